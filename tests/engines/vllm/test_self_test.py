"""How a version of vLLM is tried out that Penstock is not tested with, on an engine that only takes time;
checks/vllm/engine/self_test.py does it with vLLM."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence

import msgspec
import pytest

from penstock.engines.settings import SchedulerSettings
from penstock.engines.sim import SimSettings, sim_engine
from penstock.engines.vllm import self_test
from penstock.errors import ConfigError, RemoteError
from penstock.ports import EngineStep
from penstock.shapes import Attempt, EngineCard, Incarnation
from penstock.transfer.tcp import TcpTransfer

UNKNOWN = "9.9.1"


class Broken:
    """An engine in which one thing is as a version of vLLM might have it."""

    def __init__(self, kind: str = "") -> None:
        owner = Incarnation("sim", 1)
        settings = SimSettings(
            cost_model="zero", vocab_size=1000, scheduler=SchedulerSettings(holder=owner)
        )
        self._engine = sim_engine(settings, TcpTransfer(owner))
        self._kind = kind
        self.stopped = False

    async def start(self) -> EngineCard:
        if self._kind == "start":
            raise ImportError("cannot import name 'EngineCoreClient'")
        if self._kind == "memory":
            raise RemoteError("out of memory")
        card = await self._engine.start()
        return msgspec.structs.replace(card, transport="") if self._kind == "aggregated" else card

    def submit(self, attempt: Attempt) -> int:
        if self._kind == "continuation" and len(attempt.token_ids) > attempt.prompt_len:
            sampling = msgspec.structs.replace(attempt.sampling, seed=2)
            attempt = msgspec.structs.replace(attempt, sampling=sampling)
        if self._kind == "waits" and attempt.handoff is not None:
            return 0
        return self._engine.submit(attempt)

    def release(self, handoff_id: str, *, sent: bool) -> None:
        self._engine.release(handoff_id, sent=sent)

    def cached_hashes(self) -> Sequence[int]:
        return [] if self._kind == "events" else self._engine.cached_hashes()

    async def steps(self) -> AsyncIterator[EngineStep]:
        async for step in self._engine.steps():
            if self._kind == "dies" and step.outputs:
                raise RemoteError("vLLM's core process died")
            if self._kind == "kept":
                step.load = msgspec.structs.replace(step.load, used_blocks=3)
                for output in step.outputs:
                    if output.handoff is not None:
                        output.handoff.ttl_s = 0.5
            yield step

    async def stop(self, grace_s: float) -> None:
        self.stopped = True
        await self._engine.stop(grace_s)


@pytest.fixture(autouse=True)
def _unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "installed_version", lambda: "9.9.1")
    monkeypatch.setattr(self_test, "CHECK_S", 2.0)


async def tried_out(engine: Broken) -> EngineCard:
    return await self_test.tried_out(engine, engine.start)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["", "aggregated"])
async def test_an_unknown_version_that_works_starts_with_a_warning(
    caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    engine = Broken(kind)
    assert (await tried_out(engine)).block_size == 16
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert all("vllm 9.9.1 is not a version that Penstock is tested with" in text for text in warnings)
    assert not engine.stopped
    await engine.stop(0.0)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("start", "start: ImportError.*EngineCoreClient"),
        ("continuation", r"continuation: after \[.*\] came \[.*\], and without interruption"),
        ("events", "events: no result within 2 s"),
        ("waits", "handoff: no result within 2 s"),
        ("kept", "handoff: its KV was not freed"),
        ("dies", "continuation: vLLM's core process died"),
    ],
)
async def test_an_unknown_version_that_does_not_work_is_refused_with_the_failing_check(
    kind: str, said: str
) -> None:
    engine = Broken(kind)
    with pytest.raises(
        ConfigError, match=rf"^--engine: vllm 9\.9\.1 is not .*, and cannot be used: {said}"
    ):
        await tried_out(engine)
    assert engine.stopped is (kind != "start")


async def test_what_may_pass_is_no_reason_to_refuse_a_version() -> None:
    with pytest.raises(RemoteError, match="out of memory"):
        await tried_out(Broken("memory"))


async def test_a_tested_version_is_not_tried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "installed_version", lambda: "0.32.1")
    engine = Broken("events")
    await tried_out(engine)
    await engine.stop(0.0)
