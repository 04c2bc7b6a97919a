"""Variables whose values only a cluster knows, held open until a pod starts.

In a pod, `$(NAME)` in a container's arguments becomes the value that a Secret, a ConfigMap or the pod
itself gives. A manifest's command is read before that. So such a variable's value is, while it is read, a
mark that no shell and no flag takes for anything but text; `for_kubelet` writes `$(NAME)` again where one
is left.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_OPEN, _CLOSE = "\ue000", "\ue001"  # for private use: no manifest has them
_HELD = re.compile(f"{_OPEN}([^{_CLOSE}]*){_CLOSE}")
_NAMED = re.compile(r"\$\(([A-Za-z_][-.\w]*)\)|\$\{([A-Za-z_]\w*)\}|\$([A-Za-z_]\w*)", re.ASCII)
_ESCAPED = re.compile(rf"\$(?=[$({_OPEN}])")  # what a kubelet would take for more than a dollar sign


def placeholder(name: str) -> str:
    """What stands for a variable's value."""
    return f"{_OPEN}{name}{_CLOSE}"


def has_placeholder(text: str) -> bool:
    """Whether a part of a text is only known to a cluster."""
    return _OPEN in text


def with_references(text: str) -> str:
    """A text as people wrote it, for messages."""
    return _HELD.sub(r"$(\1)", text)


def for_kubelet(text: str) -> str:
    """A text as a container's argument: held variables are references, and other dollar signs are not."""
    return with_references(_ESCAPED.sub("$$", text))


def names_used(words: Iterable[str], known: Mapping[str, str]) -> list[str]:
    """Variables that words refer to, as Kubernetes or a shell does, and that are not known. Not those that
    have a default (`${NAME:-x}`): the kubelet has none."""
    used = ("".join(names) for word in words for names in _NAMED.findall(word))
    return [name for name in dict.fromkeys(used) if name not in known]
