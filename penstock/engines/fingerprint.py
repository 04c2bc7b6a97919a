"""Names a model's weights, so that no request goes on with KV or tokens of others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from penstock.errors import ConfigError

_HASHED_WHOLE_BYTES = 32 << 20
_SAMPLES_PER_FILE = 64
_SAMPLE_BYTES = 4096


def weights_fingerprint(paths: Iterable[Path]) -> str:
    """64 hex digits. Files up to _HASHED_WHOLE_BYTES count whole; of larger ones, the size and samples
    spread over it, which tell any two trainings apart and take milliseconds. Raises ConfigError for an
    unreadable one."""
    digest = hashlib.sha256()
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
    return digest.hexdigest()
