"""What a token costs between vLLM's core process and a worker: by AsyncLLM, and as the engine does it.

    PYTHONPATH=. ~/.cache/penstock/vllm-*/bin/python benchmarks/vllm_client.py [--streams 32] [--tokens 200]

CPU time of this process alone, which the core process is not part of; no detokenizing on either side.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from pathlib import Path

from checks.vllm.conftest import cpu_environment

MODEL = Path(__file__).parent.parent / "models" / "tiny"
PROMPT = list(range(5, 105))


async def by_async_llm(streams: int, tokens: int) -> float:
    """Microseconds a token."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    args = AsyncEngineArgs(
        model=str(MODEL),
        enforce_eager=True,
        dtype="float32",
        block_size=32,
        kv_cache_memory_bytes=64 << 20,
        distributed_executor_backend="uni",
        max_num_seqs=64,
    )
    engine = AsyncLLM.from_vllm_config(await asyncio.to_thread(args.create_engine_config))

    async def one(name: str) -> None:
        params = SamplingParams(
            max_tokens=tokens,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = {"type": "token", "prompt_token_ids": PROMPT}
        async for _ in engine.generate(prompt, params, name):
            pass

    await one("warm")
    began = time.process_time()
    await asyncio.gather(*[one(f"r{number}") for number in range(streams)])
    used = time.process_time() - began
    engine.shutdown()
    return used / (streams * tokens) * 1e6


async def by_engine(streams: int, tokens: int) -> float:
    """Microseconds a token."""
    from checks.vllm.engine.running import settings
    from penstock.engines.vllm.engine import VllmEngine
    from penstock.shapes import Attempt, Sampling

    engine = VllmEngine(settings())
    await engine.start()
    sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)

    async def all_of(names: list[str]) -> None:
        for name in names:
            engine.submit(Attempt(name, name, PROMPT, len(PROMPT), sampling))
        left = len(names)
        async for step in engine.steps():
            left -= sum(output.finish_reason is not None for output in step.outputs)
            if left == 0:
                return

    await all_of(["warm"])
    began = time.process_time()
    await all_of([f"r{number}" for number in range(streams)])
    used = time.process_time() - began
    await engine.stop(0.0)
    return used / (streams * tokens) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200)
    options = parser.parse_args()
    os.environ.update(cpu_environment() | {"VLLM_TARGET_DEVICE": "cpu", "VLLM_NO_USAGE_STATS": "1"})
    for name, measured in (("AsyncLLM", by_async_llm), ("engines/vllm", by_engine)):
        cost_us = asyncio.run(measured(options.streams, options.tokens))
        print(f"{name}: {cost_us:.1f} µs of CPU a token, {options.streams} streams", flush=True)


if __name__ == "__main__":
    main()
