"""A seed made into a scenario: everything that is left to chance in advance."""

from __future__ import annotations

import random

from penstock.core.admission import AdmissionSettings
from penstock.core.deadlines import Deadlines
from penstock.core.settings import RouterSettings
from penstock.engines import byte_tokenizer
from penstock.engines.settings import SchedulerSettings
from penstock.engines.sim import SimSettings
from penstock.link.secret import LinkSecret
from penstock.link.settings import ClientSettings, ServerSettings
from penstock.shapes import Role
from penstock.transfer.sim import SimTransferSettings
from simulator.clients import SimulatedCall, draw_calls
from simulator.faults import FAULTS, GENTLE
from simulator.scenario import BLOCK_SIZES, Options, PlannedFault, Scenario

MODEL = "lab"
VOCAB_SIZE = 5000

FILES_SHARE = 0.2
"""The share of seeds whose workers have a tokenizer, which frontends fetch over the link."""

QUIET_EVERY = 20
"""One seed in so many has no fault but clients who hang up: nothing may wait for a timeout there."""

POOL_TOKENS = 256
"""What the smallest pools hold: just the longest request."""

LATE_SHARE = 0.2
LATE_S = 8.0
"""The share of calls that come after the others, and how long after at most."""

LARGE_EVERY = 50
"""One seed in so many has hundreds of workers, and little time."""

FALSE_EVENTS = ("events-off", "wrong-block-size")
FALSE_EVENTS_SHARE = 0.15
"""Faults that one of the others makes place for, in this share of the seeds: they take many requests."""

_POLICIES = ("kv", "least-loaded", "power-of-two", "random", "round-robin")


def draw_scenario(seed: int, options: Options) -> Scenario:
    """The same for the same arguments, always."""
    rng = random.Random(f"scenario {seed}")
    large = options.workers is None and seed % LARGE_EVERY == LARGE_EVERY - 1
    count = options.workers or (rng.randint(100, 300) if large else rng.randint(3, 10))
    quiet = not options.faults and seed % QUIET_EVERY == 0
    gentle = rng.random() < 0.4 or quiet
    load_s = 2.0 if large else rng.uniform(3.0, 7.0)
    kinds = list(options.faults) or [it for it in (GENTLE if gentle else FAULTS) if it not in FALSE_EVENTS]
    gentle = gentle and set(kinds) <= set(GENTLE)
    most = 2 if gentle else 8  # a request on three workers that die is taken for the cause
    faults = [
        PlannedFault(rng.choice(kinds), rng.uniform(0.5, load_s), rng.randrange(1 << 30))
        for _ in range(rng.randint(1, most))
    ]
    if quiet:
        faults = [PlannedFault("hang-ups", load_s * part / 8, seed + part) for part in range(1, 9)]
    apart = random.Random(f"false events {seed}")
    if not (quiet or large or options.faults) and apart.random() < FALSE_EVENTS_SHARE:
        faults[-1] = PlannedFault(apart.choice(FALSE_EVENTS), faults[-1].at, faults[-1].seed)
    files = rng.random() < FILES_SHARE
    asked = rng.randint(100, 200) if large else rng.randint(20, 60)
    calls = draw_calls(rng, asked, load_s, byte_tokenizer.VOCAB_SIZE if files else VOCAB_SIZE)
    if not (quiet or large):
        calls = _with_late_ones(rng, calls)
    deadlines = _deadlines(rng, gentle)
    secret = LinkSecret("a secret of the lab")
    return Scenario(
        seed=seed,
        gentle=gentle,
        quiet=quiet,
        roles=_roles(rng, count),
        frontends=options.frontends or rng.randint(1, 2 if large else 3),
        load_s=load_s,
        calls=calls,
        faults=sorted(faults, key=lambda fault: fault.at),
        router=RouterSettings(
            policy="kv" if rng.random() < 0.7 else rng.choice(_POLICIES),
            disagg=rng.choice(("auto", "auto", "always", "never")),
            deadlines=deadlines,
            admission=_admission(rng, gentle),
        ),
        client=ClientSettings(secret=secret),
        server=ServerSettings(secret=secret, snapshot_part_blocks=rng.choice((4, 64, 16_384))),
        sim=_sim(rng, files),
        transfer=SimTransferSettings(setup_ms=rng.choice((0.5, 2.0, 50.0))),
        max_waiting=256 if gentle else rng.choice((4, 32, 256)),
        max_wait_ms=600_000.0 if gentle else rng.choice((50.0, 1000.0, 10_000.0)),
        drain_s=rng.choice((2.0, 10.0, 30.0)),
        latency_s=rng.choice(((0.0001, 0.0005), (0.0005, 0.02), (0.001, 0.1))),
        callback_s=0.0 if large else rng.choice((0.0, 0.00002, 0.0002)),
        deadlines=deadlines,
    )


def _with_late_ones(rng: random.Random, calls: list[SimulatedCall]) -> list[SimulatedCall]:
    """Some of the calls come later than the others, while the longest faults last."""
    for call in calls:
        if rng.random() < LATE_SHARE:
            call.at += rng.uniform(0.0, LATE_S)
    return sorted(calls, key=lambda call: call.at)


def _roles(rng: random.Random, count: int) -> dict[str, Role]:
    """At least one that decodes. The first stays well in gentle scenarios."""
    if rng.random() < 0.3:
        kinds = [Role.AGGREGATED]
    elif rng.random() < 0.2:
        kinds = [Role.AGGREGATED, Role.PREFILL, Role.DECODE]
    else:
        kinds = [Role.DECODE, Role.PREFILL]
    return {f"w{i}": kinds[i % len(kinds)] for i in range(count)}


def _admission(rng: random.Random, gentle: bool) -> AdmissionSettings:
    if gentle:
        return AdmissionSettings(max_wait_ms=600_000.0)
    return AdmissionSettings(
        max_wait_ms=rng.choice((200.0, 2000.0, 10_000.0)),
        dispatch_wait_ms=rng.choice((5.0, 250.0)),
        max_queued=rng.choice((4, 2048)),
    )


def _deadlines(rng: random.Random, gentle: bool) -> Deadlines:
    if gentle:
        return Deadlines(
            queue_s=60.0, prefill_s=30.0, transfer_s=30.0, first_token_s=30.0, stall_s=30.0, request_s=300.0
        )
    scale = rng.choice((0.3, 1.0, 3.0))
    return Deadlines(
        queue_s=10.0 * scale,
        prefill_s=10.0 * scale,
        transfer_s=10.0 * scale,
        first_token_s=10.0 * scale,
        stall_s=6.0 * scale,
        request_s=rng.choice((10.0, 60.0)) * scale,
    )


def _sim(rng: random.Random, files: bool) -> SimSettings:
    """Small pools, so that blocks are evicted and attempts preempted."""
    block_size = rng.choice(BLOCK_SIZES)
    return SimSettings(
        model=MODEL,
        block_size=block_size,
        total_blocks=rng.choice((POOL_TOKENS, 2 * POOL_TOKENS, 16 * POOL_TOKENS)) // block_size,
        max_model_len=400,
        vocab_size=None if files else VOCAB_SIZE,
        eos_token_ids=(0,),
        eos_rate=rng.choice((0.0, 0.02, 0.1)),
        speedup=rng.choice((0.2, 0.5, 1.0)),
        scheduler=SchedulerSettings(
            max_running=rng.choice((4, 16, 64)),
            max_batch_tokens=rng.choice((64, 256, 2048)),
            handoff_ttl_s=rng.choice((2.0, 10.0, 30.0)),
            pull_timeout_s=rng.choice((1.0, 5.0)),
        ),
    )
