from __future__ import annotations

import asyncio

import pytest

from penstock.clock import VirtualClock
from penstock.errors import ConfigError
from penstock.ports import Pulled
from penstock.shapes import Handoff
from penstock.transfer.sim import SimNetwork, SimTransfer, SimTransferSettings, SimTransferStatistics
from tests.builders import handoff

SETTINGS = SimTransferSettings(bytes_per_block=1_000_000, gigabytes_per_s=1.0, setup_ms=5.0)


class Pair:
    """A holder and a reader; `done` has the end of each pull, with its time."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        network = SimNetwork()
        self.holder = SimTransfer(SETTINGS, network, "p", self.clock)
        self.reader = SimTransfer(SETTINGS, network, "d", self.clock)
        self.pulled: list[str] = []
        self.done: list[tuple[float, Pulled]] = []
        self.pools = [memoryview(bytearray(20 * [fill] * 4)).cast("B", (20, 4)) for fill in (1, 2)]
        self.holder.start(self.pools[0], self.pulled.append)
        self.reader.start(self.pools[1], lambda handoff_id: None)

    def offer(self, handoff_id: str) -> Handoff:
        address, params = self.holder.export(handoff_id, range(10))
        return handoff(handoff_id, "p", transport="sim", address=address, params=params)

    def pull(self, handoff: Handoff, blocks: int = 10, timeout_s: float = 1.0) -> None:
        ids = range(blocks)
        self.reader.pull(
            handoff, ids, ids, timeout_s, lambda end: self.done.append((self.clock.now(), end))
        )

    @property
    def errors(self) -> list[str | None]:
        return [end.error for _, end in self.done]


async def test_a_pull_takes_setup_and_bandwidth():
    pair = Pair()
    pair.pull(pair.offer("a"))
    await pair.clock.advance(0.0149)
    assert not pair.done
    await pair.clock.advance(0.1)
    assert pair.pulled == ["a"]
    assert pair.done == [(pytest.approx(0.015), Pulled(10, 10_000_000, pytest.approx(0.015), None))]


async def test_a_pull_moves_its_blocks_at_its_end():
    pair = Pair()
    held, here = pair.pools
    held.cast("B")[9 * 4 : 10 * 4] = bytes([9, 9, 9, 9])
    pair.reader.pull(pair.offer("a"), [9, 0], [3, 4], 1.0, lambda end: None)
    await pair.clock.advance(0.006)
    assert bytes(here) == bytes([2]) * 80
    await pair.clock.advance(1.0)
    assert bytes(here) == bytes([2] * 12 + [9] * 4 + [1] * 4 + [2] * 60)


async def test_a_killed_reader_reads_no_longer():
    pair = Pair()
    pair.pull(pair.offer("a"))
    assert pair.holder.statistics() == SimTransferStatistics(offers=1, reads=0, pulls=0)
    await pair.clock.advance(0.006)
    assert not pair.holder.retract("a")
    assert pair.holder.statistics() == SimTransferStatistics(offers=0, reads=1, pulls=0)
    assert pair.reader.statistics() == SimTransferStatistics(offers=0, reads=0, pulls=1)
    pair.reader.kill()
    assert pair.holder.retract("a")


async def test_pulls_from_one_holder_queue_up():
    pair = Pair()
    for name in "abc":
        pair.pull(pair.offer(name))
    await pair.clock.advance(1.0)
    assert [at for at, _ in pair.done] == pytest.approx([0.015, 0.025, 0.035])


async def test_a_handoff_is_for_one_reader():
    pair = Pair()
    handoff = pair.offer("a")
    pair.pull(handoff)
    pair.pull(handoff)
    await pair.clock.advance(1.0)
    assert sorted(pair.errors, key=str) == [None, "p does not offer a"]
    assert pair.pulled == ["a"]


async def test_an_empty_pull_lets_the_holder_go():
    pair = Pair()
    pair.pull(pair.offer("a"), blocks=0)
    await pair.clock.advance(1.0)
    assert pair.errors == [None]
    assert pair.pulled == ["a"]


async def test_retract_waits_for_a_reader_that_has_begun():
    pair = Pair()
    handoff = pair.offer("a")
    pair.pull(handoff)
    await pair.clock.advance(0.001)
    assert not pair.holder.retract("a")
    await pair.clock.advance(1.0)
    assert pair.holder.retract("a")
    assert pair.holder.retract("nobody")
    retracted = pair.offer("b")
    assert pair.holder.retract("b")
    pair.pull(retracted)
    await pair.clock.advance(1.0)
    assert pair.errors == [None, "p does not offer b"]


async def test_a_slow_pull_ends_at_its_timeout():
    pair = Pair()
    pair.pull(pair.offer("a"), blocks=1000, timeout_s=0.5)
    await pair.clock.advance(2.0)
    assert pair.done[0][0] == pytest.approx(0.5)
    assert pair.errors == ["not done within 0.5 s"]
    assert pair.pulled == []
    assert pair.holder.retract("a")


async def test_a_holder_that_stops_fails_its_readers():
    pair = Pair()
    pair.pull(pair.offer("a"))
    await pair.clock.advance(0.001)
    pair.holder.stop()
    await pair.clock.advance(1.0)
    late = pair.offer("b")
    pair.pull(late)
    await pair.clock.advance(1.0)
    assert pair.errors == ["p stopped", "no holder at p"]


async def test_a_reader_that_stops_ends_its_pulls():
    pair = Pair()
    pair.pull(pair.offer("a"))
    await pair.clock.advance(0.001)
    pair.pull(pair.offer("b"))
    pair.reader.stop()
    for _ in range(5):
        await asyncio.sleep(0)
    assert pair.errors == ["stopped", "stopped"]
    assert pair.holder.retract("a")


@pytest.mark.parametrize("field", ["bytes_per_block", "gigabytes_per_s"])
def test_bad_settings_are_refused(field: str):
    with pytest.raises(ConfigError):
        SimTransferSettings(**{field: 0})
