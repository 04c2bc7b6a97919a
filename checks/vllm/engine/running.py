"""A vLLM engine on models/tiny, behind the Engine port, with all that it said."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from penstock.clock import MonotonicClock
from penstock.engines.vllm.engine import VllmEngine
from penstock.engines.vllm.settings import VllmSettings
from penstock.shapes import Attempt, EngineCard, FinishReason, Handoff, Incarnation, Output, Role, Sampling
from tests.engines.steps_log import StepsLog

MODEL = Path(__file__).parents[3] / "models" / "tiny"
WAIT_S = 120.0

ENGINE_ARGS = (
    "--enforce-eager",
    "--dtype",
    "float32",
    "--distributed-executor-backend",
    "uni",
    "--max-num-seqs",
    "64",
)


def settings(
    role: Role = Role.AGGREGATED, name: str = "v0", epoch: int = 1, **given: object
) -> VllmSettings:
    wanted = {
        "model": str(MODEL),
        "role": role,
        "incarnation": Incarnation(name, epoch),
        "block_size": 32,
        "kv_cache_bytes": 128 << 20,
        "engine_args": ENGINE_ARGS,
        **given,
    }
    return msgspec.convert(wanted, VllmSettings)


class Running:
    """A started engine."""

    def __init__(self, engine: VllmEngine, card: EngineCard, log: StepsLog) -> None:
        self.engine = engine
        self.card = card
        self.log = log

    async def ask(
        self,
        attempt_id: str,
        token_ids: list[int],
        sampling: Sampling,
        *,
        prompt_len: int | None = None,
        prefill_only: bool = False,
        handoff: Handoff | None = None,
        cache_salt: str = "",
    ) -> Output:
        """Submit, wait for the end, and return all its outputs as one."""
        self.submit(
            Attempt(
                attempt_id,
                attempt_id,
                token_ids,
                len(token_ids) if prompt_len is None else prompt_len,
                sampling,
                prefill_only=prefill_only,
                handoff=handoff,
                cache_salt=cache_salt,
            )
        )
        return await self.ended(attempt_id)

    def submit(self, attempt: Attempt) -> None:
        self.engine.submit(attempt)

    async def ended(self, attempt_id: str) -> Output:
        async with asyncio.timeout(WAIT_S):
            while True:
                outputs = [output for _, output in self.log.outputs(attempt_id)]
                if outputs and outputs[-1].finish_reason is not None:
                    return _joined(outputs)
                await asyncio.sleep(0.01)

    @property
    def core_pid(self) -> int:
        core = self.engine._core
        assert core is not None
        (process,) = core.client.resources.engine_manager.processes
        assert process.pid is not None
        return int(process.pid)


def _joined(outputs: list[Output]) -> Output:
    assert all(output.finish_reason is None for output in outputs[:-1]), "outputs after the last"
    first, last = outputs[0], outputs[-1]
    return Output(
        attempt_id=last.attempt_id,
        token_ids=[token_id for output in outputs for token_id in output.token_ids],
        finish_reason=last.finish_reason,
        cached_tokens=first.cached_tokens,
        logprobs=[logprob for output in outputs for logprob in output.logprobs or ()] or None,
        handoff=last.handoff,
        error=last.error,
        transferred_blocks=first.transferred_blocks,
        prompt_logprobs=first.prompt_logprobs,
    )


def reached(output: Output, reason: FinishReason) -> Output:
    """The output, which must have ended so."""
    assert output.finish_reason is reason, output
    return output


@asynccontextmanager
async def running(own: VllmSettings) -> AsyncIterator[Running]:
    """Started, its steps read; stopped in the end, unless it died."""
    clock = MonotonicClock()
    engine = VllmEngine(own)
    card = await engine.start()
    log = StepsLog(engine, clock)
    reading = asyncio.create_task(log.read())
    try:
        yield Running(engine, card, log)
    finally:
        await engine.stop(0.0)
        await asyncio.wait([reading], timeout=WAIT_S)
