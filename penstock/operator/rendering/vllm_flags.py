"""The flags of the vLLM processes of a worker that spans several nodes.

The leader runs `penstock worker ... --` with its flags; the followers run `vllm serve --headless`. Each
process makes its configuration from its flags, and the configurations of one worker must agree. So the
flags here repeat for the followers what engines/vllm/startup.py sets for the leader.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from penstock.graph.placeholders import placeholder
from penstock.options.config import WorkerOptions
from penstock.shapes import Role

MASTER_PORT = 29500

_LEADER_ADDRESS = placeholder("LWS_LEADER_ADDRESS")
_RANK = placeholder("LWS_WORKER_INDEX")
"""References to variables that the controller of LeaderWorkerSets sets in every container."""

_MIB = 1024 * 1024
_AS_THE_LEADER = (
    *("--scheduling-policy", "priority"),
    "--enable-prefix-caching",
    *("--worker-extension-cls", "penstock.engines.vllm.inside.extension.WorkerExtension"),
    *("--logits-processors", "penstock.engines.vllm.inside.forced:ForcedTokens"),
)


def leader_flags(nodes: int) -> list[str]:
    """The flags that are added to the leader's vLLM flags."""
    return _group_flags(nodes, "0")


def follower_flags(options: WorkerOptions, manifest_flags: Sequence[str], nodes: int) -> list[str]:
    """The words after `vllm`. As in the leader, the manifest's flags follow the operator's and so override
    them; only the group's flags come after them."""
    limits = {
        "--kv-cache-memory-bytes": options.kv_cache_mib and options.kv_cache_mib * _MIB,
        "--block-size": options.block_size,
        "--max-model-len": options.max_model_len,
        "--max-num-seqs": options.max_running,
        "--max-num-batched-tokens": options.max_batch_tokens,
    }
    flags = ["serve", options.model, "--headless", *_AS_THE_LEADER]
    for flag, value in limits.items():
        if value is not None:
            flags += [flag, str(value)]
    if options.role is not Role.AGGREGATED:
        flags += ["--kv-transfer-config", json.dumps(_kv_transfer(options.role))]
    return [*flags, *manifest_flags, *_group_flags(nodes, _RANK)]


def _kv_transfer(role: Role) -> dict[str, str]:
    return {
        "kv_connector": "PenstockConnector",
        "kv_connector_module_path": "penstock.engines.vllm.inside.connector",
        "kv_role": "kv_producer" if role is Role.PREFILL else "kv_consumer",
        "kv_load_failure_policy": "recompute",
    }


def _group_flags(nodes: int, rank: str) -> list[str]:
    return [
        *("--distributed-executor-backend", "mp"),
        *("--nnodes", str(nodes)),
        *("--node-rank", rank),
        *("--master-addr", _LEADER_ADDRESS),
        *("--master-port", str(MASTER_PORT)),
    ]
