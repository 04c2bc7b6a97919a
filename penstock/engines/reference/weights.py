"""A checkpoint's tensors, arranged as the model multiplies them.

Three rearrangements happen once, at load, so that a step makes fewer and larger numpy calls:

- Projections that share their input are one matrix: q, k and v; gate and up.
- RMSNorm gives `x * g * sqrt(d) / sqrt(sum(x^2) + d * eps)`. The gain `g * sqrt(d)` moves into the matrix
  that follows; attention's `1 / sqrt(head_dim)` moves into the queries' side.
- Rotary embeddings turn element i of a head together with element i + head_dim / 2. The rows of q and k
  are reordered to put such a pair side by side, where it is one complex number and the turn one
  multiplication. Scores do not change, for queries and keys are reordered alike.

Names of tensors are those of transformers' Qwen3ForCausalLM and LlamaForCausalLM.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from penstock.engines.reference.checkpoint import Checkpoint, open_checkpoint
from penstock.engines.reference.model_config import ModelConfig
from penstock.engines.reference.tiles import Floats, TiledMatrix
from penstock.errors import ConfigError
from penstock.shapes import SamplingDefaults

_KV_FORMAT = "float32, rotary pairs adjacent, (layers, 2, block_size, kv_heads, head_dim), version 1"


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer.

    `qk_gain`, shape (heads + kv_heads, head_dim), is what normalised queries and keys are multiplied
    with; None for an architecture that does not normalise them.
    """

    qkv: TiledMatrix  # (hidden, heads + 2 * kv_heads, times head_dim)
    output: TiledMatrix  # (heads * head_dim, hidden)
    gate_up: TiledMatrix  # (hidden, 2 * intermediate)
    down: TiledMatrix  # (intermediate, hidden)
    qk_gain: Floats | None


@dataclass(frozen=True, slots=True)
class Weights:
    """All of a model: embeddings of shape (vocab, hidden), layers, and the (hidden, vocab) head."""

    embeddings: Floats
    layers: tuple[LayerWeights, ...]
    head: TiledMatrix


def load_weights(folder: Path, config: ModelConfig) -> Weights:
    """Read and arrange the weights of a model folder.

    Raises:
        ConfigError: a tensor is missing, malformed, of another shape than the config implies, or not
            part of this architecture.
    """
    hidden, vocab = config.hidden_size, config.vocab_size
    with open_checkpoint(folder) as checkpoint:
        embeddings = checkpoint.read("model.embed_tokens.weight", (vocab, hidden))
        gain = _gain(checkpoint, "model.norm.weight", hidden)
        tied = config.tied_embeddings
        head = embeddings if tied else checkpoint.read("lm_head.weight", (vocab, hidden))
        layers = tuple(_layer(checkpoint, config, layer) for layer in range(config.layers))
        _refuse_leftovers(checkpoint, folder, config)
    return Weights(embeddings, layers, _matrix(head * gain))


def kv_layout(config: ModelConfig, weights: str) -> str:
    """What two workers must share for the KV of one to mean anything to the other: the geometry, the
    format of a block, and the weights (engines/fingerprint.py)."""
    digest = hashlib.sha256(_KV_FORMAT.encode())
    geometry = msgspec.structs.replace(config, eos_token_ids=(), sampling_defaults=SamplingDefaults())
    digest.update(msgspec.json.encode(geometry))
    digest.update(weights.encode())
    return digest.hexdigest()


def _layer(checkpoint: Checkpoint, config: ModelConfig, layer: int) -> LayerWeights:
    prefix = f"model.layers.{layer}."
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    attention_gain = _gain(checkpoint, f"{prefix}input_layernorm.weight", hidden)
    query, key, value = (
        checkpoint.read(f"{prefix}self_attn.{name}_proj.weight", (heads * head_dim, hidden))
        for name, heads in (("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads))
    )
    if not config.qk_norm:
        query *= np.float32(1 / math.sqrt(head_dim))
    qkv = np.concatenate((_pair_rows(query, head_dim), _pair_rows(key, head_dim), value))
    output = checkpoint.read(f"{prefix}self_attn.o_proj.weight", (hidden, config.heads * head_dim))
    mlp_gain = _gain(checkpoint, f"{prefix}post_attention_layernorm.weight", hidden)
    gate, up = (
        checkpoint.read(f"{prefix}mlp.{name}_proj.weight", (inner, hidden)) for name in ("gate", "up")
    )
    down = checkpoint.read(f"{prefix}mlp.down_proj.weight", (hidden, inner))
    return LayerWeights(
        qkv=_matrix(qkv * attention_gain),
        output=_matrix(output),
        gate_up=_matrix(np.concatenate((gate, up)) * mlp_gain),
        down=_matrix(down),
        qk_gain=_qk_gain(checkpoint, config, prefix) if config.qk_norm else None,
    )


def _qk_gain(checkpoint: Checkpoint, config: ModelConfig, prefix: str) -> Floats:
    head_dim = config.head_dim
    query = _gain(checkpoint, f"{prefix}self_attn.q_norm.weight", head_dim) * np.float32(head_dim**-0.5)
    key = _gain(checkpoint, f"{prefix}self_attn.k_norm.weight", head_dim)
    order = _pair_order(head_dim)
    return np.stack([query[order]] * config.heads + [key[order]] * config.kv_heads)


def _gain(checkpoint: Checkpoint, name: str, size: int) -> Floats:
    """A norm's weight times the sqrt(d) that its division leaves out."""
    return checkpoint.read(name, (size,)) * np.float32(math.sqrt(size))


def _matrix(weight: Floats) -> TiledMatrix:
    """A checkpoint stores (out, in); rows are multiplied from the left here."""
    return TiledMatrix(weight.T)


def _pair_order(head_dim: int) -> list[int]:
    half = head_dim // 2
    return [index for pair in range(half) for index in (pair, pair + half)]


def _pair_rows(weight: Floats, head_dim: int) -> Floats:
    """Reorder each head's rows so that rotary pairs are adjacent."""
    heads = weight.reshape(-1, head_dim, weight.shape[1])
    return heads[:, _pair_order(head_dim)].reshape(weight.shape)


def _refuse_leftovers(checkpoint: Checkpoint, folder: Path, config: ModelConfig) -> None:
    """A tensor that nothing read means that the model is not what config.json says it is. Rotary
    frequencies are computed, and a tied head may be stored a second time."""
    ignored = {"lm_head.weight"} if config.tied_embeddings else set()
    left = {name for name in checkpoint.unread() - ignored if not name.endswith("rotary_emb.inv_freq")}
    if left:
        raise ConfigError(f"{folder}: {min(left)}: not part of a {config.architecture}")
