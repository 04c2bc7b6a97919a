"""What the model can do: `python models/tiny/evaluate.py models/tiny`.

Each of 200 conversations tells a name and asks for it, with a name and a pair of phrasings that
training never saw. Each of 100 questions names something that training never saw, for one of up to three
tools; in 100 more the tool has answered. It prints how many greedy answers are exactly right, and the
answers to the two conversations of the serving example. `--write` stores all of these conversations as
heldout.jsonl and heldout_tools.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2.sandbox
import torch
from dialogues import recall
from names import HELD_OUT_NAMES
from tokenizer import CHAT_TEMPLATE, END_OF_TEXT, IM_END
from tokenizers import Tokenizer
from tools import Call, calls_turn, draw_count, draw_tools, question_and_calls, results_turns
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

Json = dict[str, Any]
Messages = list[Json]


@dataclass(frozen=True)
class Case:
    """A conversation and the exact answer to it. `tools` are what the client offers."""

    messages: Messages
    expected: str
    tools: list[Json] = field(default_factory=list)


def conversations(count: int) -> list[Case]:
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
        found.append(Case([{"role": t.role, "content": t.content} for t in asked], answer.content))
    order = random.Random(1)
    order.shuffle(found)  # so that the first few are a fair sample
    return found


def tool_conversations(count: int) -> list[Case]:
    """Held-out questions for tools, and as many conversations in which the tools have answered."""
    rng = random.Random(30_000)
    asked, answered = [], []
    for number in range(count):
        tools = draw_tools(rng, draw_count(rng))
        text, calls = question_and_calls(rng, rng.choice(tools), held_out=True)
        (_, said), results = results_turns(rng, calls)
        definitions = [tool.definition for tool in tools]
        messages: Messages = [SYSTEM] if number % 2 else []
        messages.append({"role": "user", "content": text})
        asked.append(Case(messages, calls_turn(calls).content, definitions))
        told: Messages = [
            {"role": "tool", "tool_call_id": str(at), "content": result}
            for at, result in enumerate(results)
        ]
        answered.append(Case([*messages, _calling(calls), *told], said.content, definitions))
    return [*asked, *answered]


def _calling(calls: list[Call]) -> Json:
    """The message that a client sends back for an answer with calls."""
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": str(number),
                "type": "function",
                "function": {"name": call.tool.name, "arguments": dict(call.arguments)},
            }
            for number, call in enumerate(calls)
        ],
    }


def prompt(messages: Messages, tools: list[Json] | None = None) -> str:
    """The chat template."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string(CHAT_TEMPLATE)
    return template.render(messages=messages, tools=tools, add_generation_prompt=True)


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


def wrong_answers(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, cases: list[Case], heat: float = 0.0
) -> list[tuple[str, str]]:
    """The answers that are not exactly right, as (expected, answered)."""
    wrong = []
    for case in cases:
        text = prompt(case.messages, case.tools)
        answered = answer(model, tokenizer, text, limit=160, heat=heat)
        if answered != case.expected:
            wrong.append((case.expected, answered))
    return wrong


def document_answers(model: Qwen3ForCausalLM, tokenizer: Tokenizer, heat: float = 0.0) -> list[str]:
    """What the model says to the example's two conversations."""
    return [answer(model, tokenizer, prompt(list(m)), limit=200, heat=heat) for m in DOCUMENT]


def _stored(case: Case) -> Json:
    stored = {"messages": case.messages, "expected": case.expected}
    return {"tools": case.tools, **stored} if case.tools else stored


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--heat", type=float, default=0.0, help="temperature; 0 is greedy")
    parser.add_argument("--write", action="store_true", help="write both files to the folder")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    recalls, with_tools = conversations(200), tool_conversations(100)
    calls, answers = with_tools[:100], with_tools[100:]
    sets = {"recall": recalls}
    sets |= {f"calls, tools offered: {n}": [c for c in calls if len(c.tools) == n] for n in (1, 2, 3)}
    sets["answers from results"] = answers
    if arguments.write:
        for file, cases in (("heldout.jsonl", recalls), ("heldout_tools.jsonl", with_tools)):
            lines = [json.dumps(_stored(case), ensure_ascii=False) + "\n" for case in cases]
            (arguments.folder / file).write_text("".join(lines), encoding="utf-8")
    dtype = getattr(torch, arguments.dtype)
    model = Qwen3ForCausalLM.from_pretrained(arguments.folder, dtype=dtype)
    tokenizer = Tokenizer.from_file(str(arguments.folder / "tokenizer.json"))
    for what, cases in sets.items():
        wrong = wrong_answers(model, tokenizer, cases, arguments.heat)
        for expected, answered in wrong:
            print(f"expected {expected!r}, answered {answered!r}")
        right = len(cases) - len(wrong)
        print(f"held-out {what}: {right}/{len(cases)} ({arguments.dtype}, temperature {arguments.heat})")
    for text in document_answers(model, tokenizer, arguments.heat):
        print(f"> {text}")


if __name__ == "__main__":
    main()
