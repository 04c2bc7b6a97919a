"""Arranging weights, and the fingerprint of a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.engines.fingerprint import weights_fingerprint
from penstock.engines.reference.checkpoint import weight_paths
from penstock.engines.reference.model_config import read_config
from penstock.engines.reference.weights import kv_layout, load_weights
from penstock.errors import ConfigError


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_shapes_after_arranging(checkpoint: Path) -> None:
    weights = load_weights(checkpoint, read_config(checkpoint))
    layer = weights.layers[0]
    assert weights.embeddings.shape == (128, 64)
    assert [m.columns for m in (layer.qkv, layer.output, layer.gate_up, layer.down)] == [256, 64, 192, 64]
    assert layer.qk_gain is not None
    assert layer.qk_gain.shape == (6, 32)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"intermediate_size": 80}, "gate_proj"),
        ({"num_hidden_layers": 4}, "model.layers.3"),
        ({"num_hidden_layers": 2}, "model.layers.2.* not part of"),
        ({"tie_word_embeddings": False}, "lm_head.weight"),
        ({"architectures": ["LlamaForCausalLM"]}, "k_norm.weight: not part of a Llama"),
        ({"vocab_size": 100}, "embed_tokens"),
    ],
)
def test_weights_that_do_not_fit_the_config(
    checkpoint: Path, changes: dict[str, object], named: str
) -> None:
    change_config(checkpoint, **changes)
    with pytest.raises(ConfigError, match=named):
        load_weights(checkpoint, read_config(checkpoint))


@pytest.mark.parametrize("whole_bytes", [1 << 20, 0])
def test_the_kv_layout_changes_with_weights_and_config(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, whole_bytes: int
) -> None:
    monkeypatch.setattr("penstock.engines.fingerprint._HASHED_WHOLE_BYTES", whole_bytes)

    def layout() -> str:
        return kv_layout(read_config(checkpoint), weights_fingerprint(weight_paths(checkpoint)))

    first = layout()
    assert layout() == first
    weights = checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    changed = layout()
    change_config(checkpoint, rms_norm_eps=1e-5)
    assert len({first, changed, layout()}) == 3
