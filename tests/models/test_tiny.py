"""The shipped model: what a server relies on in its folder, and what the folder promises."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2.sandbox
import pytest
from tokenizers import Tokenizer

from penstock.engines.reference.engine import ReferenceSettings, reference_engine
from penstock.shapes import Attempt, Sampling, StructuredOutput

FOLDER = Path(__file__).resolve().parents[2] / "models" / "tiny"
SHIPPED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
HEADER_LENGTH_BYTES = 8
CALLS_RIGHT = {1: 0.75, 2: 0.6, 3: 0.6}
"""By the number of tools offered, the share of held-out calls that must be exactly right."""
ANSWERS_RIGHT = 0.6
"""The share of held-out answers from results that must be exactly right."""
JSON_RIGHT = 0.8
"""The share of held-out names and ages that must stand in a forced object, exactly."""


def read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return loaded


def held_out(name: str = "heldout.jsonl") -> list[dict[str, Any]]:
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def training_text(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The modules that make the training's text can be imported, and are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    modules = [file.stem for file in FOLDER.glob("*.py")]
    for module in modules:
        monkeypatch.delitem(sys.modules, module, raising=False)
    yield
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def template() -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(read("tokenizer_config.json")["chat_template"])


def test_folder_is_small_and_complete() -> None:
    files = [
        FOLDER / name for name in (*SHIPPED, "model.safetensors", "heldout.jsonl", "heldout_tools.jsonl")
    ]
    assert sum(file.stat().st_size for file in files) < 8_000_000


def test_configuration_names_a_qwen3_of_the_tokenizers_size(tokenizer: Tokenizer) -> None:
    config = read("config.json")
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["vocab_size"] == tokenizer.get_vocab_size()
    assert config["max_position_embeddings"] == read("tokenizer_config.json")["model_max_length"] == 32_768
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


@pytest.mark.usefixtures("training_text")
def test_training_never_draws_a_held_out_name() -> None:
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


@pytest.mark.usefixtures("training_text")
def test_trained_text_of_tools_and_calls_is_what_the_template_writes(template: jinja2.Template) -> None:
    import tools

    for seed in range(40):
        rng = random.Random(seed)
        offered = tools.draw_tools(rng, 1 + seed % 3)
        question, calls = tools.question_and_calls(rng, offered[0], False)
        turns, results = tools.results_turns(rng, calls)
        trained = [
            tools.system_turn(rng, offered),
            tools.Turn.of("user", question),
            tools.calls_turn(calls),
        ]
        asked = [
            {"id": "c", "function": {"name": call.tool.name, "arguments": call.arguments}} for call in calls
        ]
        begun, _, _ = trained[0].content.rpartition("\n\n" + tools.INTRODUCTION)
        messages = [
            *([{"role": "system", "content": begun}] if begun else []),
            {"role": "user", "content": question},
            {"role": "assistant", "content": None, "tool_calls": asked},
            *({"role": "tool", "content": result} for result in results),
            {"role": "assistant", "content": turns[1].content},
        ]
        rendered = template.render(messages=messages, tools=[tool.definition for tool in offered])
        assert rendered == "".join(
            f"<|im_start|>{turn.role}\n{turn.content}<|im_end|>\n" for turn in [*trained, *turns]
        )


async def answers_to(
    prompts: list[list[int]], max_tokens: int, structured: list[StructuredOutput] | None = None
) -> list[list[int]]:
    """Greedy answers of the engine that serves the model."""
    engine = reference_engine(ReferenceSettings(model=str(FOLDER)))
    await engine.start()
    answers: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    for number, token_ids in enumerate(prompts):
        sampling = Sampling(
            max_tokens=max_tokens, temperature=0.0, structured=structured[number] if structured else None
        )
        engine.submit(Attempt(str(number), str(number), token_ids, len(token_ids), sampling))
    running = len(prompts)
    async with asyncio.timeout(240):
        async for step in engine.steps():
            for output in step.outputs:
                answers[output.attempt_id] += output.token_ids
                running -= output.finish_reason is not None
            if not running:
                break
    await engine.stop(0)
    return list(answers.values())


async def right_answers(
    cases: list[dict[str, Any]], tokenizer: Tokenizer, template: jinja2.Template, max_tokens: int
) -> int:
    prompts = [
        tokenizer.encode(
            template.render(messages=case["messages"], tools=case.get("tools"), add_generation_prompt=True)
        ).ids
        for case in cases
    ]
    answers = await answers_to(prompts, max_tokens)
    return sum(tokenizer.decode(ids) == case["expected"] for ids, case in zip(answers, cases, strict=True))


async def test_model_recalls_names_it_never_saw(tokenizer: Tokenizer, template: jinja2.Template) -> None:
    cases = held_out()
    assert await right_answers(cases, tokenizer, template, 40) >= 0.95 * len(cases)


@pytest.mark.parametrize("offered", CALLS_RIGHT)
async def test_model_calls_the_right_one_of_tools_it_never_saw(
    tokenizer: Tokenizer, template: jinja2.Template, offered: int
) -> None:
    asked = [case for case in held_out("heldout_tools.jsonl") if case["messages"][-1]["role"] == "user"]
    cases = [case for case in asked if len(case["tools"]) == offered]
    assert len(cases) >= 15
    assert await right_answers(cases, tokenizer, template, 160) >= CALLS_RIGHT[offered] * len(cases)


async def test_model_passes_on_results_it_never_saw(
    tokenizer: Tokenizer, template: jinja2.Template
) -> None:
    cases = [case for case in held_out("heldout_tools.jsonl") if case["messages"][-1]["role"] == "tool"]
    assert len(cases) == 100
    assert await right_answers(cases, tokenizer, template, 160) >= ANSWERS_RIGHT * len(cases)


async def test_model_fills_a_forced_json_shape_from_the_text(
    tokenizer: Tokenizer, template: jinja2.Template
) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    names = [case["expected"].removeprefix("Your name is ").removesuffix(".") for case in held_out()[:60]]
    people = [{"name": name, "age": 17 + number} for number, name in enumerate(names)]
    prompts = []
    for person in people:
        messages = [{"role": "user", "content": "{name} is {age} years old.".format(**person)}]
        prompts.append(tokenizer.encode(template.render(messages=messages, add_generation_prompt=True)).ids)
    wanted = [StructuredOutput("json", json.dumps(schema)) for _ in people]
    texts = [tokenizer.decode(ids) for ids in await answers_to(prompts, 100, wanted)]
    right = sum(
        text == json.dumps(person, ensure_ascii=False) for text, person in zip(texts, people, strict=True)
    )
    assert right >= JSON_RIGHT * len(people)
