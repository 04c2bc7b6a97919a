"""Record what transformers computes for the random checkpoints: `python record_goldens.py`.

Run in an environment with torch and transformers beside penstock. Writes goldens.npz: per case, 64
greedy tokens after the prompt, and the logits from which the first, the 32nd and the last were taken.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from conftest import CASES, PROMPT, write_checkpoint
from transformers import AutoModelForCausalLM

STEPS = 64
KEPT = (0, 31, 63)
LEAST_GAP = 0.005  # between the two best tokens: five times what logits may differ by
LEAST_DIFFERENT = 12  # tokens among the 64, or the case would prove little


def record(folder: Path) -> tuple[list[int], np.ndarray]:
    """Greedy tokens and kept logits, in float32, without a KV cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    token_ids = list(PROMPT)
    kept = []
    for step in range(STEPS):
        with torch.no_grad():
            logits = model(torch.tensor([token_ids]), use_cache=False).logits[0, -1]
        best = logits.topk(2).values
        assert best[0] - best[1] > LEAST_GAP, (folder.name, step, best)
        if step in KEPT:
            kept.append(logits.numpy())
        token_ids.append(int(logits.argmax()))
    return token_ids[len(PROMPT) :], np.stack(kept)


def main() -> None:
    arrays = {}
    with tempfile.TemporaryDirectory() as root:
        for name, case in CASES.items():
            write_checkpoint(case, Path(root) / name)
            tokens, logits = record(Path(root) / name)
            print(f"{name}: {len(set(tokens))} different tokens: {tokens}")
            assert len(set(tokens)) >= LEAST_DIFFERENT, name
            arrays[f"{name} tokens"], arrays[f"{name} logits"] = np.array(tokens), logits
    np.savez_compressed(Path(__file__).parent / "goldens.npz", **arrays)


if __name__ == "__main__":
    main()
