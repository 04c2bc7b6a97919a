"""vLLM's KV events: those that vLLM 0.32 was recorded to send, and any others."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from penstock.core.hashing import root_hash, sequence_hashes
from penstock.core.prefix_index import most_blocks
from penstock.engines.vllm.kv_events import CacheEvents, Changes
from penstock.errors import ProtocolError

BLOCK_SIZE = 4
MODEL = "m"
GOLDEN = json.loads((Path(__file__).parent / "golden" / "events.json").read_text())["payloads"]

PROMPT = list(range(100, 110))
OUTPUT = list(range(200, 207))


def hashes(token_ids: list[int], salt: str = "", lora: str = "") -> set[int]:
    """What the cache is said to hold when it has all whole blocks of these."""
    return set(sequence_hashes(token_ids, BLOCK_SIZE, root_hash(MODEL, salt, lora)))


TRUTH = {
    "a prompt, and four blocks with its output": hashes(PROMPT + OUTPUT[:6]),
    "the same whole blocks twice": hashes(PROMPT[:8]),
    "evicted by another prompt": hashes(list(range(50, 62))),
    "stored twice, then removed as often": hashes(PROMPT[:4]) | hashes(list(range(12))),
    "cleared": set(),
    "with a cache salt": hashes(PROMPT, salt="salt"),
    "with a LoRA": hashes(PROMPT, lora="adapter"),
    "with a LoRA and a salt": hashes(PROMPT, salt="salt", lora="adapter"),
    "with an image in the second block": hashes(PROMPT[:4]),
    "a hybrid model": hashes([*range(100, 113), *OUTPUT[:3]]),
    "a hybrid model, evicted": hashes(list(range(16))),
}


def golden(scene: str, kind: str = "int") -> list[bytes]:
    return [base64.b64decode(payload) for payload in GOLDEN[kind][scene]]


class Mirror:
    """The set of hashes as a reader of the changes knows it."""

    def __init__(self) -> None:
        self.events = CacheEvents(MODEL, BLOCK_SIZE, 1000)
        self.cached: set[int] = set()

    def apply(self, *payloads: bytes, rank: int = 0) -> set[int]:
        for payload in payloads:
            self.events.apply(rank, payload)
        return self.drain()

    def drain(self) -> set[int]:
        changes = self.events.drain()
        stored, removed = set(changes.stored), set(changes.removed)
        assert (len(stored), len(removed)) == (len(changes.stored), len(changes.removed))
        assert not stored & removed
        assert removed <= self.cached
        assert not stored & self.cached
        self.cached = (self.cached - removed) | stored
        assert len(self.events) == len(self.cached)
        return self.cached


# --- recorded payloads ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int", "bytes"])
@pytest.mark.parametrize("scene", GOLDEN["int"])
def test_what_vllm_was_recorded_to_send(scene: str, kind: str) -> None:
    assert Mirror().apply(*golden(scene, kind)) == TRUTH[scene]


@pytest.mark.parametrize("scene", GOLDEN["int"])
def test_what_is_drained_in_between_comes_to_the_same(scene: str) -> None:
    mirror = Mirror()
    for payload in golden(scene):
        mirror.apply(payload)
    assert mirror.cached == TRUTH[scene]


def test_a_block_held_twice_is_cached_until_both_are_gone() -> None:
    mirror = Mirror()
    *stored, evicted = golden("stored twice, then removed as often")
    first, second, _ = msgspec.msgpack.decode(evicted)[1]
    assert first == second
    assert mirror.apply(*stored) == hashes(PROMPT[:8])
    assert mirror.apply(payload(first)) == hashes(PROMPT[:8])
    assert mirror.apply(payload(second)) == hashes(PROMPT[:4])


def test_an_image_hides_the_blocks_after_it_also_those_of_later_events() -> None:
    mirror = Mirror()
    (with_image,) = golden("with an image in the second block")
    mirror.apply(with_image)
    assert mirror.events.unnamed == 2
    last = msgspec.msgpack.decode(with_image)[1][0]["block_hashes"][-1]
    assert mirror.apply(payload(stored([1], [1, 2, 3, 4], last))) == hashes(PROMPT[:4])
    assert mirror.events.unnamed == 3


# --- other payloads of that shape -------------------------------------------------------------------------


def stored(
    block_hashes: list[Any], token_ids: list[int], parent: Any = None, **fields: Any
) -> dict[str, Any]:
    return {
        "type": "BlockStored",
        "block_hashes": block_hashes,
        "parent_block_hash": parent,
        "token_ids": token_ids,
        "block_size": BLOCK_SIZE,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [None] * len(block_hashes),
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
        **fields,
    }


def removed(*block_hashes: Any, **fields: Any) -> dict[str, Any]:
    return {
        "type": "BlockRemoved",
        "block_hashes": list(block_hashes),
        "medium": "GPU",
        "group_idx": 0,
        **fields,
    }


CLEARED = {"type": "AllBlocksCleared"}


def payload(*events: Any, rank: int = 0) -> bytes:
    return msgspec.msgpack.encode([1.0, list(events), rank])


def test_fields_that_are_not_known_are_passed_over() -> None:
    event = stored([1, 2], PROMPT[:8], session_id="s", locality="LOCAL", invented=[1, {"a": 2}])
    assert Mirror().apply(payload(event)) == hashes(PROMPT[:8])
    more = msgspec.msgpack.encode([1.0, [event], 0, "invented"])
    assert Mirror().apply(more) == hashes(PROMPT[:8])


def test_fields_that_vllm_leaves_out_have_their_defaults() -> None:
    event = stored([1], PROMPT[:4])
    for name in ("medium", "lora_name", "extra_keys", "group_idx", "kv_cache_spec_kind"):
        del event[name]
    assert Mirror().apply(msgspec.msgpack.encode([1.0, [event]])) == hashes(PROMPT[:4])


def test_what_was_offloaded_is_not_in_the_device_s_cache() -> None:
    mirror = Mirror()
    assert not mirror.apply(payload(stored([1], PROMPT[:4], medium="CPU")))
    mirror.apply(payload(stored([1], PROMPT[:4])))
    assert mirror.apply(payload(removed(1, medium="CPU"))) == hashes(PROMPT[:4])


def test_each_rank_has_a_cache_of_its_own_and_one_is_enough() -> None:
    mirror = Mirror()
    event = payload(stored([1, 2], PROMPT[:8]))
    mirror.apply(event, rank=0)
    mirror.apply(event, rank=1)
    assert mirror.apply(payload(removed(2)), rank=0) == hashes(PROMPT[:8])
    assert mirror.apply(payload(removed(2)), rank=1) == hashes(PROMPT[:4])
    assert mirror.apply(payload(CLEARED), rank=1) == hashes(PROMPT[:4])
    assert mirror.apply(payload(CLEARED), rank=0) == set()


def test_a_forgotten_rank_begins_anew_and_the_others_stay() -> None:
    mirror = Mirror()
    mirror.apply(payload(stored([1], PROMPT[:4])), rank=0)
    mirror.apply(payload(stored([7], [9] * 4)), rank=1)
    mirror.events.forget(0)
    assert mirror.drain() == hashes([9] * 4)
    # Nothing can be said of what follows a block that was missed, until it is known again.
    assert mirror.apply(payload(stored([2], PROMPT[4:8], 1)), rank=0) == hashes([9] * 4)
    assert mirror.events.unnamed == 1
    mirror.apply(payload(stored([1], PROMPT[:4])), rank=0)
    mirror.apply(payload(stored([2], PROMPT[4:8], 1)), rank=0)
    assert mirror.cached == hashes([9] * 4) | hashes(PROMPT[:8])
    mirror.apply(payload(removed(2)), rank=0)
    assert mirror.cached == hashes([9] * 4) | hashes(PROMPT[:8])
    assert mirror.apply(payload(removed(2), removed(1)), rank=0) == hashes([9] * 4)
    mirror.events.forget_all()
    assert mirror.drain() == set()


def test_a_removal_of_something_unknown_changes_nothing() -> None:
    mirror = Mirror()
    mirror.apply(payload(stored([1], PROMPT[:4])))
    assert mirror.apply(payload(removed(77, b"what"))) == hashes(PROMPT[:4])


GOOD = stored([5, 6], PROMPT[:8])


@pytest.mark.parametrize(
    "events",
    [
        [{"type": "BlockMoved", "block_hashes": [1]}],
        [{"block_hashes": [1]}],
        [stored([1, 2], PROMPT[:4])],
        [stored([1], PROMPT[:5])],
        [stored([1], PROMPT[:8], block_size=8)],
        [stored([1], PROMPT[:4], extra_keys=[None, None])],
        [stored([1], PROMPT[:4], extra_keys="salt")],
        [stored([1], [-1, 2, 3, 4])],
        [stored([1], [2**32, 2, 3, 4])],
        [stored([1], ["a", "b", "c", "d"])],
        [stored(["text"], PROMPT[:4])],
        [stored([1.5], PROMPT[:4])],
        [removed("text")],
        [{**removed(1), "block_hashes": None}],
        [[1, 2, 3]],
        ["BlockStored"],
    ],
)
def test_a_shape_that_is_not_known_is_refused_and_nothing_of_it_is_taken(events: list[Any]) -> None:
    mirror = Mirror()
    mirror.apply(payload(stored([1, 2], [1] * 8)))
    before = set(mirror.cached)
    with pytest.raises(ProtocolError, match="rank 0"):
        mirror.events.apply(0, payload(GOOD, removed(1, 2), *events))
    assert mirror.drain() == before


@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"garbage", msgspec.msgpack.encode([]), payload(GOOD) + b"\x00"]
)
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Mirror().apply(data)


@given(
    data=st.one_of(
        st.binary(max_size=200),
        st.tuples(st.sampled_from([payload(GOOD), *golden("with a LoRA and a salt")]), st.data()).map(
            lambda pair: _damaged(*pair)
        ),
    )
)
@settings(max_examples=300)
def test_whatever_comes_is_taken_or_refused(data: bytes) -> None:
    mirror = Mirror()
    try:
        mirror.apply(data)
    except ProtocolError:
        assert mirror.drain() == set()


def _damaged(whole: bytes, data: st.DataObject) -> bytes:
    at = data.draw(st.integers(0, len(whole) - 1))
    return whole[:at] + data.draw(st.binary(max_size=3)) + whole[at + data.draw(st.integers(0, 3)) :]


# --- against an oracle ------------------------------------------------------------------------------------


Prefix = tuple[int, ...]  # one number a block

PREFIXES = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple)
RANKS = st.integers(0, 1)


def tokens(prefix: Prefix) -> list[int]:
    return [number for number in prefix for _ in range(BLOCK_SIZE)]


def engine_hash(prefix: Prefix) -> int:
    """vLLM's name for the last block of a prefix."""
    return int.from_bytes(hashlib.sha256(bytes(prefix)).digest()[:8], "big")


class Caches(RuleBasedStateMachine):
    """Two ranks' caches, which may hold a block several times. The truth is how often each does."""

    def __init__(self) -> None:
        super().__init__()
        self.mirror = Mirror()
        self.truth: dict[int, Counter[Prefix]] = {0: Counter(), 1: Counter()}

    @rule(rank=RANKS, prefix=PREFIXES, known=st.integers(0, 4))
    def store(self, rank: int, prefix: Prefix, known: int) -> None:
        """vLLM computed a prefix's blocks after the first ones, which it had cached."""
        known = min(known, len(prefix) - 1)
        while not all(self.truth[rank][prefix[:end]] for end in range(1, known + 1)):
            known -= 1
        ends = range(known + 1, len(prefix) + 1)
        event = stored(
            [engine_hash(prefix[:end]) for end in ends],
            tokens(prefix[known:]),
            engine_hash(prefix[:known]) if known else None,
        )
        self.mirror.events.apply(rank, payload(event, rank=rank))
        self.truth[rank].update(prefix[:end] for end in ends)

    @rule(rank=RANKS, data=st.data())
    def remove(self, rank: int, data: st.DataObject) -> None:
        held = sorted(+self.truth[rank])
        if held:
            gone = data.draw(st.lists(st.sampled_from(held), min_size=1, max_size=3, unique=True))
            self.mirror.events.apply(rank, payload(removed(*map(engine_hash, gone)), rank=rank))
            self.truth[rank].subtract(gone)

    @rule(rank=RANKS)
    def clear(self, rank: int) -> None:
        self.mirror.events.apply(rank, payload(CLEARED, rank=rank))
        self.truth[rank].clear()

    @rule()
    def drain(self) -> None:
        self.mirror.drain()
        held = {prefix for counts in self.truth.values() for prefix in +counts}
        names = {sequence_hashes(tokens(prefix), BLOCK_SIZE, root_hash(MODEL))[-1] for prefix in held}
        assert self.mirror.cached == names

    @invariant()
    def as_many_as_there_are(self) -> None:
        held = {prefix for counts in self.truth.values() for prefix in +counts}
        assert len(self.mirror.events) == len(held)

    def teardown(self) -> None:
        self.drain()


TestCaches = Caches.TestCase
TestCaches.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_changes_are_nothing_when_nothing_happened() -> None:
    assert CacheEvents(MODEL, BLOCK_SIZE, 1000).drain() == Changes()


def test_a_rank_with_more_blocks_than_there_can_be_is_not_followed() -> None:
    events = CacheEvents(MODEL, BLOCK_SIZE, 10)
    count = most_blocks(10)
    tokens_of = list(range(count * BLOCK_SIZE))
    events.apply(0, payload(stored(list(range(count)), tokens_of)))
    with pytest.raises(ProtocolError, match=f"over {count} blocks"):
        events.apply(0, payload(stored([count], [7] * BLOCK_SIZE)))
    events.forget(0)
    assert len(events) == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"block_size": 0},
        {"block_size": -4},
        {"token_ids": [-1, 2, 3, 4]},
        {"token_ids": [2**32, 2, 3, 4]},
        {"block_hashes": [b"x" * 65]},
        {"medium": "x" * 1000},
        {"group_idx": -1},
    ],
    ids=str,
)
def test_values_that_cannot_be_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="rank 0"):
        CacheEvents(MODEL, BLOCK_SIZE, 10).apply(0, payload({**stored([1], PROMPT[:4]), **fields}))
