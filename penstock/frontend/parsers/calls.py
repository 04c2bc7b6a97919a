"""Tool calls in a model's text, found while it is being written.

Formats differ in what stands around a call; the call itself is a JSON object with `name` and `arguments`
(or `parameters`). Its arguments are given out as they come. All work is proportional to the text.

    state      its text                         next
    ---------  -------------------------------  ----------------------------------------------------
    CONTENT    up to the format's opening       BETWEEN; what may begin the opening is held back
    BETWEEN    separators                       HEADER at `{`; CONTENT behind the format's closing
    HEADER     {"name": "f", "arguments":       ARGUMENTS; an object with its keys in another order is
                                                read as a whole; what is no call becomes content
    ARGUMENTS  one JSON value                   REST
    REST       what else the object has         BETWEEN
"""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from penstock.ports import CALL_ID_PREFIX
from penstock.shapes import Parsed, ToolCallDelta

MAX_HEADER_CHARS: Final = 1024
"""Of a call before its arguments. What is longer is read once the whole object is there."""

_HEADER: Final = re.compile(
    r'\{\s*"name"\s*:\s*"(?P<name>(?:[^"\\]|\\.)*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\S)'
)


@dataclass(frozen=True, slots=True)
class CallFormat:
    """What stands around calls."""

    opening: str  # empty: an answer that begins with `{` or `[` is calls
    closing: str = ""  # empty: calls go on to the end
    separators: str = " \t\r\n"  # between calls


class _State(Enum):
    CONTENT = "content"
    BETWEEN = "between"
    HEADER = "header"
    ARGUMENTS = "arguments"
    REST = "rest"


class JsonEnd:
    """Finds where a JSON value ends, however its text is cut. `depth`: brackets that are open already."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False
        self._escaped = False
        self._begun = depth > 0

    def find(self, text: str, start: int = 0) -> int | None:
        """The place behind the value's last character in the next part of the text, from `start` on; None
        when it goes on. A number or a word ends before the comma, bracket or white space behind it."""
        for place in range(start, len(text)):
            char = text[place]
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
                    if self._depth == 0:
                        return place + 1
            elif char == '"':
                self._in_string = self._begun = True
            elif char in "{[":
                self._depth += 1
                self._begun = True
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return place + (1 if self._depth == 0 else 0)
            elif self._depth == 0 and (char in "," or char.isspace()):
                if self._begun:
                    return place
            else:
                self._begun = True
        return None


class CallScanner:
    """`push` takes text, and returns what it adds. `end` must follow the last text."""

    def __init__(self, format: CallFormat, most_calls: int | None = None) -> None:
        """Calls beyond `most_calls` are read and left out."""
        self._format = format
        self._most_calls = most_calls
        self._state = _State.CONTENT
        self._text = ""  # not yet given out
        self._scanned = 0  # of `_text`, by `_value`
        self._value = JsonEnd()
        self._calls = 0
        self._opened = False  # where calls begin without an opening: whether this was decided
        self._only_opened = False  # whether nothing but separators has followed the opening
        self._closed = False  # whether only white space has come since the last call
        self._news = Parsed(tool_calls=[])

    def push(self, text: str) -> Parsed:
        """What this text adds; with empty fields where it adds nothing."""
        self._text += text
        while self._step():
            pass
        news, self._news = self._news, Parsed(tool_calls=[])
        return news

    def end(self) -> Parsed:
        """What was held back in case that more comes."""
        if self._state is _State.CONTENT:
            self._content(self._text)
        elif self._state is _State.HEADER or (self._state is _State.BETWEEN and self._only_opened):
            self._content(self._format.opening + self._text)
        self._text = ""
        news, self._news = self._news, Parsed(tool_calls=[])
        return news

    def _step(self) -> bool:
        """Go on by one state. False when there must be more text first."""
        match self._state:
            case _State.CONTENT:
                return self._read_content()
            case _State.BETWEEN:
                return self._read_separators()
            case _State.HEADER:
                return self._read_header()
            case _State.ARGUMENTS:
                return self._read_arguments()
            case _State.REST:
                return self._read_rest()

    def _read_content(self) -> bool:
        opening = self._format.opening
        if not opening:
            return self._read_beginning()
        if self._closed:  # white space between two calls is no content
            self._text = self._text.lstrip()
            self._closed = not self._text
        before, found, after = self._text.partition(opening)
        if found:
            self._content(before)
            self._text, self._state, self._only_opened = after, _State.BETWEEN, True
            return True
        kept = overlap(self._text, opening)
        self._content(self._text[: len(self._text) - kept])
        self._text = self._text[len(self._text) - kept :]
        return False

    def _read_beginning(self) -> bool:
        if not self._opened:
            begun = self._text.lstrip()
            if not begun:
                return False
            self._opened = True
            if begun[0] in "{[":
                self._text, self._state = begun, _State.BETWEEN
                return True
        self._content(self._text)
        self._text = ""
        return False

    def _read_separators(self) -> bool:
        closing = self._format.closing
        self._text = self._text.lstrip(self._format.separators)
        if closing and self._text.startswith(closing):
            self._text, self._state = self._text[len(closing) :], _State.CONTENT
            self._closed = True
            return True
        if not self._text or (closing and closing.startswith(self._text)):
            return False
        if self._text[0] == "{":
            self._state, self._value, self._scanned = _State.HEADER, JsonEnd(), 0
            self._only_opened = False
            return True
        return self._no_call(self._format.opening + self._text)

    def _read_header(self) -> bool:
        header = _HEADER.match(self._text) if len(self._text) <= MAX_HEADER_CHARS else None
        if header is not None:
            self._begin(json.loads(f'"{header["name"]}"', strict=False))
            self._text = self._text[header.end() :]
            self._state, self._value, self._scanned = _State.ARGUMENTS, JsonEnd(), 0
            return True
        end = self._value.find(self._text, self._scanned)
        self._scanned = len(self._text)
        if end is None:
            return False
        call = _call_of(self._text[:end])
        if call is None:
            return self._no_call(self._format.opening + self._text)
        name, arguments = call
        self._begin(name)
        self._arguments(json.dumps(arguments, ensure_ascii=False))
        self._calls += 1
        self._text, self._state = self._text[end:], _State.BETWEEN
        return True

    def _read_arguments(self) -> bool:
        end = self._value.find(self._text)
        part = self._text if end is None else self._text[:end]
        self._arguments(part)
        if end is None:
            self._text = ""
            return False
        self._text = self._text[end:]
        self._state, self._value = _State.REST, JsonEnd(depth=1)
        return True

    def _read_rest(self) -> bool:
        end = self._value.find(self._text)
        if end is None:
            self._text = ""
            return False
        self._calls += 1
        self._text, self._state = self._text[end:], _State.BETWEEN
        return True

    def _no_call(self, text: str) -> bool:
        """What looked like a call is none: it and all that follows is content."""
        self._content(text)
        self._text, self._state = "", _State.CONTENT
        return False

    def _content(self, text: str) -> None:
        if text:
            self._news.content = (self._news.content or "") + text

    @property
    def _left_out(self) -> bool:
        return self._most_calls is not None and self._calls >= self._most_calls

    def _begin(self, name: str) -> None:
        if not self._left_out:
            self._news.tool_calls.append(ToolCallDelta(self._calls, new_call_id(), name, ""))

    def _arguments(self, text: str) -> None:
        if text and not self._left_out:
            last = self._news.tool_calls[-1] if self._news.tool_calls else None
            if last is not None and last.index == self._calls:
                last.arguments = (last.arguments or "") + text
            else:
                self._news.tool_calls.append(ToolCallDelta(self._calls, arguments=text))


def new_call_id() -> str:
    """An id in OpenAI's form."""
    return f"{CALL_ID_PREFIX}{uuid.uuid4().hex[:24]}"


def overlap(text: str, mark: str) -> int:
    """How many characters at the end of the text may be the beginning of the mark."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0


def _call_of(text: str) -> tuple[str, Any] | None:
    """Name and arguments of an object that is a call; None when it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    arguments = found.get("arguments", found.get("parameters"))
    name = found.get("name")
    return (name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None
