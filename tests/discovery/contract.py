"""What every discovery adapter must do. An adapter's tests subclass `DiscoveryContract` and say how to open
one; whatever it stands on must be shared by all that one test opens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from penstock.ports import Discovery
from penstock.shapes import Registration
from tests.builders import registration

OpenDiscovery = Callable[[], Discovery]
CHANGE_S = 30.0  # how long a change may take to be seen on a busy machine


class Watcher:
    """Consumes a watch in the background and remembers the latest set."""

    def __init__(self, discovery: Discovery) -> None:
        self._discovery = discovery
        self._task: asyncio.Task[None]
        self._changed = asyncio.Condition()
        self.latest: Mapping[str, Registration] | None = None
        self.updates = 0

    async def __aenter__(self) -> Watcher:
        self._task = asyncio.create_task(self._consume())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _consume(self) -> None:
        async for instances in self._discovery.watch():
            async with self._changed:
                self.latest = dict(instances)
                self.updates += 1
                self._changed.notify_all()

    async def until(self, *instance_ids: str, within_s: float = CHANGE_S) -> Mapping[str, Registration]:
        """Wait until exactly these instances are seen."""
        return await self.until_true(
            lambda latest: latest is not None and set(latest) == set(instance_ids), within_s
        )

    async def until_true(
        self, holds: Callable[[Mapping[str, Registration] | None], bool], within_s: float = CHANGE_S
    ) -> Mapping[str, Registration]:
        async with asyncio.timeout(within_s), self._changed:
            await self._changed.wait_for(lambda: holds(self.latest))
            return self.latest or {}


class DiscoveryContract:
    """Subclasses provide the fixture `open_discovery: OpenDiscovery`."""

    odd_id = "a/b c%"

    def essence(self, found: Registration) -> object:
        """What of a registration is passed on; of all adapters that write it down, all of it."""
        return found

    def same(self, found: Mapping[str, Registration] | None, *wanted: Registration) -> bool:
        """Whether exactly these are found."""
        essences = {one.instance_id: self.essence(one) for one in wanted}
        return found is not None and {name: self.essence(one) for name, one in found.items()} == essences

    async def test_a_watch_starts_with_the_whole_set(self, open_discovery: OpenDiscovery) -> None:
        first, second = registration("w-0"), registration("w-1")
        await open_discovery().register(first)
        await open_discovery().register(second)
        async with Watcher(open_discovery()) as watcher:
            assert self.same(await watcher.until("w-0", "w-1"), first, second)

    async def test_an_empty_directory_yields_an_empty_set_at_once(
        self, open_discovery: OpenDiscovery
    ) -> None:
        async with Watcher(open_discovery()) as watcher:
            assert await watcher.until() == {}

    async def test_instances_come_and_go(self, open_discovery: OpenDiscovery) -> None:
        async with Watcher(open_discovery()) as watcher:
            await watcher.until()
            lease = await open_discovery().register(registration())
            await watcher.until("w-0")
            await lease.close()
            await watcher.until()

    async def test_a_new_incarnation_replaces_the_old(self, open_discovery: OpenDiscovery) -> None:
        async with Watcher(open_discovery()) as watcher:
            old = await open_discovery().register(registration(epoch=1))
            await watcher.until("w-0")
            newer = registration(epoch=2)
            await open_discovery().register(newer)
            await watcher.until_true(lambda latest: self.same(latest, newer))
            await old.close()  # the old owner's farewell must not take the new one along
            await asyncio.sleep(0.3)
            assert self.same(watcher.latest, newer)

    async def test_no_change_no_update(self, open_discovery: OpenDiscovery) -> None:
        await open_discovery().register(registration())
        async with Watcher(open_discovery()) as watcher:
            await watcher.until("w-0")
            await asyncio.sleep(0.8)
            assert watcher.updates == 1

    async def test_leases_and_watches_say_that_all_is_well(self, open_discovery: OpenDiscovery) -> None:
        lease = await open_discovery().register(registration())
        assert lease.registered
        async with Watcher(watching := open_discovery()) as watcher:
            await watcher.until("w-0")
            assert lease.trouble == watching.trouble == ""

    async def test_closing_a_lease_twice_is_harmless(self, open_discovery: OpenDiscovery) -> None:
        lease = await open_discovery().register(registration())
        await lease.close()
        await lease.close()

    async def test_close_ends_the_watch(self, open_discovery: OpenDiscovery) -> None:
        discovery = open_discovery()
        updates = discovery.watch()
        assert await anext(updates) == {}
        await discovery.close()
        async with asyncio.timeout(CHANGE_S):
            assert [update async for update in updates] == []

    async def test_any_address_is_kept_as_it_is(self, open_discovery: OpenDiscovery) -> None:
        await open_discovery().register(registration(self.odd_id))
        async with Watcher(open_discovery()) as watcher:
            seen = await watcher.until(self.odd_id)
            assert seen[self.odd_id].address == "10.0.0.7:1"
