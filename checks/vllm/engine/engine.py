"""A real vLLM behind the Engine port: what comes out, what is refused, and how it dies."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from checks.vllm.engine.running import ENGINE_ARGS, WAIT_S, Running, reached, running, settings
from penstock.engines.vllm.engine import VllmEngine
from penstock.engines.vllm.installed import installed_version
from penstock.engines.vllm.outputs import REASONS
from penstock.errors import ConfigError, RemoteError
from penstock.shapes import Attempt, FinishReason, Sampling, StructuredOutput
from tests.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = list(range(5, 105))
GREEDY = Sampling(max_tokens=16, temperature=0.0, ignore_eos=True)
KINDS = {
    "greedy": GREEDY,
    "seeded": Sampling(max_tokens=16, seed=5, reproducible=True, ignore_eos=True),
    "penalties": msgspec.structs.replace(GREEDY, presence_penalty=1.5, frequency_penalty=0.5),
    "repetition": msgspec.structs.replace(GREEDY, repetition_penalty=1.5),
    "regex": msgspec.structs.replace(GREEDY, structured=StructuredOutput("regex", "[a-z ]{30,40}")),
    "min_tokens": Sampling(max_tokens=16, temperature=0.0, min_tokens=12),
    "logprobs": msgspec.structs.replace(GREEDY, logprobs=2),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one() -> AsyncIterator[Running]:
    async with running(settings()) as engine:
        yield engine


async def test_the_card_says_what_vllm_is(one: Running) -> None:
    card = one.card
    assert card.name == f"vllm {installed_version()}"
    assert (card.model.name, card.block_size, card.model.vocab_size) == ("tiny", 32, 1024)
    assert card.model.eos_token_ids == [0, 2]
    assert card.total_blocks == 2048
    assert card.model.answering.structured_output
    assert set(card.model.assets) >= {"tokenizer.json", "tokenizer_config.json"}


async def test_every_way_to_end_has_a_name_here() -> None:
    from vllm.v1.engine import FinishReason as CoreFinishReason

    assert {str(reason) for reason in CoreFinishReason} == set(REASONS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [1, 7, 15])
async def test_an_output_begun_elsewhere_goes_on_as_if_it_had_begun_here(
    one: Running, kind: str, given: int
) -> None:
    sampling = KINDS[kind]
    whole = reached(await one.ask(f"{kind}-{given}", PROMPT, sampling), FinishReason.LENGTH)
    rest = await one.ask(
        f"{kind}-{given}-rest", PROMPT + whole.token_ids[:given], sampling, prompt_len=len(PROMPT)
    )
    assert rest.token_ids == whole.token_ids[given:]
    assert rest.finish_reason is whole.finish_reason
    if whole.logprobs is not None:
        assert rest.logprobs is not None
        assert [entry.token_id for entry in rest.logprobs] == rest.token_ids
        for ours, theirs in zip(rest.logprobs, whole.logprobs[given:], strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)


async def test_a_sample_goes_on_with_other_tokens_when_nobody_asked_to_repeat_them(one: Running) -> None:
    # So hot that eight equal tokens are no chance.
    sampling = msgspec.structs.replace(KINDS["seeded"], reproducible=False, temperature=2.0)
    whole = await one.ask("sample", PROMPT, sampling)
    rest = await one.ask("sample-rest", PROMPT + whole.token_ids[:8], sampling, prompt_len=len(PROMPT))
    assert len(rest.token_ids) == 8
    assert rest.token_ids != whole.token_ids[8:]


async def test_logprobs_are_of_the_tokens_given(one: Running) -> None:
    output = await one.ask("logprobs", PROMPT, KINDS["logprobs"])
    assert output.logprobs is not None
    assert [entry.token_id for entry in output.logprobs] == output.token_ids
    for entry in output.logprobs:
        assert len(entry.top) == 2
        assert entry.top[0] == (entry.token_id, entry.logprob)  # greedy: the chosen is the most likely
        assert entry.top[1][1] <= entry.logprob <= 0.0


async def test_what_was_cached_is_told(one: Running) -> None:
    prompt = [700 + i for i in range(70)]
    assert (await one.ask("cold", prompt, GREEDY)).cached_tokens == 0
    assert (await one.ask("warm", prompt, GREEDY)).cached_tokens == 64
    assert (await one.ask("salted", prompt, GREEDY, cache_salt="x")).cached_tokens == 0


async def test_eos_ends_an_output_unless_it_is_to_be_ignored(one: Running) -> None:
    # The bias makes EOS the only choice.
    sampling = Sampling(max_tokens=5, temperature=0.0, logit_bias={2: 100.0})
    output = reached(await one.ask("eos", PROMPT, sampling), FinishReason.STOP)
    assert output.token_ids == [2]
    ignored = msgspec.structs.replace(sampling, ignore_eos=True)
    assert (await one.ask("no-eos", PROMPT, ignored)).token_ids == [2] * 5


@pytest.mark.parametrize(
    ("structured", "said"),
    [
        (StructuredOutput("json", '{"type": 5}'), "Type should be a string"),
        (StructuredOutput("regex", "((("), "regex"),
        (StructuredOutput("grammar", "root ::= what"), "rammar"),
    ],
)
async def test_a_wrong_grammar_is_rejected_and_the_engine_lives_on(
    one: Running, structured: StructuredOutput, said: str
) -> None:
    output = await one.ask(
        f"bad-{structured.kind}", PROMPT, msgspec.structs.replace(GREEDY, structured=structured)
    )
    assert said in (reached(output, FinishReason.REJECTED).error or "")
    reached(await one.ask(f"after-{structured.kind}", PROMPT, GREEDY), FinishReason.LENGTH)


async def test_attempts_that_cannot_be_served_end_at_once(one: Running) -> None:
    empty = await one.ask("empty", [], GREEDY)
    assert "empty" in (reached(empty, FinishReason.ERROR).error or "")
    outside = await one.ask("outside", [5000], GREEDY)
    assert "vocabulary" in (reached(outside, FinishReason.ERROR).error or "")
    full = await one.ask("full", PROMPT + [1] * 16, GREEDY, prompt_len=len(PROMPT))
    assert reached(full, FinishReason.LENGTH).token_ids == []


async def test_a_cancelled_attempt_ends_and_leaves_nothing(one: Running) -> None:
    long = Sampling(max_tokens=3000, temperature=0.0, ignore_eos=True)
    one.submit(Attempt("long", "long", PROMPT, len(PROMPT), long))
    await until(lambda: one.log.outputs("long"))
    one.engine.cancel("long")
    one.engine.cancel("long")
    one.engine.cancel("nobody")
    reached(await one.ended("long"), FinishReason.CANCELLED)
    await until(lambda: one.log.steps[-1][1].load.used_blocks == 0)
    load = one.log.steps[-1][1].load
    assert (load.running, load.waiting, load.prefill_tokens, load.context_tokens) == (0, 0, 0, 0)


async def test_many_at_once(one: Running) -> None:
    alone = [(await one.ask(f"alone-{i}", PROMPT[i:], GREEDY)).token_ids for i in range(24)]
    together = await asyncio.gather(*[one.ask(f"together-{i}", PROMPT[i:], GREEDY) for i in range(24)])
    assert [output.token_ids for output in together] == alone


async def test_the_mirror_of_the_cache_is_what_vllm_finds_cached(one: Running) -> None:
    prompt = [300 + i for i in range(200)]
    await one.ask("fill", prompt, GREEDY)
    await until(lambda: one.engine._prompts.cached_tokens(prompt, "") == 192)
    assert (await one.ask("find", prompt, GREEDY)).cached_tokens == 192


@pytest.mark.parametrize(
    ("engine_args", "said"),
    [
        (("--port", "8000"), "--port"),
        (("--kv_transfer_config", "{}"), "--kv-transfer-config"),
        (("--no-such-flag",), "--no-such-flag"),
        (("--max-model-len", "many"), "max-model-len"),
        (("--max-model-len", "99999999"), "max_model_len"),
    ],
)
async def test_wrong_engine_arguments_are_named(engine_args: tuple[str, ...], said: str) -> None:
    engine = VllmEngine(settings(engine_args=(*ENGINE_ARGS, *engine_args)))
    with pytest.raises(ConfigError, match=said):
        await engine.start()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
async def test_a_dead_core_ends_the_steps_with_a_reason(number: signal.Signals) -> None:
    async with running(settings(name=f"dying-{number}")) as dying:
        long = Sampling(max_tokens=3000, temperature=0.0, ignore_eos=True)
        dying.submit(Attempt("long", "long", PROMPT, len(PROMPT), long))
        await until(lambda: dying.log.outputs("long"))
        reading = asyncio.create_task(_read_on(dying))
        os.kill(dying.core_pid, number)
        with pytest.raises(RemoteError, match="died"):
            await asyncio.wait_for(reading, WAIT_S)
        dying.submit(Attempt("late", "late", PROMPT, len(PROMPT), long))  # must not raise
        await asyncio.wait_for(dying.engine.stop(10 * WAIT_S), WAIT_S)  # there is nothing to wait for


async def test_an_engine_can_be_stopped_before_it_did_anything() -> None:
    async with running(settings(name="idle")) as engine:
        directory = engine.engine._core and engine.engine._core.events.directory
    assert directory is not None
    assert not _exists(bytes(directory))


async def test_a_bug_on_the_way_to_vllm_ends_the_steps_too(caplog: pytest.LogCaptureFixture) -> None:
    async def broken() -> None:
        raise ValueError("a bug")

    async with running(settings(name="broken")) as breaking:
        reading = asyncio.create_task(_read_on(breaking))
        breaking.engine._commands.put_nowait(broken)
        with pytest.raises(RemoteError, match="a bug"):
            await asyncio.wait_for(reading, WAIT_S)
    assert "the engine failed" in caplog.text


async def _read_on(dying: Running) -> None:
    """The log's reader has the error; so does whoever looks at the engine's steps again."""
    while True:
        async for _ in dying.engine.steps():
            pass
        await asyncio.sleep(0.05)


WORKER = """
import asyncio, sys
from checks.vllm.engine.running import running, settings

async def main():
    async with running(settings(name="killed")) as engine:
        print(engine.core_pid, engine.engine._core.events.directory, flush=True)
        await asyncio.sleep(10_000)

asyncio.run(main())
"""


def _exists(path: bytes) -> bool:
    return Path(path.decode()).exists()


async def test_nothing_of_a_killed_worker_stays() -> None:
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WORKER, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[3]
    )
    assert worker.stdout is not None
    core_pid, directory = (await asyncio.wait_for(worker.stdout.readline(), 300.0)).split()
    descriptor = os.pidfd_open(int(core_pid))
    assert _exists(directory)
    worker.kill()
    await worker.wait()
    ended, _, _ = await asyncio.to_thread(select.select, [descriptor], [], [], WAIT_S)
    os.close(descriptor)
    assert ended
    assert not _exists(directory)
