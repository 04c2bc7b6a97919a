"""Fields that chats and completions refuse, that change nothing, and that may be null."""

import json
from pathlib import Path

import msgspec
import pytest
from msgspec import inspect

from penstock.errors import Rejection, RequestRejected
from penstock.frontend.chat import Chat, template_input_of
from penstock.frontend.completions import Completions
from penstock.frontend.openai import (
    ChatRequest,
    CompletionRequest,
    NvExt,
    decode_chat,
    decode_completion,
)
from penstock.frontend.unserved import (
    CHAT_REFUSED,
    COMPLETION_REFUSED,
    HARMLESS,
    NVEXT_HARMLESS,
    NVEXT_REFUSED,
)

PEERS = json.loads(Path(__file__).with_name("peer_fields.json").read_text())
HI = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"model": "m", "prompt": "Hi"}
DECODERS = {"chat": (decode_chat, HI), "completions": (decode_completion, TEXT)}
REQUESTS = {"chat": ChatRequest, "completions": CompletionRequest}
REFUSED = {"chat": CHAT_REFUSED, "completions": COMPLETION_REFUSED}


def decode(endpoint, **fields):
    decoder, body = DECODERS[endpoint]
    return decoder(json.dumps(body | fields).encode())


@pytest.mark.parametrize(
    ("endpoint", "name"), [(endpoint, name) for endpoint, names in REFUSED.items() for name in names]
)
def test_a_refused_field_is_named_and_null_or_a_neutral_value_is_absence(endpoint, name):
    for asks in ({"x": 1}, "asks", 7, True not in REFUSED[endpoint][name].neutral):
        with pytest.raises(RequestRejected) as raised:
            decode(endpoint, **{name: asks})
        assert (raised.value.kind, raised.value.code, raised.value.field) == (
            Rejection.INVALID,
            "unsupported_value",
            name,
        )
        assert f"`{name}`" in raised.value.message
    for nothing in (None, *REFUSED[endpoint][name].neutral):
        decode(endpoint, **{name: nothing})


@pytest.mark.parametrize("name", HARMLESS)
def test_a_harmless_field_may_have_any_value_and_a_reason_is_written_beside_it(name):
    for value in (None, 1, "x", [1], {"a": 1}):
        decode("chat", **{name: value})
        decode("completions", **{name: value})
    assert HARMLESS[name]


def test_zero_is_not_false():
    with pytest.raises(RequestRejected, match="use_beam_search"):
        decode("completions", use_beam_search=0)


def test_a_refused_field_is_named_before_the_value_of_another():
    """`max_tokens: 0` might be right with it."""
    with pytest.raises(RequestRejected) as raised:
        decode("chat", use_beam_search=True, max_tokens=0)
    assert raised.value.field == "use_beam_search"


def test_echo_is_of_completions_and_only_with_it_no_token_may_be_asked_for():
    assert decode("completions", echo=True, max_tokens=0, logprobs=1).max_tokens == 0
    for endpoint, fields, field in (
        ("completions", {"max_tokens": 0}, "max_tokens"),
        ("chat", {"max_tokens": 0}, "max_tokens"),
        ("chat", {"echo": True}, "echo"),
    ):
        with pytest.raises(RequestRejected) as raised:
            decode(endpoint, **fields)
        assert raised.value.field == field
    assert decode("chat", echo=False).echo is False


def test_every_member_of_nvext_has_one_place():
    places = [set(NvExt.__struct_fields__), NVEXT_REFUSED, NVEXT_HARMLESS]
    found = {name: sum(name in place for place in places) for name in PEERS["dynamo"]["nvext"]}
    assert {name for name, count in found.items() if count != 1} == set()


@pytest.mark.parametrize("name", NVEXT_REFUSED)
def test_a_refused_member_of_nvext_is_named(name):
    with pytest.raises(RequestRejected) as raised:
        decode("chat", nvext={name: 7})
    assert (raised.value.code, raised.value.field) == ("unsupported_value", f"nvext.{name}")
    decode("chat", nvext=dict.fromkeys([name, *NVEXT_HARMLESS]))


@pytest.mark.parametrize("endpoint", DECODERS)
def test_members_of_nvext_count_where_the_request_does_not_say_it_itself(endpoint):
    nvext = {"ignore_eos": True, "top_k": 4.0, "repetition_penalty": 1.5, "cache_salt": "s"}
    request = decode(endpoint, nvext=nvext, top_k=9)
    assert (request.ignore_eos, request.top_k) == (True, 9)
    assert (request.repetition_penalty, request.cache_salt) == (1.5, "s")
    assert decode(endpoint, temperature=0.7, nvext={"greed_sampling": True}).temperature == 0
    assert decode(endpoint, temperature=0.7, nvext={"greed_sampling": False}).temperature == 0.7


def test_dynamos_name_for_template_variables():
    assert decode("chat", chat_template_args={"a": 1}).template_variables == {"a": 1}


# --- served fields --------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "f"}}]
GIVEN = {
    "add_generation_prompt": False,
    "allowed_token_ids": [1],
    "logprob_token_ids": [1],
    "bad_words": ["x"],
    "cache_salt": "s",
    "chat_template_args": {"a": 1},
    "chat_template_kwargs": {"a": 1},
    "continue_final_message": True,
    "documents": [{}],
    "logit_bias": {"1": 1},
    "logprobs": 2,
    "messages": [{"role": "user", "content": "You"}],
    "model": "other",
    "n": 2,
    "nvext": {"ignore_eos": True},
    "prompt": "You",
    "prompt_cache_key": "s",
    "reasoning_effort": "high",
    "repetition_detection": {"max_pattern_size": 2, "min_count": 3},
    "repetition_penalty": 2,
    "response_format": {"type": "json_object"},
    "session_id": "s",
    "skip_special_tokens": False,
    "stop": "x",
    "stop_token_ids": [1],
    "structured_outputs": {"regex": "a"},
    "tools": TOOLS,
    "top_p": 0.5,
    "truncation_side": "right",
}
"""Values that ask for something; of other fields 1 or true does."""
TOGETHER = {
    "best_of": {"n": 2},
    "continue_final_message": {"add_generation_prompt": False},
    "echo": {"logprobs": 1},
    "top_logprobs": {"logprobs": True},
    "truncation_side": {"truncate_prompt_tokens": 1},
}
"""What a field is sent with."""
ELSEWHERE = {
    "add_special_tokens": "read where a prompt is tokenized",
    "best_of": "may only say what `n` does",
    "include_reasoning": "read by the model's parser",
    "parallel_tool_calls": "read by the model's parser",
    "return_prompt_text": "read where the prompt is rendered",
    "stream_options": "read where chunks are written",
    "tool_choice": "read by the model's parser",
}


def meaning(endpoint, **fields):
    """What is made of a body."""
    if endpoint == "chat":
        request = decode("chat", **fields)
        return Chat(request).wanted, template_input_of(request)
    request = decode("completions", **fields)
    return Completions(request).wanted, request.prompts


def asked(endpoint, name):
    if name in GIVEN and (endpoint, name) != ("chat", "logprobs"):
        return GIVEN[name]
    fields = {field.name: field for field in inspect.type_info(REQUESTS[endpoint]).fields}
    return True if any(isinstance(kind, inspect.BoolType) for kind in fields[name].type.types) else 1


@pytest.mark.parametrize(
    ("endpoint", "name"),
    [
        (endpoint, name)
        for endpoint, kind in REQUESTS.items()
        for name in kind.__struct_fields__
        if name not in ELSEWHERE and (endpoint, name) != ("chat", "echo")
    ],
)
def test_a_served_field_changes_what_is_made_of_a_body(endpoint, name):
    others = {other: value for other, value in TOGETHER.get(name, {}).items() if other != name}
    if name == "logprob_token_ids":
        others = {"logprobs": asked(endpoint, "logprobs")}
    assert meaning(endpoint, **others, **{name: asked(endpoint, name)}) != meaning(endpoint, **others)


# --- null -----------------------------------------------------------------------------------------


def optional_fields(kind, path=()):
    """The paths to all fields that may be left out, and to those that are inside of others."""
    match kind:
        case inspect.Metadata():
            yield from optional_fields(kind.type, path)
        case inspect.UnionType():
            for option in kind.types:
                yield from optional_fields(option, path)
        case inspect.ListType():
            yield from optional_fields(kind.item_type, (*path, 0))
        case inspect.StructType():
            for field in kind.fields:
                here = (*path, (kind, field.encode_name))
                if not field.required:
                    yield here
                yield from optional_fields(field.type, here)


def body_with_null(kind, path):
    """The least body in which the field at this path is null."""
    if not path:
        return None
    step, rest = path[0], path[1:]
    if step == 0:
        return [body_with_null(kind, rest)]
    struct, name = step
    return required(struct) | {name: body_with_null(kind, rest)}


def required(struct):
    tag = {} if struct.tag_field is None else {struct.tag_field: struct.tag}
    return tag | {field.encode_name: example(field.type) for field in struct.fields if field.required}


def example(kind):
    match kind:
        case inspect.Metadata():
            return example(kind.type)
        case inspect.UnionType():
            return example(
                next(option for option in kind.types if not isinstance(option, inspect.NoneType))
            )
        case inspect.LiteralType():
            return "user" if "user" in kind.values else kind.values[0]
        case inspect.StrType():
            return "text"
        case inspect.IntType():
            return 1
        case inspect.ListType():
            return [example(kind.item_type)]
        case inspect.DictType():
            return {}
        case inspect.StructType():
            return required(kind)
    raise TypeError(kind)


@pytest.mark.parametrize("endpoint", DECODERS)
def test_null_is_the_same_as_leaving_a_field_out(endpoint):
    request = inspect.type_info(REQUESTS[endpoint])
    paths = list(optional_fields(request))
    assert len(paths) > 30
    wrong = {}
    for path in paths:
        body = json.dumps(body_with_null(request, path)).encode()
        try:
            msgspec.json.decode(body, type=REQUESTS[endpoint])
        except msgspec.ValidationError as error:
            wrong[".".join(str(step[1] if step else step) for step in path)] = str(error)
    assert wrong == {}


@pytest.mark.parametrize("endpoint", DECODERS)
def test_a_body_of_nulls_is_one_of_defaults(endpoint):
    names = set(REQUESTS[endpoint].__struct_fields__) - {"model", "messages", "prompt"}
    request = decode(endpoint, **dict.fromkeys(names))
    assert request == decode(endpoint)
