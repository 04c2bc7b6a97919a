"""Dynamo's `nvext` of an answer: tells who asks which workers served the call, how long it took, and (which
Dynamo does not) why it went there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec

from penstock.core.attempt_times import AttemptTimes
from penstock.frontend.choice import Choice
from penstock.frontend.endpoint import Beginning
from penstock.shapes import JsonObject

NvextOf = Callable[[Choice], JsonObject]


def nvext_of(beginning: Beginning) -> NvextOf | None:
    """Makes the object of a choice that is complete; None where the client asked for nothing."""
    extra_fields, since = beginning.wanted.extra_fields, beginning.caller.since
    if not extra_fields:
        return None

    def of(choice: Choice) -> JsonObject:
        nvext: JsonObject = {}
        if "worker_id" in extra_fields:
            nvext["worker_id"] = _workers(choice.attempts)
        if "timing" in extra_fields:
            nvext["timing"] = _timing(choice, time.perf_counter() - since)
        if "explanation" in extra_fields and choice.explain is not None:
            nvext["explanation"] = msgspec.to_builtins(choice.explain())
        return nvext

    return of


def nvext_fields(beginning: Beginning, choices: Sequence[Choice]) -> JsonObject:
    """What a whole answer has of it: the object of its first choice."""
    of = nvext_of(beginning)
    return {} if of is None else {"nvext": of(choices[0])}


def _workers(attempts: Sequence[AttemptTimes]) -> JsonObject:
    """Which one computed the prompt and which one the last token, each as far as there was one."""
    first = _first_answered(attempts)
    workers = {"prefill_worker_id": first.instance_id} if first is not None else {}
    return workers | ({"decode_worker_id": attempts[-1].instance_id} if attempts else {})


def _timing(choice: Choice, total_s: float) -> JsonObject:
    timing: JsonObject = {
        "request_received_ms": round((time.time() - total_s) * 1e3),
        "total_time_ms": _ms(total_s),
        "kv_hit_rate": choice.cached_tokens / len(choice.request.token_ids),
    }
    first = _first_answered(choice.attempts)
    if first is not None and first.first_output_s is not None:
        timing["prefill_wait_time_ms"] = _ms(first.sent_s)
        timing["prefill_time_ms"] = _ms(first.first_output_s - first.sent_s)
        timing["ttft_ms"] = _ms(first.first_output_s)
    return timing


def _first_answered(attempts: Sequence[AttemptTimes]) -> AttemptTimes | None:
    return next((attempt for attempt in attempts if attempt.first_output_s is not None), None)


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
