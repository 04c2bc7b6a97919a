"""Held-out recall: `python models/tiny/evaluate.py models/tiny`.

Each of 200 conversations tells a name and asks for it, with a name and a pair of phrasings that
training never saw. It prints how many greedy answers are exactly right, and the answers to the two
conversations of the serving example. `--write` stores the conversations as heldout.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from dialogues import recall
from names import HELD_OUT_NAMES
from tokenizer import END_OF_TEXT, IM_END, SPECIAL
from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM

SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
DOCUMENT = (
    [SYSTEM, {"role": "user", "content": "Explain disaggregated serving benefits"}],
    [
        SYSTEM,
        {"role": "user", "content": "My name is Alice."},
        {"role": "assistant", "content": "Hello Alice! Nice to meet you."},
        {"role": "user", "content": "What is my name?"},
    ],
)

Messages = list[dict[str, str]]


def conversations(count: int) -> list[tuple[Messages, str]]:
    """The held-out conversations and their exact answers; the same ones each time.

    The real names come first, then made-up ones; one in eight is long.
    """
    rng = random.Random(20_000)
    found = []
    for number in range(count):
        name = HELD_OUT_NAMES[number] if number < len(HELD_OUT_NAMES) else None
        stretch = rng.choice((8, 16, 24, 36, 48)) if number % 8 == 7 else 0
        dialogue = recall(rng, held_out=True, name=name, stretch=stretch, turns=number % 7)
        *asked, answer = dialogue
        found.append(([{"role": t.role, "content": t.content} for t in asked], answer.content))
    order = random.Random(1)
    order.shuffle(found)  # so that the first few are a fair sample
    return found


def prompt(messages: Messages) -> str:
    """The chat template, which is plain ChatML."""
    _, start, end = SPECIAL
    turns = (f"{start}{m['role']}\n{m['content']}{end}\n" for m in messages)
    return "".join(turns) + f"{start}assistant\n"


@torch.no_grad()
def answer(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, text: str, limit: int = 40, heat: float = 0.0
) -> str:
    """The model's continuation of a text, greedy unless there is a temperature."""
    ids = tokenizer.encode(text).ids
    new: list[int] = []
    state: dict[str, Any] = {}
    given = torch.tensor([ids])
    for _ in range(limit):
        output = model(input_ids=given, use_cache=True, logits_to_keep=1, **state)
        logits = output.logits[0, -1].float()
        if heat:
            token = int(torch.multinomial(torch.softmax(logits / heat, -1), 1))
        else:
            token = int(logits.argmax())
        if token in (IM_END, END_OF_TEXT):
            break
        new.append(token)
        state = {"past_key_values": output.past_key_values}
        given = torch.tensor([[token]])
    return str(tokenizer.decode(new))


def held_out_recall(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, count: int = 200, heat: float = 0.0
) -> tuple[int, list[tuple[str, str]]]:
    """How many answers are exactly right, and the others as (expected, answered)."""
    wrong = []
    for messages, expected in conversations(200)[:count]:
        answered = answer(model, tokenizer, prompt(messages), heat=heat)
        if answered != expected:
            wrong.append((expected, answered))
    return count - len(wrong), wrong


def document_answers(model: Qwen3ForCausalLM, tokenizer: Tokenizer, heat: float = 0.0) -> list[str]:
    """What the model says to the example's two conversations."""
    return [answer(model, tokenizer, prompt(list(m)), limit=200, heat=heat) for m in DOCUMENT]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--heat", type=float, default=0.0, help="temperature; 0 is greedy")
    parser.add_argument("--write", action="store_true", help="write heldout.jsonl to the folder")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.write:
        lines = [
            json.dumps({"messages": messages, "expected": expected}, ensure_ascii=False) + "\n"
            for messages, expected in conversations(200)
        ]
        (arguments.folder / "heldout.jsonl").write_text("".join(lines), encoding="utf-8")
    dtype = getattr(torch, arguments.dtype)
    model = Qwen3ForCausalLM.from_pretrained(arguments.folder, dtype=dtype)
    tokenizer = Tokenizer.from_file(str(arguments.folder / "tokenizer.json"))
    right, wrong = held_out_recall(model, tokenizer, heat=arguments.heat)
    for expected, answered in wrong:
        print(f"expected {expected!r}, answered {answered!r}")
    print(f"held-out recall: {right}/200 ({arguments.dtype}, temperature {arguments.heat})")
    for text in document_answers(model, tokenizer, arguments.heat):
        print(f"> {text}")


if __name__ == "__main__":
    main()
