"""What no honest peer says is refused where it is decoded, with the field in the reason: field by field."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from penstock.errors import ProtocolError
from penstock.shapes import (
    MAX_ASSETS,
    MAX_POOL_BLOCKS,
    MAX_TEXT_CHARS,
    Attempt,
    FinishReason,
    Handoff,
    Incarnation,
    Load,
    Output,
    PromptLogprob,
    Rates,
    Role,
    Sampling,
    TokenLogprob,
    shortened,
)
from penstock.wire.frames import decode_to_frontend, decode_to_worker
from penstock.wire.messages import (
    Asset,
    AssetRequest,
    Bounce,
    Cancel,
    Challenge,
    Draining,
    Generate,
    Goodbye,
    Heartbeat,
    Hello,
    Ping,
    Refused,
    Release,
    Snapshot,
    Step,
    ToFrontend,
    ToWorker,
    Welcome,
)
from tests.cards import card

SHA256 = "ab" * 32
HANDOFF = Handoff(
    "r.1", Incarnation("p0", 1), 3, 16, 2**64 - 1, "layout", 30.0, "tcp", "127.0.0.1:1", b"key"
)
SAMPLING = Sampling(
    5, 1, 0.5, 0.9, 40, 0.1, 7, 0.2, 0.3, 1.1, logit_bias={5: -1.0}, stop_token_ids=(2, 3), logprobs=4
)
ATTEMPT = Attempt("r.2", "r", [1, 2, 3], 2, SAMPLING, handoff=HANDOFF, cache_salt="salt", priority=-1)
CARD = card(
    "w0",
    Role.PREFILL,
    epoch=1_700_000_000_000,
    eos_token_ids=[2],
    temperature=0.6,
    assets={"tokenizer.json": SHA256},
)
LOAD = Load(1, 2, 3, 4, 5, 6, 7, 8, Rates(), 9, 10)
OUTPUT = Output(
    "r.2",
    [4],
    FinishReason.PREFILLED,
    2,
    [TokenLogprob(4, -0.5, [(4, -0.5)])],
    HANDOFF,
    None,
    1,
    [PromptLogprob(2, -0.5, [], 3)],
)

HONEST: list[ToFrontend | ToWorker] = [
    Challenge(1, b"n" * 16),
    Welcome(CARD, b"p" * 32),
    Refused("no"),
    Snapshot([1, 2**64 - 1], True, LOAD),
    Step(1, LOAD, [OUTPUT], [1], [2]),
    Heartbeat(1, LOAD),
    Bounce("r.2", "full", 0.25),
    Asset(SHA256, b"content", True),
    Draining("stopping"),
    Goodbye("stopped"),
    Hello(1, "f", b"n" * 16, b"p" * 32),
    Generate(1, ATTEMPT),
    Cancel("r.2"),
    Release("r.1"),
    AssetRequest(SHA256),
]

COUNT = (-1, 2**31, 1.5, "3")
TOTAL = (-1, 2**53 + 1)
TOKENS = ([-1], [2**32], [1.5], ["a"])
HASHES = ([-1], [1.5], [True])
MS = (-0.1, math.nan, math.inf, 1e10)
NAME = ("", "x" * 257, "a\nb", "a\x1b[31m")
WORD = ("x" * 513,)
TEXT = ("x" * (MAX_TEXT_CHARS + 1),)
TOP = [(1, -1.0)] * 129

LIES: dict[type, dict[str, tuple[Any, ...]]] = {
    Challenge: {"protocol": COUNT, "nonce": (b"n" * 65,)},
    Welcome: {
        "card.incarnation.instance_id": NAME,
        "card.incarnation.epoch": TOTAL,
        "card.role": ("boss",),
        "card.engine.model.name": NAME,
        "card.engine.name": WORD,
        "card.engine.block_size": (0, -16, 2**21),
        "card.engine.total_blocks": (0, MAX_POOL_BLOCKS + 1),
        "card.engine.model.max_model_len": (0, 2**31),
        "card.engine.model.vocab_size": (0, 2**33),
        "card.engine.model.weights": WORD,
        "card.engine.model.answering.tool_parser": WORD,
        "card.engine.model.answering.reasoning_parser": WORD,
        "card.engine.model.eos_token_ids": (*TOKENS, [1] * 1025),
        "card.engine.layout": WORD,
        "card.engine.transport": WORD,
        "card.engine.model.answering.sampling_defaults.temperature": (math.nan, -1.0),
        "card.engine.model.answering.sampling_defaults.top_p": (1.5,),
        "card.engine.model.answering.sampling_defaults.top_k": (-1, 2**31, 1.5),
        "card.engine.model.answering.sampling_defaults.min_p": (1.5,),
        "card.engine.model.answering.sampling_defaults.presence_penalty": (-101.0,),
        "card.engine.model.answering.sampling_defaults.frequency_penalty": (101.0,),
        "card.engine.model.answering.sampling_defaults.repetition_penalty": (0.0,),
        "card.engine.model.assets": (
            {"../secret": SHA256},
            {"a/b": SHA256},
            {"..": SHA256},
            {"": SHA256},
            {"tokenizer.json": SHA256[:-1]},
            {"tokenizer.json": SHA256.upper()},
            {f"{number}": SHA256 for number in range(MAX_ASSETS + 1)},
        ),
        "card.engine.max_batch_tokens": COUNT,
        "card.engine.max_running": COUNT,
        "proof": (b"p" * 65,),
    },
    Refused: {"reason": TEXT},
    Snapshot: {"hashes": HASHES, "load.running": COUNT},
    Step: {
        "seen": TOTAL,
        "stored": HASHES,
        "removed": HASHES,
        **{
            f"load.{name}": COUNT
            for name in (
                "running",
                "waiting",
                "prefill_tokens",
                "used_blocks",
                "total_blocks",
                "held_handoffs",
            )
        },
        **{
            f"load.{name}": TOTAL
            for name in ("context_tokens", "steps", "submitted", "prefill_context_tokens")
        },
        **{f"load.rates.{name}": MS for name in Rates.__struct_fields__},
        "outputs[0].token_ids": TOKENS,
        "outputs[0].finish_reason": ("tired",),
        "outputs[0].cached_tokens": COUNT,
        "outputs[0].transferred_blocks": COUNT,
        "outputs[0].error": TEXT,
        "outputs[0].prompt_logprobs[0].rank": (0, 1.5),
        "outputs[0].logprobs[0].token_id": (-1, 2**32),
        "outputs[0].logprobs[0].logprob": (math.nan, math.inf, 1e10),
        "outputs[0].logprobs[0].top": (TOP, [(-1, -1.0)], [(1, math.nan)]),
        "outputs[0].handoff.handoff_id": NAME,
        "outputs[0].handoff.num_tokens": COUNT,
        "outputs[0].handoff.block_size": (0, 2**21),
        "outputs[0].handoff.last_hash": (-1,),
        "outputs[0].handoff.ttl_s": (-1.0, math.nan, math.inf),
        "outputs[0].handoff.address": WORD,
        "outputs[0].handoff.params": (b"x" * (2**21 + 1),),
    },
    Heartbeat: {"seen": TOTAL, "received": TOTAL, "load.waiting": COUNT, "load.rates.step_ms": MS},
    Bounce: {"attempt_id": NAME, "reason": TEXT, "retry_after_s": (-1.0, math.nan, math.inf)},
    Asset: {"sha256": WORD},
    Draining: {"reason": TEXT},
    Goodbye: {"reason": TEXT},
    Hello: {"protocol": COUNT, "frontend_id": WORD, "nonce": (b"n" * 65,), "proof": (b"p" * 65,)},
    Generate: {
        "seq": TOTAL,
        "attempt.attempt_id": NAME,
        "attempt.request_id": NAME,
        "attempt.token_ids": TOKENS,
        "attempt.prompt_len": (0, 4, *COUNT),
        "attempt.cache_salt": WORD,
        "attempt.priority": (2**31, -(2**31) - 1),
        "attempt.handoff.num_tokens": (0, 4, *COUNT),
        "attempt.handoff.ttl_s": (-1.0, math.nan, math.inf),
        "attempt.sampling.max_tokens": COUNT,
        "attempt.sampling.min_tokens": COUNT,
        "attempt.sampling.temperature": (-1.0, math.nan, math.inf, 101.0),
        "attempt.sampling.top_p": (-0.1, 1.1, math.nan),
        "attempt.sampling.top_k": COUNT,
        "attempt.sampling.min_p": (-0.1, 1.1, math.nan),
        "attempt.sampling.seed": (-1,),
        "attempt.sampling.presence_penalty": (-101.0, 101.0, math.nan),
        "attempt.sampling.frequency_penalty": (-101.0, 101.0, math.nan),
        "attempt.sampling.repetition_penalty": (0.0, 101.0, math.nan),
        "attempt.sampling.logit_bias": (
            {-1: 1.0},
            {1: math.nan},
            {1: 101.0},
            dict.fromkeys(range(1025), 0.0),
        ),
        "attempt.sampling.stop_token_ids": (*TOKENS, [1] * 1025),
        "attempt.sampling.logprobs": (-1, 129),
    },
    Cancel: {"attempt_id": NAME},
    Release: {"handoff_id": NAME},
    AssetRequest: {"sha256": WORD},
}

TOLD = [
    (message, field, lie)
    for message in HONEST
    for field, lies in LIES[type(message)].items()
    for lie in lies
]


def told(message: ToFrontend | ToWorker, field: str, lie: Any) -> bytes:
    """The message as it travels, with another value in one of its fields."""
    plain = msgspec.msgpack.decode(msgspec.msgpack.encode(message), strict=False)
    place: Any = plain
    kind: Any = message
    *path, last = field.replace("[0]", ".0").split(".")
    for name in path:
        place, kind = place[_key(kind, name)], kind[0] if name == "0" else getattr(kind, name)
    place[_key(kind, last)] = lie
    return msgspec.msgpack.encode(plain)


def _key(kind: Any, name: str) -> str | int:
    """Structs that are arrays on the wire have their fields by number."""
    if name == "0":
        return 0
    return kind.__struct_fields__.index(name) if kind.__struct_config__.array_like else name


def decode(message: ToFrontend | ToWorker, body: bytes) -> Any:
    return (decode_to_worker if isinstance(message, ToWorker) else decode_to_frontend)(body)


@pytest.mark.parametrize("message", HONEST, ids=lambda message: type(message).__name__)
def test_an_honest_message_is_taken(message: ToFrontend | ToWorker) -> None:
    assert decode(message, msgspec.msgpack.encode(message)) == message


def test_the_table_has_every_message_but_the_empty_one() -> None:
    kinds = {*ToFrontend.__args__, *ToWorker.__args__} - {Ping}
    assert {type(message) for message in HONEST} == set(LIES) == kinds


@pytest.mark.parametrize(("message", "field", "lie"), TOLD, ids=lambda value: str(value)[:40])
def test_a_lie_is_refused_and_its_field_named(message: ToFrontend | ToWorker, field: str, lie: Any) -> None:
    with pytest.raises(ProtocolError) as refused:
        decode(message, told(message, field, lie))
    assert field.replace("[0]", "") in str(refused.value).replace("[0]", "")


def test_a_text_is_cut_to_what_is_taken() -> None:
    assert shortened("short") == "short"
    long = Goodbye(reason=shortened("x" * 10_000))
    assert decode(long, msgspec.msgpack.encode(long)) == long
