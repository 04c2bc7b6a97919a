"""What Penstock asks of vLLM's workers, in their own processes, by collective_rpc."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.engines.vllm.inside.generators import keep_generators_of_partial_prompts
from penstock.engines.vllm.inside.guard import die_with_owner

if TYPE_CHECKING:
    from penstock.engines.vllm.inside.connector import PullWorker

# This module is loaded by every worker process.
die_with_owner()
keep_generators_of_partial_prompts()


class WorkerExtension:
    """Mixed into vLLM's worker class. With tensor parallelism every rank answers."""

    def penstock_compared(self) -> str:
        """A digest of what vLLM's connector compares when one engine first speaks to another, whose KV it
        refuses otherwise: what only a worker knows, as its attention backend, and the model's path."""
        return _connector_worker().compat_hash or ""

    def penstock_held(self, unwanted: list[str]) -> list[str]:
        """Let go of these requests' KV, which nobody reads, nor will. Returns all those whose KV this rank
        keeps for a reader."""
        worker = _connector_worker()
        worker.release(unwanted)
        return worker.held()


def _connector_worker() -> PullWorker:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from penstock.engines.vllm.inside.connector import PullWorker

    worker = get_kv_transfer_group().connector_worker
    assert isinstance(worker, PullWorker)
    return worker
