"""Responses that a frontend keeps in its memory."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

import msgspec

from penstock.ports import StoredResponse


class _Kept(msgspec.Struct):
    stored: StoredResponse
    used_at: float


class MemoryResponseStore:
    """In this process. What was not used for longest goes first, of the tenant who keeps most.

    Args:
        max_responses: kept at one time.
        max_bytes: the same, in bytes.
        max_age_s: since it was made or last used.
    """

    def __init__(
        self,
        max_responses: int,
        max_bytes: int,
        max_age_s: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._now = now
        self._tenants: dict[str, OrderedDict[str, _Kept]] = {}  # each in order of use
        self._sizes: dict[str, int] = {}
        self.count = 0
        self.bytes = 0

    async def put(self, tenant: str, stored: StoredResponse) -> bool:
        if stored.size > self._max_bytes:
            return False
        self._drop(tenant, stored.response_id)
        self._tenants.setdefault(tenant, OrderedDict())[stored.response_id] = _Kept(stored, self._now())
        self._sizes[tenant] = self._sizes.get(tenant, 0) + stored.size
        self.count += 1
        self.bytes += stored.size
        self._forget_old()
        while self.count > self._max_responses or self.bytes > self._max_bytes:
            largest = max(self._sizes, key=self._sizes.__getitem__)
            self._drop(largest, next(iter(self._tenants[largest])))
        return True

    async def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        self._forget_old()
        responses = self._tenants.get(tenant)
        if responses is None or response_id not in responses:
            return None
        responses.move_to_end(response_id)
        responses[response_id].used_at = self._now()
        return responses[response_id].stored

    async def delete(self, tenant: str, response_id: str) -> bool:
        self._forget_old()
        return self._drop(tenant, response_id)

    async def check(self) -> None:
        """It always answers."""

    async def close(self) -> None:
        """It has no connections."""

    def _forget_old(self) -> None:
        oldest = self._now() - self._max_age_s
        for tenant, responses in list(self._tenants.items()):
            while responses and (first := next(iter(responses))) and responses[first].used_at < oldest:
                self._drop(tenant, first)

    def _drop(self, tenant: str, response_id: str) -> bool:
        responses = self._tenants.get(tenant)
        kept = responses.pop(response_id, None) if responses is not None else None
        if kept is None:
            return False
        self.count -= 1
        self.bytes -= kept.stored.size
        self._sizes[tenant] -= kept.stored.size
        if not responses:
            del self._tenants[tenant], self._sizes[tenant]
        return True
