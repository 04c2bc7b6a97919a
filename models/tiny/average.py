"""The mean of two models: `python models/tiny/average.py ONE OTHER --out FOLDER`.

Of two stages of one training it is better than either: the noise of their last steps cancels out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer
from train import save
from transformers import Qwen3ForCausalLM


@torch.no_grad()
def mean(one: Path, other: Path) -> Qwen3ForCausalLM:
    """A model whose every weight lies halfway between those of the two."""
    model, second = (Qwen3ForCausalLM.from_pretrained(each, dtype=torch.float32) for each in (one, other))
    for weight, further in zip(model.parameters(), second.parameters(), strict=True):
        weight.lerp_(further, 0.5)
    return model


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("one", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.one / "tokenizer.json"))
    save(mean(arguments.one, arguments.other), tokenizer, arguments.out)


if __name__ == "__main__":
    main()
