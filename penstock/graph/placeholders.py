"""Placeholders for environment variables whose values are known only when a pod starts.

In a pod, the kubelet replaces `$(NAME)` in a container's arguments by a value from a Secret, a ConfigMap or
the pod itself. The manifest's command is read before that. So while it is read, a placeholder stands for
the value: plain text without a special meaning for shells and flags. `for_kubelet` turns the remaining
placeholders into `$(NAME)` again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_OPEN, _CLOSE = "\ue000", "\ue001"  # private-use characters, which no manifest contains
_HELD = re.compile(f"{_OPEN}([^{_CLOSE}]*){_CLOSE}")
_NAMED = re.compile(r"\$\(([A-Za-z_][-.\w]*)\)|\$\{([A-Za-z_]\w*)\}|\$([A-Za-z_]\w*)", re.ASCII)
_ESCAPED = re.compile(rf"\$(?=[$({_OPEN}])")  # a dollar sign that the kubelet would not take literally


def placeholder(name: str) -> str:
    """The placeholder for the value of a variable."""
    return f"{_OPEN}{name}{_CLOSE}"


def has_placeholder(text: str) -> bool:
    """Whether a text contains a placeholder."""
    return _OPEN in text


def with_references(text: str) -> str:
    """A text with `$(NAME)` for each placeholder, for messages."""
    return _HELD.sub(r"$(\1)", text)


def for_kubelet(text: str) -> str:
    """A text as an argument of a container: with `$(NAME)` for placeholders, and other dollar signs
    escaped."""
    return with_references(_ESCAPED.sub("$$", text))


def names_used(words: Iterable[str], known: Mapping[str, str]) -> list[str]:
    """The variables that words refer to, in the syntax of Kubernetes or a shell, and that are not in
    `known`. Without those with a default (`${NAME:-x}`), since the kubelet knows no defaults."""
    used = ("".join(names) for word in words for names in _NAMED.findall(word))
    return [name for name in dict.fromkeys(used) if name not in known]
