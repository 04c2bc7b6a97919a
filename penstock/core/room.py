"""How much may wait in a frontend, over all models.

Dynamic thresholds (Choudhury and Hahne, 1998): each tenant may have as much as there is room left. So a
tenant that sends a lot leaves room for others, and nothing that was let in has to make room for them.
"""

from __future__ import annotations


class Room:
    """Prompt tokens that wait, by tenant.

    Args:
        most: that may wait. One call more than that may: its choices are let in together.
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
