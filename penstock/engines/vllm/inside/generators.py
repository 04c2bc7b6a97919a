"""Seeded requests on a CPU, in vLLM's process: keeps long prompts from ending the engine.

A step that computes only a part of a prompt draws a token for it all the same, drops it, and winds the
request's generator back by its offset. torch's CPU generators have none: vLLM 0.32 dies of asking for it.
Here such a request has no generator during such a step: what is not drawn from needs no winding back.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform

if TYPE_CHECKING:
    import torch
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner


@cache
def keep_generators_of_partial_prompts() -> None:
    """From now on, in this process, if it computes on a CPU."""
    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    sample, account = CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync
    kept: dict[int, torch.Generator] = {}  # by row; empty between two steps

    def sample_whole_prompts(runner: CPUModelRunner, *args: Any, **given: Any) -> Any:
        generators = runner.input_batch.generators
        partial = runner.discard_request_mask.np[: runner.input_batch.num_reqs]
        kept.update({row: generators.pop(row) for row in tuple(generators) if partial[row]})
        return sample(runner, *args, **given)

    def account_and_give_back(runner: CPUModelRunner, *args: Any, **given: Any) -> Any:
        accounts = account(runner, *args, **given)
        runner.input_batch.generators.update(kept)
        kept.clear()
        return accounts

    CPUModelRunner._sample = sample_whole_prompts
    CPUModelRunner._bookkeeping_sync = account_and_give_back
