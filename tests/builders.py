"""Attempts, handoffs and registrations for tests, in one line each. Cards: tests/cards.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from penstock.shapes import Attempt, Handoff, Incarnation, Registration, Role, Sampling


def attempt(
    attempt_id: str = "a.1",
    prompt: int | Sequence[int] = 3,
    sampling: Sampling | None = None,
    *,
    generated: Sequence[int] = (),
    **fields: Any,
) -> Attempt:
    """An attempt at a prompt, or at one of so many tokens. What earlier attempts generated follows it.
    `fields` are the attempt's others and, unless a sampling is given, those of its sampling."""
    token_ids = list(range(prompt) if isinstance(prompt, int) else prompt)
    if sampling is None:
        given = {name: fields.pop(name) for name in Sampling.__struct_fields__ if name in fields}
        sampling = Sampling(**{"max_tokens": 5, **given})
    request_id = attempt_id.partition(".")[0]
    return Attempt(attempt_id, request_id, [*token_ids, *generated], len(token_ids), sampling, **fields)


def handoff(handoff_id: str = "h", instance_id: str = "p0", *, epoch: int = 1, **fields: Any) -> Handoff:
    """The right to pull the KV of three tokens over TCP. `fields` are the handoff's others."""
    holder = Incarnation(instance_id, epoch)
    usual = Handoff(handoff_id, holder, 3, 16, 1, "layout", 30.0, "tcp", "127.0.0.1:1")
    return msgspec.structs.replace(usual, **fields)


def registration(instance_id: str = "w-0", epoch: int = 1, **fields: Any) -> Registration:
    """A decode worker, on another machine, where each of its epochs listens on another port. `fields` are
    the registration's others."""
    usual = Registration(instance_id, epoch, Role.DECODE, "m", f"10.0.0.7:{epoch}", host="h")
    return msgspec.structs.replace(usual, **fields)
