"""When the attempts of a request were sent and answered, for whoever asks once it has ended."""

from __future__ import annotations

import msgspec


class AttemptTimes(msgspec.Struct, gc=False):
    """One attempt, in seconds since the frontend had read its call. It ended when the request began to wait
    again (`queued_s` of the next attempt), when the next one was sent, or with the request."""

    attempt_id: str
    instance_id: str
    prefill_only: bool
    sent_s: float
    queued_s: float | None = None  # when the request began to wait for it; None: it followed a prefill
    retried_because: str = ""  # why the attempt before it did not get on
    first_output_s: float | None = None
    cached_tokens: int | None = None  # of its prompt, as the engine reported with its first output
    took: tuple[float, float, float, float] | None = None  # EngineTimes, once it has ended in the engine
