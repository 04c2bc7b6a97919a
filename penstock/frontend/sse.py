"""Chunks of a streamed answer, as server-sent events.

All that a call's chunks share is encoded once; a chunk then costs the encoding of its own text and one
join.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from penstock.errors import PenstockError
from penstock.frontend.answer import Answer
from penstock.frontend.logprobs import LogprobFormat
from penstock.frontend.responses import Envelope, Usage, error_object
from penstock.structs import FinishReason

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode
_FINISH: dict[FinishReason | None, bytes] = {reason: _encode(reason) for reason in FinishReason}
_FINISH[None] = b"null"


class ChunkFormat:
    """Writes the chunks of one call.

    Args:
        envelope: what each chunk repeats.
        chat: whether text goes into `delta.content` (the first one of a choice with its role) or `text`.
        choices: number of choices.
        include_usage: whether chunks have a `usage`, null in all but the last.
        formats: per choice, for log-probabilities; empty when none were asked for.
    """

    def __init__(
        self,
        envelope: Envelope,
        *,
        chat: bool,
        choices: int,
        include_usage: bool,
        formats: Sequence[LogprobFormat] = (),
    ) -> None:
        self._head = b"data: " + _encode(envelope)[:-1] + b',"choices":['
        before = b'"delta":{"content":' if chat else b'"text":'
        first = b'"delta":{"role":"assistant","content":' if chat else before
        self._close = b"}" if chat else b""
        opens = [self._head + b'{"index":%d,' % index for index in range(choices)]
        self._opens = [opening + first for opening in opens]  # a choice's own, until its first chunk
        self._later_opens = [opening + before for opening in opens]
        self._tail = b"}]" + (b',"usage":null' if include_usage else b"") + b"}\n\n"
        self._plain = self._close + b',"logprobs":null,"finish_reason":null' + self._tail
        self._formats = formats

    def chunk(self, answer: Answer) -> bytes:
        """What is new of an answer; empty when nothing is."""
        text, logprobs = answer.take()
        reason = answer.finish_reason
        if reason is None and not logprobs:
            if not text:
                return b""
            after = self._plain
        else:
            rendered = b"null"
            if self._formats and logprobs:
                rendered = _encode(self._formats[answer.index].render(logprobs))
            after = b"".join(
                (self._close, b',"logprobs":', rendered, b',"finish_reason":', _FINISH[reason], self._tail)
            )
        index = answer.index
        opening = self._opens[index]
        self._opens[index] = self._later_opens[index]
        return b"".join((opening, _encode(text), after))

    def usage(self, usage: Usage) -> bytes:
        """The extra last chunk that `include_usage` asks for."""
        return self._head + b'],"usage":' + _encode(usage) + b"}\n\n"


def error_event(error: PenstockError) -> bytes:
    """Tells of a failure after the response has begun; no [DONE] follows."""
    return b"data: " + _encode(error_object(error)) + b"\n\n"
