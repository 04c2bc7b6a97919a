"""The tests of `transfer/nixl.py` that need NIXL (330 MB): `make test-nixl`. They fail without it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from penstock.errors import ConfigError, RemoteError
from penstock.shapes import Incarnation
from penstock.transfer.messages import Done, Granted, Memory
from penstock.transfer.nixl import NixlTransfer, NixlTransferSettings
from penstock.transfer.nixl_agent import Agent
from penstock.transfer.stream import Stream
from tests.transfer import contract
from tests.waiting import wait_until

BLOCKS, holder_process = contract.BLOCKS, contract.holder_process

MIDWAY_S = 5.0  # for a read to be under way, after which its holder freezes
LARGE = 1 << 18  # bytes of a block: 64 of them take many staging buffers


def make_nixl(instance_id: str, **settings: object) -> NixlTransfer:
    return NixlTransfer(Incarnation(instance_id, 1), NixlTransferSettings(**settings))


class TestNixlTransfer(contract.TransferContract):
    transport = "nixl"

    @pytest.fixture
    def make(self) -> Callable[..., NixlTransfer]:
        return make_nixl

    def test_blocks_larger_than_a_staging_buffer(self, workers) -> None:
        holder, reader = (workers(name, 4, 100_003, staging_bytes=10) for name in ("holder", "reader"))
        holder.fill()
        assert reader.pull(holder.export("h", [3, 1, 2]), [0, 1, 2], [0, 1, 2]).error is None
        assert (reader.pool[:3] == holder.pool[[3, 1, 2]]).all()

    def test_a_reader_that_never_says_done_holds_the_blocks_no_longer_than_allowed(
        self, workers, reader, monkeypatch
    ) -> None:
        holder = workers("holder", read_timeout_s=2.0)
        reading, over = threading.Event(), threading.Event()

        def read_on(*_: object) -> None:
            reading.set()
            assert over.wait(contract.SOON_S)

        monkeypatch.setattr(reader.transfer, "_fetch", read_on)
        outcome = reader.begin_pull(holder.export("h", [1]), [0], [1])
        assert reading.wait(contract.SOON_S)
        assert not holder.transfer.retract("h")
        wait_until(lambda: holder.transfer.retract("h"))
        over.set()
        assert outcome.result().error
        assert holder.pulled == []

    def test_of_many_peers_the_one_unused_longest_is_forgotten(self, workers) -> None:
        reader = workers("reader", max_pulls=1, max_peers=2)
        holders = [workers(f"holder{number}") for number in range(3)]
        for turn in range(2):
            for holder in holders:
                holder.fill(turn)
                assert reader.pull(holder.export(f"h{turn}", [1]), [0], [1]).error is None
                assert (reader.pool[1] == holder.pool[1]).all()
        assert len(reader.transfer._peers._peers) == 2

    @pytest.mark.parametrize(
        "memory",
        [
            None,
            Memory("stranger", b"no metadata", 0, BLOCKS, [1]),
            Memory("stranger", b"", 0, BLOCKS, []),
            Memory("stranger", b"", 0, BLOCKS, [BLOCKS]),
        ],
        ids=["none", "garbage", "too-few", "outside"],
    )
    def test_a_holder_that_answers_nonsense(self, holder, reader, monkeypatch, memory) -> None:
        def lend(stream: Stream, rows: list[int], deadline: float) -> None:
            stream.send(Granted(memory=memory), deadline)
            stream.receive(Done, deadline)

        monkeypatch.setattr(holder.transfer, "_lend", lend)
        assert reader.pull(holder.export("h", [1]), [0], [1]).error
        monkeypatch.undo()
        assert reader.pull(holder.export("g", [1]), [0], [1]).error is None

    def test_a_failed_start_can_be_stopped(self, holder) -> None:
        port = int(holder.transfer.address.rpartition(":")[2])
        transfer = make_nixl("second", port=port)
        with pytest.raises(ConfigError, match="cannot listen"):
            transfer.start(np.zeros((4, 64), np.uint8).data, lambda handoff_id: None)
        transfer.stop()

    def test_idle_it_costs_next_to_nothing(self, holder, reader) -> None:
        assert reader.pull(holder.export("h", [1]), [0], [1]).error is None
        before, began = time.process_time(), time.monotonic()
        time.sleep(1.0)
        share = (time.process_time() - before) / (time.monotonic() - began)
        assert share < 0.1  # two agents; a spinning one alone takes a second


@pytest.fixture
def over_tcp(monkeypatch) -> None:
    """UCX without shared memory: reads that need the holder's help, so that it can freeze under one."""
    monkeypatch.setenv("UCX_TLS", "tcp")


@pytest.mark.usefixtures("over_tcp")
class TestReadsThatWereGivenUp:
    def test_late_bytes_reach_no_pool_and_the_buffer_comes_back(self) -> None:
        reader = contract.Worker(make_nixl("reader", max_pulls=1, staging_buffers=1), "r", BLOCKS, LARGE)
        with (
            holder_process("nixl", "midway-SIGSTOP", BLOCKS, LARGE) as frozen,
            holder_process("nixl", "none", BLOCKS, LARGE) as healthy,
        ):
            every = list(range(BLOCKS))
            assert "in time" in reader.pull(frozen.handoff, every, every, timeout_s=MIDWAY_S).error
            reader.pool[:] = 99
            stuck = reader.pull(healthy.handoff, every, every, timeout_s=2.0)
            assert "no staging buffer" in stuck.error
            frozen.signal(signal.SIGCONT)
            wait_until(lambda: reader.transfer._staging.stranded() == 0)
            assert (reader.pool == 99).all(), "written after on_done"
        with holder_process("nixl", "none", BLOCKS, LARGE) as another:
            assert reader.pull(another.handoff, every, every).error is None
            assert (reader.pool[:, -1] == np.arange(BLOCKS)).all()
        reader.transfer.stop()

    def test_stopping_keeps_the_memory_that_may_still_be_written(self, caplog) -> None:
        reader = contract.Worker(make_nixl("reader"), "r", BLOCKS, LARGE)
        with holder_process("nixl", "midway-SIGSTOP", BLOCKS, LARGE) as frozen:
            every = list(range(BLOCKS))
            assert "in time" in reader.pull(frozen.handoff, every, every, timeout_s=MIDWAY_S).error
            reader.transfer.stop()
            assert "keeping their memory" in caplog.text
            frozen.signal(signal.SIGCONT)
            time.sleep(0.3)

    def test_a_holder_killed_under_a_read_is_found_out_before_the_deadline(self) -> None:
        reader = contract.Worker(make_nixl("reader"), "r", BLOCKS, LARGE)
        with holder_process("nixl", "midway-SIGKILL", BLOCKS, LARGE) as killed:
            every = list(range(BLOCKS))
            begun = time.monotonic()
            assert reader.pull(killed.handoff, every, every, timeout_s=240.0).error
            assert time.monotonic() - begun < contract.SOON_S
        assert reader.transfer._peers._peers == {}
        reader.transfer.stop()


def test_errors_of_nixl_are_mapped() -> None:
    agent = Agent("mapped", 0.01, "127.0.0.1")
    memory = np.zeros((1, 64), np.uint8)
    agent.register(memory)
    row = np.array([[memory.ctypes.data, 64, 0]], np.uint64)
    with pytest.raises(RemoteError, match="NIXL: cannot load"):
        agent.add_peer("nobody", b"garbage")
    with pytest.raises(RemoteError, match="NIXL: cannot read"):
        agent.post("nobody", row, row)
    agent.close()
