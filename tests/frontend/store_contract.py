"""What every store of responses must do. Its tests subclass `StoreContract` and say how to open one."""

import asyncio
from collections.abc import Callable

from penstock.ports import ResponseStore, StoredResponse

OpenStore = Callable[..., ResponseStore]
"""With `age_s` and `max_bytes`, and anything for what a test does not say."""


def stored(name, size=0):
    return StoredResponse(name, b"\x00\xff" * (size // 2), b'["\xc3\xa4"]', "resp_0")


async def kept(store, tenant, *names):
    return [name for name in names if await store.get(tenant, name) is not None]


class StoreContract:
    """Subclasses provide the fixture `open_store: OpenStore`."""

    async def test_response_is_given_back_as_it_was_put(self, open_store: OpenStore) -> None:
        store = open_store()
        assert await store.put("t", stored("a", 1000))
        assert await store.get("t", "a") == stored("a", 1000)
        assert await store.get("t", "b") is None

    async def test_later_response_of_the_same_id_replaces_the_earlier(self, open_store: OpenStore) -> None:
        store = open_store()
        assert await store.put("t", stored("a", 1000))
        assert await store.put("t", stored("a", 10))
        assert await store.get("t", "a") == stored("a", 10)

    async def test_response_is_hidden_from_other_tenants(self, open_store: OpenStore) -> None:
        store = open_store()
        await store.put("t", stored("a"))
        await store.put("", stored("t:a"))
        for other in ("u", "", "t:"):
            assert await kept(store, other, "a") == []
            assert not await store.delete(other, "a")
        assert await kept(store, "t", "a") == ["a"]

    async def test_response_is_deleted_once(self, open_store: OpenStore) -> None:
        store = open_store()
        await store.put("t", stored("a"))
        assert await store.delete("t", "a")
        assert not await store.delete("t", "a")
        assert await kept(store, "t", "a") == []

    async def test_response_that_is_used_stays_and_others_go_by_age(self, open_store: OpenStore) -> None:
        store = open_store(age_s=2.0)
        await store.put("t", stored("used"))
        await store.put("t", stored("unused"))
        for _ in range(6):
            await asyncio.sleep(0.4)
            assert await kept(store, "t", "used") == ["used"]
        assert await kept(store, "t", "unused") == []
        await asyncio.sleep(2.2)
        assert await kept(store, "t", "used") == []

    async def test_response_beyond_the_limit_is_not_kept(self, open_store: OpenStore) -> None:
        store = open_store(max_bytes=10_000)
        assert not await store.put("t", stored("huge", 10_000))
        assert await store.put("t", stored("small", 100))
        assert await kept(store, "t", "huge", "small") == ["small"]

    async def test_calls_at_one_time_do_not_mix(self, open_store: OpenStore) -> None:
        store = open_store()
        names = [f"resp_{number}" for number in range(100)]
        assert all(await asyncio.gather(*(store.put("t", stored(name, 2000)) for name in names)))
        found = await asyncio.gather(*(store.get("t", name) for name in names))
        assert [response and response.response_id for response in found] == names
