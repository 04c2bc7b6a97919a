"""The worker shell around an engine that says what the test wants."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from penstock.core.progress import ProgressLimits
from penstock.discovery.file import FileDiscovery
from penstock.engines.assets import Assets
from penstock.errors import RemoteError
from penstock.link.server import LinkServerStatistics
from penstock.link.settings import ServerSettings
from penstock.ports import EngineStep
from penstock.shapes import (
    Attempt,
    AttemptReport,
    EngineCard,
    FinishReason,
    Incarnation,
    Load,
    ModelCard,
    Output,
    Rates,
    Role,
)
from penstock.worker.metrics import WorkerMetrics
from penstock.worker.worker import Worker, WorkerSettings, WorkerStatistics
from tests import builders
from tests.builders import attempt
from tests.waiting import WITHIN_S, until
from tests.worker.frontend import Frontend

ASSETS = Assets({"tokenizer.json": b"{}"})
QUICK = ServerSettings(heartbeat_s=0.05, peer_timeout_s=30)


class ScriptedEngine:
    """The Engine port, played by hand: `say` is the next step."""

    def __init__(self) -> None:
        self.submitted: list[Attempt] = []
        self.cancelled: list[str] = []
        self.released: list[str] = []
        self.hashes: set[int] = {1, 2}
        self.cached_tokens = 0  # of each prompt
        self._said: asyncio.Queue[EngineStep | Exception | None] = asyncio.Queue()

    async def start(self) -> EngineCard:
        model = ModelCard("m", max_model_len=1000, vocab_size=50, assets=ASSETS.digests)
        return EngineCard("scripted", model, block_size=16, total_blocks=100)

    def submit(self, attempt: Attempt) -> int:
        self.submitted.append(attempt)
        return len(attempt.token_ids) - self.cached_tokens

    def cancel(self, attempt_id: str) -> None:
        self.cancelled.append(attempt_id)

    def release(self, handoff_id: str, *, sent: bool) -> None:
        self.released.append(handoff_id)

    def asset(self, sha256: str) -> bytes | None:
        return ASSETS.get(sha256)

    def cached_hashes(self) -> Sequence[int]:
        return sorted(self.hashes)

    async def steps(self) -> AsyncIterator[EngineStep]:
        while (said := await self._said.get()) is not None:
            if isinstance(said, Exception):
                raise said
            self.hashes |= set(said.stored)
            yield said

    async def stop(self, grace_s: float) -> None:
        self._said.put_nowait(None)

    def say(
        self,
        *outputs: Output,
        stored: Sequence[int] = (),
        load: Load | None = None,
        ended: Sequence[AttemptReport] = (),
    ) -> None:
        load = load or Load(submitted=len(self.submitted))
        step = EngineStep(outputs=list(outputs), stored=list(stored), load=load, ended=list(ended))
        self._said.put_nowait(step)

    def die(self) -> None:
        self._said.put_nowait(RemoteError("out of ideas"))


class Stage:
    """A worker and its frontends."""

    def __init__(self, folder: Path, server: ServerSettings = QUICK, **settings: object) -> None:
        self.engine = ScriptedEngine()
        self.discovery = FileDiscovery(folder)
        self.worker = Worker(
            self.engine,
            self.discovery,
            WorkerSettings(Incarnation("w", 1), Role.DECODE, **settings),  # type: ignore[arg-type]
            server,
            metrics=(metrics := WorkerMetrics()),
        )
        self.metrics = metrics
        self.stop = asyncio.Event()
        self.task = asyncio.create_task(self.worker.run(self.stop))
        self.frontends: list[Frontend] = []

    async def frontend(self, name: str = "f") -> Frontend:
        async for found in self.discovery.watch():
            if found:
                address = found["w"].address
                break
        frontend = Frontend(address, name)
        self.frontends.append(frontend)
        await until(lambda: frontend.cards)
        return frontend


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    stage = Stage(tmp_path, drain_s=1.0, max_waiting=2)
    yield stage
    stage.stop.set()
    await asyncio.gather(stage.task, return_exceptions=True)
    for frontend in stage.frontends:
        await frontend.hang_up()


async def test_a_frontend_gets_card_snapshot_and_the_changes_since(stage: Stage) -> None:
    frontend = await stage.frontend()
    assert frontend.cards[0].instance_id == "w"
    assert frontend.hashes == [1, 2]
    assert await frontend.client.asset(frontend.cards[0].model.assets["tokenizer.json"]) == b"{}"
    stage.engine.say(stored=[3])
    await until(lambda: frontend.steps)
    assert frontend.steps[0].stored == [3]
    late = await stage.frontend("late")
    assert late.hashes == [1, 2, 3]


async def test_a_worker_with_events_off_says_so_and_tells_nothing_of_its_cache(tmp_path: Path) -> None:
    stage = Stage(tmp_path, kv_events=False)
    frontend = await stage.frontend()
    assert not frontend.cards[0].engine.kv_events
    assert frontend.hashes == []
    stage.engine.say(stored=[3])
    await until(lambda: frontend.steps)
    assert frontend.steps[0].stored == []
    stage.stop.set()
    await stage.task
    await frontend.hang_up()


async def test_outputs_go_to_their_frontend_and_events_to_all(stage: Stage) -> None:
    mine, other = await stage.frontend("f1"), await stage.frontend("f2")
    mine.client.generate(attempt("a.1"))
    await until(lambda: stage.engine.submitted)
    stage.engine.say(Output("a.1", [7], FinishReason.STOP), stored=[9])
    await until(lambda: mine.steps and other.steps)
    assert [output.token_ids for output in mine.steps[0].outputs] == [[7]]
    assert mine.steps[0].seen == 1
    assert other.steps[0].outputs == []
    assert other.steps[0].stored == [9]


async def test_each_attempt_has_a_line_when_it_comes_and_one_when_it_ends(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "penstock.worker")
    frontend = await stage.frontend("f1")
    frontend.client.generate(attempt("a.1"))
    await until(lambda: stage.engine.submitted)
    ended = AttemptReport("a.1", 10.0, 10.5, None, 11.0, 13.0, output_tokens=4)
    stage.engine.say(Output("a.1", [7], FinishReason.STOP), ended=[ended])
    await until(lambda: frontend.steps)
    assert "attempt received: attempt=a.1 frontend=f1 prompt=3 output=0" in caplog.text
    exposition = stage.metrics.render().decode()
    assert 'penstock_engine_attempts_total{outcome="stop"} 1.0' in exposition
    assert "penstock_engine_waiting 0.0" in exposition
    times = "queue_ms=500.0 prefill_ms=500.0 decode_ms=2000.0"
    assert f"attempt ended: attempt=a.1 finish=stop output=4 {times}" in caplog.text


async def test_an_attempt_that_the_engine_never_began_has_a_line_with_its_error(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "penstock.worker")
    frontend = await stage.frontend("f1")
    frontend.client.generate(attempt("a.1"))
    await until(lambda: stage.engine.submitted)
    stage.engine.say(Output("a.1", finish_reason=FinishReason.ERROR, error="no room"))
    await until(lambda: frontend.steps)
    assert "attempt ended: attempt=a.1 finish=error error='no room'" in caplog.text


async def test_the_load_includes_what_the_engine_has_not_taken_in_yet(stage: Stage) -> None:
    frontend = await stage.frontend()
    frontend.client.generate(attempt("a.1"))
    await until(lambda: stage.engine.submitted)
    stage.engine.say(load=Load(submitted=0))
    stage.engine.say(load=Load(submitted=1, running=1))
    await until(lambda: len(frontend.steps) == 2)
    assert (frontend.steps[0].load.waiting, frontend.steps[0].load.prefill_tokens) == (1, 3)
    assert (frontend.steps[1].load.waiting, frontend.steps[1].load.running) == (0, 1)


async def test_cached_tokens_of_an_attempt_that_came_during_a_step_are_not_in_the_queue(
    stage: Stage,
) -> None:
    frontend = await stage.frontend()
    stage.engine.cached_tokens = 90
    frontend.client.generate(replace(attempt("a.1"), token_ids=[1] * 100, prompt_len=100))
    await until(lambda: stage.engine.submitted)
    stage.engine.say(load=Load(submitted=0))
    await until(lambda: frontend.steps)
    load = frontend.steps[0].load
    assert (load.waiting, load.prefill_tokens, load.prefill_context_tokens) == (1, 10, 10 * 95)


async def test_other_frontends_are_told_of_attempts_at_once_and_of_several_together(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ServerSettings(heartbeat_s=60, peer_timeout_s=300))  # so none is by the clock
    mine, other = await stage.frontend("f1"), await stage.frontend("f2")
    for number in (1, 2):
        mine.client.generate(attempt(f"a.{number}"))
    await until(lambda: other.heartbeats and other.heartbeats[-1][1].waiting)
    seen, load = other.heartbeats[-1]
    assert (seen, load.waiting, load.prefill_tokens) == (0, 2, 6)
    assert len([load for _, load in other.heartbeats if load.waiting]) == 1
    assert not [load for _, load in mine.heartbeats if load.waiting]
    stage.stop.set()
    stage.engine.say(Output("a.1", [7], FinishReason.STOP), Output("a.2", [7], FinishReason.STOP))
    await stage.task
    for frontend in stage.frontends:
        await frontend.hang_up()


async def test_statistics_count_what_the_worker_keeps(stage: Stage) -> None:
    assert stage.worker.revision == ""
    frontend = await stage.frontend()
    assert stage.worker.revision
    frontend.client.generate(replace(attempt("a.1"), prefill_only=True))
    await until(lambda: stage.engine.submitted)
    link = LinkServerStatistics(frontends=1, handshakes=0)
    assert stage.worker.statistics() == WorkerStatistics(1, not_in_load=1, handoffs=0, link=link)
    (peer,) = stage.worker.peers
    assert dict(stage.worker.attempts) == {"a.1": peer}
    handoff = builders.handoff("a.1", "w")
    stage.engine.say(Output("a.1", [7], FinishReason.PREFILLED, handoff=handoff))
    await until(lambda: frontend.steps)
    assert stage.worker.statistics() == WorkerStatistics(0, not_in_load=0, handoffs=1, link=link)


async def test_bounces_when_full_and_twins(stage: Stage) -> None:
    frontend = await stage.frontend()
    for number in (1, 1, 2, 3):
        frontend.client.generate(attempt(f"a.{number}"))
    await until(lambda: len(frontend.bounces) == 2)
    assert [bounce.attempt_id for bounce in frontend.bounces] == ["a.1", "a.3"]
    assert "here already" in frontend.bounces[0].reason
    assert "full" in frontend.bounces[1].reason
    assert [each.attempt_id for each in stage.engine.submitted] == ["a.1", "a.2"]


async def test_bounces_what_would_wait_too_long(stage: Stage) -> None:
    frontend = await stage.frontend()
    frontend.client.generate(attempt("a.1"))
    await until(lambda: stage.engine.submitted)
    rates = Rates(prefill_token_ms=0.1)
    stage.engine.say(load=Load(running=1, prefill_tokens=90_000, submitted=1, rates=rates))
    await until(lambda: frontend.steps)
    frontend.client.generate(attempt("a.2"))
    await until(lambda: len(stage.engine.submitted) == 2)
    stage.engine.say(load=Load(running=2, prefill_tokens=120_000, submitted=2, rates=rates))
    await until(lambda: len(frontend.steps) == 2)
    frontend.client.generate(attempt("a.3"))
    await until(lambda: frontend.bounces)
    (bounce,) = frontend.bounces
    assert bounce.attempt_id == "a.3"
    assert bounce.reason.startswith("full: wait_ms=120")
    assert bounce.reason.endswith("bound_ms=10000")
    assert bounce.retry_after_s > 0


async def test_only_the_owner_cancels(stage: Stage) -> None:
    mine, other = await stage.frontend("f1"), await stage.frontend("f2")
    mine.client.generate(attempt("a.1"))
    await until(lambda: stage.engine.submitted)
    other.client.cancel("a.1")
    other.client.generate(attempt("a.2"))  # what it said before has arrived once this has
    await until(lambda: len(stage.engine.submitted) == 2)
    assert stage.engine.cancelled == []
    mine.client.cancel("a.1")
    await until(lambda: stage.engine.cancelled == ["a.1"])


async def test_only_the_owner_of_a_handoff_releases_it(stage: Stage) -> None:
    mine, other = await stage.frontend("f1"), await stage.frontend("f2")
    mine.client.generate(replace(attempt("a.1"), prefill_only=True))
    await until(lambda: stage.engine.submitted)
    handoff = builders.handoff("a.1", "w")
    stage.engine.say(Output("a.1", [7], FinishReason.PREFILLED, handoff=handoff))
    await until(lambda: mine.steps)
    other.client.release("a.1", sent=False)
    other.client.generate(attempt("a.2"))
    await until(lambda: len(stage.engine.submitted) == 2)
    assert stage.engine.released == []
    mine.client.release("a.1", sent=False)
    await until(lambda: stage.engine.released == ["a.1"])


async def test_a_lost_frontends_attempts_are_cancelled_and_its_handoffs_released(stage: Stage) -> None:
    frontend = await stage.frontend()
    frontend.client.generate(attempt("a.1"))
    await until(lambda: stage.engine.submitted)
    await frontend.hang_up()
    await until(lambda: stage.engine.cancelled == ["a.1"])
    handoff = builders.handoff("a.1", "w")
    stage.engine.say(Output("a.1", [7], FinishReason.PREFILLED, handoff=handoff))
    await until(lambda: stage.engine.released == ["a.1"])


def told(frontend: Frontend) -> list[str]:
    """The attempts of which it has got outputs."""
    return [output.attempt_id for step in frontend.steps for output in step.outputs]


async def test_handoffs_that_a_lost_frontend_had_are_released(stage: Stage) -> None:
    frontend, other = await stage.frontend(), await stage.frontend("other")
    for number, peer in ((1, frontend), (2, frontend), (3, other)):
        peer.client.generate(replace(attempt(f"a.{number}"), prefill_only=True))
        await until(lambda number=number: len(stage.engine.submitted) == number)
        name = f"a.{number}"
        handoff = builders.handoff(name, "w")
        stage.engine.say(Output(name, [7], FinishReason.PREFILLED, handoff=handoff))
    await until(lambda: told(frontend) == ["a.1", "a.2"] and told(other) == ["a.3"])
    frontend.client.release("a.2", sent=False)
    await until(lambda: stage.engine.released == ["a.2"])
    await frontend.hang_up()
    await until(lambda: stage.engine.released == ["a.2", "a.1"])


async def test_draining_takes_nothing_new_and_waits_for_what_runs(stage: Stage) -> None:
    frontend = await stage.frontend()
    frontend.client.generate(attempt("a.1"))
    await until(lambda: stage.engine.submitted)
    assert stage.worker.health()["status"] == "healthy"
    stage.stop.set()
    await until(lambda: frontend.draining)
    assert stage.worker.health()["status"] == "draining"
    frontend.client.generate(attempt("a.2"))
    await until(lambda: frontend.bounces)
    assert frontend.bounces[0].reason == "draining"
    assert not stage.task.done()
    stage.engine.say(Output("a.1", [7], FinishReason.STOP))
    await asyncio.wait_for(stage.task, WITHIN_S)
    assert frontend.steps[-1].outputs or frontend.steps[-2].outputs


async def test_health_tells_how_busy_it_is_also_while_it_drains(stage: Stage) -> None:
    def busy() -> tuple[int, ...]:
        health = stage.worker.health()
        return tuple(health[name] for name in ("attempts", "running", "waiting", "held_handoffs"))

    frontend = await stage.frontend()
    assert busy() == (0, 0, 0, 0)
    frontend.client.generate(msgspec.structs.replace(attempt("a.1"), prefill_only=True))
    frontend.client.generate(attempt("a.2"))
    await until(lambda: len(stage.engine.submitted) == 2)
    assert busy() == (2, 0, 2, 0)  # the engine has said nothing of them yet
    stage.engine.say(load=Load(submitted=2, running=1, waiting=1, steps=1))
    await until(lambda: busy() == (2, 1, 1, 0))
    handoff = builders.handoff("a.1", "w")
    prefilled = Output("a.1", [7], FinishReason.PREFILLED, handoff=handoff)
    done = Output("a.2", [7], FinishReason.STOP)
    stage.engine.say(prefilled, done, load=Load(submitted=2, held_handoffs=1, steps=2))
    await until(lambda: busy() == (0, 0, 0, 1))
    stage.stop.set()
    await until(lambda: stage.worker.health()["status"] == "draining")
    assert busy() == (0, 0, 0, 1)
    stage.engine.say(load=Load(submitted=2, steps=3))  # it was pulled
    await asyncio.wait_for(stage.task, WITHIN_S)
    assert busy() == (0, 0, 0, 0)


async def test_health_tells_of_an_engine_that_stands_still_and_of_its_death(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    stage = Stage(tmp_path, progress=ProgressLimits(stuck_s=0.2, first_s=0.0))
    assert stage.worker.health()["status"] == "starting"
    frontend = await stage.frontend()
    await until(lambda: stage.worker.health()["status"] == "healthy")
    frontend.client.generate(attempt("a.1"))
    await until(lambda: stage.worker.health()["status"] == "stuck")
    assert re.fullmatch(r"no step for \d+\.\d s.*", stage.worker.health()["engine"])
    # With its last token: while anything ran, it would soon be stuck again.
    stage.engine.say(Output("a.1", [7], FinishReason.STOP), load=Load(submitted=1, steps=1))
    await until(lambda: stage.worker.health()["status"] == "healthy")
    assert "engine stuck: no step for" in caplog.text
    assert "engine continues: steps=1" in caplog.text
    stage.engine.die()
    with pytest.raises(RemoteError, match="out of ideas"):
        await asyncio.wait_for(stage.task, WITHIN_S)
    assert stage.worker.health()["status"] == "dead"
    await frontend.hang_up()


async def test_a_dead_engine_ends_the_worker_with_its_reason(stage: Stage) -> None:
    frontend = await stage.frontend()
    stage.engine.die()
    with pytest.raises(RemoteError, match="out of ideas"):
        await asyncio.wait_for(stage.task, WITHIN_S)
    await until(lambda: frontend.downs)
    assert "out of ideas" in frontend.downs[0]
