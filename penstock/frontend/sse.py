"""Chunks of a streamed answer, as server-sent events.

All that a call's chunks share is encoded once; a chunk then costs the encoding of its own text and one
join.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from penstock.errors import PenstockError
from penstock.frontend.answer import Answer
from penstock.frontend.http.statuses import error_object
from penstock.frontend.reply import TOOL_CALLS, Reply
from penstock.frontend.responses import Envelope, Usage, finish_name
from penstock.frontend.text.logprobs import LogprobFormat
from penstock.shapes import FinishReason, JsonObject, Parsed, TokenLogprob, ToolCallDelta

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode
_FINISH: dict[str | None, bytes] = {reason: _encode(reason) for reason in (*FinishReason, TOOL_CALLS, None)}


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
        self._going_on = b',"logprobs":null,"finish_reason":null' + self._tail
        self._plain = self._close + self._going_on
        self._begun: set[int] = set()  # choices that are taken apart, and have had a chunk
        self._formats = formats

    def chunk(self, answer: Answer) -> bytes:
        """What is new of an answer; empty when nothing is."""
        text, logprobs = answer.take()
        if answer.reply is not None:
            return self._taken_apart(answer, answer.reply, logprobs)
        reason = answer.finish_reason
        if reason is None and not logprobs:
            if not text:
                return b""
            after = self._plain
        else:
            after = self._close + self._ending(answer, logprobs)
        index = answer.index
        opening = self._opens[index]
        self._opens[index] = self._later_opens[index]
        return b"".join((opening, _encode(text), after))

    def _ending(self, answer: Answer, logprobs: Sequence[TokenLogprob]) -> bytes:
        """What follows the delta or text where there is more to say than that it goes on."""
        rendered = b"null"
        if self._formats and logprobs:
            rendered = _encode(self._formats[answer.index].render(logprobs))
        finish = _FINISH[finish_name(answer)]
        stop = b""
        if answer.finish_reason is not None:
            stop = b',"stop_reason":' + _encode(answer.stop_reason)
        return b"".join((b',"logprobs":', rendered, b',"finish_reason":', finish, stop, self._tail))

    def _taken_apart(self, answer: Answer, reply: Reply, logprobs: Sequence[TokenLogprob]) -> bytes:
        """One chunk for each part of what is new; the last one says how the answer goes on."""
        deltas = [_delta(parsed) for parsed in reply.take()]
        if not deltas and (answer.finish_reason is not None or (logprobs and self._formats)):
            deltas.append({})
        if not deltas:
            return b""
        index = answer.index
        if index not in self._begun:
            self._begun.add(index)
            deltas[0] = {"role": "assistant", **deltas[0]}
        opening = self._head + b'{"index":%d,"delta":' % index
        chunks = [b"".join((opening, _encode(delta), self._going_on)) for delta in deltas[:-1]]
        return b"".join((*chunks, opening, _encode(deltas[-1]), self._ending(answer, logprobs)))

    def usage(self, usage: Usage) -> bytes:
        """The extra last chunk that `include_usage` asks for."""
        return self._head + b'],"usage":' + _encode(usage) + b"}\n\n"


def _delta(parsed: Parsed) -> JsonObject:
    """A part of an answer, as OpenAI's `delta`, with `reasoning` beside `content` as vLLM has it."""
    delta: JsonObject = {}
    if parsed.reasoning is not None:
        delta["reasoning"] = parsed.reasoning
    if parsed.content is not None:
        delta["content"] = parsed.content
    if parsed.tool_calls:
        delta["tool_calls"] = [_call_delta(call) for call in parsed.tool_calls]
    return delta


def _call_delta(call: ToolCallDelta) -> JsonObject:
    function = {"name": call.name, "arguments": call.arguments}
    delta: JsonObject = {
        "index": call.index,
        "function": {name: value for name, value in function.items() if value is not None},
    }
    return {"id": call.id, "type": "function", **delta} if call.id is not None else delta


def error_event(error: PenstockError) -> bytes:
    """Tells of a failure after the response has begun; no [DONE] follows."""
    return b"data: " + _encode(error_object(error)) + b"\n\n"
