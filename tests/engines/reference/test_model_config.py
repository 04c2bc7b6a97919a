"""Reading config.json and generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.engines.reference.model_config import MAX_CONFIG_BYTES, ModelConfig, Rope, read_config
from penstock.errors import ConfigError
from penstock.shapes import SamplingDefaults

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def read(folder: Path, generation: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return read_config(folder)


def test_what_is_left_out_is_derived(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert (config.kv_heads, config.head_dim, config.group) == (4, 16, 1)
    assert (config.qk_norm, config.tied_embeddings) == (False, False)
    assert config.rope == Rope(10000.0)
    assert config.eos_token_ids == ()
    assert config.sampling_defaults == SamplingDefaults()


def test_explicit_head_dim_and_groups(tmp_path: Path) -> None:
    config = read(tmp_path, head_dim=32, num_key_value_heads=2, architectures=["Qwen3ForCausalLM"])
    assert (config.head_dim, config.kv_heads, config.group, config.qk_norm) == (32, 2, 2, True)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 500.0, "rope_scaling": LLAMA3_SCALING},
        {"rope_parameters": {"rope_theta": 500.0, **LLAMA3_SCALING}},
        {"rope_theta": 500.0, "rope_parameters": LLAMA3_SCALING},
    ],
)
def test_rope_in_every_spelling(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert read(tmp_path, **changes).rope == Rope(500.0, "llama3", 8.0, 1.0, 4.0, 64)


def test_linear_rope_in_its_oldest_spelling(tmp_path: Path) -> None:
    rope = read(tmp_path, rope_scaling={"type": "linear", "factor": 2}).rope
    assert rope == Rope(10000.0, "linear", 2.0)


def test_eos_ids_of_both_files_and_sampling_defaults(tmp_path: Path) -> None:
    generation = {"eos_token_id": [7, 3], "temperature": 0.6, "top_k": 20, "do_sample": True}
    config = read(tmp_path, generation, eos_token_id=3)
    assert config.eos_token_ids == (3, 7)
    assert config.sampling_defaults == SamplingDefaults(temperature=0.6, top_k=20)


def test_do_sample_false_is_greedy(tmp_path: Path) -> None:
    assert read(tmp_path, {"do_sample": False}).sampling_defaults == SamplingDefaults(temperature=0.0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "architectures"),
        ({"architectures": None}, "architectures"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 66}, "hidden_size"),
        ({"hidden_size": 1 << 40}, "hidden_size"),
        ({"num_hidden_layers": 100000}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": 5}, "layer_types"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_experts": 8}, "num_experts"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "full_attention"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24]}}, "mrope_section"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "type"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {**LLAMA3_SCALING, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"eos_token_id": 128}, "eos_token_id"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id"),
    ],
)
def test_refusals_name_the_field(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: {named}: "):
        read(tmp_path, **changes)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b" " * MAX_CONFIG_BYTES + b"{}"]
)
def test_malformed_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_config(tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read"):
        read_config(tmp_path)
