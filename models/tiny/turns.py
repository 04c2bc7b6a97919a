"""The turns of a dialogue, each part of an answer marked with how much it counts in training."""

from __future__ import annotations

from dataclasses import dataclass


class Copied(str):
    """A part of an answer that must be read from the context: it counts most."""

    __slots__ = ()


class Chosen(Copied):
    """A tool's name, or a parameter's. It is copied too, but from one of several places: it counts most of
    all."""

    __slots__ = ()


class Forced(str):
    """A part of an answer that the model cannot know, or must not learn to choose: it counts nothing. A
    server forces it, by a schema that stands in no prompt."""

    __slots__ = ()


class Key(Forced):
    """A key that a server forces. It counts little: enough to be written in the tokens of training where a
    server lets the model choose how to cut it."""

    __slots__ = ()


Part = str
"""Text of an answer; plain, or one of the kinds above."""


@dataclass(frozen=True)
class Turn:
    """One message, in parts. A `plain` turn stands for a text without any template."""

    role: str
    parts: tuple[Part, ...]

    @staticmethod
    def of(role: str, content: str, copied: str = "") -> Turn:
        """A turn of one part; or of three, when `copied` is the substring that is read from the context."""
        if not copied:
            return Turn(role, (content,))
        start = content.rindex(copied)
        return Turn(role, (content[:start], Copied(copied), content[start + len(copied) :]))

    @property
    def content(self) -> str:
        """The message's text."""
        return "".join(self.parts)


Dialogue = list[Turn]
