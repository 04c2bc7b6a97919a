"""Where vLLM cannot be held to tokens that were given before (its newer model runner, on GPUs): what comes
instead is noticed, and the output goes on from what the client has read."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec
import pytest
import pytest_asyncio
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs

from checks.vllm.engine.pair import GREEDY, idle, prompt_of
from checks.vllm.engine.running import Running, reached, running, settings
from penstock.shapes import Attempt, FinishReason, Role, Sampling
from tests.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = prompt_of(100)
REPLAYED = msgspec.structs.replace(GREEDY, presence_penalty=1.0)  # what depends on the output is replayed
GIVEN = [7, 8, 9]  # nothing that the model would say


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def free() -> AsyncIterator[Running]:
    """Not held to anything."""
    configure = AsyncEngineArgs.create_engine_config

    def without_processors(args: AsyncEngineArgs) -> VllmConfig:
        config = configure(args)
        config.model_config.logits_processors = None
        return config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AsyncEngineArgs, "create_engine_config", without_processors)
        starting = running(settings(Role.PREFILL))
        engine = await starting.__aenter__()
    yield engine
    await starting.__aexit__(None, None, None)


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def _nothing_stays_behind(free: Running) -> AsyncIterator[None]:
    yield
    await until(lambda: idle(free))
    load = free.log.steps[-1][1].load
    assert (load.prefill_tokens, load.context_tokens) == (0, 0)


async def test_what_comes_again_by_itself_is_dropped(free: Running) -> None:
    whole = await free.ask("whole", PROMPT, REPLAYED)
    rest = await free.ask("rest", PROMPT + whole.token_ids[:5], REPLAYED, prompt_len=len(PROMPT))
    assert rest.token_ids == whole.token_ids[5:]
    assert free.engine._core_ids == {}


async def test_what_goes_astray_begins_again_from_what_was_given(free: Running) -> None:
    sampling = msgspec.structs.replace(REPLAYED, max_tokens=REPLAYED.max_tokens - len(GIVEN))
    expected = await free.ask("folded", PROMPT + GIVEN, sampling, cache_salt="folded")
    output = await free.ask("astray", PROMPT + GIVEN, REPLAYED, prompt_len=len(PROMPT))
    assert reached(output, FinishReason.LENGTH).token_ids == expected.token_ids
    told = [output.cached_tokens for _, output in free.log.outputs("astray")]
    assert [cached for cached in told if cached is not None] == [96]


async def test_what_goes_astray_late_tells_what_was_cached_once(free: Running) -> None:
    whole = await free.ask("late-whole", PROMPT, REPLAYED)
    given = [*whole.token_ids[:5], 7]
    output = await free.ask("late", PROMPT + given, REPLAYED, prompt_len=len(PROMPT))
    assert len(reached(output, FinishReason.LENGTH).token_ids) == REPLAYED.max_tokens - 6
    told = [output.cached_tokens for _, output in free.log.outputs("late")]
    assert len([cached for cached in told if cached is not None]) == 1


async def test_a_cancel_after_it_began_again_ends_it(free: Running) -> None:
    long = msgspec.structs.replace(REPLAYED, max_tokens=3000)
    free.submit(Attempt("long", "long", PROMPT + GIVEN, len(PROMPT), long))
    await until(lambda: any(output.token_ids for _, output in free.log.outputs("long")))
    free.engine.cancel("long")
    reached(await free.ended("long"), FinishReason.CANCELLED)


async def test_a_prefill_that_goes_astray_is_handed_over_with_all_that_was_given(free: Running) -> None:
    output = await free.ask("prefill", PROMPT + GIVEN, REPLAYED, prompt_len=len(PROMPT), prefill_only=True)
    handoff = reached(output, FinishReason.PREFILLED).handoff
    assert handoff is not None
    assert (handoff.handoff_id, handoff.num_tokens) == ("prefill", 103)
    assert len(output.token_ids) == 1
    free.engine.release("prefill", sent=False)


async def test_a_prefill_that_ends_as_it_goes_astray_holds_nothing(free: Running) -> None:
    """EOS, the only choice, comes in place of the token that was given, and ends vLLM's request."""
    sampling = Sampling(max_tokens=9, temperature=0.0, presence_penalty=1.0, logit_bias={2: 100.0})
    output = await free.ask("ends", [*PROMPT, 7], sampling, prompt_len=len(PROMPT), prefill_only=True)
    assert reached(output, FinishReason.STOP).token_ids == [2]
