"""Names a model's weights, so that KV computed with others is never used."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from penstock.errors import ConfigError

_HASHED_WHOLE_BYTES = 32 << 20
_SAMPLES_PER_FILE = 64
_SAMPLE_BYTES = 4096


class Digest(Protocol):
    """As hashlib's."""

    def update(self, data: bytes, /) -> None: ...


def add_files(digest: Digest, paths: Iterable[Path]) -> None:
    """Files up to _HASHED_WHOLE_BYTES count whole; of larger ones, the size and samples spread over it,
    which tell any two trainings apart and take milliseconds. Raises ConfigError for an unreadable one."""
    for path in paths:
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                digest.update(f"{path.name} {size} ".encode())
                if size <= _HASHED_WHOLE_BYTES:
                    digest.update(file.read())
                    continue
                for sample in range(_SAMPLES_PER_FILE):
                    file.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES_PER_FILE - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
