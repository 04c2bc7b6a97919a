"""Chunks of a streamed answer of OpenAI's APIs, as server-sent events.

All that a call's chunks share is encoded once; a chunk then costs the encoding of its own text and one
join.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import msgspec

from penstock.errors import PenstockError
from penstock.frontend.choice import Choice
from penstock.frontend.completion_objects import Envelope, finish_name, usage_of
from penstock.frontend.http.statuses import error_object
from penstock.frontend.nvext import NvextOf
from penstock.frontend.reply import TOOL_CALLS
from penstock.shapes import FinishReason, JsonObject, TokenLogprob

_END = b"}\n\n"  # of a chunk
DONE = b"data: [DONE]\n\n"

encode = msgspec.json.Encoder().encode
_FINISH: dict[str | None, bytes] = {reason: encode(reason) for reason in (*FinishReason, TOOL_CALLS, None)}


class Chunks:
    """Writes the chunks of one call. A subclass says where their text goes.

    Args:
        envelope: what each chunk repeats.
        choices: number of choices.
        include_usage: whether chunks have a `usage`, null in all but the last.
        continuous_usage: whether it is null in none, and says what its choice has cost so far.
        nvext: makes the `nvext` of a choice's last chunk.
        beside_first: what the first chunk of each choice has beside it.
    """

    prompt_in_choice: ClassVar[bool]  # where the prompt's token ids are shown: in the choice, or beside it

    before: ClassVar[bytes]  # the text of a choice
    first: ClassVar[bytes]  # the same, before the choice's first text
    close: ClassVar[bytes] = b""  # after it

    def __init__(
        self,
        envelope: Envelope,
        choices: int,
        *,
        include_usage: bool,
        continuous_usage: bool = False,
        nvext: NvextOf | None = None,
        beside_first: JsonObject | None = None,
    ) -> None:
        shared = b"data: " + encode(envelope)[:-1]
        self._head = self._first_head = shared + b',"choices":['
        if beside_first:
            self._first_head = b"".join((shared, b",", encode(beside_first)[1:-1], b',"choices":['))
        self._later_opens = [self.opening(index) + self.before for index in range(choices)]
        # Of each choice's next chunk.
        self._opens = [self.opening(index, first=True) + self.first for index in range(choices)]
        self._include_usage = include_usage
        self._continuous_usage = continuous_usage
        self._nvext = nvext
        self._prompts_due = set(range(choices))  # choices whose prompt's token ids are still to be shown
        self._tail = b"}]" + (b',"usage":null' if include_usage else b"") + _END
        self.going_on = b',"logprobs":null,"finish_reason":null' + self._tail
        self._plain = self.close + self.going_on

    def chunk(self, choice: Choice) -> bytes:
        """What is new of a choice; empty when nothing is."""
        text, logprobs = choice.take()
        token_ids = choice.take_token_ids()
        if choice.finish_reason is None and not logprobs and not token_ids:
            if not text:
                return b""
            after = self._plain if not self._continuous_usage else self.close + self.ending(choice, ())
        else:
            after = self.close + self.ending(choice, logprobs, token_ids)
        index = choice.index
        opening = self._opens[index]
        self._opens[index] = self._later_opens[index]
        return b"".join((opening, encode(text), after))

    def opening(self, index: int, *, first: bool = False) -> bytes:
        """How a chunk of a choice begins, its first one or another."""
        return (self._first_head if first else self._head) + b'{"index":%d,' % index

    def ending(
        self, choice: Choice, logprobs: Sequence[TokenLogprob], token_ids: list[int] | None = None
    ) -> bytes:
        """What follows the delta or text where there is more to say than that it goes on."""
        rendered = encode(choice.render_logprobs(logprobs)) if logprobs else b"null"
        finish = _FINISH[finish_name(choice)]
        stop = b""
        if choice.finish_reason is not None:
            stop = b',"stop_reason":' + encode(choice.stop_reason)
        ids, tail = b"", self._tail
        if token_ids is not None:
            ids, tail = self._with_token_ids(choice, token_ids)
        if self._continuous_usage:
            tail = tail.replace(b',"usage":null', b',"usage":' + encode(usage_of([choice])))
        if self._nvext is not None and choice.finish_reason is not None:
            tail = tail.removesuffix(_END) + b',"nvext":' + encode(self._nvext(choice)) + _END
        return b"".join((b',"logprobs":', rendered, b',"finish_reason":', finish, stop, ids, tail))

    def _with_token_ids(self, choice: Choice, token_ids: list[int]) -> tuple[bytes, bytes]:
        """What a chunk's choice ends with, and what follows it; the first of a choice has its prompt's."""
        ids, tail = b',"token_ids":' + encode(token_ids), self._tail
        if choice.index in self._prompts_due:
            self._prompts_due.remove(choice.index)
            prompt = b',"prompt_token_ids":' + encode(choice.request.token_ids)
            if self.prompt_in_choice:
                return ids + prompt, tail
            return ids, b"}]" + prompt + tail.removeprefix(b"}]")
        return ids, tail

    async def end(self, choices: Sequence[Choice]) -> bytes:
        """The extra last chunk that `include_usage` asks for, and OpenAI's end of a stream."""
        if not self._include_usage:
            return DONE
        return b"".join((self._head, b'],"usage":', encode(usage_of(choices)), b"}\n\n", DONE))

    def failed(self, error: PenstockError) -> bytes:
        """Tells of a failure after the response has begun; no [DONE] follows."""
        return b"data: " + encode(error_object(error)) + b"\n\n"
