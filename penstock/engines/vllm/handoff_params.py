"""KV that one vLLM hands to another: what is told of it, and what must be true before it is pulled.

vLLM's reader trusts what it is given: too few blocks end its whole engine, blocks that were given to
somebody else meanwhile become wrong text, and another block size does too. So everything is checked here,
before vLLM sees it; whatever does not fit costs only this prompt's computation.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from math import ceil

import msgspec

from penstock.core.hashing import last_hash, root_hash
from penstock.engines.active import mismatch
from penstock.shapes import Attempt, EngineCard, Handoff, Incarnation, JsonObject

MIN_LEFT_S = 1.0
"""A handoff with less life than this is not used: the pull would hardly end in time."""

MAX_LEFT_S = 24 * 3600.0
"""No worker keeps KV for a reader longer than this: what claims so is wrong."""

MAX_USED = 65536
"""Handoffs remembered as used, each until it has expired: thousands a second. Pulling one twice would read
what the first pull's end has freed, so beyond this, none is used."""

MAX_BLOCK_ID = 2**31 - 1
MAX_RANKS = 4096

LEASE_FACTOR = 1.5
LEASE_EXTRA_S = 5.0


PREFILL_ONLY: JsonObject = {"do_remote_decode": True, "do_remote_prefill": False}
"""What tells vLLM to keep a request's KV for somebody else when it ends."""


def lease_s(handoff_ttl_s: float) -> int:
    """For how long a prefill engine keeps blocks, in whole seconds as vLLM wants it.

    No pull may end later than `handoff_ttl_s` after the prompt was prefilled, by the clocks of the worker
    that held it and of the one that pulls. The lease is longer by more than those clocks may differ, and is
    not shortened by anything while a pull is possible.
    """
    return ceil(LEASE_FACTOR * handoff_ttl_s + LEASE_EXTRA_S)


def engine_id(incarnation: Incarnation) -> str:
    """Its name in NIXL."""
    return f"{incarnation.instance_id}.{incarnation.epoch}"


class Params(msgspec.Struct, forbid_unknown_fields=False):
    """What vLLM's pull connector needs, and nothing else; its own names."""

    remote_block_ids: list[list[int]]  # per KV cache group
    remote_engine_id: str
    remote_request_id: str
    remote_host: str
    remote_port: int
    remote_num_tokens: int
    tp_size: int
    dcp_size: int = 1
    pp_size: int = 1
    expires_at: float = 0.0  # seconds since 1970; not vLLM's


_DECODER = msgspec.msgpack.Decoder(Params)


def pack(params: JsonObject, ttl_s: float) -> bytes:
    """A prefill's kv_transfer_params, for a Handoff. Raises msgspec.ValidationError when vLLM's shape is
    not what it was."""
    checked = msgspec.convert(params, Params)
    checked.expires_at = time.time() + ttl_s
    return msgspec.msgpack.encode(checked)


def handoff_of(
    attempt: Attempt, card: EngineCard, holder: Incarnation, params: JsonObject, lease_end: float
) -> Handoff:
    """The handoff of a prompt that was computed, with vLLM's params for it. `lease_end`: by the monotonic
    clock, since the lease began when the core said so, however long that message lay somewhere."""
    ttl_s = max(0.0, lease_end - time.monotonic())
    root = root_hash(card.model.name, attempt.cache_salt)
    return Handoff(
        handoff_id=attempt.attempt_id,
        holder=holder,
        num_tokens=len(attempt.token_ids),
        block_size=card.block_size,
        last_hash=last_hash(attempt.token_ids, card.block_size, root),
        layout=card.layout,
        ttl_s=ttl_s,
        transport=card.transport,
        address=f"{params['remote_host']}:{params['remote_port']}",
        params=pack(params, ttl_s),
    )


class UsedHandoffs:
    """Decides which handoffs may be pulled, each once."""

    def __init__(self) -> None:
        self._used: OrderedDict[str, float] = OrderedDict()  # handoff id -> its end, by the monotonic clock

    def __len__(self) -> int:
        return len(self._used)

    def accept(
        self, handoff: Handoff, attempt: Attempt, card: EngineCard, prompt_len: int
    ) -> tuple[JsonObject | None, str]:
        """kv_transfer_params for the first `prompt_len` tokens of the attempt; or None, and why not."""
        now = time.monotonic()
        reason = mismatch(handoff, attempt, card) or self._used_up(handoff.handoff_id, now)
        if reason is not None:
            return None, reason
        try:
            params = _DECODER.decode(handoff.params)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return None, f"params: {error}"
        # By the time on its way, and by the clocks of both hosts: neither alone can be trusted.
        lefts_s = (handoff.ttl_s, params.expires_at - time.time())
        left_s = min(lefts_s)
        if not all(MIN_LEFT_S <= left_s <= MAX_LEFT_S for left_s in lefts_s):
            return None, f"expired, or not to be believed: {lefts_s[0]:.1f} s and {lefts_s[1]:.1f} s left"
        reason = _fault(params, handoff, prompt_len)
        if reason is not None:
            return None, reason
        self._used[handoff.handoff_id] = now + left_s
        blocks = -(-prompt_len // card.block_size)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [group[:blocks] for group in params.remote_block_ids],
            "remote_engine_id": params.remote_engine_id,
            "remote_request_id": params.remote_request_id,
            "remote_host": params.remote_host,
            "remote_port": params.remote_port,
            "remote_num_tokens": prompt_len,
            "tp_size": params.tp_size,
            "dcp_size": params.dcp_size,
            "pp_size": params.pp_size,
            "transfer_mode": "pull",
            # By this host's monotonic clock; connector.py keeps to it.
            "remote_blocks_expiry_time": now + left_s,
        }, ""

    def _used_up(self, handoff_id: str, now: float) -> str | None:
        while self._used and next(iter(self._used.values())) <= now:
            self._used.popitem(last=False)
        if handoff_id in self._used:
            return "used before"
        return None if len(self._used) < MAX_USED else f"{MAX_USED} others are in use"


def _fault(params: Params, handoff: Handoff, prompt_len: int) -> str | None:
    """Why these params must not reach vLLM, in words."""
    if not 0 < prompt_len <= handoff.num_tokens:
        return f"it has {handoff.num_tokens} tokens, of {prompt_len}"
    if params.remote_num_tokens != handoff.num_tokens:
        return f"remote_num_tokens is {params.remote_num_tokens}, num_tokens {handoff.num_tokens}"
    expected = engine_id(handoff.holder)
    if not re.fullmatch(re.escape(expected) + r"(_dp[0-9]+)?", params.remote_engine_id):
        return f"remote_engine_id is {params.remote_engine_id!r}, expected {expected!r}"
    blocks = -(-handoff.num_tokens // handoff.block_size)
    if not params.remote_block_ids:
        return "remote_block_ids: missing"
    for group in params.remote_block_ids:
        if len(group) != blocks:
            return f"remote_block_ids: {len(group)} blocks for {handoff.num_tokens} tokens"
        if not all(0 <= block <= MAX_BLOCK_ID for block in group) or len(set(group)) < blocks:
            return "remote_block_ids: not the ids of different blocks"
    if not params.remote_request_id or not params.remote_host or not 0 < params.remote_port < 2**16:
        return "it does not say where its KV is"
    if not all(1 <= size <= MAX_RANKS for size in (params.tp_size, params.dcp_size, params.pp_size)):
        return "tp_size, dcp_size or pp_size: not a number of ranks"
    return None
