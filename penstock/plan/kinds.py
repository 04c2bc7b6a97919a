"""The kinds of workers that can be planned with: how many GPUs each takes, and how much KV fits beside the
weights.

The KV cache of a worker is what vLLM takes by default, 90 % of the GPUs' memory, less weights and less what
activations and CUDA graphs take. OTHER_BYTES is what makes this come out at the 307,328 tokens that llm-d
measured for Qwen3-32B on two H100 (llm-d's benchmark of precise prefix routing, 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from penstock.engines.cost_models import ZERO, MeasuredCosts, cost_models
from penstock.errors import ConfigError

KV_SHARE = 0.9
"""Of a GPU's memory, for weights, activations and KV together: vLLM's --gpu-memory-utilization."""

OTHER_BYTES = 3.9e9
"""Of each GPU: activations and CUDA graphs."""

GPU_BYTES: Mapping[str, float] = {"h100": 85.5e9, "h200": 150.1e9}
"""Memory of a GPU of each kind, as its driver reports it."""


class ModelSize(msgspec.Struct, frozen=True):
    """A model's name for vLLM, and what it takes of memory."""

    model: str
    weight_bytes: float
    kv_bytes_per_token: int


# Weights: parameters times bytes of each. KV: layers x KV heads x head size x 2 (keys, values) x 2 bytes.
MODEL_SIZES: Mapping[str, ModelSize] = {
    "llama-3.1-8b": ModelSize("meta-llama/Llama-3.1-8B-Instruct", 16.1e9, 128 * 1024),
    "llama-3.1-70b": ModelSize("meta-llama/Llama-3.1-70B-Instruct", 141.1e9, 320 * 1024),
    "llama-3.1-70b-fp8": ModelSize("RedHatAI/Meta-Llama-3.1-70B-Instruct-FP8", 72.7e9, 320 * 1024),
    "qwen3-32b": ModelSize("Qwen/Qwen3-32B", 65.5e9, 256 * 1024),
    "qwen3-32b-fp8": ModelSize("Qwen/Qwen3-32B-FP8", 34.5e9, 256 * 1024),
    "qwen3-8b": ModelSize("Qwen/Qwen3-8B", 16.4e9, 144 * 1024),
    "qwen3-0.6b": ModelSize("Qwen/Qwen3-0.6B", 1.5e9, 112 * 1024),
}


UNKNOWN_KV_BYTES = 256 * 1024
"""Of a token's KV, where the model is only known by a file of measured costs: as Qwen3-32B has."""


class WorkerKind(msgspec.Struct, frozen=True):
    """One worker: its timing, and what it takes."""

    cost_model: str  # name or file of its timing
    model: str  # for vLLM
    gpus: int
    cache_tokens: int
    kv_bytes_per_token: int


def worker_kinds(names: str) -> list[WorkerKind]:
    """The kinds that these names mean, separated by commas: `qwen3-32b/h200/tp2`, or its beginning, such as
    `qwen3-32b/h200` for all tensor parallel sizes and `qwen3-32b` for all kinds of GPUs as well, or a file
    that `penstock calibrate` wrote. Raises ConfigError for a name that means none."""
    known = sorted(cost_models().keys() - {ZERO})
    kinds: dict[str, WorkerKind] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name.endswith(".json"):
            kinds[name] = _measured(Path(name).resolve())
            continue
        meant = [it for it in known if it == name or it.startswith(f"{name}/")]
        if not meant:
            raise ConfigError(
                f"cost-model: `{name}` is none of {', '.join(known)}, nor the beginning of one"
            )
        kinds |= {it: _kind(it) for it in meant}
    if not kinds:
        raise ConfigError("cost-model: nothing is given")
    return list(kinds.values())


def _measured(path: Path) -> WorkerKind:
    measured = MeasuredCosts.read(path)
    return WorkerKind(str(path), measured.model, measured.gpus, measured.cache_tokens, UNKNOWN_KV_BYTES)


def _kind(name: str) -> WorkerKind:
    model, gpu, parallel = name.split("/")
    size, gpus = MODEL_SIZES[model], int(parallel.removeprefix("tp"))
    free_bytes = gpus * (KV_SHARE * GPU_BYTES[gpu] - OTHER_BYTES) - size.weight_bytes
    return WorkerKind(
        cost_model=name,
        model=size.model,
        gpus=gpus,
        cache_tokens=int(free_bytes / size.kv_bytes_per_token),
        kv_bytes_per_token=size.kv_bytes_per_token,
    )
