"""The machine's GPUs, and which of them are free."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence

from penstock.errors import ConfigError

VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"

_QUERY = ("nvidia-smi", "--query-gpu=index", "--format=csv,noheader")
_QUERY_TIMEOUT_S = 10.0


def visible_gpus(environ: Mapping[str, str]) -> list[str]:
    """The GPUs that this process may use: those in CUDA_VISIBLE_DEVICES when it is set, else all."""
    if VISIBLE_VARIABLE in environ:
        return [gpu.strip() for gpu in environ[VISIBLE_VARIABLE].split(",") if gpu.strip()]
    try:
        answer = subprocess.run(
            _QUERY, capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []  # no driver, no GPUs
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]


class GpuPool:
    """GPUs, each used by at most one replica. The lowest go first, so that a restart takes the same
    ones."""

    def __init__(self, gpus: Sequence[str]) -> None:
        self._all = tuple(gpus)
        self._free = list(gpus)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> tuple[str, ...]:
        """Raises ConfigError when fewer are free."""
        if count > len(self._free):
            raise ConfigError(
                f"{count} GPUs are needed, {len(self._free)} of this machine's {len(self)} are free"
            )
        taken, self._free = self._free[:count], self._free[count:]
        return tuple(taken)

    def give_back(self, gpus: Sequence[str]) -> None:
        self._free = sorted((*self._free, *gpus), key=self._all.index)
