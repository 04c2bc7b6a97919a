"""A short search around the corpus in every run of the tests; `make fuzz` searches long and guided."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.frontend.anthropic import MessagesRequest
from penstock.frontend.openai import ChatRequest, CompletionRequest
from penstock.frontend.responses_api.request_body import ResponsesRequest
from penstock.frontend.tokenization import DetokenizeRequest, TokenizeRequest
from penstock.wire.messages import ToFrontend, ToWorker
from tests.fuzz.targets import TARGETS
from tests.fuzz.test_corpus import INPUTS

GRAPHS = ("to_router", "to_engine")
"""Targets that run a whole graph for every input, 40 ms of it: half as many inputs."""

SHORT = settings(
    max_examples=200,
    deadline=None,  # test_corpus.py bounds the time of each input; a slow machine must not fail here
    database=None,
    suppress_health_check=list(HealthCheck),
)


def short(name: str) -> settings:
    """How far a target is searched."""
    return settings(SHORT, max_examples=SHORT.max_examples // 2) if name in GRAPHS else SHORT


SEEDS = {name: [path.read_bytes() for path in INPUTS if path.parent.name == name] for name in TARGETS}


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A seed, or the parts of two, with some bytes changed, doubled or left out."""
    data = bytearray(draw(st.sampled_from(seeds)))
    if draw(st.booleans()):
        other = draw(st.sampled_from(seeds))
        data = data[: draw(st.integers(0, len(data)))] + other[draw(st.integers(0, len(other))) :]
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 8)))
        piece = draw(
            st.binary(max_size=8)
            | st.sampled_from([b"\0", b"\xff" * 4, b"[" * 50, b"-1", b"1e999", b"9" * 30, b'"', b"\\"])
            | st.just(bytes(data[start:end]) * 3)
        )
        data[start:end] = piece
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_near_the_corpus(name: str) -> None:
    @short(name)
    @given(mutated(SEEDS[name]) | st.binary(max_size=200))
    def search(data: bytes) -> None:
        TARGETS[name](data)

    search()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("name", "struct"),
    [
        ("chat", ChatRequest),
        ("message", MessagesRequest),
        ("completion", CompletionRequest),
        ("responses", ResponsesRequest),
        ("tokenize", TokenizeRequest),
        ("detokenize", DetokenizeRequest),
    ],
)
def test_bodies_of_known_fields(name: str, struct: type[msgspec.Struct]) -> None:
    """Fields that exist, with values that need not fit."""
    fields = st.sampled_from(struct.__struct_fields__)
    whole = [body for seed in SEEDS[name] if isinstance(body := _json(seed), dict)]
    values = JSON | st.sampled_from(_values(whole))

    @SHORT
    @given(st.sampled_from(whole), st.dictionaries(fields, values, max_size=4))
    def search(body: dict[str, Any], changes: dict[str, Any]) -> None:
        TARGETS[name](json.dumps({**body, **changes}).encode())

    search()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("to_worker", ToWorker),
        ("to_engine", ToWorker),
        ("to_frontend", ToFrontend),
        ("to_router", ToFrontend),
    ],
)
def test_messages_of_known_shape(name: str, message: Any) -> None:
    """Messages as their types say, in any order: right in shape, wrong in all else."""

    @short(name)
    @given(st.lists(st.one_of([_message(kind) for kind in message.__args__]), max_size=4))
    def search(messages: list[dict[str, Any]]) -> None:
        bodies = [msgspec.msgpack.encode(body) for body in messages]
        TARGETS[name](b"".join(len(body).to_bytes(4, "big") + body for body in bodies))

    search()


def _json(seed: bytes) -> Any:
    try:
        return json.loads(seed)
    except ValueError:
        return None


def _values(bodies: list[dict[str, Any]]) -> list[Any]:
    return [value for body in bodies for value in body.values()]


def _message(kind: type[msgspec.Struct]) -> st.SearchStrategy[dict[str, Any]]:
    described = msgspec.inspect.type_info(kind)
    assert isinstance(described, msgspec.inspect.StructType)
    values = {field.encode_name: _value(field.type) for field in described.fields}
    return st.fixed_dictionaries({"t": st.just(described.tag)}, optional=values)


def _value(kind: msgspec.inspect.Type) -> st.SearchStrategy[Any]:
    """Values of a type, with numbers at the edges of what a frame can hold."""
    match kind:
        case msgspec.inspect.Metadata():
            return _value(kind.type)
        case msgspec.inspect.StructType():
            values = {field.encode_name: _value(field.type) for field in kind.fields}
            if kind.array_like:
                return st.tuples(*values.values()).map(list)
            return st.fixed_dictionaries({}, optional=values)
        case msgspec.inspect.ListType() | msgspec.inspect.VarTupleType():
            return st.lists(_value(kind.item_type), max_size=3)
        case msgspec.inspect.DictType():
            return st.dictionaries(_value(kind.key_type), _value(kind.value_type), max_size=3)
        case msgspec.inspect.UnionType():
            return st.one_of([_value(option) for option in kind.types])
        case msgspec.inspect.IntType():
            return st.integers(-(2**63), 2**64 - 1) | st.integers(-2, 5)
        case msgspec.inspect.FloatType():
            return st.floats() | st.floats(0.0, 1.0)
        case msgspec.inspect.BoolType():
            return st.booleans()
        case msgspec.inspect.BytesType():
            return st.binary(max_size=20)
        case msgspec.inspect.EnumType():
            return st.sampled_from([member.value for member in kind.cls])
        case msgspec.inspect.LiteralType():
            return st.sampled_from(kind.values)
        case msgspec.inspect.NoneType():
            return st.none()
    return st.text(max_size=10)
