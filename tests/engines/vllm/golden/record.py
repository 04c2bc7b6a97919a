"""Records what vLLM publishes of its cache, as golden bytes for test_events.py.

    PYTHONPATH=. PYTHON_WITH_VLLM tests/engines/vllm/golden/record.py

Run it once for each vLLM that is supported. The cache is vLLM's own, without a model: requests take blocks,
fill them and give them back, as its scheduler would have them do, and each scene's events are encoded as
its publisher encodes them. Hashes and times are the same each time.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import torch
from vllm import SamplingParams
from vllm import __version__ as vllm_version
from vllm.distributed.kv_events import KVEventBatch
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

GOLDEN = Path(__file__).parent / "events.json"
BLOCK_SIZE = 4
MAX_LEN = 64
PROMPT = list(range(100, 110))  # two whole blocks and a half

Scene = Callable[["Cache"], None]


class Cache:
    """vLLM's cache, and the payloads that its events came to."""

    def __init__(self, blocks: int = 16, *, hybrid: bool = False) -> None:
        shape = {"block_size": BLOCK_SIZE, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
        specs: list[KVCacheSpec] = [FullAttentionSpec(**shape)]
        if hybrid:
            specs.append(SlidingWindowSpec(**shape, sliding_window=BLOCK_SIZE))
        groups = [KVCacheGroupSpec([f"layer {i}"], spec) for i, spec in enumerate(specs)]
        self.kv = KVCacheManager(
            KVCacheConfig(num_blocks=blocks + 1, kv_cache_tensors=[], kv_cache_groups=groups),
            max_model_len=MAX_LEN,
            scheduler_block_size=BLOCK_SIZE,
            hash_block_size=BLOCK_SIZE,
            enable_kv_cache_events=True,
        )
        self.payloads: list[bytes] = []

    def request(self, token_ids: list[int], **fields: object) -> Request:
        """A request that has been computed, and holds its blocks."""
        request = Request(
            f"r{len(self.payloads)}",
            token_ids,
            SamplingParams(max_tokens=20),
            None,
            block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
            **fields,
        )
        self.kv.new_step_starts()
        cached, hits, _ = self.kv.get_computed_blocks(request)
        assert self.kv.allocate_slots(request, len(token_ids) - hits, hits, cached) is not None
        request.num_computed_tokens = len(token_ids)
        self.publish()
        return request

    def generate(self, request: Request, count: int) -> None:
        """Tokens of its output, a step for each."""
        for i in range(count):
            request.append_output_token_ids(200 + i)
            self.kv.new_step_starts()
            assert self.kv.allocate_slots(request, 1) is not None
            request.num_computed_tokens += 1
            self.publish()

    def publish(self) -> None:
        """What has happened since, as one payload of rank 0."""
        if events := self.kv.take_events():
            batch = KVEventBatch(ts=float(len(self.payloads)), events=events, data_parallel_rank=0)
            self.payloads.append(msgspec.msgpack.encode(batch))


def scenes() -> Iterator[tuple[str, Cache]]:
    """Names, and caches in which something has happened."""
    cache = Cache()
    cache.generate(cache.request(PROMPT), 7)
    yield "a prompt, and four blocks with its output", cache

    cache = Cache()
    cache.request(PROMPT[:8])
    cache.request(PROMPT[:8])
    yield "the same whole blocks twice", cache

    cache = Cache(blocks=4)
    cache.kv.free(cache.request(PROMPT))
    cache.request([50 + token_id for token_id in range(14)])
    yield "evicted by another prompt", cache

    cache = Cache(blocks=4)
    first, second = cache.request(PROMPT[:8]), cache.request(PROMPT[:8])
    cache.kv.free(first)
    cache.kv.free(second)
    cache.request(list(range(12)))
    yield "stored twice, then removed as often", cache

    cache = Cache()
    cache.kv.free(cache.request(PROMPT))
    assert cache.kv.reset_prefix_cache()
    cache.publish()
    yield "cleared", cache

    cache = Cache()
    cache.request(PROMPT, cache_salt="salt")
    yield "with a cache salt", cache

    lora = LoRARequest("adapter", 3, "/adapters/3")
    cache = Cache()
    cache.request(PROMPT, lora_request=lora)
    yield "with a LoRA", cache
    cache = Cache()
    cache.request(PROMPT, lora_request=lora, cache_salt="salt")
    yield "with a LoRA and a salt", cache

    image = MultiModalFeatureSpec(
        data=None, modality="image", identifier="picture", mm_position=PlaceholderRange(offset=5, length=2)
    )
    cache = Cache()
    cache.request(list(range(100, 112)), mm_features=[image])
    yield "with an image in the second block", cache

    cache = Cache(hybrid=True)
    cache.generate(cache.request(list(range(100, 113))), 3)
    yield "a hybrid model", cache
    cache = Cache(blocks=10, hybrid=True)
    cache.kv.free(cache.request(list(range(100, 112))))
    cache.request(list(range(16)))
    yield "a hybrid model, evicted", cache


def main() -> None:
    init_none_hash(sha256)
    recorded = {}
    for kind, as_int in (("int", "1"), ("bytes", "0")):
        os.environ["VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES"] = as_int
        recorded[kind] = {
            name: [base64.b64encode(payload).decode() for payload in cache.payloads]
            for name, cache in scenes()
        }
    text = json.dumps({"vllm": vllm_version, "payloads": recorded}, indent=1)
    GOLDEN.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
