"""The link secret: what workers and frontends of one deployment have in common.

It may consist of several lines, each a secret. A frontend proves that it knows the first; a worker accepts
any, and proves that it knows the one it was shown. So a secret is replaced under load, with no moment at
which old and new processes refuse each other:

    old             everywhere
    old, new        everywhere, in any order: all prove the old one and accept both
    new, old        everywhere: what has changed already proves the new one, which all accept
    new             everywhere

The file is read again when it has changed, and counts for connections that begin from then on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from penstock.clock import Clock
from penstock.errors import ConfigError
from penstock.net.renewed import Renewed, read_text

MIN_CHARS: Final = 16
MAX_SECRETS: Final = 8  # a stranger's proof is compared with each
MAX_FILE_BYTES: Final = 64 * 1024

_WHAT = "link secret"


class LinkSecret:
    """The secrets that count now.

    Args:
        text: one per line; None for none. Empty is a mistake.
        path: a file of the same, instead; empty for none.
        clock: as for Renewed.

    Raises ConfigError. None at all leaves the link open to whoever can connect.
    """

    def __init__(self, text: str | None = None, path: str = "", clock: Clock | None = None) -> None:
        self._fixed = _parsed(text, _WHAT) if text is not None else ()
        self._file: Renewed[tuple[str, ...]] | None = None
        if path:
            file = Path(path)
            self._file = Renewed(f"{_WHAT} {path}", [file], lambda: _read(file), clock)

    def accepted(self) -> tuple[str, ...]:
        """All that count, the one to prove first; empty: open."""
        return self._file.get() if self._file is not None else self._fixed


def _read(path: Path) -> tuple[str, ...]:
    return _parsed(read_text(_WHAT, path, MAX_FILE_BYTES), f"{_WHAT} {path}")


def _parsed(text: str, source: str) -> tuple[str, ...]:
    """No message shows a secret."""
    secrets = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not secrets or min(map(len, secrets)) < MIN_CHARS:
        raise ConfigError(f"{source}: a secret needs at least {MIN_CHARS} characters")
    if len(secrets) > MAX_SECRETS:
        raise ConfigError(f"{source}: {len(secrets)} secrets are more than {MAX_SECRETS}")
    return secrets
