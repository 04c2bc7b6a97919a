"""Elects one operator at a time, by a Lease of the API server.

The holder of the lease renews it every `renew_s`. A holder that could not renew it for `deadline_s` stops
acting. Another operator may take the lease once it has seen no renewal for `lease_s`. Each measures by its
own clock; clocks of different machines are never compared. As deadline_s < lease_s, no two operators act at
once: each checks `leads` before every write.

The protocol is that of client-go (k8s.io/client-go/tools/leaderelection), so the Lease has the usual
fields.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec

from penstock.clock import Clock
from penstock.kubernetes.api import Api, ApiError, Object
from penstock.kubernetes.kinds import LEASES

log = logging.getLogger(__name__)


class ElectionSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The lease, with times in seconds."""

    namespace: str
    name: str
    identity: str  # of this process; unique among all that ever try
    lease_s: float = 15.0
    deadline_s: float = 10.0
    renew_s: float = 2.0


class Election:
    """The election, as one process takes part in it."""

    def __init__(
        self,
        api: Api,
        settings: ElectionSettings,
        clock: Clock,
        utc: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.elected = asyncio.Event()
        self._api = api
        self._settings = settings
        self._clock = clock
        self._utc = utc
        self._renewed_at: float | None = None  # when this process last wrote the lease as its holder
        # The lease's resourceVersion, and when it was first seen.
        self._seen: tuple[str, float] | None = None

    @property
    def leads(self) -> bool:
        """Whether this process may act now."""
        if self._renewed_at is None:
            return False
        return self._clock.now() - self._renewed_at < self._settings.deadline_s

    async def run(self) -> None:
        """Try to get the lease and to keep it. Returns when the lease is lost. The caller must then drop
        its caches, since another operator may act, and may call this again."""
        self.elected.clear()
        self._renewed_at = None
        while True:
            began = self._clock.now()
            try:
                async with asyncio.timeout(self._settings.deadline_s / 2):
                    held = await self._hold()
            except (ApiError, TimeoutError) as error:
                held = False
                log.warning("the lease %s cannot be written: %s", self._settings.name, error or "no answer")
            if held:
                self._renewed_at = began
                if not self.elected.is_set():
                    log.info("this operator now acts: lease=%s/%s", *self._place)
                    self.elected.set()
            elif self.elected.is_set() and not self.leads:
                log.error("this operator lost the lease %s/%s and stops acting", *self._place)
                return
            await self._clock.sleep(self._settings.renew_s)

    async def resign(self) -> None:
        """Give the lease back, so that another operator need not wait for its end."""
        if not self.leads:
            return
        self._renewed_at = None
        try:
            lease = await self._api.get(LEASES, self._settings.name, self._settings.namespace)
            if lease["spec"].get("holderIdentity") == self._settings.identity:
                lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
                await self._api.replace(LEASES, lease)
        except ApiError as error:
            log.warning("the lease %s could not be released: %s", self._settings.name, error)

    @property
    def _place(self) -> tuple[str, str]:
        return self._settings.namespace, self._settings.name

    async def _hold(self) -> bool:
        """Renew the lease, or take it if it is free. Returns whether this process holds it now."""
        settings = self._settings
        try:
            lease = await self._api.get(LEASES, settings.name, settings.namespace)
        except ApiError as error:
            if not error.is_not_found:
                raise
            return await self._write({}, None)
        spec = lease.get("spec") or {}
        holder = spec.get("holderIdentity") or ""
        version = lease["metadata"]["resourceVersion"]
        if self._seen is None or self._seen[0] != version:
            self._seen = version, self._clock.now()
        silent_s = self._clock.now() - self._seen[1]
        if holder not in ("", settings.identity) and self.elected.is_set():
            # Another process took the lease too early, by hand or because its clock jumped. It may act
            # already.
            self._renewed_at = None
            return False
        if holder not in ("", settings.identity) and silent_s < settings.lease_s:
            return False
        return await self._write(spec, lease)

    async def _write(self, before: Object, lease: Object | None) -> bool:
        settings = self._settings
        now = self._utc().strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        mine = before.get("holderIdentity") == settings.identity
        transitions = int(before.get("leaseTransitions") or 0)
        spec: dict[str, Any] = {
            "holderIdentity": settings.identity,
            "leaseDurationSeconds": round(settings.lease_s),
            "acquireTime": before.get("acquireTime", now) if mine else now,
            "renewTime": now,
            "leaseTransitions": transitions if mine or lease is None else transitions + 1,
        }
        metadata = {"name": settings.name, "namespace": settings.namespace}
        try:
            if lease is None:
                wanted = {"apiVersion": LEASES.api_version, "kind": LEASES.name}
                await self._api.create(LEASES, {**wanted, "metadata": metadata, "spec": spec})
            else:
                await self._api.replace(LEASES, {**lease, "spec": spec})
        except ApiError as error:
            if error.is_conflict:  # another process was faster
                return False
            raise
        return True
