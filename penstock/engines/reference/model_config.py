"""What a checkpoint's config.json says, checked: Qwen3 and Llama, dense, with full attention.

Field names are those of transformers' `Qwen3Config` and `LlamaConfig`. Whatever this engine does not
compute exactly is refused here, with the field named, instead of giving wrong text later. Rotary
embeddings are read in both spellings: `rope_theta` with `rope_scaling` (transformers 4), and
`rope_parameters` (transformers 5).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec

from penstock.errors import ConfigError
from penstock.shapes import SamplingDefaults

MAX_CONFIG_BYTES = 1 << 20
MAX_DIMENSION = 1 << 24  # far above any real model; keeps products of sizes sane
MAX_LAYERS = 1024

_QK_NORM = {"Qwen3ForCausalLM": True, "LlamaForCausalLM": False}
_ROPE_FIELDS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"}
_LLAMA3_FIELDS = {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
_SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class Rope(msgspec.Struct, frozen=True):
    """Rotary position embeddings. The factors are those of `kind` and unused by the other kinds."""

    theta: float
    kind: str = "default"  # default, linear (positions divided by `factor`) or llama3
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192  # context length before scaling


class ModelConfig(msgspec.Struct, frozen=True):
    """A decoder's geometry. Sizes are in elements."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int
    tied_embeddings: bool
    qk_norm: bool
    rope: Rope
    eos_token_ids: tuple[int, ...] = ()
    sampling_defaults: SamplingDefaults = SamplingDefaults()

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads


def read_config(folder: Path) -> ModelConfig:
    """Read config.json and, when present, generation_config.json of a model folder.

    Raises:
        ConfigError: a file is missing or malformed, or asks for something that is not supported.
    """
    source = _Fields(folder / "config.json")
    generation_path = folder / "generation_config.json"
    generation = _Fields(generation_path) if generation_path.exists() else None
    architecture = _architecture(source)
    _refuse_unsupported(source)
    heads = source.size("num_attention_heads")
    kv_heads = source.size("num_key_value_heads", heads)
    hidden_size = source.size("hidden_size")
    if heads % kv_heads:
        raise source.error("num_key_value_heads", f"{kv_heads} does not divide {heads} attention heads")
    if source.get("head_dim") is None and hidden_size % heads:
        raise source.error("hidden_size", f"{hidden_size} is no multiple of {heads} attention heads")
    head_dim = source.size("head_dim", hidden_size // heads)
    if head_dim % 2:
        raise source.error("head_dim", f"{head_dim} is odd, and rotary embeddings turn pairs")
    vocab_size = source.size("vocab_size")
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=source.size("intermediate_size"),
        layers=source.size("num_hidden_layers", limit=MAX_LAYERS),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=source.positive("rms_norm_eps", 1e-6),
        max_positions=source.size("max_position_embeddings"),
        tied_embeddings=source.flag("tie_word_embeddings", False),
        qk_norm=_QK_NORM[architecture],
        rope=_rope(source),
        eos_token_ids=_eos_token_ids([source, generation] if generation else [source], vocab_size),
        sampling_defaults=_sampling_defaults(generation) if generation else SamplingDefaults(),
    )


class _Fields:
    """A JSON object from a file, read field by field with checks."""

    def __init__(self, path: Path, fields: dict[str, Any] | None = None) -> None:
        self.path = path
        self._fields = _read_object(path) if fields is None else fields

    def error(self, name: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.path}: {name}: {problem}")

    def get(self, name: str) -> Any:
        return self._fields.get(name)

    def size(self, name: str, default: int | None = None, limit: int = MAX_DIMENSION) -> int:
        """A whole number from 1 to `limit`."""
        value = self.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
            raise self.error(name, f"expected a whole number from 1 to {limit}, got {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        value = self.get(name)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise self.error(name, f"expected a number, got {value!r}")
        return float(value)

    def positive(self, name: str, default: float | None = None) -> float:
        value = self.number(name, default)
        if value <= 0:
            raise self.error(name, f"expected a positive number, got {value!r}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.error(name, f"expected true or false, got {value!r}")
        return value

    def refuse_beyond(self, known: set[str]) -> None:
        """Refuse fields whose meaning is not known, unless they are null."""
        for name, value in self._fields.items():
            if name not in known and value is not None:
                raise self.error(name, "not supported")

    def inner(self, name: str) -> _Fields | None:
        """The object under `name`, or None when there is none."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, f"expected an object, got {value!r}")
        return _Fields(self.path, value)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes")
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return fields


def _architecture(source: _Fields) -> str:
    names = source.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in _QK_NORM:
        raise source.error("architectures", f"expected one of {', '.join(_QK_NORM)}, got {names!r}")
    return str(names[0])


def _refuse_unsupported(source: _Fields) -> None:
    """Every field that would change the computation into one that is not implemented."""
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if source.flag(name, False):
            raise source.error(name, "not supported")
    for name in ("quantization_config", "num_experts", "num_local_experts", "compression_config"):
        if source.get(name) is not None:
            raise source.error(name, "not supported")
    layer_types = source.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise source.error("layer_types", f"only full_attention is supported, got {layer_types!r}")
    if source.get("hidden_act") not in (None, "silu"):
        raise source.error("hidden_act", f"only silu is supported, got {source.get('hidden_act')!r}")
    if source.number("partial_rotary_factor", 1.0) != 1.0:
        raise source.error("partial_rotary_factor", "only 1.0 is supported")


def _rope(source: _Fields) -> Rope:
    new = source.inner("rope_parameters")
    old = source.inner("rope_scaling")
    scaling = new or old or _Fields(source.path, {})
    theta = (new if new and new.get("rope_theta") is not None else source).positive("rope_theta", 10000.0)
    name = "rope_type" if scaling.get("rope_type") is not None else "type"
    kind = scaling.get(name) or "default"
    if kind not in ("default", "linear", "llama3"):
        raise scaling.error(name, f"expected default, linear or llama3, got {kind!r}")
    if scaling.number("partial_rotary_factor", 1.0) != 1.0:
        raise scaling.error("partial_rotary_factor", "only 1.0 is supported")
    scaling.refuse_beyond(_ROPE_FIELDS | (_LLAMA3_FIELDS if kind == "llama3" else set()))
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, factor=scaling.positive("factor"))
    rope = Rope(
        theta,
        kind,
        factor=scaling.positive("factor"),
        low_freq_factor=scaling.positive("low_freq_factor"),
        high_freq_factor=scaling.positive("high_freq_factor"),
        original_positions=scaling.size("original_max_position_embeddings"),
    )
    if rope.high_freq_factor <= rope.low_freq_factor:
        raise scaling.error("high_freq_factor", "must be larger than low_freq_factor")
    return rope


def _eos_token_ids(sources: list[_Fields], vocab_size: int) -> tuple[int, ...]:
    """The ids that end a text: those of both files, each once."""
    ids: dict[int, None] = {}
    for source in sources:
        value = source.get("eos_token_id")
        for token_id in value if isinstance(value, list) else [] if value is None else [value]:
            if not isinstance(token_id, int) or isinstance(token_id, bool):
                raise source.error("eos_token_id", f"expected token ids, got {value!r}")
            if not 0 <= token_id < vocab_size:
                raise source.error("eos_token_id", f"{token_id} is outside the vocabulary of {vocab_size}")
            ids[token_id] = None
    return tuple(ids)


def _sampling_defaults(generation: _Fields) -> SamplingDefaults:
    """What the model's makers recommend. `do_sample: false` is how transformers spells greedy."""
    defaults: dict[str, Any] = {
        name: generation.number(name) for name in _SAMPLING_FIELDS if generation.get(name) is not None
    }
    if "top_k" in defaults:
        defaults["top_k"] = max(0, int(defaults["top_k"]))  # -1 means off, as 0 does
    if not generation.flag("do_sample", True):
        defaults["temperature"] = 0.0
    return SamplingDefaults(**defaults)
