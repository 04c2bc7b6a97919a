"""Runs inside vLLM on a CPU: keeps a long prompt with a seed from crashing vLLM.

A step that computes only a part of a prompt draws a token nevertheless, drops it, and resets the offset of
the request's random generator. torch's generators for the CPU have no offset, so vLLM 0.32 fails with an
exception that ends its process. So any client could end a worker by a long prompt with a seed. Here, the
request has no generator during such a step, and vLLM has nothing to reset.
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
    """Change the model runner of this process, if it computes on a CPU."""
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
