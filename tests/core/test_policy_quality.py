"""The policies at work: conversations on eight simulated workers, in virtual time.

A worker computes one step at a time, with the times of `RATES`; its cache has room for a third of all
conversations. Everything that decides is the real code: index, load book and policy.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from random import Random
from statistics import mean

from penstock.core.hashing import sequence_hashes
from penstock.core.policy import Candidate, Query, choose
from penstock.core.prefix_index import PrefixIndex
from penstock.core.worker_load import WorkerLoad
from penstock.shapes import Load, Rates, Role

BLOCK = 64
CAPACITY_BLOCKS = 700
STEP_TOKENS = 2048
RATES = Rates(step_ms=10.0, prefill_token_ms=0.1, decode_request_ms=0.3)
USERS = 120
TURNS = 4
OUTPUT_TOKENS = 60
THINK_MS = 1_500.0


@dataclass(eq=False)
class Turn:
    user: int
    number: int
    tokens: list[int]
    arrived_ms: float
    hashes: list[int] = field(default_factory=list)
    uncached: int | None = None  # still to compute; None until the worker looked into its cache


class SimulatedWorker:
    def __init__(self, name: str) -> None:
        self.name = name
        self.cache: OrderedDict[int, None] = OrderedDict()
        self.queue: deque[Turn] = deque()
        self.decoding: dict[Turn, int] = {}  # output tokens left
        self.seen = 0
        self.busy = False

    def load(self) -> Load:
        tokens = sum(len(turn.tokens) if turn.uncached is None else turn.uncached for turn in self.queue)
        return Load(running=len(self.decoding), waiting=len(self.queue), prefill_tokens=tokens, rates=RATES)

    def begin_step(self, report: Report) -> tuple[float, list[Turn]]:
        """Compute up to STEP_TOKENS of prompts beside the decoding; (its time in ms, prompts ready)."""
        left, ready = STEP_TOKENS, []
        while self.queue and left:
            turn = self.queue[0]
            if turn.uncached is None:
                hits = next((n for n, key in enumerate(turn.hashes) if key not in self.cache), None)
                cached = (len(turn.hashes) if hits is None else hits) * BLOCK
                turn.uncached = max(1, len(turn.tokens) - cached)
                report.prompt_tokens += len(turn.tokens)
                report.cached_tokens += len(turn.tokens) - turn.uncached
            count = min(left, turn.uncached)
            turn.uncached -= count
            left -= count
            if not turn.uncached:
                ready.append(self.queue.popleft())
        computed = STEP_TOKENS - left
        rates = RATES
        step_ms = rates.step_ms + rates.prefill_token_ms * computed
        return step_ms + rates.decode_request_ms * len(self.decoding), ready

    def store(self, hashes: list[int]) -> tuple[list[int], list[int]]:
        """Cache these blocks; (stored, removed)."""
        stored = [key for key in hashes if key not in self.cache]
        for key in hashes:
            self.cache[key] = None
            self.cache.move_to_end(key)
        removed = [self.cache.popitem(last=False)[0] for _ in range(len(self.cache) - CAPACITY_BLOCKS)]
        return stored, removed


@dataclass
class Report:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    ttft_ms: list[float] = field(default_factory=list)

    @property
    def hit_share(self) -> float:
        return self.cached_tokens / self.prompt_tokens


class Simulation:
    def __init__(self, policy: str, seed: int) -> None:
        self.policy = policy
        self.rng = Random(seed)
        self.workers = {f"w{number}": SimulatedWorker(f"w{number}") for number in range(8)}
        self.index = PrefixIndex()
        for name in self.workers:
            self.index.add_worker(name)
        self.loads = {name: WorkerLoad() for name in self.workers}
        self.report = Report()
        self.sent = dict.fromkeys(self.workers, 0)
        self.order = itertools.count()
        self.events: list[tuple[float, int, Turn | tuple[SimulatedWorker, list[Turn]]]] = []

    def run(self) -> Report:
        workload = Random(1)  # the same for all policies
        system = [workload.randrange(50_000) for _ in range(256)]
        for user in range(USERS):
            tokens = system + [workload.randrange(50_000) for _ in range(workload.randint(300, 1500))]
            self.at(workload.uniform(0, 4_000), Turn(user, 0, tokens, 0.0))
        while self.events:
            now, _, what = heapq.heappop(self.events)
            if isinstance(what, Turn):
                self.arrive(what, now)
            else:
                self.finish_step(*what, now)
        return self.report

    def at(self, when_ms: float, what: Turn | tuple[SimulatedWorker, list[Turn]]) -> None:
        heapq.heappush(self.events, (when_ms, next(self.order), what))

    def arrive(self, turn: Turn, now: float) -> None:
        turn.arrived_ms = now
        turn.hashes = sequence_hashes(turn.tokens, BLOCK, root=7)
        overlaps = self.index.overlaps(turn.hashes)
        pool = [
            Candidate(name, Role.AGGREGATED, self.loads[name].assumed(), BLOCK, overlaps.get(name, 0))
            for name in self.workers
        ]
        query = Query(len(turn.tokens), sum(self.sent.values()), OUTPUT_TOKENS)
        decision = choose(query, pool, policy=self.policy, rng=self.rng)
        assert decision is not None
        worker = self.workers[decision.decode]
        self.sent[worker.name] += 1
        uncached = len(turn.tokens) - overlaps.get(worker.name, 0) * BLOCK
        self.loads[worker.name].send(self.sent[worker.name], uncached, len(turn.tokens), 0.0, now / 1e3)
        worker.queue.append(turn)
        worker.seen += 1
        if not worker.busy:
            self.step(worker, now)

    def step(self, worker: SimulatedWorker, now: float) -> None:
        worker.busy = bool(worker.queue or worker.decoding)
        if worker.busy:
            step_ms, ready = worker.begin_step(self.report)
            self.at(now + step_ms, (worker, ready))

    def finish_step(self, worker: SimulatedWorker, ready: list[Turn], now: float) -> None:
        for turn in list(worker.decoding):
            worker.decoding[turn] -= 1
            if not worker.decoding[turn]:
                del worker.decoding[turn]
                self.next_turn(turn, now)
        for turn in ready:
            self.report.ttft_ms.append(now - turn.arrived_ms)
            worker.decoding[turn] = OUTPUT_TOKENS
            stored, removed = worker.store(turn.hashes)
            self.index.removed(worker.name, removed)
            self.index.stored(worker.name, stored)
        self.loads[worker.name].report(worker.seen, worker.load(), now / 1e3)
        self.step(worker, now)

    def next_turn(self, turn: Turn, now: float) -> None:
        if turn.number + 1 < TURNS:
            rng = Random(turn.user * TURNS + turn.number)
            added = [rng.randrange(50_000) for _ in range(OUTPUT_TOKENS + rng.randint(50, 300))]
            following = Turn(turn.user, turn.number + 1, turn.tokens + added, 0.0)
            self.at(now + rng.expovariate(1 / THINK_MS), following)


def test_kv_beats_the_others_on_conversations() -> None:
    reports = {
        policy: Simulation(policy, seed=0).run()
        for policy in ("kv", "round-robin", "random", "least-loaded", "power-of-two")
    }
    assert all(len(report.ttft_ms) == USERS * TURNS for report in reports.values())
    kv = reports.pop("kv")
    for policy, report in reports.items():
        assert kv.hit_share > report.hit_share + 0.25, (policy, kv.hit_share, report.hit_share)
        assert mean(kv.ttft_ms) < 0.7 * mean(report.ttft_ms), (
            policy,
            mean(kv.ttft_ms),
            mean(report.ttft_ms),
        )


def test_a_shared_prefix_does_not_pile_everybody_onto_one_worker() -> None:
    """All prompts begin with the same system prompt, first cached on one worker."""
    simulation = Simulation("kv", seed=0)
    simulation.run()
    assert min(simulation.sent.values()) > 0.4 * mean(simulation.sent.values())
