"""The output items of a response, and the events that tell of them as they grow."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from penstock.frontend.reply import text_alone
from penstock.frontend.responses_api.input_items import carried
from penstock.frontend.responses_api.tool_names import Offered
from penstock.frontend.sse import encode
from penstock.frontend.tools import INPUT
from penstock.shapes import JsonObject, Parsed, ToolCallDelta

_MESSAGE: Final = "message"
_REASONING: Final = "reasoning"
_CALL: Final = "function_call"
_CUSTOM_CALL: Final = "custom_tool_call"

_PREFIXES: Final = {_MESSAGE: "msg", _REASONING: "rs", _CALL: "fc", _CUSTOM_CALL: "ctc"}
_DELTAS: Final = {
    _MESSAGE: "response.output_text.delta",
    _REASONING: "response.reasoning_text.delta",
    _CALL: "response.function_call_arguments.delta",
}

_BEGUN_INPUT: Final = re.compile(rf'\s*\{{\s*"{INPUT}"\s*:\s*"')
_BEGUN_STRING: Final = re.compile(
    r'(?:[^"\\\x00-\x1f]+|\\["\\/bfnrt]|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}'
    r"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})*"
)

_NUMBER: Final = b',"sequence_number":'
_LOGPROBS: Final = b',"logprobs":%b' + _NUMBER


def item_id(item_type: str, response_id: str, place: str) -> str:
    """It has the response's id in it, so that an item can be found by its own."""
    return f"{_PREFIXES.get(item_type, 'item')}_{response_id.partition('_')[2]}_{place}"


@dataclass(slots=True)
class _OpenItem:
    """The item that grows."""

    type: str
    shown: JsonObject
    head: bytes = b""  # of the events of its texts: what comes before the text
    middle: bytes = b""  # and what comes between that and the sequence number
    texts: list[str] = field(default_factory=list)
    logprobs: list[JsonObject] = field(default_factory=list)
    told: int = 0  # how many of them events have had
    call: int | None = None  # the number of the call that it is


class OutputItems:
    """Takes an answer part by part, gives events, and collects `items`.

    Args:
        response_id: what the ids of items are made from.
        offered: tools by the names that the model knows.
        carries: whether reasoning is also given in `encrypted_content`.
    """

    def __init__(self, response_id: str, offered: Mapping[str, Offered], *, carries: bool) -> None:
        self.items: list[JsonObject] = []
        self._response_id = response_id
        self._offered = offered
        self._carries = carries
        self._sequence = 0
        self._open: _OpenItem | None = None
        self._called = False
        self._entries: list[JsonObject] = []  # log-probabilities of tokens whose text has not come

    def event(self, name: str, fields: JsonObject) -> bytes:
        """One event, with the next sequence number."""
        number = self._sequence
        self._sequence += 1
        data = encode({"type": name, **fields, "sequence_number": number})
        return b"".join((b"event: ", name.encode(), b"\ndata: ", data, b"\n\n"))

    def add(self, parsed: Parsed, entries: Sequence[JsonObject]) -> bytes:
        """The next part of the answer; `entries` are the log-probabilities of its tokens."""
        if not entries and (text := text_alone(parsed)) is not None:
            return self.add_text(text)
        self._entries += entries
        events: list[bytes] = []
        if parsed.reasoning:
            self._grow(_REASONING, parsed.reasoning, events)
        if parsed.content:
            self._add_content(parsed.content, events)
        elif parsed.reasoning or parsed.tool_calls:
            self._entries = []
        for call in parsed.tool_calls:
            self._add_call(call, events)
        return b"".join(events)

    def add_text(self, text: str) -> bytes:
        """The same for a part that is text alone."""
        if not text:
            return b""
        item = self._open
        if item is not None and item.type == _MESSAGE and not self._entries:
            return self._delta(item, text)
        events: list[bytes] = []
        self._add_content(text, events)
        return b"".join(events)

    def end(self, *, complete: bool) -> bytes:
        """The end of the answer: an answer without anything is an empty message."""
        events: list[bytes] = []
        if self._open is None and not self.items:
            self._begin(_MESSAGE, events)
        self._close(events, complete=complete)
        return b"".join(events)

    def _add_content(self, text: str, events: list[bytes]) -> None:
        """Space between calls is no message."""
        within = self._open is not None and self._open.type == _MESSAGE
        if within or not self._called or not text.isspace():
            self._grow(_MESSAGE, text, events)

    def _grow(self, item_type: str, text: str, events: list[bytes]) -> None:
        if self._open is None or self._open.type != item_type:
            self._close(events)
            self._begin(item_type, events)
        if item_type == _MESSAGE:
            self._add_logprobs(text)
        self._add_text(text, events)

    def _add_logprobs(self, text: str) -> None:
        if self._entries and self._open is not None:
            self._open.logprobs += _entries_of(text, self._entries)
            self._entries = []

    def _add_text(self, text: str, events: list[bytes]) -> None:
        item = self._open
        if item is None:
            return
        if item.type == _CUSTOM_CALL:  # its delta is made of the whole text
            item.texts.append(text)
        else:
            events.append(self._delta(item, text))

    def _delta(self, item: _OpenItem, text: str) -> bytes:
        """The event of the item's next text."""
        item.texts.append(text)
        middle = item.middle
        if item.told < len(item.logprobs):
            middle = _LOGPROBS % encode(item.logprobs[item.told :])
            item.told = len(item.logprobs)
        number = self._sequence
        self._sequence = number + 1
        return b"".join((item.head, encode(text), middle, b"%d}\n\n" % number))

    def _add_call(self, call: ToolCallDelta, events: list[bytes]) -> None:
        if self._open is None or self._open.call != call.index:
            self._close(events)
            self._called = True
            name = call.name or ""
            offered = self._offered.get(name, Offered("function", name))
            kind = _CUSTOM_CALL if offered.type == "custom" else _CALL
            fields: JsonObject = {"call_id": call.id or "", "name": offered.name}
            if offered.namespace is not None:
                fields["namespace"] = offered.namespace
            self._begin(kind, events, fields, call.index)
        if call.arguments:
            self._add_text(call.arguments, events)

    def _begin(
        self, item_type: str, events: list[bytes], fields: JsonObject | None = None, call: int | None = None
    ) -> None:
        index = len(self.items)
        shown: JsonObject = {
            "id": item_id(item_type, self._response_id, str(index)),
            "type": item_type,
            "status": "in_progress",
            **(fields or {}),
            **_EMPTY[item_type],
        }
        events.append(self.event("response.output_item.added", {"output_index": index, "item": shown}))
        place = {"item_id": shown["id"], "output_index": index}
        if item_type in (_MESSAGE, _REASONING):
            place["content_index"] = 0
            part = _part(item_type, "", [])
            events.append(self.event("response.content_part.added", {**place, "part": part}))
        item = _OpenItem(item_type, shown, call=call)
        if item_type != _CUSTOM_CALL:
            name = _DELTAS[item_type]
            fixed = encode({"type": name, **place})[:-1]
            item.head = b"".join((b"event: ", name.encode(), b"\ndata: ", fixed, b',"delta":'))
            item.middle = _LOGPROBS % b"[]" if item_type == _MESSAGE else _NUMBER
        self._open = item

    def _close(self, events: list[bytes], *, complete: bool = True) -> None:
        """What follows the last text of the item that is open."""
        item, self._open = self._open, None
        if item is None:
            return
        index, text = len(self.items), "".join(item.texts)
        place: JsonObject = {"item_id": item.shown["id"], "output_index": index}
        done: JsonObject = {**item.shown, "status": "completed" if complete else "incomplete"}
        if item.type == _CALL:
            done["arguments"] = text
            fields = {**place, "name": done["name"], "arguments": text}
            events.append(self.event("response.function_call_arguments.done", fields))
        elif item.type == _CUSTOM_CALL:
            done["input"] = _custom_input(text)
            delta = {**place, "delta": done["input"]}
            events.append(self.event("response.custom_tool_call_input.delta", delta))
            fields = {**place, "input": done["input"]}
            events.append(self.event("response.custom_tool_call_input.done", fields))
        else:
            place["content_index"] = 0
            fields = {**place, "text": text}
            if item.type == _MESSAGE:
                fields["logprobs"] = item.logprobs
            name = _DELTAS[item.type].replace(".delta", ".done")
            events.append(self.event(name, fields))
            part = _part(item.type, text, item.logprobs)
            events.append(self.event("response.content_part.done", {**place, "part": part}))
            done["content"] = [part]
            if item.type == _REASONING:
                done["encrypted_content"] = carried(text) if self._carries else None
        self.items.append(done)
        events.append(self.event("response.output_item.done", {"output_index": index, "item": done}))


_EMPTY: Final[dict[str, JsonObject]] = {
    _MESSAGE: {"role": "assistant", "content": []},
    _REASONING: {"summary": [], "content": []},
    _CALL: {"arguments": ""},
    _CUSTOM_CALL: {"input": ""},
}
"""What an item has beside its id when it begins."""


def _part(item_type: str, text: str, logprobs: list[JsonObject]) -> JsonObject:
    if item_type == _REASONING:
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _custom_input(arguments: str) -> str:
    """The text in a custom tool's arguments, as far as it goes where they were cut. What a model wrote
    otherwise is the text itself."""
    try:
        given: Any = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        begun = _BEGUN_INPUT.match(arguments)
        return arguments if begun is None else _begun_text(arguments[begun.end() :])
    text = given.get(INPUT) if isinstance(given, dict) else None
    return text if isinstance(text, str) else arguments


def _begun_text(begun: str) -> str:
    """A JSON string of which only the beginning is there, after its first quote, without what was cut of an
    escape; or, when it has ended, without what follows its end."""
    text = _BEGUN_STRING.match(begun)
    return "" if text is None else str(msgspec.json.decode(f'"{text[0]}"'))


def _entries_of(text: str, entries: Sequence[JsonObject]) -> list[JsonObject]:
    """Those of the tokens of which this text was made: others belong to reasoning, calls and marks."""
    wanted = text.encode()
    pieces = [bytes(entry["bytes"]) for entry in entries]
    start = b"".join(pieces).rfind(wanted)
    if start < 0:
        return list(entries)
    found, at = [], 0
    for entry, piece in zip(entries, pieces, strict=True):
        if at < start + len(wanted) and at + len(piece) > start:
            found.append(entry)
        at += len(piece)
    return found
