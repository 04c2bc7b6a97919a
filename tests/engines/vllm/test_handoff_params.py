"""Which handoffs of another vLLM are pulled, and what vLLM is then told. All else is computed."""

from __future__ import annotations

import math
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.hashing import last_hash, root_hash
from penstock.engines.vllm import handoff_params
from penstock.engines.vllm.handoff_params import (
    MAX_LEFT_S,
    MIN_LEFT_S,
    UsedHandoffs,
    engine_id,
    lease_s,
    pack,
)
from penstock.shapes import Attempt, EngineCard, Handoff, Incarnation, JsonObject, ModelCard, Sampling
from tests import builders

BLOCK_SIZE = 32
PROMPT = list(range(100))  # three whole blocks and a part
CARD = EngineCard(
    name="vllm",
    model=ModelCard("m", max_model_len=512, vocab_size=1000),
    block_size=BLOCK_SIZE,
    total_blocks=64,
    layout="layout",
    transport="vllm-nixl",
)

# As vLLM 0.32 gave them for a prompt of 100 tokens, the engine's name aside.
PARAMS: JsonObject = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[4, 5, 6, 7]],
    "remote_engine_id": "p0.7",
    "remote_request_id": "a1",
    "remote_host": "127.0.0.1",
    "remote_port": 5600,
    "tp_size": 1,
    "dcp_size": 1,
    "pp_size": 1,
    "remote_num_tokens": 100,
    "remote_blocks_expiry_time": None,
    "transfer_mode": "pull",
    "remote_prefill_cached_tokens": 0,
}


def handoff(params: bytes | JsonObject = PARAMS, ttl_s: float = 30.0, **fields: Any) -> Handoff:
    num_tokens = fields.pop("num_tokens", len(PROMPT))
    return builders.handoff(
        fields.pop("handoff_id", "a1"),
        epoch=7,
        num_tokens=num_tokens,
        block_size=BLOCK_SIZE,
        last_hash=last_hash(PROMPT[:num_tokens], BLOCK_SIZE, root_hash("m")),
        ttl_s=ttl_s,
        transport="vllm-nixl",
        address="127.0.0.1:5600",
        params=params if isinstance(params, bytes) else pack(params, ttl_s),
        **fields,
    )


def accept(
    given: Handoff, prompt_len: int = 100, used: UsedHandoffs | None = None, salt: str = ""
) -> tuple[JsonObject | None, str]:
    attempt = Attempt("d", "r", [*PROMPT, 5], 100, Sampling(max_tokens=9), handoff=given, cache_salt=salt)
    used = UsedHandoffs() if used is None else used
    return used.accept(given, attempt, CARD, prompt_len)


def changed(**fields: Any) -> bytes:
    """Params that another engine could have sent, as they travel."""
    sent = msgspec.msgpack.decode(pack(PARAMS, 30.0))
    sent.update(fields)
    return msgspec.msgpack.encode({name: value for name, value in sent.items() if value is not ...})


# --- accepted -------------------------------------------------------------------------------------------


def test_what_vllm_is_told() -> None:
    before = time.monotonic()
    params, reason = accept(handoff())
    assert reason == ""
    assert params is not None
    deadline = params.pop("remote_blocks_expiry_time")
    assert before + 29.9 < deadline <= time.monotonic() + 30.0
    theirs = {name: value for name, value in PARAMS.items() if name in params}
    assert params == theirs
    assert set(PARAMS) - set(params) == {"remote_blocks_expiry_time", "remote_prefill_cached_tokens"}


@pytest.mark.parametrize(("prompt_len", "blocks"), [(100, 4), (97, 4), (96, 3), (1, 1)])
def test_a_shorter_prompt_takes_fewer_blocks(prompt_len: int, blocks: int) -> None:
    params, _ = accept(handoff(), prompt_len)
    assert params is not None
    assert params["remote_block_ids"] == [[4, 5, 6, 7][:blocks]]
    assert params["remote_num_tokens"] == prompt_len


def test_the_earlier_of_both_deadlines_counts() -> None:
    for ttl_s, packed_s in ((5.0, 20.0), (20.0, 5.0)):
        params, _ = accept(handoff(pack(PARAMS, packed_s), ttl_s))
        assert params is not None
        assert params["remote_blocks_expiry_time"] - time.monotonic() == pytest.approx(5.0, abs=0.2)


def test_a_data_parallel_rank_s_name_is_its_engine_s() -> None:
    assert accept(handoff(changed(remote_engine_id="p0.7_dp3")))[0] is not None


@given(ttl_s=st.floats(0.001, 1e5))
def test_the_lease_outlives_every_deadline(ttl_s: float) -> None:
    assert lease_s(ttl_s) >= 1.5 * ttl_s + 5


def test_what_vllm_does_not_say_any_more_is_not_packed() -> None:
    for name in ("remote_block_ids", "remote_engine_id", "remote_port", "remote_num_tokens", "tp_size"):
        with pytest.raises(msgspec.ValidationError):
            pack({key: value for key, value in PARAMS.items() if key != name}, 30.0)


# --- refused --------------------------------------------------------------------------------------------

SENT: dict[str, tuple[dict[str, Any], str]] = {
    "another engine": ({"remote_engine_id": "p1.7"}, "remote_engine_id"),
    "another epoch": ({"remote_engine_id": "p0.8"}, "remote_engine_id"),
    "a pattern for a name": ({"remote_engine_id": "p0x7"}, "remote_engine_id"),
    "a longer name": ({"remote_engine_id": "p0.7_dp3\n"}, "remote_engine_id"),
    "too few blocks": ({"remote_block_ids": [[4, 5, 6]]}, "3 blocks for 100 tokens"),
    "too many blocks": ({"remote_block_ids": [[4, 5, 6, 7, 8]]}, "5 blocks for 100 tokens"),
    "too few blocks of the second group": ({"remote_block_ids": [[4, 5, 6, 7], [1]]}, "1 blocks"),
    "no group of blocks": ({"remote_block_ids": []}, "missing"),
    "a negative block": ({"remote_block_ids": [[4, 5, 6, -7]]}, "ids"),
    "a huge block": ({"remote_block_ids": [[4, 5, 6, 2**31]]}, "ids"),
    "one block twice": ({"remote_block_ids": [[4, 5, 6, 6]]}, "ids"),
    "blocks that are none": ({"remote_block_ids": [["a", "b", "c", "d"]]}, "params"),
    "another number of tokens": ({"remote_num_tokens": 99}, "remote_num_tokens"),
    "no port": ({"remote_port": 0}, "where"),
    "a port that is none": ({"remote_port": 65536}, "where"),
    "a negative port": ({"remote_port": -1}, "where"),
    "no host": ({"remote_host": ""}, "where"),
    "no request": ({"remote_request_id": ""}, "where"),
    "no tensor parallel rank": ({"tp_size": 0}, "ranks"),
    "too many ranks": ({"pp_size": 2**40}, "ranks"),
    "no context parallel rank": ({"dcp_size": -1}, "ranks"),
    "something left out": ({"remote_port": ...}, "params"),
    "never made to expire": ({"expires_at": ...}, "expired"),
    "expired by the clock": ({"expires_at": time.time() - 1.0}, "expired"),
    "for ever": ({"expires_at": math.inf}, "believed"),
    "until no time": ({"expires_at": math.nan}, "believed"),
}


@pytest.mark.parametrize("fault", SENT)
def test_params_that_do_not_fit_are_refused(fault: str) -> None:
    fields, said = SENT[fault]
    params, reason = accept(handoff(changed(**fields)))
    assert params is None
    assert said in reason


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"ttl_s": 0.0}, "expired"),
        ({"ttl_s": -1.0}, "expired"),
        ({"ttl_s": MIN_LEFT_S / 2}, "expired"),
        ({"ttl_s": math.nan}, "believed"),
        ({"ttl_s": math.inf}, "believed"),
        ({"ttl_s": MAX_LEFT_S + 1}, "believed"),
        ({"transport": "tcp"}, "transport"),
        ({"layout": "other"}, "layout"),
        ({"block_size": 64}, "block_size"),
        ({"num_tokens": 0}, "num_tokens"),
        ({"num_tokens": 102}, "num_tokens"),
        ({"last_hash": 1}, "last_hash"),
        ({"holder": Incarnation("p1", 7)}, "remote_engine_id"),
        ({"holder": Incarnation("p0", 8)}, "remote_engine_id"),
    ],
)
def test_handoffs_that_do_not_fit_are_refused(fields: dict[str, Any], said: str) -> None:
    params, reason = accept(msgspec.structs.replace(handoff(changed()), **fields))
    assert params is None
    assert said in reason


def test_a_prompt_that_goes_on_after_the_handed_kv_is_refused() -> None:
    assert accept(handoff(), 101)[0] is None
    assert accept(handoff(), 0)[0] is None


def test_another_salt_s_kv_is_refused() -> None:
    params, reason = accept(handoff(), salt="x")
    assert params is None
    assert "last_hash" in reason


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", b"garbage", b"\x91\xa1\xff", b"\x81" * 5000, b"\x91" * 100_000]
)
def test_garbage_is_refused(data: bytes) -> None:
    params, reason = accept(handoff(data))
    assert params is None
    assert "params" in reason


# --- once -----------------------------------------------------------------------------------------------


def test_a_handoff_is_used_once() -> None:
    used = UsedHandoffs()
    assert accept(handoff(), used=used)[0] is not None
    params, reason = accept(handoff(), used=used)
    assert params is None
    assert "before" in reason
    assert accept(handoff(handoff_id="a2"), used=used)[0] is not None


def test_one_that_was_refused_may_still_be_used() -> None:
    used = UsedHandoffs()
    assert accept(handoff(changed(remote_port=0)), used=used)[0] is None
    assert accept(handoff(), used=used)[0] is not None


def test_used_ones_are_remembered_until_they_have_expired(monkeypatch: pytest.MonkeyPatch) -> None:
    used, now = UsedHandoffs(), 1000.0
    monkeypatch.setattr(handoff_params.time, "monotonic", lambda: now)
    for i in range(5):
        assert accept(handoff(handoff_id=str(i)), used=used)[0] is not None
    now += 29.0
    assert accept(handoff(handoff_id="0"), used=used)[1] == "used before"
    now += 2.0
    assert accept(handoff(handoff_id="9"), used=used)[0] is not None
    assert len(used) == 1


def test_when_too_many_are_in_use_more_are_refused_and_none_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handoff_params, "MAX_USED", 3)
    used = UsedHandoffs()
    for i in range(3):
        assert accept(handoff(handoff_id=str(i)), used=used)[0] is not None
    assert "in use" in accept(handoff(handoff_id="3"), used=used)[1]
    assert accept(handoff(handoff_id="0"), used=used)[1] == "used before"


# --- whatever comes -------------------------------------------------------------------------------------

SMALL = st.integers(-(2**40), 2**70) | st.integers(-2, 8)
ODD = st.none() | st.booleans() | SMALL | st.floats() | st.text(max_size=8) | st.binary(max_size=8)
FIELDS = st.dictionaries(
    st.sampled_from([*PARAMS, "expires_at"]),
    ODD | st.lists(st.lists(SMALL, max_size=5) | ODD, max_size=3) | st.just(...),
    max_size=4,
)


def packed(fields: dict[str, Any]) -> bytes:
    fits = {name: min(value, 2**63) if isinstance(value, int) else value for name, value in fields.items()}
    try:
        return changed(**fits)
    except OverflowError:  # an integer in a list that msgpack has no room for
        return b""


@settings(max_examples=500)
@given(
    data=st.binary(max_size=120) | FIELDS.map(packed) | st.just(changed()),
    ttl_s=st.floats() | st.just(30.0),
    num_tokens=st.integers(-1, 110) | st.just(100),
    prompt_len=st.integers(-1, 110) | st.just(100),
)
def test_nothing_that_could_harm_gets_through(
    data: bytes, ttl_s: float, num_tokens: int, prompt_len: int
) -> None:
    used = UsedHandoffs()
    given = handoff(data, ttl_s, num_tokens=num_tokens)
    params, reason = accept(given, prompt_len, used)
    if params is None:
        assert reason
        assert len(used) == 0
        return
    now = time.monotonic()
    assert now < params["remote_blocks_expiry_time"] <= now + ttl_s
    assert params["remote_num_tokens"] == prompt_len <= num_tokens
    assert params["remote_engine_id"].startswith(engine_id(Incarnation("p0", 7)))
    blocks = math.ceil(prompt_len / BLOCK_SIZE)
    for group in params["remote_block_ids"]:
        assert len(set(group)) == len(group) == blocks > 0
        assert all(isinstance(block, int) and 0 <= block < 2**31 for block in group)
    assert 0 < params["remote_port"] < 65536
    assert all(1 <= params[name] <= 4096 for name in ("tp_size", "dcp_size", "pp_size"))
    assert accept(given, prompt_len, used)[0] is None
