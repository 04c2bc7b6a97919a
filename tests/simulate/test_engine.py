"""Steps that are taken together give what they give one by one."""

from __future__ import annotations

from functools import partial
from itertools import islice

import msgspec
import pytest

from penstock.bench.measurements import Slo
from penstock.core.settings import RouterSettings
from penstock.engines.cost_models import cost_model
from penstock.engines.settings import SchedulerSettings
from penstock.engines.sim import SimSettings, load_sim
from penstock.ports import EngineStep
from penstock.shapes import Attempt, FinishReason, Sampling
from penstock.simulate.answers import OwnTokens
from penstock.simulate.engine import SimulatedEngine
from penstock.simulate.events import EventQueue
from penstock.simulate.generators import chat
from penstock.simulate.report import SimulationReport
from penstock.simulate.run import Scenario, SimulatedGraph, WorkloadSettings
from penstock.simulate.scheduler import StridingScheduler

COSTS = cost_model("qwen3-32b/h200/tp2")


class Engine:
    """A simulated engine, with all that it said."""

    def __init__(self, total_blocks: int = 1000) -> None:
        self.events = EventQueue()
        self.steps: list[tuple[float, EngineStep]] = []
        model = load_sim(SimSettings(vocab_size=1 << 32, block_size=16, total_blocks=total_blocks), None)
        settings = SchedulerSettings(max_batch_tokens=8192)
        self.engine = SimulatedEngine(self.events, model, OwnTokens(), COSTS, settings, None, self._on_step)

    def _on_step(self, step: EngineStep, ended_at: float) -> None:
        self.steps.append((ended_at, step))

    def send(self, at_s: float, name: str, prompt_tokens: int, output_tokens: int) -> None:
        sampling = Sampling(max_tokens=output_tokens, seed=7, ignore_eos=True)
        attempt = Attempt(name, name, [len(name)] * prompt_tokens, prompt_tokens, sampling)
        self.events.at(at_s, partial(self.engine.add, attempt))

    def run(self) -> None:
        while self.events.run_next():
            pass

    def ended(self) -> dict[str, float]:
        """When each attempt did, by name."""
        return {
            output.attempt_id: at_s
            for at_s, step in self.steps
            for output in step.outputs
            if output.finish_reason is FinishReason.LENGTH
        }

    def tokens(self, name: str) -> int:
        return sum(
            len(it.token_ids) for _, step in self.steps for it in step.outputs if it.attempt_id == name
        )


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StridingScheduler, "stride", lambda self: 1)


def _three(engine: Engine) -> Engine:
    engine.send(0.0, "a", 3000, 200)
    engine.send(1.2345, "bb", 500, 37)  # in the middle of a step
    engine.send(1.3, "ccc", 20, 400)
    engine.run()
    return engine


def test_attempts_end_when_they_would_end_step_by_step(request: pytest.FixtureRequest) -> None:
    together = _three(Engine())
    request.getfixturevalue("one_by_one")
    apart = _three(Engine())
    assert together.ended() == pytest.approx(apart.ended(), rel=1e-9)
    assert together.engine.computing_s == pytest.approx(apart.engine.computing_s)
    assert len(together.steps) < len(apart.steps) / 10
    assert [together.tokens(name) for name in ("a", "bb", "ccc")] == [200, 37, 400]
    ours, theirs = together.engine.load(), apart.engine.load()
    assert (ours.steps, ours.running, ours.used_blocks) == (theirs.steps, 0, 0)


def test_catching_up_says_what_has_ended_until_then_and_changes_nothing() -> None:
    undisturbed, engine = _three(Engine()), Engine()
    for number in range(100):
        engine.events.at(number * 0.0517, engine.engine.catch_up)
    caught_up = _three(engine)
    assert caught_up.ended() == pytest.approx(undisturbed.ended(), rel=1e-9)
    alone = Engine()
    alone.send(0.0, "a", 3000, 200)
    alone.events.at(1.0, alone.engine.catch_up)
    while alone.events.now() < 1.0 and alone.events.run_next():
        pass
    first_s = alone.steps[0][0]
    passed_ms = (1.0 - first_s) * 1e3
    assert alone.tokens("a") - 1 == pytest.approx(passed_ms / 11.0, abs=2), "11 ms or so a token"


def test_a_full_pool_is_met_step_by_step() -> None:
    """Attempts that outgrow the pool together: one gives way, and all end."""
    engine = Engine(total_blocks=40)
    for name in ("a", "bb", "ccc"):
        engine.send(0.0, name, 190, 200)
    engine.run()
    assert engine.engine.scheduler.preemptions > 0
    assert [engine.tokens(name) for name in ("a", "bb", "ccc")] == [200] * 3


def _report(policy: str) -> SimulationReport:
    settings = WorkloadSettings(
        generator="chat", users=12, duration_s=60.0, lengths={"prompt_tokens": 800, "output_tokens": 60}
    )
    graph = SimulatedGraph(aggregated=3, cache_tokens=40_000)
    report = Scenario(settings, graph, RouterSettings(policy=policy), Slo(500, 20), 1.0, 3).run()
    return msgspec.structs.replace(report, cpu_s=0.0)


def test_a_whole_run_is_the_same_step_by_step(request: pytest.FixtureRequest) -> None:
    """Round-robin looks at no load, so that not even the order of reports matters."""
    together = _report("round-robin")
    request.getfixturevalue("one_by_one")
    apart = _report("round-robin")
    assert together.requests == apart.requests > 50
    for name in together.__struct_fields__:
        ours, theirs = getattr(together, name), getattr(apart, name)
        assert ours == (pytest.approx(theirs) if isinstance(theirs, float) else theirs), name


def test_sessions_of_the_chat_load_grow() -> None:
    sessions = list(islice(chat(0, prompt_tokens=100, output_tokens=50, shared_tokens=1000), 50))
    assert all(session.turns[0].new[0] == (0, 1000) for session in sessions)
    assert {len(session.turns) for session in sessions} >= {1, 12}
