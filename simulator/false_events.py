"""Workers whose cache events are not true, and that frontends name them.

A worker is replaced by one that tells nothing of its cache, or tells it in blocks of another size than its
card says, and a frontend gets requests until it has answers enough of it. Then the frontend must have named
what is wrong. All requests are served meanwhile, as by any other worker.
"""

from __future__ import annotations

import asyncio
import random

from penstock.core.overlap_check import Cause
from penstock.shapes import Sampling
from simulator.clients import SimulatedCall, draw_tokens
from simulator.injector import Injector
from simulator.processes import SimulatedFrontend, SimulatedWorker
from simulator.world import World

ANSWERS = 32
"""Of a worker, after which the frontend must have named it: about ten are said to do, and some of them were
on their way together, so that the first of them were looked at late."""

ROOMY_TOKENS = 2000
"""What a pool holds that keeps a prompt until it is looked at. From smaller ones its beginning may be gone
by then, and with it what tells the size of its blocks. That those of the right size are missing is left."""

CALLS_EACH = 24
MOST_CALLS = 150
"""Calls for each worker there is, so that the false one gets enough of them; and at most."""

PROMPT_TOKENS = (48, 80)
"""Three blocks and more of any size, in common with no other prompt."""

PAUSE_S = 0.15
ENDED_S = 60.0
"""Between two calls, on average; for how long their ends are waited for."""


async def tell_false_events(
    injector: Injector, rng: random.Random, worker: SimulatedWorker, cause: Cause
) -> None:
    """Replace the worker for a while by one whose events are false."""
    world = injector.world
    false = await _replaced(world, worker, cause)
    if false is None:
        return
    while not (false.serving or false.exited):
        await asyncio.sleep(0.1)
    frontend = injector.frontend(rng)
    if frontend is not None:
        await _must_name(world, rng, frontend, false, cause)
    await _replaced(world, false, None)


async def _replaced(world: World, worker: SimulatedWorker, cause: Cause | None) -> SimulatedWorker | None:
    """The next incarnation, once this one has left; None where somebody else was faster."""
    if worker.serving:
        worker.leave()
    while not worker.exited:
        await asyncio.sleep(0.1)
    if world.workers[worker.instance_id] is not worker or world.closing:
        return None
    return world.start_worker(worker.instance_id, worker.role, false_events=cause)


async def _must_name(
    world: World, rng: random.Random, frontend: SimulatedFrontend, worker: SimulatedWorker, cause: Cause
) -> None:
    name, router = worker.instance_id, frontend.router
    while name not in router.placement.loads:
        await asyncio.sleep(0.1)
        if worker.exited or frontend.exited:
            return
    link = router.placement.loads[name]  # another one with each link
    vocab_size = world.scenario.vocab_size
    asked = []
    for _ in range(min(MOST_CALLS, CALLS_EACH * len(world.live_workers()))):
        prompt = draw_tokens(rng, rng.randint(*PROMPT_TOKENS), vocab_size)
        sampling = Sampling(max_tokens=rng.choice((4, 8, 16)), seed=rng.randrange(1 << 40))
        asked += world.ask(frontend, SimulatedCall(0.0, 0, prompt, [sampling]))
        await asyncio.sleep(rng.expovariate(1 / PAUSE_S))
        if worker.exited or frontend.exited:
            return
    until = world.loop.time() + ENDED_S
    while not all(it.ended for it in asked):
        if world.loop.time() > until:
            return
        await asyncio.sleep(0.1)
    if worker.exited or frontend.exited or router.placement.loads.get(name) is not link:
        return
    answers = sum(_answered(frontend, it.request.request_id, name) for it in asked)
    found = router.placement.overlap_check.causes.get(name)
    world.journal.note("false events", name, frontend.name, answers, found)
    exact = cause is Cause.EVENTS_OFF or world.scenario.pool_tokens >= ROOMY_TOKENS
    if answers >= ANSWERS and (found is not cause if exact else found is None):
        what = f"{frontend.name} finds {found} of {name} after {answers} answers, not {cause}"
        world.journal.violate("false events are named", what)


def _answered(frontend: SimulatedFrontend, request_id: str, instance_id: str) -> bool:
    """Whether this worker gave a token of this request."""
    return any(
        attempt.instance_id == instance_id and attempt.first_output_s is not None
        for routed in frontend.router.dispatcher.decisions.find(request_id)
        for attempt in routed.attempts
    )
