"""The whole engine: the same tokens whatever the scheduler does with a request, and wherever it runs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.engines.reference.engine import ReferenceSettings, load_model, reference_engine
from penstock.engines.settings import SchedulerSettings
from penstock.engines.stepping import SteppingEngine
from penstock.errors import ConfigError
from penstock.ports import Pulled
from penstock.shapes import Attempt, FinishReason, Handoff, Output, Sampling
from tests import builders
from tests.cards import changed

GREEDY = Sampling(max_tokens=64, temperature=0.0, ignore_eos=True)
SEEDED = Sampling(
    max_tokens=64, temperature=1.3, top_p=0.95, seed=11, presence_penalty=0.4, logprobs=2, ignore_eos=True
)
WAIT_S = 20.0


class DirectTransfer:
    """A KvTransfer between two pools of this process: copies rows, and nothing else."""

    name = "direct"
    pools: dict[str, tuple[Any, list[int], Callable[[str], None]]] = {}

    def start(self, pool: memoryview, on_pulled: Callable[[str], None]) -> None:
        self._pool = np.asarray(pool)
        self._on_pulled = on_pulled

    def export(self, handoff_id: str, block_ids: Sequence[int]) -> tuple[str, bytes]:
        self.pools[handoff_id] = (self._pool, list(block_ids), self._on_pulled)
        return "here", b""

    def retract(self, handoff_id: str) -> bool:
        self.pools.pop(handoff_id, None)
        return True

    def pull(
        self,
        handoff: Handoff,
        source_indices: Sequence[int],
        block_ids: Sequence[int],
        timeout_s: float,
        on_done: Callable[[Pulled], None],
    ) -> None:
        source, exported, on_pulled = self.pools.pop(handoff.handoff_id)
        self._pool[list(block_ids)] = source[[exported[index] for index in source_indices]]
        on_pulled(handoff.handoff_id)
        on_done(Pulled(len(block_ids), self._pool.shape[1] * len(block_ids), 0.001))

    def stop(self) -> None:
        self.pools.clear()


class Client:
    """Submits attempts to a running engine and collects their outputs."""

    def __init__(self, engine: SteppingEngine) -> None:
        self.engine = engine
        self.outputs: dict[str, list[Output]] = {}
        self._ended: dict[str, asyncio.Event] = {}

    async def read(self) -> None:
        async for step in self.engine.steps():
            for output in step.outputs:
                self.outputs[output.attempt_id].append(output)
                if output.finish_reason is not None:
                    self._ended[output.attempt_id].set()

    async def run(self, attempt: Attempt) -> list[Output]:
        self.outputs[attempt.attempt_id] = []
        self._ended[attempt.attempt_id] = asyncio.Event()
        self.engine.submit(attempt)
        await asyncio.wait_for(self._ended[attempt.attempt_id].wait(), WAIT_S)
        return self.outputs[attempt.attempt_id]


@asynccontextmanager
async def running(folder: Path, *, transfer: bool = False, **changes: Any) -> AsyncIterator[Client]:
    settings = ReferenceSettings(str(folder), **{"block_size": 4, "kv_cache_bytes": 1 << 22, **changes})
    engine = reference_engine(settings, DirectTransfer() if transfer else None)
    await engine.start()
    client = Client(engine)
    async with asyncio.TaskGroup() as group:
        group.create_task(client.read())
        try:
            yield client
        finally:
            await engine.stop(0.0)


attempt = partial(builders.attempt, sampling=GREEDY)


def tokens(outputs: list[Output]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def logprobs(outputs: list[Output]) -> list[Any]:
    return [logprob for output in outputs for logprob in output.logprobs or []]


@pytest.fixture
def folder(folders: dict[str, Path], case_name: str) -> Path:
    return folders[case_name]


@pytest.fixture
def golden(case_name: str) -> list[int]:
    with np.load(Path(__file__).parent / "goldens.npz") as arrays:
        return list(map(int, arrays[f"{case_name} tokens"]))


async def test_greedy_tokens_are_those_of_transformers_also_after_a_prefix_hit(
    folder: Path, golden: list[int], prompt: list[int]
) -> None:
    async with running(folder) as client:
        first = await client.run(attempt("a", prompt))
        again = await client.run(attempt("b", prompt))
        later = await client.run(attempt("c", [*prompt, *golden[:30]]))
    assert tokens(first) == tokens(again) == golden
    assert (first[0].cached_tokens, again[0].cached_tokens) == (0, 20)
    assert later[0].cached_tokens == 52
    assert tokens(later)[:34] == golden[30:]
    assert first[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
async def test_chunks_and_preemption_change_nothing(
    folder: Path, prompt: list[int], sampling: Sampling, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [prompt[at:] + prompt[:at] for at in range(6)]
    async with running(folder) as client:
        alone = [
            await client.run(attempt(str(at), text, sampling=sampling)) for at, text in enumerate(prompts)
        ]
        block_bytes = load_model(client_settings(folder)).pool.shape[1]
    tight = SchedulerSettings(max_running=6, max_batch_tokens=7)
    caplog.set_level("INFO", logger="penstock.engine")
    async with running(folder, kv_cache_bytes=60 * block_bytes, scheduler=tight) as client:
        runs = (client.run(attempt(str(at), text, sampling=sampling)) for at, text in enumerate(prompts))
        crowded = await asyncio.gather(*runs)
    assert "preempted: " in caplog.text
    assert [tokens(outputs) for outputs in crowded] == [tokens(outputs) for outputs in alone]
    assert [logprobs(outputs) for outputs in crowded] == [logprobs(outputs) for outputs in alone]


def client_settings(folder: Path) -> ReferenceSettings:
    return ReferenceSettings(str(folder), block_size=4, kv_cache_bytes=1 << 22)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
async def test_disaggregated_is_aggregated(folder: Path, prompt: list[int], sampling: Sampling) -> None:
    async with running(folder) as client:
        expected = await client.run(attempt("a", prompt, sampling=sampling))
    async with running(folder, transfer=True) as prefill, running(folder, transfer=True) as decode:
        prefilled = await prefill.run(attempt("p", prompt, sampling=sampling, prefill_only=True))
        handoff = prefilled[-1].handoff
        assert prefilled[-1].finish_reason is FinishReason.PREFILLED
        continued = attempt("d", prompt, sampling=sampling, generated=tokens(prefilled), handoff=handoff)
        decoded = await decode.run(continued)
    assert (decoded[0].cached_tokens, decoded[0].transferred_blocks) == (23, 6)
    assert tokens(prefilled) + tokens(decoded) == tokens(expected)
    assert logprobs(prefilled) + logprobs(decoded) == logprobs(expected)


async def test_another_attempt_continues_after_a_lost_worker(folder: Path, prompt: list[int]) -> None:
    async with running(folder) as client:
        expected = tokens(await client.run(attempt("a", prompt, sampling=SEEDED)))
    async with running(folder) as client:
        rest = await client.run(attempt("b", prompt, sampling=SEEDED, generated=expected[:20]))
    assert tokens(rest) == expected[20:]


def test_the_card_tells_what_the_checkpoint_and_the_settings_say(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("{}")
    (checkpoint / "generation_config.json").write_text(json.dumps({"top_k": 5, "eos_token_id": [1, 2]}))
    loaded = load_model(client_settings(checkpoint))
    card, model = loaded.card, loaded.card.model
    assert (model.name, model.vocab_size, model.max_model_len) == ("model", 128, 256)
    assert (card.block_size, card.total_blocks) == (4, (1 << 22) // (3 * 2 * 4 * 2 * 32 * 4))
    assert (model.eos_token_ids, model.answering.sampling_defaults.top_k) == ([1, 2], 5)
    assert sorted(model.assets) == ["config.json", "generation_config.json", "tokenizer.json"]
    assert loaded.assets.get(model.assets["tokenizer.json"]) == b"{}"
    assert len(card.layout) == 64


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"block_size": 0}, "block_size"),
        ({"block_size": 1 << 20}, "block_size"),
        ({"kv_cache_bytes": 0}, "kv_cache_bytes"),
        ({"kv_cache_bytes": 1000}, "kv_cache_bytes"),
        ({"kv_cache_bytes": 1 << 70}, "kv_cache_bytes"),
        ({"max_model_len": 0}, "max_model_len"),
        ({"max_model_len": 257}, "max_model_len"),
        ({"max_model_len": 200, "kv_cache_bytes": 100_000}, "max_model_len"),
        ({"model": "/nowhere"}, "/nowhere"),
    ],
)
def test_bad_settings_are_refused(checkpoint: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_model(ReferenceSettings(**{"model": str(checkpoint), **changes}))


def test_model_whose_tokenizer_has_no_end_of_reasoning_is_refused_with_a_reasoning_parser(
    checkpoint: Path,
) -> None:
    (checkpoint / "tokenizer.json").write_text(
        json.dumps({"added_tokens": [{"id": 3, "content": "<think>"}]})
    )
    reasons = {"reasoning_parser": "qwen3", "reasoning_marks": ("<think>", "</think>")}
    with pytest.raises(ConfigError, match=r"parser qwen3: .* no token </think>"):
        load_model(ReferenceSettings(model=str(checkpoint), **reasons))


@pytest.mark.parametrize("max_batch_tokens", [3, 64])
async def test_a_prompts_log_probabilities_are_those_of_its_tokens_one_by_one(
    checkpoint: Path, max_batch_tokens: int
) -> None:
    """Also when the prompt is cached, which must not be made use of; and they come once."""
    prompt = [5, 9, 2, 7, 7, 1, 30, 4, 11]
    scheduler = SchedulerSettings(max_batch_tokens=max_batch_tokens, max_running=2)
    async with running(checkpoint, scheduler=scheduler) as client:
        expected = []
        for end in range(1, len(prompt)):
            forced = changed(GREEDY, max_tokens=1, allowed_token_ids=(prompt[end],), logprobs=20)
            (output,) = await client.run(attempt(f"prefix-{end}", prompt[:end], sampling=forced))
            expected += output.logprobs or []
        scoring = changed(GREEDY, max_tokens=3, prompt_logprobs=2)
        first, *rest = await client.run(attempt("whole", prompt, sampling=scoring))
        for found, alone in zip(first.prompt_logprobs or [], expected, strict=True):
            assert (found.token_id, found.logprob) == (alone.token_id, alone.logprob)
            assert found.top == alone.top[:2]
            ranks = {token_id: rank for rank, (token_id, _) in enumerate(alone.top, 1)}
            assert ranks.get(found.token_id) == (found.rank if found.rank <= len(ranks) else None)
        assert first.cached_tokens == 0
        assert [output.prompt_logprobs for output in rest] == [None] * len(rest)
        known = attempt("continued", prompt, sampling=scoring, generated=first.token_ids)
        outputs = await client.run(known)
        assert [output.prompt_logprobs for output in outputs] == [None] * len(outputs)
        assert tokens([first, *rest]) == [*first.token_ids, *tokens(outputs)]
