"""No field that changes an answer is ignored without a word. All fields of other servers
are served, refused by name, or known to be harmless."""

import json
from pathlib import Path

import msgspec
import openai.types.chat.completion_create_params as openai_chat
import openai.types.completion_create_params as openai_text
import pytest
from msgspec import inspect
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionFunctionMessageParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
)

from penstock.errors import Rejection, RequestRejected
from penstock.frontend.messages import Message
from penstock.frontend.openai import (
    ChatRequest,
    CompletionRequest,
    NvExt,
    StreamOptions,
    decode_chat,
    decode_completion,
)
from penstock.frontend.structured import StructuredOutputs
from penstock.frontend.tools import Function, Tool
from penstock.frontend.unserved import HARMLESS, NVEXT_HARMLESS, NVEXT_REFUSED, REFUSED

PEERS = json.loads(Path(__file__).with_name("peer_fields.json").read_text())
HI = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"model": "m", "prompt": "Hi"}
DECODERS = {"chat": (decode_chat, HI), "completions": (decode_completion, TEXT)}
REQUESTS = {"chat": ChatRequest, "completions": CompletionRequest}
OPENAI = {
    "chat": openai_chat.CompletionCreateParamsBase.__annotations__,
    "completions": openai_text.CompletionCreateParamsBase.__annotations__,
}


def decode(endpoint, **fields):
    decoder, body = DECODERS[endpoint]
    return decoder(json.dumps(body | fields).encode())


def named(peer, endpoint):
    return OPENAI[endpoint] if peer == "openai" else PEERS[peer][endpoint]


@pytest.mark.parametrize("endpoint", DECODERS)
@pytest.mark.parametrize("peer", ["openai", *PEERS])
def test_every_field_of_a_peer_has_one_place(peer, endpoint):
    served = set(REQUESTS[endpoint].__struct_fields__) | {"stream"}
    places = {
        name: [where for where in (served, REFUSED, HARMLESS) if name in where]
        for name in named(peer, endpoint)
    }
    assert {name for name, found in places.items() if len(found) != 1} == set()


@pytest.mark.parametrize("endpoint", DECODERS)
@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_field_is_named_and_null_or_a_neutral_value_is_absence(endpoint, name):
    for asks in ({"x": 1}, "asks", 7, True not in REFUSED[name].neutral):
        with pytest.raises(RequestRejected) as raised:
            decode(endpoint, **{name: asks})
        assert (raised.value.kind, raised.value.code, raised.value.field) == (
            Rejection.INVALID,
            "unsupported_value",
            name,
        )
        assert f"`{name}`" in raised.value.message
    for nothing in (None, *REFUSED[name].neutral):
        decode(endpoint, **{name: nothing})


@pytest.mark.parametrize("name", HARMLESS)
def test_a_harmless_field_may_have_any_value_and_a_reason_is_written_beside_it(name):
    for value in (None, 1, "x", [1], {"a": 1}):
        decode("chat", **{name: value})
        decode("completions", **{name: value})
    assert HARMLESS[name]


def test_zero_is_not_false():
    """`prompt_logprobs: 0` asks for the prompt's own log-probabilities."""
    with pytest.raises(RequestRejected, match="prompt_logprobs"):
        decode("completions", prompt_logprobs=0)


def test_a_refused_field_is_named_before_the_value_of_another():
    """`max_tokens: 0` might be right with it."""
    with pytest.raises(RequestRejected) as raised:
        decode("chat", prompt_logprobs=1, max_tokens=0)
    assert raised.value.field == "prompt_logprobs"


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


@pytest.mark.parametrize(
    ("kind", "struct", "harmless"),
    [
        ("stream_options", StreamOptions, set()),
        ("tool", Tool, set()),
        ("function", Function, set()),
        ("structured_outputs", StructuredOutputs, set()),
        ("message", Message, set()),
    ],
)
def test_what_vllm_reads_inside_of_fields_is_read(kind, struct, harmless):
    assert set(PEERS["vllm"][kind]) - set(struct.__struct_fields__) == harmless


def test_what_openai_has_in_messages_is_read():
    messages = (
        ChatCompletionAssistantMessageParam,
        ChatCompletionDeveloperMessageParam,
        ChatCompletionFunctionMessageParam,
        ChatCompletionSystemMessageParam,
        ChatCompletionToolMessageParam,
        ChatCompletionUserMessageParam,
    )
    names = {name for message in messages for name in message.__annotations__}
    assert names - set(Message.__struct_fields__) == set()


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
