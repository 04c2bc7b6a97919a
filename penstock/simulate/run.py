"""One simulated run: a load, a graph, a policy and a seed go in, a report comes out.

The prompts' tokens are made up so that they have in common what the load says; the workers' steps take the
time of a cost model; requests are placed by the router's own code. Equal scenarios give equal reports.
"""

from __future__ import annotations

import gc
import time
from functools import partial
from pathlib import Path
from random import Random

import msgspec

from penstock.bench.measurements import RequestOutcome, Slo
from penstock.bench.traces import read_trace
from penstock.core.decision_record import DecisionRecord
from penstock.core.settings import RouterSettings
from penstock.engines.cost_models import cost_model
from penstock.engines.settings import SchedulerSettings
from penstock.engines.sim import SimSettings, load_sim
from penstock.errors import ConfigError
from penstock.ports import EngineStep
from penstock.shapes import Card, Delta, Incarnation, Request, Role, Sampling
from penstock.simulate.answers import OwnTokens
from penstock.simulate.arrivals import RateRange, begin
from penstock.simulate.engine import SimulatedEngine
from penstock.simulate.events import EventQueue
from penstock.simulate.generators import GENERATORS
from penstock.simulate.report import Results, SimulationReport
from penstock.simulate.router import Client, SimulatedRouter
from penstock.simulate.transfer import SimulatedTransfer
from penstock.simulate.workload import ClientSession, Workload, from_trace, tokens_of
from penstock.transfer.sim import SimTransferSettings

GC_ALLOCATIONS = 200_000
"""Net allocations between two looks for cycles among young objects: a simulation makes few cycles, and
Python's 700 cost a tenth of its time."""

VOCABULARY = 1 << 32
OWN_TOKENS = 1 << 31
"""Token ids from here on are outputs', one for each request."""

REFUSED_PAUSE_S = 1.0
"""After which a user whose request was refused begins the next session: Retry-After is a second or more."""


class SimulatedGraph(msgspec.Struct, frozen=True):
    """The workers that are simulated."""

    aggregated: int = 8
    prefill: int = 0
    decode: int = 0
    cost_model: str = "qwen3-32b/h200/tp2"  # of every worker
    cache_tokens: int = 700_000  # KV pool of each worker
    block_size: int = 64
    max_model_len: int = 262_144
    scheduler: SchedulerSettings = SchedulerSettings(max_batch_tokens=8192)
    kv_bytes_per_token: int = 256 * 1024
    gigabytes_per_s: float = 20.0  # that one holder sends

    def check(self) -> None:
        """Raises ConfigError where no request could be served."""
        cost_model(self.cost_model)
        if not self.aggregated + self.decode:
            raise ConfigError("workers: no worker decodes; give --workers, or --prefill and --decode")

    @property
    def roles(self) -> list[Role]:
        """One for each worker."""
        return (
            [Role.AGGREGATED] * self.aggregated
            + [Role.PREFILL] * self.prefill
            + [Role.DECODE] * self.decode
        )


class WorkloadSettings(msgspec.Struct, frozen=True):
    """Which load is sent: a trace, or one of GENERATORS."""

    trace: Path | None = None
    generator: str = ""
    rate: RateRange | None = None  # of an open load that is generated
    pattern: str = "poisson"
    users: int | None = None  # of a closed load
    duration_s: float = 600.0
    """For how long requests are sent; those sent by then are served to their end."""
    requests: int = 0  # of a trace: the first so many; 0: all
    lengths: dict[str, int] = {}  # arguments of the generator

    def load(self, scale: float, seed: int) -> Workload:
        """The sessions, with `scale` times the rate or users. Raises ConfigError for a trace that cannot be
        read."""
        if self.trace is not None:
            rows = read_trace(self.trace, speedup=scale, seed=seed)
            return Workload(from_trace(rows[: self.requests or None]))
        sessions = GENERATORS[self.generator](seed, **self.lengths)
        if self.users is not None:
            return Workload(sessions, max(1, round(scale * self.users)), self.duration_s)
        assert self.rate is not None, "a load that is generated has a rate or users"
        rate = RateRange(scale * self.rate.first_per_s, scale * self.rate.last_per_s)
        return Workload(begin(sessions, rate, self.pattern, self.duration_s, seed), None, self.duration_s)


class Scenario(msgspec.Struct, frozen=True):
    """All that a run depends on."""

    load: WorkloadSettings
    graph: SimulatedGraph
    router: RouterSettings
    slo: Slo
    scale: float
    seed: int

    def run(self) -> SimulationReport:
        """Simulate it."""
        usual = gc.get_threshold()
        gc.set_threshold(GC_ALLOCATIONS)
        try:
            return Simulation(self).run()
        finally:
            gc.set_threshold(*usual)


class Simulation:
    """One run, which is over when every request that it sent has ended."""

    def __init__(self, scenario: Scenario) -> None:
        load = scenario.load.load(scenario.scale, scenario.seed)
        self._scenario = scenario
        self._events = EventQueue()
        self._results = Results(scenario.slo)
        self._sessions = iter(load.sessions)
        self._users = load.users
        self._sends_until = load.until_s
        self._begun = 0  # sessions
        self._open = 0  # of those, not ended
        self._more = True  # sessions may follow
        self._requests = 0  # so far
        self._router = SimulatedRouter(self._events, scenario.router, Random(f"{scenario.seed}/router"))
        self._tokens = OwnTokens()
        self._engines = self._start(scenario.graph)
        self._model = self._router.model()

    def _start(self, graph: SimulatedGraph) -> list[SimulatedEngine]:
        costs = cost_model(graph.cost_model)
        settings = SimSettings(
            cost_model=graph.cost_model,
            vocab_size=VOCABULARY,
            block_size=graph.block_size,
            total_blocks=graph.cache_tokens // graph.block_size,
            max_model_len=graph.max_model_len,
            scheduler=graph.scheduler,
        )
        network = SimTransferSettings(graph.kv_bytes_per_token * graph.block_size, graph.gigabytes_per_s)
        holders: dict[str, SimulatedTransfer] = {}
        disaggregated = bool(graph.prefill)
        workers = {}
        for number, role in enumerate(graph.roles):
            name = f"{role.value}-{number}"
            incarnation = Incarnation(name, number + 1)
            model = load_sim(settings, None)
            transfer = SimulatedTransfer(network, self._events, name, holders) if disaggregated else None
            engine = SimulatedEngine(
                self._events,
                model,
                self._tokens,
                costs,
                msgspec.structs.replace(graph.scheduler, holder=incarnation),
                transfer,
                partial(self._on_step, name),
            )
            workers[name] = Card(incarnation, role, engine.scheduler.card), engine
        self._router.add_workers(workers)
        return [engine for _, engine in workers.values()]

    def _on_step(self, name: str, step: EngineStep, ended_at: float) -> None:
        self._router.reported(name, step, ended_at)

    def run(self) -> SimulationReport:
        """Until it is over."""
        began = time.process_time()
        for _ in range(self._users or 1):
            self._next_session()
        while (self._more or self._open) and self._events.run_next():
            pass
        virtual_s = self._events.now()
        computing_s = sum(engine.computing_s for engine in self._engines)
        return self._results.report(
            policy=self._scenario.router.policy,
            scale=self._scenario.scale,
            seed=self._scenario.seed,
            virtual_s=virtual_s,
            cpu_s=time.process_time() - began,
            computing_share=computing_s / len(self._engines) / virtual_s,
        )

    @property
    def decisions(self) -> DecisionRecord:
        """What was decided for the latest requests."""
        return self._router.dispatcher.decisions

    def _next_session(self) -> None:
        session = next(self._sessions, None) if self._events.now() < self._sends_until else None
        if session is None:
            self._more = False
            return
        if self._users is None:
            self._events.at(session.at_s, partial(self._begin, session))
        else:
            self._begin(session)

    def _begin(self, session: ClientSession) -> None:
        self._open += 1
        self._begun += 1
        name = session.name or (str(self._begun) if len(session.turns) > 1 else "")
        if self._users is None:
            self._next_session()
        self._turn(session, name, 0, [])

    def _end(self, failed: bool) -> None:
        self._open -= 1
        if self._users is not None and failed:
            self._events.after(REFUSED_PAUSE_S, self._next_session)
        elif self._users is not None:
            self._next_session()

    def _turn(self, session: ClientSession, name: str, number: int, said: list[int]) -> None:
        turn = session.turns[number]
        self._requests += 1
        seed = OWN_TOKENS + self._requests
        kept = said if turn.kept_tokens is None else said[: turn.kept_tokens]
        token_ids = kept + tokens_of(turn.new)
        request = Request(
            request_id=f"r{self._requests}",
            model=self._model,
            token_ids=token_ids,
            sampling=Sampling(max_tokens=turn.output_tokens, seed=seed, ignore_eos=True),
            session=name,
        )
        if turn.answer:
            self._tokens.answers[seed] = tokens_of(turn.answer)
        began = self._events.now()
        outcome = RequestOutcome(prompt_tokens=len(token_ids))

        def on_delta(delta: Delta) -> None:
            now = self._events.now()
            if not outcome.output_tokens:
                outcome.ttft_s = now - began
                outcome.cached_tokens = delta.cached_tokens
            outcome.output_tokens += len(delta.token_ids)
            if delta.finish_reason is not None:
                outcome.e2e_s = now - began
                outcome.itl_s = (outcome.e2e_s - outcome.ttft_s) / max(1, outcome.output_tokens - 1)
                ended()

        def on_error(error: str) -> None:
            outcome.error = error
            ended()

        def ended() -> None:
            self._results.add(outcome)
            answer = self._tokens.answers.pop(seed, [seed] * outcome.output_tokens)
            over = number + 1 == len(session.turns) or self._events.now() >= self._sends_until
            if outcome.error is not None or over:
                self._end(failed=outcome.error is not None)
                return
            following = session.turns[number + 1]
            said = token_ids + answer
            self._events.after(following.think_s, partial(self._turn, session, name, number + 1, said))

        self._router.submit(request, Client(on_delta, on_error))
