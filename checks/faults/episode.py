"""One fault at one phase: a burst of requests into a healthy graph, the fault, and what came of it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from checks.faults.clients import Client, Question, sim_question
from checks.faults.faults import Fault
from checks.faults.processes import Graph
from tests.proxy import Weather

_PHASE_S = 40.0  # to bring the burst into its phase
_RECOVERY_S = 90.0


class Row(msgspec.Struct):
    """What came of one fault at one phase. Times are seconds."""

    fault: str
    phase: str
    engine: str
    requests: int = 0
    in_flight: int = 0  # of them, when the fault happened
    ok: int = 0
    migrated: int = 0  # attempts that went on elsewhere, by the frontends' own count
    cut: int = 0  # connections that ended with their frontend; the client asked another one
    refused: int = 0  # frontends that were not there or leaving; the client asked another one
    wrong: int = 0
    lost: int = 0
    hung: int = 0
    errors: dict[str, int] = {}  # by status and code
    worst_stall_s: float = 0.0
    longest_s: float = 0.0
    recovery_s: float = 0.0
    notes: list[str] = []  # what is wrong, in words

    @property
    def passed(self) -> bool:
        return not (self.wrong or self.lost or self.hung or self.notes)


@dataclass(frozen=True)
class Phase:
    """A burst that is in this phase for a while."""

    requests: int
    prompt_chars: int
    max_tokens: int
    reached: Callable[[list[Client], dict[str, float]], object]  # a truth
    stalled_transfers: bool = False


def _load(loads: dict[str, float], *names: str) -> float:
    return sum(loads.get(name, 0) for name in names)


def _unanswered(clients: list[Client]) -> int:
    return sum(not (client.answering or client.done) for client in clients)


SIM_PHASES = {
    "queued": Phase(
        14, 2000, 24, lambda clients, load: _load(load, "prefill.running") and _unanswered(clients) >= 10
    ),
    "prefill": Phase(8, 6000, 40, lambda clients, load: _load(load, "prefill.running") >= 2),
    "transfer": Phase(
        24, 600, 60, lambda clients, load: _load(load, "held_handoffs") >= 8, stalled_transfers=True
    ),
    "decode": Phase(
        48, 200, 160, lambda clients, load: sum(client.outcome.pieces > 4 for client in clients) >= 36
    ),
}
"""With the sim engine, whose long prompts take seconds."""

REFERENCE_PHASES = {
    "decode": Phase(24, 0, 0, lambda clients, load: sum(client.answering for client in clients) >= 6),
}
"""The tiny model is through with a prompt before anything can happen to it."""


@dataclass
class Lab:
    """A graph and what is asked of it."""

    graph: Graph
    engine: str
    questions: list[Question] = field(default_factory=list)  # with the reference engine
    asked: int = 0

    def _client(self, phase: Phase) -> Client:
        self.asked += 1
        if self.questions:
            question = self.questions[self.asked % len(self.questions)]
        else:
            question = sim_question(self.asked, phase.prompt_chars, phase.max_tokens)
        return Client(question, self.graph.urls, self.asked)

    async def _ask_on(
        self, client: Client, phase: Phase, clients: list[Client], over: asyncio.Event
    ) -> None:
        """One user, who asks the next question after each answer for as long as the fault lasts."""
        await client.run()
        while not over.is_set():
            client = self._client(phase)
            clients.append(client)
            await client.run()

    async def loads(self) -> dict[str, float]:
        """The workers' load as the first frontend that answers sees it: by role and summed."""
        found: Counter[str] = Counter()
        for one in (await self.graph.first_health())["instances"]:
            for name in ("running", "waiting", "held_handoffs"):
                found[f"{one['role']}.{name}"] += one["load"][name]
                found[name] += one["load"][name]
        return dict(found)

    async def episode(self, fault: Fault, phase_name: str) -> Row:
        phases = REFERENCE_PHASES if self.questions else SIM_PHASES
        phase = phases[phase_name]
        row = Row(fault.name, phase_name, self.engine)
        retries = await self.graph.metric("penstock_retries_total")
        if phase.stalled_transfers:
            self.graph.weather(self.graph.role("prefill"), Weather(hold_down=True), transfer=True)
        clients = [self._client(phase) for _ in range(phase.requests)]
        over = asyncio.Event()
        slots = [asyncio.create_task(self._ask_on(client, phase, clients, over)) for client in clients]
        await self._until(phase, clients, row)
        row.in_flight = sum(not client.done for client in clients)
        hurting = asyncio.create_task(self._hurt(fault, row))
        if phase.stalled_transfers:
            await asyncio.sleep(1.0)
            self.graph.weather(self.graph.role("prefill"), Weather(), transfer=True)
        await hurting
        over.set()
        await asyncio.gather(*slots)
        self._count(row, fault, clients)
        await self._idle(row)
        after = await self.graph.metric("penstock_retries_total")
        row.migrated = int(sum(max(0.0, count - retries.get(name, 0)) for name, count in after.items()))
        return row

    async def _until(self, phase: Phase, clients: list[Client], row: Row) -> None:
        deadline = time.monotonic() + _PHASE_S
        while not phase.reached(clients, await self.loads()):
            if time.monotonic() > deadline:
                row.notes.append("the burst was not in this phase")
                return
            await asyncio.sleep(0.02)

    async def _hurt(self, fault: Fault, row: Row) -> None:
        """Let it happen, and wait until all is as before."""
        began = time.monotonic()
        try:
            await fault.happen(self.graph)
            await self.graph.ready(_RECOVERY_S)
        except (TimeoutError, AssertionError) as error:
            row.notes.append(f"{type(error).__name__}: {error}")
        row.recovery_s = max(0.0, time.monotonic() - began - fault.lasts_s)

    def _count(self, row: Row, fault: Fault, clients: list[Client]) -> None:
        errors: Counter[str] = Counter()
        row.requests = len(clients)
        for client in clients:
            outcome = client.outcome
            row.cut += outcome.cuts
            row.refused += outcome.refusals
            row.longest_s = max(row.longest_s, outcome.took_s)
            row.worst_stall_s = max(row.worst_stall_s, outcome.worst_gap_s)
            if outcome.kind == "ok":
                row.ok += 1
            elif outcome.kind in ("wrong", "hung"):
                setattr(row, outcome.kind, getattr(row, outcome.kind) + 1)
                row.notes.append(f"{client.question.body.get('seed')}: {outcome.detail}")
            else:
                errors[outcome.kind] += 1
                if outcome.kind not in fault.errors:
                    row.lost += 1
                    row.notes.append(outcome.detail)
        row.errors = dict(errors)
        if row.cut and not fault.ends_connections:
            row.lost += row.cut
            row.notes.append(f"{row.cut} connections were cut though no frontend ended")

    async def _idle(self, row: Row) -> None:
        """Nothing may be left over."""
        deadline = time.monotonic() + _RECOVERY_S
        while _load(loads := await self.loads(), "running", "waiting", "held_handoffs"):
            if time.monotonic() > deadline:
                row.notes.append(f"not idle after {_RECOVERY_S:g} s: {loads}")
                return
            await asyncio.sleep(0.1)
