"""Small random checkpoints, made from a seed with numpy alone, and rows to run them with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.engines.batch import BatchRow, Sequence
from penstock.engines.reference.kv import KvPool
from penstock.engines.reference.model import Model
from penstock.engines.reference.model_config import ModelConfig, read_config
from penstock.engines.reference.runner import ReferenceRunner
from penstock.engines.reference.weights import load_weights
from penstock.shapes import Sampling

_GAINS = {"q_norm": 1.7, "k_norm": 1.7, "q_proj": 2.0, "k_proj": 2.0, "o_proj": 4.0, "embed_tokens": 3.0}

BLOCK_SIZE = 4
TOTAL_BLOCKS = 256
PROMPT = [3, 17, 88, 41, 5, 99, 23, 61, 2, 77, 30, 118, 9, 54, 12, 66, 101, 8, 45, 70, 31, 90, 14]
GREEDY = Sampling(max_tokens=64, temperature=0.0)


@dataclass(frozen=True)
class Case:
    """One random model: its config.json beyond the common fields, and how its weights are stored.

    Seeds are such that the two best tokens of a greedy run are never nearly equal (record_goldens.py)."""

    architecture: str
    dtype: str = "F32"
    shards: int = 1
    seed: int = 1
    config: dict[str, Any] = field(default_factory=dict)


CASES = {
    "qwen3-tied-bf16": Case(
        "Qwen3ForCausalLM",
        "BF16",
        config={"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
    ),
    "qwen3-mha-f32-sharded": Case("Qwen3ForCausalLM", shards=3, config={"head_dim": 16}),
    "llama-gqa-f16": Case(
        "LlamaForCausalLM", "F16", config={"num_attention_heads": 8, "num_key_value_heads": 2}
    ),
    "llama3-rope-tied-bf16": Case(
        "LlamaForCausalLM",
        "BF16",
        seed=4,
        config={
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "llama-linear-rope-f32": Case(
        "LlamaForCausalLM",
        seed=2,
        config={"rope_theta": 1000.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
}


def write_checkpoint(case: Case, folder: Path) -> None:
    """Write config.json and weights; equal on every machine and numpy version."""
    config = {
        "architectures": [case.architecture],
        "model_type": "qwen3" if case.architecture.startswith("Qwen3") else "llama",
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        **case.config,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    bits = np.random.PCG64(case.seed)
    tensors = {
        name: _random(bits, name, shape) for name, shape in tensor_shapes(read_config(folder)).items()
    }
    if case.shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, case.dtype)
        return
    weight_map = {name: f"model-{at % case.shards}.safetensors" for at, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == shard}
        write_safetensors(folder / shard, part, case.dtype)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes as transformers saves them."""
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_proj.weight": (config.heads * head_dim, hidden),
            f"{prefix}self_attn.k_proj.weight": (config.kv_heads * head_dim, hidden),
            f"{prefix}self_attn.v_proj.weight": (config.kv_heads * head_dim, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, config.heads * head_dim),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}mlp.up_proj.weight": (inner, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, inner),
        }
        if config.qk_norm:
            shapes |= {f"{prefix}self_attn.{which}_norm.weight": (head_dim,) for which in "qk"}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def _random(bits: np.random.PCG64, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform values from raw generator bits. Attention is sharp and outweighs the current token, so
    that outputs depend on the whole prompt and do not soon repeat themselves."""
    count = int(np.prod(shape))
    uniform = (bits.random_raw(count) >> np.uint64(40)).astype(np.float64) * 2.0**-23 - 1.0
    kind = name.split(".")[-2]
    if "norm" in kind:
        values = _GAINS.get(kind, 1.0) + 0.5 * uniform
    else:
        values = _GAINS.get(kind, 1.5) * (3.0 / shape[-1]) ** 0.5 * uniform
    return values.reshape(shape).astype(np.float32)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    """Write float32 arrays in the given dtype; bfloat16 by cutting the lower half off."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts: list[bytes] = []
    offset = 0
    for name, array in tensors.items():
        if dtype == "BF16":
            content = (array.view(np.uint32) >> 16).astype("<u2").tobytes()
        else:
            content = array.astype("<f2" if dtype == "F16" else "<f4").tobytes()
        offsets = [offset, offset + len(content)]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
        parts.append(content)
        offset += len(content)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def load_model(folder: Path, block_size: int = BLOCK_SIZE, total_blocks: int = TOTAL_BLOCKS) -> Model:
    config = read_config(folder)
    pool = KvPool(config, total_blocks, block_size)
    return Model(config, load_weights(folder, config), pool, config.max_positions)


@dataclass
class Bench:
    """A model with hand-made rows; hands out blocks in an order that is not the pool's."""

    model: Model
    next_block: int = 0

    def sequence(self, token_ids: list[int], sampling: Sampling = GREEDY, room: int = 96) -> Sequence:
        """A sequence with blocks for `room` tokens more than it has."""
        total = self.model.pool.total_blocks
        count = -(-(len(token_ids) + room) // self.model.pool.block_size)
        block_ids = [(self.next_block + at) * 37 % total for at in range(count)]
        self.next_block += count
        assert self.next_block <= total
        return Sequence("a", list(token_ids), len(token_ids), sampling, block_ids)

    def run(self, *rows: BatchRow) -> list[int | None]:
        """Run one batch and append what it drew."""
        drawn = ReferenceRunner(self.model, ()).run(list(rows))
        for row, sampled in zip(rows, drawn, strict=True):
            row.sequence.computed = row.start + row.count
            if sampled:
                row.sequence.token_ids.append(sampled.token_id)
        return [sampled.token_id if sampled else None for sampled in drawn]

    @staticmethod
    def rest(sequence: Sequence, count: int | None = None) -> BatchRow:
        """A row for the next `count` tokens without KV, or all of them; it samples when none is left."""
        left = len(sequence.token_ids) - sequence.computed
        count = left if count is None else min(count, left)
        return BatchRow(sequence, sequence.computed, count, count == left)

    def logits(self, *rows: BatchRow) -> np.ndarray:
        return self.model.logits(list(rows)).copy()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One written checkpoint per case."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, case in CASES.items():
        write_checkpoint(case, root / name)
    return {name: root / name for name in CASES}


@pytest.fixture
def prompt() -> list[int]:
    return list(PROMPT)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small Qwen3 checkpoint of its own, to be tampered with."""
    write_checkpoint(CASES["qwen3-tied-bf16"], tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(params=list(CASES))
def case_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def case(case_name: str) -> Case:
    return CASES[case_name]


@pytest.fixture
def make_checkpoint() -> Callable[[Case, Path], None]:
    return write_checkpoint


@pytest.fixture
def make_bench() -> Callable[[Path], Bench]:
    """A fresh model of a folder."""
    return lambda folder: Bench(load_model(folder))


@pytest.fixture
def bench(folders: dict[str, Path], case_name: str) -> Bench:
    """A fresh model of each case."""
    return Bench(load_model(folders[case_name]))
