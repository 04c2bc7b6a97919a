"""What `penstock simulate` foretells, held against real routers, links and workers with sim engines.

These run on virtual time as well (tests/virtual_cluster.py), so that nothing of the machine is in the
figures. benchmarks/simulated.py does the same with processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean

import msgspec
import pytest

from penstock.bench.measurements import RequestOutcome, Slo
from penstock.core.settings import RouterSettings
from penstock.engines.settings import SchedulerSettings
from penstock.errors import PenstockError, RequestRejected
from penstock.shapes import Delta, Request, Role, Sampling
from penstock.simulate.arrivals import RateRange
from penstock.simulate.report import Results, SimulationReport
from penstock.simulate.run import VOCABULARY, Scenario, SimulatedGraph, WorkloadSettings
from penstock.simulate.workload import ClientSession, Workload, tokens_of
from penstock.transfer.sim import SimTransferSettings
from tests.virtual_cluster import MODEL, Frontend, VirtualCluster

WORKERS = 4
COST_MODEL = "qwen3-32b/h200/tp2"
SLO = Slo(1000.0, 25.0)
ROLES = [Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE]
GIGABYTES_PER_S = SimTransferSettings().gigabytes_per_s


class Case(msgspec.Struct, frozen=True):
    """A load, and who serves it."""

    load: WorkloadSettings
    seeds: Sequence[int] = (
        0,
        1,
        2,
    )  # one small difference leads to others, so each run has luck of its own
    disaggregated: bool = False


CHAT = WorkloadSettings(
    generator="chat", users=60, duration_s=40.0, lengths={"prompt_tokens": 600, "output_tokens": 100}
)
CASES = {
    "chat": Case(CHAT),
    "chat, disaggregated": Case(CHAT, disaggregated=True),
    "shared prefixes": Case(
        WorkloadSettings(
            generator="shared-prefix",
            rate=RateRange(4.0, 4.0),
            duration_s=40.0,
            lengths={"output_tokens": 100},
        )
    ),
    "beyond saturation": Case(
        WorkloadSettings(
            generator="prompts",
            rate=RateRange(20.0, 20.0),
            duration_s=20.0,
            lengths={"prompt_tokens": 4000, "output_tokens": 60},
        ),
        seeds=(0,),
    ),
}


class Clients:
    """Plays the sessions of a load at a router of the cluster, as penstock/simulate/run.py does."""

    def __init__(self, cluster: VirtualCluster, frontend: Frontend, load: Workload) -> None:
        self.results = Results(SLO)
        self._loop = cluster.loop
        self._router = frontend.router
        self._load = load
        self._began = self._loop.time()
        self._asked = 0

    def now_s(self) -> float:
        return self._loop.time() - self._began

    async def play(self) -> None:
        sessions = iter(self._load.sessions)
        async with asyncio.TaskGroup() as tasks:
            if self._load.users is not None:
                for _ in range(self._load.users):
                    tasks.create_task(self._user(sessions))
                return
            for session in sessions:
                await asyncio.sleep(session.at_s - self.now_s())
                tasks.create_task(self._session(session))

    async def _user(self, sessions: Iterator[ClientSession]) -> None:
        while self.now_s() < self._load.until_s:
            await self._session(next(sessions))

    async def _session(self, session: ClientSession) -> None:
        said: list[int] = []
        for number, turn in enumerate(session.turns):
            if number:
                if self.now_s() >= self._load.until_s:
                    return
                await asyncio.sleep(turn.think_s)
            said = said + tokens_of(turn.new)
            answer = await self._ask(said, turn.output_tokens)
            if answer is None:
                return
            said += answer

    async def _ask(self, prompt: list[int], output_tokens: int) -> list[int] | None:
        self._asked += 1
        request = Request(
            f"r{self._asked}",
            self._router.model(MODEL).key,
            list(prompt),
            Sampling(max_tokens=output_tokens),
        )
        outcome, began = RequestOutcome(prompt_tokens=len(prompt)), self._loop.time()
        answer: list[int] = []
        ended = self._loop.create_future()

        def on_delta(delta: Delta) -> None:
            if not answer:
                outcome.ttft_s = self._loop.time() - began
                outcome.cached_tokens = delta.cached_tokens
            answer.extend(delta.token_ids)
            if delta.finish_reason is not None:
                ended.set_result(None)

        def on_error(error: PenstockError) -> None:
            ended.set_result(str(error))

        try:
            self._router.submit(request, on_delta, on_error)
            outcome.error = await ended
        except RequestRejected:
            outcome.error = "refused"
        outcome.e2e_s = self._loop.time() - began
        outcome.output_tokens = len(answer)
        outcome.itl_s = (outcome.e2e_s - outcome.ttft_s) / max(1, len(answer) - 1)
        self.results.add(outcome)
        return answer if outcome.error is None else None


def measured(case: Case, seed: int) -> SimulationReport:
    """On routers, links and workers."""
    roles = ROLES if case.disaggregated else WORKERS
    cluster = VirtualCluster(roles, cost_model=COST_MODEL, vocab_size=VOCABULARY)
    frontend = cluster.frontend(slo_itl_ms=0.0)  # with an objective, small differences lead to large ones
    found: list[SimulationReport] = []

    async def story() -> None:
        clients = Clients(cluster, frontend, case.load.load(1.0, seed))
        await clients.play()
        found.append(
            clients.results.report(
                policy="kv", scale=1.0, seed=seed, virtual_s=clients.now_s(), cpu_s=0.0, computing_share=0.0
            )
        )

    cluster.run(story)
    return found[0]


def foretold(case: Case, seed: int) -> SimulationReport:
    """By `penstock simulate`."""
    graph = SimulatedGraph(
        aggregated=0 if case.disaggregated else WORKERS,
        prefill=ROLES.count(Role.PREFILL) if case.disaggregated else 0,
        decode=ROLES.count(Role.DECODE) if case.disaggregated else 0,
        cost_model=COST_MODEL,
        cache_tokens=16_384 * 16,
        block_size=16,
        max_model_len=32_768,
        scheduler=SchedulerSettings(),
        gigabytes_per_s=GIGABYTES_PER_S,
    )
    return Scenario(case.load, graph, RouterSettings(slo_itl_ms=0.0), SLO, 1.0, seed).run()


@pytest.mark.parametrize("name", CASES)
def test_a_simulation_foretells_what_routers_and_workers_do(name: str) -> None:
    case = CASES[name]
    real = [measured(case, seed) for seed in case.seeds]
    simulated = [foretold(case, seed) for seed in case.seeds]

    def means(of: Callable[[SimulationReport], float | None]) -> tuple[float, float]:
        return fmean(of(it) or 0.0 for it in simulated), fmean(of(it) or 0.0 for it in real)

    for of, tolerance in (
        (lambda it: it.ttft_ms.mean, 0.05),
        (lambda it: it.itl_ms.mean, 0.05),
        (lambda it: it.e2e_ms.mean, 0.05),
        (lambda it: it.requests, 0.01),
        (lambda it: it.output_tokens_per_s, 0.02),
    ):
        ours, theirs = means(of)
        assert ours == pytest.approx(theirs, rel=tolerance)
    for share in (lambda it: it.cached_share, lambda it: it.good_share):
        ours, theirs = means(share)
        assert ours == pytest.approx(theirs, abs=0.03)
