"""Responses in a frontend's memory: the contract of stores, and its limits."""

import pytest

from penstock.frontend.responses_api.memory_store import MemoryResponseStore
from penstock.ports import STORED_ENTRY_BYTES
from tests.frontend.store_contract import StoreContract, kept, stored


class TestContract(StoreContract):
    @pytest.fixture
    def open_store(self):
        return lambda age_s=60.0, max_bytes=10**6: MemoryResponseStore(1000, max_bytes, age_s)


async def test_store_beyond_its_count_forgets_what_was_not_used_for_longest():
    store = MemoryResponseStore(2, 10**6, 60.0)
    await store.put("t", stored("a"))
    await store.put("t", stored("b"))
    await store.get("t", "a")
    await store.put("t", stored("c"))
    assert await kept(store, "t", "a", "b", "c") == ["a", "c"]


async def test_store_beyond_its_bytes_takes_from_who_keeps_most():
    store = MemoryResponseStore(100, 11 * STORED_ENTRY_BYTES, 60.0)
    await store.put("small", stored("s"))
    for number in range(5):
        await store.put("large", stored(str(number), 2 * STORED_ENTRY_BYTES))
    assert await kept(store, "small", "s") == ["s"]
    assert await kept(store, "large", *"01234") == ["2", "3", "4"]
    assert (store.count, store.bytes) == (
        4,
        stored("s").size + 3 * stored("0", 2 * STORED_ENTRY_BYTES).size,
    )


async def test_store_of_no_responses_keeps_none():
    store = MemoryResponseStore(0, 0, 0.0)
    assert not await store.put("t", stored("a"))
    assert await kept(store, "t", "a") == []
    assert (store.count, store.bytes) == (0, 0)
