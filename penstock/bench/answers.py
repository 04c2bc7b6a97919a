"""Parses the answers of a server: a stream of OpenAI's chunks, or one JSON document."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

MAX_EVENT_BYTES = 1 << 20
"""Longest event. A longer one ends the request as failed."""

MAX_BODY_BYTES = 8 << 20
"""Most bytes that are kept of an answer that is not a stream."""

MAX_MESSAGE_CHARS = 1000
"""Most characters that are kept of an error's body."""


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class TokenCounts(msgspec.Struct):
    """The token counts of a request, as in OpenAI's API."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None

    @property
    def cached_tokens(self) -> int | None:
        """None if the server does not report it."""
        return self.prompt_tokens_details.cached_tokens if self.prompt_tokens_details else None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Error(msgspec.Struct):
    message: str = ""


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: TokenCounts | None = None
    error: _Error | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class StreamedAnswer:
    """Receives a stream of chat completions or completions.

    Times are seconds of time.perf_counter(). `failure` is (kind, message) after a failure.

    Args:
        on_gap: called with the seconds between two chunks that carry text.
        keep_text: whether `text` is collected, for the next turn.
    """

    __slots__ = (
        "_buffer",
        "_keep_text",
        "_on_gap",
        "_parts",
        "chunks",
        "done",
        "failure",
        "finish_reason",
        "first_at",
        "last_at",
        "retry_after_s",
        "status",
        "usage",
    )

    def __init__(self, on_gap: Callable[[float], None] | None = None, *, keep_text: bool = False) -> None:
        self.status = 0
        self.retry_after_s = 0.0  # from the answer's Retry-After
        self.first_at: float | None = None
        self.last_at = 0.0
        self.chunks = 0  # that carry text
        self.usage: TokenCounts | None = None
        self.finish_reason: str | None = None
        self.done = False  # [DONE] has arrived
        self.failure: tuple[str, str] | None = None
        self._on_gap = on_gap
        self._keep_text = keep_text
        self._parts: list[str] = []
        self._buffer = b""

    @property
    def text(self) -> str:
        return "".join(self._parts)

    @property
    def complete(self) -> bool:
        return self.failure is None and self.done and self.finish_reason is not None

    def on_status(self, status: int, retry_after_s: float = 0.0) -> None:
        self.status = status
        self.retry_after_s = retry_after_s
        if status != 200:
            self.failure = (f"http {status}", "")

    def on_body(self, chunk: bytes, now: float) -> None:
        if self.failure is not None:
            if self.status != 200:  # the body says why
                kind, message = self.failure
                self.failure = (kind, (message + chunk.decode(errors="replace"))[:MAX_MESSAGE_CHARS])
            return
        data = self._buffer + chunk if self._buffer else chunk
        if b"\r" in data:
            data = data.replace(b"\r", b"")  # JSON escapes its own; these are line ends
        *events, self._buffer = data.split(b"\n\n")
        for event in events:
            self._on_event(event, now)
        if len(self._buffer) > MAX_EVENT_BYTES:
            self.failure = ("protocol", f"an event of more than {MAX_EVENT_BYTES} bytes")

    def _on_event(self, event: bytes, now: float) -> None:
        if not event.startswith(b"data:"):
            event = next((line for line in event.split(b"\n") if line.startswith(b"data:")), b"")
        payload = event[5:].strip()
        if payload == b"[DONE]":
            self.done = True
        elif payload:
            try:
                self._on_chunk(_decode_chunk(payload), now)
            except msgspec.MsgspecError as error:
                self.failure = ("protocol", f"not a completion chunk: {error}")

    def _on_chunk(self, chunk: _Chunk, now: float) -> None:
        if chunk.usage is not None:
            self.usage = chunk.usage
        if chunk.error is not None:
            self.failure = ("stream error", chunk.error.message)
        for choice in chunk.choices:
            if choice.finish_reason is not None:
                self.finish_reason = choice.finish_reason
            text = choice.text
            if choice.delta is not None:
                text = choice.delta.content or choice.delta.reasoning_content
            if text:
                self._on_text(text, now)

    def _on_text(self, text: str, now: float) -> None:
        if self.first_at is None:
            self.first_at = now
        elif self._on_gap is not None:
            self._on_gap(now - self.last_at)
        self.last_at = now
        self.chunks += 1
        if self._keep_text:
            self._parts.append(text)


class JsonAnswer:
    """Receives one JSON document."""

    def __init__(self) -> None:
        self.status = 0
        self._body = b""

    def on_status(self, status: int, retry_after_s: float = 0.0) -> None:
        self.status = status

    def on_body(self, chunk: bytes, now: float) -> None:
        if len(self._body) < MAX_BODY_BYTES:
            self._body += chunk

    def decode(self) -> Any:
        """The document; None if the body is not valid JSON."""
        try:
            return msgspec.json.decode(self._body)
        except msgspec.MsgspecError:
            return None
