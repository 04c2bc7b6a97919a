"""CPU time of the reference engine's steps: `OMP_NUM_THREADS=1 python benchmark.py`.

Random weights in the shipped model's geometry (Qwen3, 4 layers, hidden 192, vocabulary 1024). CPU time of
the computing thread, the least of several runs: what a quiet machine would take.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from conftest import Case, load_model, write_checkpoint

from penstock.engines.batch import BatchRow, Sequence
from penstock.engines.reference.runner import ReferenceRunner
from penstock.shapes import Sampling

SHIPPED = Case(
    "Qwen3ForCausalLM",
    "BF16",
    config={
        "vocab_size": 1024,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
)
BLOCK_SIZE, TOTAL_BLOCKS = 16, 4096
REPEATS = 15
SAMPLINGS = {
    "greedy": Sampling(max_tokens=1, temperature=0.0),
    "top_p 0.9": Sampling(max_tokens=1, temperature=0.7, top_p=0.9),
}


def least_ms(step: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.thread_time()
        step()
        times.append(time.thread_time() - start)
    return min(times) * 1e3


def sequence(rng: np.random.Generator, length: int, number: int, sampling: Sampling) -> Sequence:
    blocks = -(-length // BLOCK_SIZE)
    first = number * blocks
    token_ids = rng.integers(0, 1024, length).tolist()
    return Sequence("a", token_ids, length, sampling, list(range(first, first + blocks)))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(SHIPPED, Path(folder))
        runner = ReferenceRunner(load_model(Path(folder), BLOCK_SIZE, TOTAL_BLOCKS), ())
    rng = np.random.default_rng(0)
    for name, sampling in SAMPLINGS.items():
        for size in (1, 8, 32, 64):
            sequences = [sequence(rng, int(rng.integers(250, 350)), at, sampling) for at in range(size)]
            rows = [BatchRow(one, len(one.token_ids) - 1, 1, True) for one in sequences]
            print(f"decode {name}, batch {size}: {least_ms(lambda rows=rows: runner.run(rows)):.2f} ms")
    for length in (512, 2048):
        rows = [BatchRow(sequence(rng, length, 0, SAMPLINGS["greedy"]), 0, length, True)]
        spent_ms = least_ms(lambda rows=rows: runner.run(rows))
        print(f"prefill {length}: {spent_ms:.1f} ms, {length / spent_ms * 1e3:,.0f} tokens/s")


if __name__ == "__main__":
    main()
