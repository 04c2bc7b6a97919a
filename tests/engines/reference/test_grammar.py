"""Structured output: what a grammar allows, and that an answer held to one can be moved and continued."""

from __future__ import annotations

import copy
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from penstock.engines.batch import Sequence
from penstock.engines.reference.engine import ReferenceSettings, load_model
from penstock.engines.reference.grammar import MAX_KEPT, Grammars, InvalidGrammar, closed
from penstock.engines.reference.sampler import Sampler
from penstock.engines.reference.tiles import Floats
from penstock.frontend.parsers.built_in import HERMES, BuiltInChatParser
from penstock.shapes import FinishReason, Sampling, StructuredOutput
from tests import builders
from tests.engines.reference.test_engine import running, tokens

TINY = Path("models/tiny")
TOKENIZER = Tokenizer.from_file(str(TINY / "tokenizer.json"))
VOCAB = 1024
EOS = 2
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 999}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
AS_PERSON = StructuredOutput("json", json.dumps(PERSON))


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars((TINY / "tokenizer.json").read_text(), VOCAB, [EOS])


def written(grammars: Grammars, wanted: StructuredOutput, seed: int = 0, **sampling: Any) -> str:
    """A text that the sampler draws from random logits."""
    sampler, random = Sampler([EOS], grammars), np.random.default_rng(seed)
    sequence = Sequence("a", [5], 1, Sampling(max_tokens=200, structured=wanted, seed=seed, **sampling))
    for _ in range(200):
        logits: Floats = random.normal(0, 2, (1, VOCAB)).astype(np.float32)
        token_id = sampler.sample(logits, [sequence])[0].token_id
        if token_id == EOS:
            return str(TOKENIZER.decode(sequence.token_ids[1:], skip_special_tokens=False))
        sequence.token_ids.append(token_id)
    raise AssertionError(f"no end: {TOKENIZER.decode(sequence.token_ids[1:])}")


def test_one_of_several_schemas_that_overlap_counts_as_any_of_them(grammars: Grammars) -> None:
    options = [{"type": "integer", "minimum": 1, "maximum": 5}, {"type": "integer", "enum": [3, 7]}]
    wanted = StructuredOutput("json", json.dumps({"oneOf": options}))
    assert int(written(grammars, wanted)) in (1, 2, 3, 4, 5, 7)


@pytest.mark.parametrize("seed", range(5))
def test_json_schema_is_obeyed(grammars: Grammars, seed: int) -> None:
    person = json.loads(written(grammars, AS_PERSON, seed))
    assert set(person) == {"name", "age"}
    assert (len(person["name"]) <= 8, person["age"] <= 999) == (True, True)


ADDRESS = {"type": "object", "properties": {"no": {"enum": [1]}}, "required": ["no"]}


@pytest.mark.parametrize(
    "schema",
    [
        ADDRESS,
        {"properties": {"at": ADDRESS}, "required": ["at"]},
        {"properties": {"properties": ADDRESS}, "required": ["properties"]},
        {"properties": {"at": {"$ref": "#/$defs/A"}}, "required": ["at"], "$defs": {"A": ADDRESS}},
        {"type": "array", "minItems": 1, "maxItems": 1, "items": {"anyOf": [ADDRESS]}},
    ],
)
def test_objects_have_the_properties_that_they_name(grammars: Grammars, schema: dict[str, Any]) -> None:
    for seed in range(5):
        found = written(grammars, StructuredOutput("json", json.dumps(schema)), seed)
        assert found in ('{"no": 1}', '{"at": {"no": 1}}', '[{"no": 1}]', '{"properties": {"no": 1}}')


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"$defs": {"properties": {"type": "string"}}},
        {**ADDRESS, "additionalProperties": {}},
        {**ADDRESS, "patternProperties": {"^x": {}}},
        {**ADDRESS, "minProperties": 2},
        {**ADDRESS, "required": ["no", "street"]},
        {**ADDRESS, "anyOf": [{"required": ["no"]}]},
        {"allOf": [ADDRESS, {"properties": {"street": {}}}]},
        {"allOf": [{"$ref": "#/$defs/A"}, {"required": ["street"]}], "$defs": {"A": ADDRESS}},
        {"properties": {"x": {"$ref": "#/$defs/A", "properties": {}}}, "$defs": {"A": ADDRESS}},
        {"enum": [ADDRESS], "default": ADDRESS},
        True,
    ],
)
def test_objects_that_may_have_others_stay_open(schema: Any) -> None:
    assert closed(copy.deepcopy(schema)) == schema


@pytest.mark.parametrize("parameters", [None, {}, {"type": "object", "properties": {}}])
def test_forced_call_of_a_tool_without_parameters_has_no_arguments(
    grammars: Grammars, parameters: Any
) -> None:
    tools = [{"type": "function", "function": {"name": "stop", "parameters": parameters}}]
    choice = {"type": "function", "function": {"name": "stop"}}
    call = BuiltInChatParser(HERMES, "", None).begin({"tools": tools, "tool_choice": choice})
    wanted = call.structured([])
    assert wanted is not None
    assert written(grammars, wanted) == "{}"


def with_definition(name: str, unit: list[str]) -> dict[str, Any]:
    """A tool whose parameters refer to a definition, and that to the parameters, as in a tree."""
    node = {"properties": {"unit": {"enum": unit}, "next": {"$ref": "#"}}, "required": ["unit"]}
    parameters = {
        "type": "object",
        "properties": {"node": {"$ref": "#/$defs/Node"}},
        "required": ["node"],
        "additionalProperties": False,
        "$defs": {"Node": {"type": "object", "additionalProperties": False, **node}},
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def test_forced_calls_obey_definitions_of_a_schema_with_a_name_of_its_own(grammars: Grammars) -> None:
    parameters = {
        "$id": "https://example.com/one.json",
        "definitions": {"One": {"const": 1}},
        "properties": {"a": {"$ref": "#/definitions/One"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "get", "parameters": parameters}}]
    call = BuiltInChatParser(HERMES, "", None).begin({"tools": tools, "tool_choice": "required"})
    wanted = call.structured([])
    assert wanted is not None
    first = json.loads(written(grammars, wanted))[0]
    assert first == {"name": "get", "parameters": {"a": 1}}


@pytest.mark.parametrize("seed", range(5))
def test_forced_calls_obey_the_definitions_of_their_own_tool(grammars: Grammars, seed: int) -> None:
    units = {"first": ["a", "b"], "second": ["c"]}  # both tools name their definition `Node`
    tools = [with_definition(name, unit) for name, unit in units.items()]
    request = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    parser = BuiltInChatParser(HERMES, "", None).begin(request)
    wanted = parser.structured([])
    assert wanted is not None
    [call] = json.loads(written(grammars, wanted, seed))
    node = call["parameters"]["node"]
    while node is not None:
        assert node["unit"] in units[call["name"]]
        node = node.get("next", {}).get("node")


@pytest.mark.parametrize(
    ("kind", "spec", "allowed"),
    [
        ("regex", "[0-3]{2}x?", {f"{a}{b}{x}" for a in "0123" for b in "0123" for x in ("", "x")}),
        ("choice", '["yes", "n\\u00f8"]', {"yes", "nø"}),
        ("grammar", 'root ::= "a" ("b" | "c")', {"ab", "ac"}),
        ("grammar", 'start: "a" | "b" "c"', {"a", "bc"}),
        ("grammar", '?start: x\n?x: "a" | "b" x', {"b" * n + "a" for n in range(200)}),
    ],
)
def test_other_kinds_are_obeyed(grammars: Grammars, kind: Any, spec: str, allowed: set[str]) -> None:
    assert {written(grammars, StructuredOutput(kind, spec), seed) for seed in range(10)} <= allowed


@pytest.mark.parametrize("text", ["<|im_start|>a", "a<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize("kind", ["choice", "regex", "grammar", "json"])
def test_name_of_a_special_token_is_written_as_text(grammars: Grammars, kind: Any, text: str) -> None:
    specs = {
        "choice": json.dumps([text]),
        "regex": re.escape(text),
        "grammar": f"start: {json.dumps(text)}",
        "json": json.dumps({"const": text}),
    }
    found = written(grammars, StructuredOutput(kind, specs[kind]))
    assert found == (json.dumps(text) if kind == "json" else text)


def test_white_space_is_as_asked_for(grammars: Grammars) -> None:
    schema = json.dumps({"type": "array", "items": {"enum": [1]}, "minItems": 2, "maxItems": 2})
    texts = {
        written(grammars, StructuredOutput("json", schema, **options), seed)
        for options in ({"disable_any_whitespace": True}, {"whitespace_pattern": "[_]{1,2}"}, {})
        for seed in range(8)
    }
    assert {"[1,1]", "[1, 1]"} < texts
    assert all(set(text) <= set("[1, _]") for text in texts)
    assert any("_" in text and " " not in text for text in texts)
    with pytest.raises(InvalidGrammar):
        grammars.begin(StructuredOutput("json", schema, whitespace_pattern="("))


def test_structural_tag_is_obeyed_after_its_trigger(grammars: Grammars) -> None:
    tag = {"begin": "<tool>", "schema": {"enum": [7]}, "end": "</tool>"}
    wanted = StructuredOutput("structural_tag", json.dumps({"structures": [tag], "triggers": ["<tool"]}))
    text = "I call <tool"
    while not text.endswith("</tool>"):
        begun = TOKENIZER.encode(text, add_special_tokens=False).ids
        sequence = Sequence("a", [5, *begun], 1, Sampling(max_tokens=99, temperature=0, structured=wanted))
        forced = Sampler([EOS], grammars).sample(np.zeros((1, VOCAB), np.float32), [sequence])[0]
        text += TOKENIZER.decode([forced.token_id], skip_special_tokens=False)
    assert text == "I call <tool>7</tool>"


def test_json_object_is_any_object(grammars: Grammars) -> None:
    sampler = Sampler([EOS], grammars)
    sampling = Sampling(max_tokens=9, temperature=0, structured=StructuredOutput("json_object"))
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, TOKENIZER.token_to_id("[")] = 9.0
    first = sampler.sample(logits, [Sequence("a", [5], 1, sampling)])[0].token_id
    assert TOKENIZER.decode([first]).startswith("{")


def test_rows_without_a_grammar_are_left_alone(grammars: Grammars) -> None:
    logits = np.random.default_rng(3).normal(0, 1, (1, VOCAB)).astype(np.float32)
    free = Sequence("a", [5], 1, Sampling(max_tokens=9, temperature=0))
    held = Sequence("b", [5], 1, Sampling(max_tokens=9, temperature=0, structured=AS_PERSON))
    both = Sampler([EOS], grammars).sample(np.repeat(logits, 2, axis=0), [free, held])
    assert both[0].token_id == logits.argmax()
    assert TOKENIZER.decode([both[1].token_id]).startswith("{")


def test_complete_answer_ends_before_min_tokens(grammars: Grammars) -> None:
    choice = StructuredOutput("choice", '["yes"]')
    assert written(grammars, choice, min_tokens=50) == "yes"


def test_answer_ends_where_the_grammar_and_the_allowed_tokens_leave_nothing(grammars: Grammars) -> None:
    choice = StructuredOutput("choice", '["yes"]')
    assert written(grammars, choice, allowed_token_ids=(7,), min_tokens=5) == ""


def test_output_that_breaks_the_grammar_can_only_end(grammars: Grammars) -> None:
    broken = TOKENIZER.encode("no json", add_special_tokens=False).ids
    sequence = Sequence("a", [5, *broken], 1, Sampling(max_tokens=99, structured=AS_PERSON))
    logits = np.zeros((1, VOCAB), np.float32)
    assert Sampler([EOS], grammars).sample(logits, [sequence])[0].token_id == EOS


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        (StructuredOutput("regex", "([0-9"), "unclosed character class"),
        (StructuredOutput("json", '{"type": "foo"}'), "Invalid type: foo"),
        (StructuredOutput("json", "[1"), "json"),
        (StructuredOutput("json", "[" * 100_000), "json"),
        (StructuredOutput("json", '{"properties": {"a": {}}, "required": 5}'), "json"),
        (StructuredOutput("choice", "5"), "choice"),
        (StructuredOutput("grammar", "root ::= ("), "grammar"),
        (StructuredOutput("structural_tag", '{"format": {"type": "any_text"}}'), "structures"),
        (StructuredOutput("structural_tag", '{"structures": [], "triggers": []}'), "structural_tag"),
    ],
)
def test_invalid_specification_is_named(grammars: Grammars, wanted: StructuredOutput, named: str) -> None:
    with pytest.raises(InvalidGrammar, match=named):
        grammars.begin(wanted)


def test_number_of_kept_grammars_is_limited(grammars: Grammars) -> None:
    for number in range(MAX_KEPT + 10):
        grammars.begin(StructuredOutput("regex", f"x{number}"))
    assert grammars.kept == MAX_KEPT


# --- in an engine ---------------------------------------------------------------------------------

attempt = partial(
    builders.attempt, sampling=Sampling(max_tokens=80, temperature=1.5, seed=4, structured=AS_PERSON)
)
PROMPT = list(range(5, 40))


async def test_engine_serves_structured_output_also_when_an_attempt_is_continued() -> None:
    async with running(TINY) as client:
        whole = await client.run(attempt("a", PROMPT))
        ids = tokens(whole)
        assert json.loads(TOKENIZER.decode(ids)).keys() == {"name", "age"}
        assert whole[-1].finish_reason is FinishReason.STOP
        rest = await client.run(attempt("b", PROMPT, generated=ids[:7]))
        assert tokens(rest) == ids[7:]


async def test_engine_rejects_what_it_cannot_compile_and_goes_on() -> None:
    wrong = Sampling(max_tokens=80, structured=StructuredOutput("regex", "(("))
    async with running(TINY) as client:
        refused = await client.run(attempt("a", PROMPT, sampling=wrong))
        assert refused[-1].finish_reason is FinishReason.REJECTED
        assert "regex" in (refused[-1].error or "")
        assert tokens(await client.run(attempt("b", PROMPT)))


@pytest.fixture
def tokenless(tmp_path: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to((TINY / name).resolve())
    return tmp_path


@pytest.mark.parametrize("tokenizer_json", [None, "{}"])
def test_model_without_a_usable_tokenizer_has_no_structured_output(
    tokenless: Path, tokenizer_json: str | None
) -> None:
    if tokenizer_json is not None:
        (tokenless / "tokenizer.json").write_text(tokenizer_json)
    loaded = load_model(ReferenceSettings(str(tokenless), kv_cache_bytes=1 << 22))
    assert not loaded.card.model.answering.structured_output
    assert "structured output" in (loaded.refusal(Sampling(max_tokens=1, structured=AS_PERSON)) or "")
    assert loaded.refusal(Sampling(max_tokens=1)) is None
