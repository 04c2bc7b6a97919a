"""Discovery by keys in etcd: one key per instance, with a lease.

Connected frontends and workers do not need etcd. During an outage, a watcher keeps the last known instances
and an owner keeps trying. After the outage, whether etcd kept its data or not, every owner notices within
`refresh_s` that its lease or key is gone, and writes it again with the same epoch.

A watch consists of a list and the changes since its revision. Whenever it ends (the connection is lost, the
revision is compacted, `watch_s` is over), the watcher lists again. It does not resume from the old
revision: the list is small, and an etcd that lost its data counts its revisions from 1 again, so that a
resumed watch would wait for a revision far in the future.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from urllib.parse import quote

import msgspec

from penstock.discovery.etcd_client import EtcdClient, EtcdError, KeyValue, WatchReply
from penstock.discovery.etcd_settings import EtcdSettings
from penstock.discovery.outage import Outage
from penstock.shapes import Registration

log = logging.getLogger(__name__)

_SHOWN = 200  # characters of a key, and of an error message, which may quote the value

_WRITES_MAX = 3
"""Attempts to write a key that other processes keep changing, before the next refresh."""


class EtcdDiscovery:
    """The `Discovery` port over one etcd cluster."""

    def __init__(self, settings: EtcdSettings) -> None:
        """Does not connect yet. Raises ConfigError if the TLS files cannot be used."""
        self._settings = settings
        self._client = EtcdClient(settings)
        self._followers: set[asyncio.Task[None]] = set()
        self.trouble = "not asked yet"

    async def register(self, registration: Registration) -> EtcdLease:
        """Write this instance's key, and keep it until the lease is closed. Returns after the first
        attempt. If it failed, the lease reports this in `trouble`, and keeps trying."""
        lease = EtcdLease(self._client, registration, self._settings)
        await lease.start()
        return lease

    async def watch(self) -> AsyncIterator[Mapping[str, Registration]]:
        known = _Known(self._settings)
        follower = asyncio.create_task(self._follow(known), name="etcd watch")
        follower.add_done_callback(lambda _: known.changed.set())
        self._followers.add(follower)
        try:
            while True:
                await known.changed.wait()
                known.changed.clear()
                if follower.done():
                    if not follower.cancelled():
                        follower.result()
                    return
                yield known.instances()
        finally:
            self._followers.discard(follower)
            follower.cancel()
            await asyncio.gather(follower, return_exceptions=True)

    async def close(self) -> None:
        """End all watches and close all connections."""
        for follower in self._followers:
            follower.cancel()
        await self._client.close()

    async def _follow(self, known: _Known) -> None:
        outage = Outage(log, "etcd", "the last known instances stay")
        pause = _Pause(self._settings)
        while True:
            try:
                if await self._list_and_watch(known, outage, pause):
                    continue
            except Exception:  # a bug here must not end the frontend
                log.exception("etcd watch failed")
            await pause.after_failure()

    async def _list_and_watch(self, known: _Known, outage: Outage, pause: _Pause) -> bool:
        """List, then watch until the watch ends. Returns whether it ended after `watch_s`, as intended."""
        try:
            listed = await self._client.list_below(self._settings.prefix, self._settings.instances_max)
        except EtcdError as error:
            self.trouble = str(error)
            outage.began(self.trouble)
            return False
        self.trouble = ""
        outage.ended()
        known.replace(listed.kvs, listed.count)
        began = time.monotonic()
        reason = "closed by etcd"
        try:
            async with asyncio.timeout(self._settings.watch_s):
                await self._client.watch(self._settings.prefix, listed.header.revision + 1, known.apply)
        except TimeoutError:
            pause.reset()
            return True
        except EtcdError as error:
            reason = str(error)
        log.info("etcd watch ended: reason=%r lasted_s=%.1f", reason, time.monotonic() - began)
        return False


_SUPERSEDED = "a newer incarnation took over"


class EtcdLease:
    """The key and the lease of one instance, and the task that keeps both."""

    def __init__(self, client: EtcdClient, registration: Registration, settings: EtcdSettings) -> None:
        self.registered = False
        self.trouble = "not registered yet"
        self._client = client
        self._settings = settings
        self._instance_id = registration.instance_id
        self._epoch = registration.epoch
        self._key = _key(settings, registration.instance_id)
        self._value = msgspec.json.encode(registration)
        self._lease = 0  # its id; chosen here, so that it can be revoked even if a reply was lost. 0: none
        self._outage = Outage(log, "etcd", f"instance {registration.instance_id} keeps trying to register")
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Try once to register, then keep trying in the background until `close`."""
        await self._try()
        self._keeper = asyncio.create_task(self._keep(), name=f"lease {self._instance_id}")

    async def close(self) -> None:
        """Deregister, in at most `close_s`. If etcd does not answer, the lease runs out."""
        if self._keeper is None:
            return
        self._keeper.cancel()
        await asyncio.gather(self._keeper, return_exceptions=True)
        self._keeper = None
        if not self._lease:
            return
        try:
            async with asyncio.timeout(self._settings.close_s):
                await self._client.revoke(self._lease)
        except (EtcdError, TimeoutError) as error:
            log.warning(
                "etcd: instance=%s could not be deregistered, its lease ends in %g s: reason=%r",
                self._instance_id,
                self._settings.lease_s,
                str(error) or f"no answer in {self._settings.close_s:g} s",
            )

    async def _keep(self) -> None:
        pause = _Pause(self._settings)
        while True:
            if self.trouble:
                await pause.after_failure()
            else:
                pause.reset()
                await asyncio.sleep(self._settings.refresh_s * random.uniform(0.8, 1.0))
            try:
                await self._try()
            except Exception:  # a bug must not end the task that keeps this instance registered
                log.exception("etcd: instance=%s could not be refreshed", self._instance_id)
                self.trouble = "an error in this process, see the log"

    async def _try(self) -> None:
        try:
            held = await self._refresh()
        except EtcdError as error:
            self.trouble = str(error)
            self._outage.began(self.trouble)
            return
        self._outage.ended()
        if held:
            self.registered, self.trouble = True, ""
        elif self.trouble != _SUPERSEDED:
            # Or an older incarnation, from a host whose clock is ahead; then its key disappears with its
            # lease.
            self.trouble = _SUPERSEDED
            log.warning("etcd: a newer incarnation took over instance=%s", self._instance_id)

    async def _refresh(self) -> bool:
        """Renew the lease, and write the key if it is missing or different. Returns False if a newer
        incarnation owns the key."""
        if self._lease and not await self._client.keep_alive(self._lease):
            log.warning("etcd: instance=%s lost its lease, registering again", self._instance_id)
            self._lease = 0
        for _ in range(_WRITES_MAX):
            held = await self._client.get(self._key)
            if held is not None:
                if held.value == self._value and held.lease == self._lease:
                    return True
                if _epoch_in(held.value) > self._epoch:
                    return False
            if not self._lease:
                self._lease = secrets.randbits(62) + 1
                await self._client.grant(self._lease, max(1, round(self._settings.lease_s)))
            if await self._client.put(
                self._key, self._value, self._lease, held.mod_revision if held is not None else 0
            ):
                log.info("etcd: registered instance=%s key=%s", self._instance_id, self._key)
                return True
        raise EtcdError(f"{self._key} changes faster than it can be written")


class _Known:
    """The instances that a watch has found so far."""

    def __init__(self, settings: EtcdSettings) -> None:
        self.changed = asyncio.Event()  # set when `instances` changes
        self._settings = settings
        self._by_key: dict[bytes, Registration] | None = None  # None: nothing seen yet
        self._warned: set[bytes] = set()  # keys with invalid values that were logged

    def instances(self) -> dict[str, Registration]:
        return {found.instance_id: found for found in (self._by_key or {}).values()}

    def replace(self, found: Iterable[KeyValue], count: int) -> None:
        """Take a complete list. `count` is the number of keys in etcd, which may be larger."""
        if count > self._settings.instances_max:
            self._warn_once(
                b"", f"{count} instances, over {self._settings.instances_max}; the rest is ignored"
            )
        self._become({held.key: read for held in found if (read := self._read(held)) is not None})

    def apply(self, reply: WatchReply) -> None:
        """Take the changes of a watch."""
        current = dict(self._by_key or {})
        for event in reply.events:
            read = None if event.type == "DELETE" else self._read(event.kv)
            if read is None:
                current.pop(event.kv.key, None)
            elif event.kv.key in current or len(current) < self._settings.instances_max:
                current[event.kv.key] = read
        self._become(current)

    def _become(self, current: dict[bytes, Registration]) -> None:
        if current != self._by_key:
            self._by_key = current
            self.changed.set()

    def _read(self, held: KeyValue) -> Registration | None:
        try:
            if len(held.value) > self._settings.value_bytes_max:
                raise msgspec.ValidationError(f"{len(held.value)} bytes is too large")
            found = msgspec.json.decode(held.value, type=Registration)
            if held.key.decode() != _key(self._settings, found.instance_id):
                raise msgspec.ValidationError(f"it is not the key of {found.instance_id!r}")
            return found
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            self._warn_once(held.key, f"ignoring {held.key[:_SHOWN]!r}: {str(error)[:_SHOWN]}")
            return None

    def _warn_once(self, key: bytes, message: str) -> None:
        if key not in self._warned and len(self._warned) < self._settings.instances_max:
            self._warned.add(key)
            log.warning("etcd: %s", message)


class _Pause:
    """Pauses after failures. They double, and are random, so that not all processes reach a recovered etcd
    at once."""

    def __init__(self, settings: EtcdSettings) -> None:
        self._settings = settings
        self._next_s = settings.retry_min_s

    def reset(self) -> None:
        self._next_s = self._settings.retry_min_s

    async def after_failure(self) -> None:
        pause_s = self._next_s * random.uniform(0.5, 1.0)
        self._next_s = min(2 * self._next_s, self._settings.retry_max_s)
        await asyncio.sleep(pause_s)


def _key(settings: EtcdSettings, instance_id: str) -> str:
    return settings.prefix + quote(instance_id, safe="")


def _epoch_in(value: bytes) -> int:
    try:
        return msgspec.json.decode(value, type=Registration).epoch
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return -1
