"""A real vLLM whose version Penstock pretends not to be tested with."""

from __future__ import annotations

import msgspec
import pytest

from checks.vllm.engine.pair import GREEDY, idle, prompt_of
from checks.vllm.engine.running import reached, running, settings
from penstock.engines.vllm import handoff_params, installed
from penstock.engines.vllm.engine import VllmEngine
from penstock.errors import ConfigError
from penstock.shapes import FinishReason, JsonObject, Role
from tests.waiting import until


@pytest.fixture(autouse=True)
def _unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "NEWEST_TESTED", (0, 1))


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
async def test_an_unknown_version_passes_and_its_worker_begins_with_nothing_counted(
    role: Role, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(settings(role, f"unknown-{role}")) as started:
        assert "passed the self-test" in caplog.text
        reached(await started.ask("first", prompt_of(100), GREEDY), FinishReason.LENGTH)
        await until(lambda: idle(started))
        load = started.log.steps[-1][1].load
        assert (load.submitted, load.prefill_tokens, load.context_tokens) == (1, 0, 0)


async def test_a_version_with_other_handoffs_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_names(params: JsonObject, ttl_s: float) -> bytes:
        raise msgspec.ValidationError("Object missing required field `remote_block_ids`")

    monkeypatch.setattr(handoff_params, "pack", other_names)
    refused = VllmEngine(settings(Role.PREFILL, "refused"))
    with pytest.raises(ConfigError, match=r"cannot be used: handoff: .*remote_block_ids"):
        await refused.start()
