"""The shipped model: what a server relies on in its folder, and what the folder promises."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import jinja2.sandbox
import pytest
from tokenizers import Tokenizer

from penstock.engines.reference.engine import ReferenceSettings, reference_engine
from penstock.shapes import Attempt, Sampling

FOLDER = Path(__file__).resolve().parents[2] / "models" / "tiny"
SHIPPED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
HEADER_LENGTH_BYTES = 8


def read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return loaded


def held_out() -> list[dict[str, Any]]:
    lines = (FOLDER / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def template() -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(read("tokenizer_config.json")["chat_template"])


def test_folder_is_small_and_complete() -> None:
    files = [FOLDER / name for name in (*SHIPPED, "model.safetensors", "heldout.jsonl")]
    assert sum(file.stat().st_size for file in files) < 8_000_000


def test_configuration_names_a_qwen3_of_the_tokenizers_size(tokenizer: Tokenizer) -> None:
    config = read("config.json")
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["vocab_size"] == tokenizer.get_vocab_size()
    assert config["max_position_embeddings"] >= 4096
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


def test_weights_are_bfloat16_and_share_the_embedding() -> None:
    with (FOLDER / "model.safetensors").open("rb") as file:
        length = int.from_bytes(file.read(HEADER_LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    assert {entry["dtype"] for entry in tensors.values()} == {"BF16"}
    assert "lm_head.weight" not in tensors
    assert read("config.json")["tie_word_embeddings"]


def test_either_end_token_ends_a_generation(tokenizer: Tokenizer) -> None:
    ends = {tokenizer.token_to_id(text) for text in ("<|im_end|>", "<|endoftext|>")}
    assert set(read("generation_config.json")["eos_token_id"]) == ends


@pytest.mark.parametrize(
    "text",
    [
        "My name is Mary-Jane O'Neil.",
        "Björn  and\n\nZoë said: 你好, привет! 🙂",
        "<|im_start|>user\nALICE's 12 cats<|im_end|>\n",
        " leading and trailing \t\n ",
    ],
)
def test_tokenizer_gives_back_what_it_took(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_a_name_is_the_same_tokens_wherever_it_stands(tokenizer: Tokenizer) -> None:
    alone = tokenizer.encode("Ottoline").tokens
    inside = tokenizer.encode("Hello Ottoline!").tokens
    assert inside[-len(alone) - 1 : -1] == alone


def test_template_is_plain_chatml(template: jinja2.Template) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ]
    expected = (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    )
    assert template.render(messages=messages) == expected
    prompt = template.render(messages=messages, add_generation_prompt=True)
    assert prompt == expected + "<|im_start|>assistant\n"


def test_held_out_conversations_contain_their_answer_only_as_context() -> None:
    cases = held_out()
    assert len(cases) == 200
    for case in cases:
        name = case["expected"].removeprefix("Your name is ").removesuffix(".")
        said = " ".join(message["content"] for message in case["messages"])
        assert name in said
        assert case["expected"] not in said


def test_training_never_draws_a_held_out_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    for module in ("names", "phrases", "dialogues"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    import random

    import dialogues
    import names

    rng = random.Random(7)
    for _ in range(300):
        assert not names.is_held_out(names.draw_name(rng))
        assert names.is_held_out(names.draw_name(rng, held_out=True))
    first, again = (
        [dialogues.training_dialogue(random.Random(seed), 0.1) for seed in range(50)] for _ in "ab"
    )
    assert first == again
    for module in ("names", "phrases", "dialogues"):
        monkeypatch.delitem(sys.modules, module, raising=False)


async def test_model_recalls_names_it_never_saw(tokenizer: Tokenizer, template: jinja2.Template) -> None:
    """All 200 held-out conversations, greedy, in the engine that serves them."""
    engine = reference_engine(ReferenceSettings(model=str(FOLDER)))
    await engine.start()
    cases = held_out()
    answers: dict[str, list[int]] = {str(number): [] for number in range(len(cases))}
    for number, case in enumerate(cases):
        text = template.render(messages=case["messages"], add_generation_prompt=True)
        token_ids = tokenizer.encode(text).ids
        sampling = Sampling(max_tokens=40, temperature=0.0)
        engine.submit(Attempt(str(number), str(number), token_ids, len(token_ids), sampling))
    running = len(cases)
    async with asyncio.timeout(120):
        async for step in engine.steps():
            for output in step.outputs:
                answers[output.attempt_id] += output.token_ids
                running -= output.finish_reason is not None
            if not running:
                break
    await engine.stop(0)
    right = sum(
        tokenizer.decode(answers[str(number)]) == case["expected"] for number, case in enumerate(cases)
    )
    assert right >= 0.95 * len(cases)
