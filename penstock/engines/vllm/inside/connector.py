"""vLLM's NIXL pull connector, made safe against late readers, and gentle on a CPU. Runs in vLLM's process.

What is wrong with the original, as of vLLM 0.32 and NIXL 1.5:

Late reads. A decode engine never asks whether the prefill engine still keeps the blocks that it has read.
One that was frozen, or whose network was, reads whatever is there by then, goes on with it, and caches it
under the hashes of the prompt it should have been, for everybody. Here every read carries a deadline,
before which the prefill engine's lease cannot have ended (handoff_params.py): a read that has not ended by
then counts as failed, and vLLM computes its blocks (kv_load_failure_policy=recompute).

Releasing. A prefill engine could not be told that nobody will read; now it can.

CPU. The original pins the worker to one core, the same for all engines of a machine, and NIXL's progress
thread spins on it. Neither is wanted where the model itself computes on those cores.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from time import monotonic
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import connector as original
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlPullConnector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import ReqMeta
    from vllm.v1.kv_cache_interface import KVCacheConfig

log = logging.getLogger("vllm.penstock")

PROGRESS_SLEEP_US = 1000
"""Between two looks of NIXL's progress thread, in microseconds. 0, the original, keeps a core busy."""


class PullWorker(NixlPullConnectorWorker):  # type: ignore[misc]
    """The worker's side."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._released: set[str] = set()  # requests whose blocks nobody will read

    # --- reading --------------------------------------------------------------------------------------

    def _read_blocks_for_req(self, req_id: str, meta: ReqMeta) -> None:
        if any(meta.local_block_ids) and _late(meta):
            log.warning("request %s: its KV may have been freed by now; computing the prompt", req_id)
            self._handle_failed_transfer(req_id, None, self._recv_failures)
            return
        super()._read_blocks_for_req(req_id, meta)

    def _pop_done_transfers(self, transfers: dict[str, list[int]]) -> tuple[set[str], set[str]]:
        done, failed = super()._pop_done_transfers(transfers)
        if transfers is self._recving_transfers:
            for req_id in done - failed:
                meta = self._recving_metadata.get(req_id)
                if meta is not None and any(meta.local_block_ids) and _late(meta):
                    log.warning("request %s: its KV was read too late; computing the prompt", req_id)
                    failed.add(req_id)
        return done, failed

    # --- holding --------------------------------------------------------------------------------------

    def held(self) -> list[str]:
        """Requests whose blocks are kept for a reader, or are still being computed."""
        return sorted(self._reqs_to_process.union(self._reqs_to_send))

    def release(self, req_ids: Iterable[str]) -> None:
        """Nobody reads these requests' blocks, and nobody will."""
        self._released.update(req_ids)

    def _get_new_notifs(self) -> set[str]:
        """The original tells which requests were read; a released one counts as read."""
        done: set[str] = super()._get_new_notifs()
        for req_id in tuple(self._released):
            if req_id in self._reqs_to_send:
                del self._reqs_to_send[req_id]
                self._reqs_to_process.discard(req_id)
                self.consumer_notification_counts_by_req.pop(req_id, None)
                self.expected_consumer_notifications_by_req.pop(req_id, None)
                done.add(req_id)
            elif req_id in self._reqs_to_process:
                continue  # the scheduler's word that it is to be kept is still on its way
            self._released.discard(req_id)
        return done


def _late(meta: ReqMeta) -> bool:
    deadline = meta.remote.blocks_expiry_time if meta.remote is not None else None
    return deadline is not None and monotonic() >= deadline


class PenstockConnector(NixlPullConnector):  # type: ignore[misc]
    """Named in KVTransferConfig; vLLM builds one in its scheduler and one in each worker."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        with contextlib.ExitStack() as around:
            if role == KVConnectorRole.WORKER:
                around.enter_context(_replaced(original, "NixlPullConnectorWorker", PullWorker))
                if current_platform.is_cpu():
                    around.enter_context(_gently())
            super().__init__(vllm_config, role, kv_cache_config)


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextlib.contextmanager
def _gently() -> Iterator[None]:
    """Agents made meanwhile let their progress thread sleep, and this process keeps its cores."""
    import nixl._api as api

    bindings = api.nixlBind

    class Config(bindings.nixlAgentConfig):  # type: ignore[misc, name-defined]
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, PROGRESS_SLEEP_US if name == "pthrDelay" else value)

    cores = os.sched_getaffinity(0)
    try:
        with _replaced(bindings, "nixlAgentConfig", Config):
            yield
    finally:
        os.sched_setaffinity(0, cores)
