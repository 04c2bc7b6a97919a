"""How much memory requests may take that wait in a frontend, over all models.

Dynamic thresholds (Choudhury and Hahne, 1998): each tenant may have as much as there is room left. So a
tenant that sends a lot leaves room for others, and nothing that was let in has to make room for them.
"""

from __future__ import annotations

from penstock.shapes import Request

TOKEN_BYTES = 44
"""Of a prompt token: an int object, a place in the request's list and one in its lifecycle's."""

REQUEST_BYTES = 32 * 1024
"""Of a request besides: its connection, tasks and records."""


def waiting_bytes(request: Request) -> int:
    """What a request takes while it waits."""
    structured = request.sampling.structured
    spec_bytes = len(structured.spec) if structured is not None else 0
    return REQUEST_BYTES + TOKEN_BYTES * len(request.token_ids) + spec_bytes


class Room:
    """Bytes that requests take, by tenant.

    Args:
        most: that they may take. A call may exceed that, as its choices are let in with the first.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.used = 0
        self._by_tenant: dict[str, int] = {}

    def fits(self, tenant: str, size: int) -> bool:
        """Whether a newcomer of this size may wait. When nothing waits, any may."""
        return not self.used or self._by_tenant.get(tenant, 0) + size <= self.most - self.used

    def take(self, tenant: str, size: int) -> None:
        """So much more waits. Whether it fits is not asked."""
        self.used += size
        self._by_tenant[tenant] = self._by_tenant.get(tenant, 0) + size

    def give_back(self, tenant: str, size: int) -> None:
        """So much waits no longer."""
        self.used -= size
        left = self._by_tenant.pop(tenant, 0) - size
        if left:
            self._by_tenant[tenant] = left
