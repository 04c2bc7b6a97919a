"""API keys: who may use the frontend, and under which name.

A keys file holds hashes, so that who reads it, or its backup, can use none of the keys:

    # one line per key; a name may have several, as while its key is being replaced
    team-a sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae

The hash is a fast one without salt. Slow, salted hashes are for passwords, which can be guessed; a key made
by `penstock key` is 256 random bits, which cannot, whatever the speed, and each request must be checked in
microseconds. A digest is looked up in a dict: how long that takes may depend on the digest, but nobody can
choose keys by their digests, so there is no way from that time to a key.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Final

from penstock.clock import Clock
from penstock.errors import ConfigError, Rejection, RequestRejected
from penstock.net.renewed import Renewed, read_text

MAX_FILE_BYTES: Final = 4 * 1024 * 1024  # 40,000 keys, read in some 30 ms
MIN_KEY_CHARS: Final = 20  # of keys made elsewhere: 120 bits when they are random
UNNAMED: Final = "api-key"  # the name of the key that came as a setting and not from the file
ADMIN: Final = "admin"  # the name of the keys that may see what was decided for everybody's requests

_RANDOM_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9][-\w.]{0,63}", re.ASCII)
_LINE = re.compile(rf"(?P<name>{_NAME.pattern})\s+sha256:(?P<digest>[0-9a-f]{{64}})", re.ASCII)

Digests = Mapping[bytes, str]  # SHA-256 of each key, and the name it stands for


class ApiKeys:
    """The keys of which a request must bring one. None at all lets everybody in.

    Args:
        key: one key in the clear, known as UNNAMED; empty for none.
        path: a keys file, read again when it has changed; empty for none.
        clock: as for Renewed.

    Raises ConfigError when the file cannot be used.
    """

    def __init__(self, key: str = "", path: str = "", clock: Clock | None = None) -> None:
        self._fixed: Digests = {sha256(key.encode()).digest(): UNNAMED} if key else {}
        self._file: Renewed[Digests] | None = None
        if path:
            file = Path(path)
            self._file = Renewed(
                f"API keys {path}", [file], lambda: {**read_api_keys(file), **self._fixed}, clock
            )

    def check(self, authorization: bytes | None, x_api_key: bytes | None = None) -> str:
        """The name of the key in an `Authorization` header, where OpenAI's clients send it, or else in an
        `x-api-key` header, where Anthropic's do; "" when no keys are needed.

        Raises RequestRejected(UNAUTHENTICATED) unless it brings a key that is known.
        """
        digests = self._file.get() if self._file is not None else self._fixed
        if not digests:
            return ""
        scheme, _, key = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not key.strip():
            key = x_api_key or b""
        if not key.strip():
            raise RequestRejected(
                "An API key is needed: `Authorization: Bearer KEY`, or `x-api-key: KEY`.",
                kind=Rejection.UNAUTHENTICATED,
                code="missing_api_key",
            )
        name = digests.get(sha256(key.strip()).digest())
        if name is None:
            raise RequestRejected(
                "The API key is not valid.", kind=Rejection.UNAUTHENTICATED, code="invalid_api_key"
            )
        return name


def new_key() -> str:
    """A key that cannot be guessed."""
    return "pk-" + secrets.token_urlsafe(_RANDOM_BYTES)


def key_line(name: str, key: str) -> str:
    """The line of a keys file for this key. Raises ConfigError when the name or the key will not do."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            "name: expected up to 64 letters, digits, -, _ and ., beginning with a letter or digit"
        )
    if len(key) < MIN_KEY_CHARS or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"key: expected at least {MIN_KEY_CHARS} printable ASCII characters without spaces, at random: "
            f"its hash would not hide less"
        )
    return f"{name} sha256:{sha256(key.encode()).hexdigest()}"


def read_api_keys(path: Path) -> dict[bytes, str]:
    """The names in a keys file by their keys' digests; empty lines, and those that begin with `#`, count
    for nothing.

    Raises ConfigError when the file cannot be read, has a line that is not one of a key, or has no key:
    an empty file must not open the door. The message never shows what stands in the file.
    """
    text = read_text("API keys", path, MAX_FILE_BYTES)
    digests: dict[bytes, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ConfigError(
                f"API keys: {path}, line {number}: expected `NAME sha256:64_HEX_DIGITS`; a key itself "
                f"does not belong there, `penstock key NAME --hash` makes its line"
            )
        digest = bytes.fromhex(match["digest"])
        other = digests.setdefault(digest, match["name"])
        if other != match["name"]:
            raise ConfigError(f"API keys: {path}, line {number}: the same key as {other} has")
    if not digests:
        raise ConfigError(f"API keys: {path} has none")
    return digests
