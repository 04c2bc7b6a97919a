"""Tries out a version of vLLM that Penstock is not tested with, when a worker with it starts: a few short
requests show what would otherwise go wrong with those of clients. The checks:

    continuation  an output that was begun elsewhere goes on as it would have gone on there
    events        vLLM's KV events tell what is cached
    handoff       the engine keeps a prompt's KV for a reader, frees it when told to, and computes a prompt
                  whose KV it cannot pull. It is asked to pull its own, which vLLM refuses after the engine
                  has spoken with itself as with another: whether blocks arrive, only two could show.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from secrets import token_hex

from penstock.core.hashing import root_hash, sequence_hashes
from penstock.engines.vllm.installed import TESTED, installed_version, is_tested
from penstock.errors import ConfigError, PenstockError
from penstock.ports import Engine
from penstock.shapes import Attempt, EngineCard, FinishReason, Handoff, Load, Output, Sampling

log = logging.getLogger("penstock.engine")

CHECK_S = 120.0
"""Seconds for each check. On a GPU, the first request may have to wait until its kernels are compiled."""

SAMPLING = Sampling(max_tokens=8, seed=1, reproducible=True, presence_penalty=1.0, ignore_eos=True)
"""Depends on all that a continuation must bring back: a seed's draws, and the tokens that were given."""


async def tried_out(engine: Engine, start: Callable[[], Awaitable[EngineCard]]) -> EngineCard:
    """Start an engine, and try it out where vLLM's version makes that necessary. What is wrong then is a
    ConfigError with the failing check's name: `start`, or one of those above; the engine is stopped."""
    version = installed_version()
    if is_tested(version):
        return await start()
    unknown = f"vllm {version} is not a version that Penstock is tested with ({TESTED})"
    log.warning(
        "%s: trying it out. An error of its own about a failed NIXL handshake belongs to that", unknown
    )
    try:
        card = await start()
    except PenstockError:
        raise
    except Exception as error:  # of whatever vLLM does not have any more, or has otherwise
        raise ConfigError(f"--engine: {unknown}, and cannot be used: start: {error!r}") from error
    try:
        await self_test(engine, card)
    except BaseException as error:
        await engine.stop(0.0)
        if isinstance(error, ConfigError):
            raise ConfigError(f"--engine: {unknown}, and cannot be used: {error}") from error
        raise
    log.warning("%s, but it passed the self-test", unknown)
    return card


async def self_test(engine: Engine, card: EngineCard) -> None:
    """Use an engine that nobody else uses yet; no request of the test stays in it. Raises ConfigError with
    the name of the first check that fails."""
    test = _SelfTest(engine, card)
    checks = {"continuation": test.continuation, "events": test.events}
    if card.transport:
        checks["handoff"] = test.handoff
    reading = asyncio.create_task(test.read(), name="self-test")
    try:
        for name, check in checks.items():
            try:
                async with asyncio.timeout(CHECK_S):
                    await check()
            except TimeoutError:
                raise ConfigError(f"{name}: no result within {CHECK_S:g} s") from None
            except PenstockError as error:
                raise ConfigError(f"{name}: {error}") from error
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


class _SelfTest:
    def __init__(self, engine: Engine, card: EngineCard) -> None:
        self._engine = engine
        self._card = card
        # Two whole blocks and a part of one.
        self._prompt = [1 + i % (card.model.vocab_size - 1) for i in range(2 * card.block_size + 5)]
        self._salt = f"self-test {token_hex(8)}"
        self._outputs: dict[str, list[Output]] = {}  # by attempt id
        self._load = Load()
        self._changed = asyncio.Event()
        self._died: PenstockError | None = None

    async def continuation(self) -> None:
        # Nothing is cached for either: both compute the same, with the same kernels.
        whole = await self._ask("whole", self._prompt, FinishReason.LENGTH, salt="whole")
        begun = whole[: SAMPLING.max_tokens // 2]
        rest = await self._ask("rest", self._prompt + begun, FinishReason.LENGTH, salt="rest")
        if len(whole) != SAMPLING.max_tokens or begun + rest != whole:
            raise ConfigError(f"after {begun} came {rest}, and without interruption {whole}")

    async def events(self) -> None:
        await self._ask("cached", self._prompt, FinishReason.LENGTH)
        root = root_hash(self._card.model.name, self._salt)
        expected = set(sequence_hashes(self._prompt, self._card.block_size, root))
        await self._until(lambda: expected.issubset(self._engine.cached_hashes()))

    async def handoff(self) -> None:
        first = await self._ask("prefill", self._prompt, FinishReason.PREFILLED, prefill_only=True)
        handoff = self._outputs["prefill"][-1].handoff
        assert handoff is not None  # as it is for every PREFILLED output
        rest = await self._ask("decode", self._prompt + first, FinishReason.LENGTH, handoff=handoff)
        if len(first) != 1 or len(rest) != SAMPLING.max_tokens - 1:
            raise ConfigError(f"after {first} came {rest}")
        self._engine.release(handoff.handoff_id, sent=False)
        try:
            async with asyncio.timeout(handoff.ttl_s):  # vLLM's own lease is longer
                await self._until(lambda: not self._load.used_blocks)
        except TimeoutError:
            raise ConfigError("its KV was not freed when it was released") from None

    async def read(self) -> None:
        """Read the engine's steps, until cancelled."""
        try:
            async for step in self._engine.steps():
                for output in step.outputs:
                    self._outputs.setdefault(output.attempt_id, []).append(output)
                self._load = step.load
                self._changed.set()
        except PenstockError as error:
            self._died = error
            self._changed.set()

    async def _ask(
        self,
        name: str,
        token_ids: list[int],
        reason: FinishReason,
        *,
        prefill_only: bool = False,
        handoff: Handoff | None = None,
        salt: str = "",
    ) -> list[int]:
        """The tokens of an attempt, which must end for this reason."""
        self._engine.submit(
            Attempt(
                name,
                name,
                token_ids,
                len(self._prompt),
                SAMPLING,
                prefill_only=prefill_only,
                handoff=handoff,
                cache_salt=self._salt + salt,
            )
        )
        outputs = self._outputs.setdefault(name, [])
        await self._until(lambda: outputs and outputs[-1].finish_reason is not None)
        if outputs[-1].finish_reason is not reason:
            raise ConfigError(f"a request ended as {outputs[-1].finish_reason}: {outputs[-1].error}")
        return [token_id for output in outputs for token_id in output.token_ids]

    async def _until(self, holds: Callable[[], object]) -> None:
        while not holds():
            if self._died is not None:
                raise self._died
            self._changed.clear()
            await self._changed.wait()
