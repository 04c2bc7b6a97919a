"""The model against transformers' recorded results, and against itself under every way of batching.

Against transformers, tokens must be equal and logits close. Between two ways of batching, everything
must be equal to the last bit: that is what makes outputs the same whichever worker computes them.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.engines.batch import Sequence
from penstock.engines.reference.model import rotations
from penstock.engines.reference.model_config import Rope

LOGIT_TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def goldens() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "goldens.npz") as arrays:
        return dict(arrays)


def generate(bench: Any, sequence: Sequence, count: int) -> list[int]:
    """Greedy tokens: everything without KV at once, then one by one."""
    for _ in range(count):
        bench.run(bench.rest(sequence))
    return sequence.token_ids[-count:]


def test_tokens_and_logits_equal_those_of_transformers(
    bench: Any, case_name: str, goldens: dict[str, np.ndarray], prompt: list[int]
) -> None:
    sequence = bench.sequence(prompt)
    for step, token_id in enumerate(goldens[f"{case_name} tokens"].tolist()):
        logits = bench.logits(bench.rest(sequence))[0]
        if step in (0, 31, 63):
            expected = goldens[f"{case_name} logits"][(0, 31, 63).index(step)]
            assert np.abs(logits - expected).max() < LOGIT_TOLERANCE
        assert bench.run(bench.rest(sequence)) == [token_id]


def test_logits_are_equal_bit_for_bit_however_a_text_is_chunked(bench: Any, prompt: list[int]) -> None:
    token_ids = [*prompt, *range(100)]  # crosses window widths of 64 keys
    whole = bench.logits(bench.rest(bench.sequence(token_ids)))
    for size in (1, 3, 7, 16, 64, 100):
        sequence = bench.sequence(token_ids, room=0)
        while len(token_ids) - sequence.computed > size:
            bench.run(bench.rest(sequence, size))
        assert np.array_equal(bench.logits(bench.rest(sequence)), whole), size
        bench.next_block = 40


def test_logits_are_equal_bit_for_bit_whatever_else_is_in_the_batch(bench: Any, prompt: list[int]) -> None:
    rng = random.Random(5)
    token_ids = [*prompt, *range(50)]
    whole = bench.logits(bench.rest(bench.sequence(token_ids, room=0)))[0]
    for others in (1, 2, 6, 7, 8, 17):
        bench.next_block = 0
        rows = [bench.rest(bench.sequence(token_ids, room=0))]
        for _ in range(others):
            other = bench.sequence(rng.choices(range(128), k=rng.randrange(1, 40)), room=0)
            rows.append(bench.rest(other, rng.choice([1, 5, None])))
        rng.shuffle(rows)
        at = [row.sequence.token_ids for row in rows if row.sample].index(token_ids)
        assert np.array_equal(bench.logits(*rows)[at], whole), others


def test_generation_is_equal_batched_interleaved_and_alone(bench: Any, prompt: list[int]) -> None:
    prompts = [prompt[:length] for length in (1, 4, 9, 17, 23)]
    alone = [generate(bench, bench.sequence(text, room=12), 10) for text in prompts]
    bench.next_block = 0
    sequences = [bench.sequence(text, room=12) for text in prompts]
    rng = random.Random(3)
    while any(len(s.token_ids) < s.prompt_len + 10 for s in sequences):
        unfinished = [s for s in sequences if len(s.token_ids) < s.prompt_len + 10]
        chosen = rng.sample(unfinished, rng.randint(1, len(unfinished)))
        bench.run(*(bench.rest(sequence, rng.choice([1, 2, 5, 30])) for sequence in chosen))
    assert [s.token_ids[s.prompt_len :][:10] for s in sequences] == alone


def test_a_prefix_hit_and_a_preemption_change_nothing(bench: Any, prompt: list[int]) -> None:
    size = bench.model.pool.block_size
    first = bench.sequence(prompt, room=24)
    expected = generate(bench, first, 20)
    hit = bench.sequence(prompt, room=24)
    shared = (len(prompt) - 1) // size
    hit.block_ids[:shared] = first.block_ids[:shared]
    hit.computed = shared * size
    assert generate(bench, hit, 20) == expected
    preempted = bench.sequence(prompt, room=24)
    generate(bench, preempted, 9)
    preempted.block_ids = bench.sequence(prompt, room=24).block_ids
    preempted.computed = 0
    generate(bench, preempted, 11)
    assert preempted.token_ids[len(prompt) :] == expected


def test_blocks_moved_as_bytes_continue_in_another_pool(
    bench: Any, make_bench: Any, folders: Any, case_name: str, prompt: list[int]
) -> None:
    """What a KV transfer does: the last, partial block moves as well."""
    here = bench.sequence(prompt)
    expected = generate(bench, here, 20)
    there = make_bench(folders[case_name])
    there.next_block = 11
    moved = there.sequence(prompt)
    moved.token_ids.append(expected[0])
    source, target = bench.model.pool.raw(), there.model.pool.raw()
    again = bench.sequence(prompt)
    bench.run(bench.rest(again))
    for old, new in zip(again.block_ids[:6], moved.block_ids[:6], strict=True):
        np.asarray(target)[new] = np.asarray(source)[old]
    moved.computed = len(prompt)
    assert generate(there, moved, 19) == expected[1:]


def test_what_a_block_held_before_cannot_be_seen(bench: Any, prompt: list[int]) -> None:
    expected = generate(bench, bench.sequence(prompt), 20)
    bench.model.pool.array[:] = np.nan
    bench.next_block = 0
    assert generate(bench, bench.sequence(prompt), 20) == expected


def test_a_batch_without_samples_gives_no_logits(bench: Any, prompt: list[int]) -> None:
    assert bench.logits(bench.rest(bench.sequence(prompt), 5)).shape == (0, 128)


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones() -> None:
    plain = rotations(Rope(10000.0), 64, 2)[1]
    scaled = rotations(Rope(10000.0, "llama3", 8.0, 1.0, 4.0, 64), 64, 2)[1]
    assert np.array_equal(plain[:3], scaled[:3])
    assert np.angle(scaled[-1]) == pytest.approx(np.angle(plain[-1]) / 8, rel=1e-5)
    assert np.allclose(np.abs(scaled), 1.0)
