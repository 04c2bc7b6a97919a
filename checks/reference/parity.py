"""Logits and greedy tokens beside transformers itself: `pytest checks/reference/parity.py`.

Not collected by a plain run, because it needs torch and transformers; without them it fails. Beyond the
recorded goldens it tries other random weights, and the shipped model on real text.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

TOLERANCE = 1e-3
STEPS = 32
SHIPPED = Path(__file__).parents[2] / "models" / "tiny"
DIALOGUE = (
    "<|im_start|>user\nHello! My name is Ottoline.<|im_end|>\n"
    "<|im_start|>assistant\nNice to meet you.<|im_end|>\n"
    "<|im_start|>user\nWhat is my name?<|im_end|>\n<|im_start|>assistant\n"
)


def compare(folder: Path, token_ids: list[int], bench: Any) -> None:
    """Follow transformers' greedy choice, and compare all logits on the way. Where two tokens are nearly
    equal, either may come out on top."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    sequence = bench.sequence(token_ids)
    for _ in range(STEPS):
        with torch.no_grad():
            expected = model(torch.tensor([sequence.token_ids]), use_cache=False).logits[0, -1].numpy()
        logits = bench.logits(bench.rest(sequence))[0]
        assert np.abs(logits - expected).max() < TOLERANCE
        sequence.computed = len(sequence.token_ids)
        sequence.token_ids.append(int(expected.argmax()))


@pytest.mark.parametrize("seed", [101, 102, 103])
def test_random_checkpoints(
    make_checkpoint: Any, make_bench: Any, case: Any, tmp_path: Path, seed: int
) -> None:
    make_checkpoint(replace(case, seed=seed), tmp_path)
    prompt = np.random.default_rng(seed).integers(0, 128, 90).tolist()
    compare(tmp_path, prompt, make_bench(tmp_path))


def test_shipped_model(make_bench: Any) -> None:
    token_ids = Tokenizer.from_file(str(SHIPPED / "tokenizer.json")).encode(DIALOGUE).ids
    compare(SHIPPED, token_ids, make_bench(SHIPPED))
