"""What every KV transfer between processes must do. A transport's tests subclass `TransferContract` and
say how to make one; `holder.py` runs one in a process that can be killed and frozen."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest

from penstock.ports import KvTransfer, Pulled
from penstock.shapes import Handoff, Incarnation
from tests.builders import handoff
from tests.ports import free_port
from tests.waiting import wait_until

BLOCKS = 64
BLOCK_BYTES = 4096
SOON_S = 60.0  # for what should take milliseconds, on a loaded machine
LITTLE_S = 20.0  # that an on_done may come after its timeout, on a loaded machine

MakeTransfer = Callable[..., KvTransfer]


class Worker:
    """A transfer, its pool, and what its callbacks said."""

    def __init__(
        self, transfer: KvTransfer, instance_id: str, blocks: int = BLOCKS, block_bytes: int = BLOCK_BYTES
    ) -> None:
        self.transfer = transfer
        self.instance_id = instance_id
        self.pool = np.zeros((blocks, block_bytes), np.uint8)
        self.pulled: list[str] = []
        transfer.start(self.pool.data, self.pulled.append)

    def fill(self, seed: int = 0) -> None:
        self.pool[:] = np.random.default_rng(seed).integers(0, 256, self.pool.shape, np.uint8)

    def export(self, handoff_id: str, block_ids: list[int]) -> Handoff:
        address, params = self.transfer.export(handoff_id, block_ids)
        transport = self.transfer.name
        return handoff(handoff_id, self.instance_id, transport=transport, address=address, params=params)

    def pull(
        self, given: Handoff, indices: list[int], block_ids: list[int], timeout_s: float = SOON_S
    ) -> Pulled:
        return self.begin_pull(given, indices, block_ids, timeout_s).result()

    def begin_pull(
        self, given: Handoff, indices: list[int], block_ids: list[int], timeout_s: float = SOON_S
    ) -> Outcome:
        outcome = Outcome()
        self.transfer.pull(given, indices, block_ids, timeout_s, outcome)
        return outcome


class Outcome:
    """An `on_done` that remembers."""

    def __init__(self) -> None:
        self._there = threading.Event()
        self.calls: list[Pulled] = []
        self.thread = ""

    def __call__(self, pulled: Pulled) -> None:
        self.calls.append(pulled)
        self.thread = threading.current_thread().name
        self._there.set()

    def result(self, within_s: float = SOON_S + LITTLE_S) -> Pulled:
        assert self._there.wait(within_s), "on_done was not called"
        return self.calls[0]


def changed(given: Handoff, **fields: object) -> Handoff:
    return msgspec.structs.replace(given, **fields)


class HolderProcess:
    """`holder.py` for a transport. Block `b` of its pool is filled with byte `b`."""

    def __init__(
        self, transport: str, fault: str = "none", blocks: int = BLOCKS, block_bytes: int = BLOCK_BYTES
    ) -> None:
        arguments = [transport, fault, str(blocks), str(block_bytes)]
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "holder.py"), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.handoff = msgspec.json.decode(self._process.stdout.readline(), type=Handoff)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


@contextmanager
def holder_process(*args: object) -> Iterator[HolderProcess]:
    process = HolderProcess(*args)
    try:
        yield process
    finally:
        process.close()


class TransferContract:
    """Subclasses provide `transport` and the fixture `make: (instance_id, **settings) -> KvTransfer`."""

    transport: str

    @pytest.fixture
    def workers(self, make: MakeTransfer) -> Iterator[Callable[..., Worker]]:
        started: list[Worker] = []

        def start(instance_id: str, blocks: int = BLOCKS, block_bytes: int = BLOCK_BYTES, **settings):
            started.append(Worker(make(instance_id, **settings), instance_id, blocks, block_bytes))
            return started[-1]

        yield start
        for worker in started:
            worker.transfer.stop()

    @pytest.fixture
    def holder(self, workers: Callable[..., Worker]) -> Worker:
        worker = workers("holder")
        worker.fill()
        return worker

    @pytest.fixture
    def reader(self, workers: Callable[..., Worker]) -> Worker:
        return workers("reader")

    # What arrives

    def test_blocks_arrive_bit_exact_and_nothing_else_changes(self, holder, reader) -> None:
        given = holder.export("h", [5, 9, 2, 3, 4])
        reader.pool[:] = 255
        pulled = reader.pull(given, [0, 1, 2, 3, 4], [7, 8, 9, 30, 1])
        assert (pulled.blocks, pulled.bytes, pulled.error) == (5, 5 * BLOCK_BYTES, None)
        assert pulled.seconds > 0
        expected = np.full_like(reader.pool, 255)
        expected[[7, 8, 9, 30, 1]] = holder.pool[[5, 9, 2, 3, 4]]
        np.testing.assert_array_equal(reader.pool, expected)
        assert holder.pulled == ["h"]

    @pytest.mark.parametrize("seed", range(4))
    def test_any_blocks_in_any_order(self, holder, reader, seed: int) -> None:
        rng = random.Random(seed)
        source = rng.sample(range(BLOCKS), 40)
        indices = rng.sample(range(40), rng.randint(1, 40))
        rows = rng.sample(range(BLOCKS), len(indices))
        given = holder.export("h", source)
        assert reader.pull(given, indices, rows).error is None
        expected = np.zeros_like(reader.pool)
        expected[rows] = holder.pool[[source[index] for index in indices]]
        np.testing.assert_array_equal(reader.pool, expected)

    def test_asking_for_nothing_lets_the_holder_go(self, holder, reader) -> None:
        given = holder.export("h", [1, 2])
        pulled = reader.pull(given, [], [])
        assert (pulled.blocks, pulled.bytes, pulled.error) == (0, 0, None)
        assert holder.pulled == ["h"]
        assert not reader.pool.any()

    @pytest.mark.parametrize(("blocks", "block_bytes"), [(64, 1 << 20), (4096, 64), (3, 100_003)])
    def test_large_and_tiny_blocks(self, workers, blocks: int, block_bytes: int) -> None:
        holder = workers("holder", blocks, block_bytes)
        reader = workers("reader", blocks, block_bytes)
        holder.pool.reshape(-1)[:] = np.arange(holder.pool.size, dtype=np.uint32).view(np.uint8)[::4]
        holder.pool[:, 0] = np.arange(blocks)
        rows = random.Random(0).sample(range(blocks), blocks)
        pulled = reader.pull(holder.export("h", list(range(blocks))), list(range(blocks)), rows)
        assert pulled.error is None
        assert (reader.pool[rows] == holder.pool).all()

    def test_workers_pull_from_each_other(self, holder, reader) -> None:
        reader.fill(seed=1)
        there, back = holder.export("there", [1]), reader.export("back", [2])
        assert reader.pull(there, [0], [10]).error is None
        assert holder.pull(back, [0], [20]).error is None
        assert (reader.pool[10] == holder.pool[1]).all()
        assert (holder.pool[20] == reader.pool[2]).all()

    # Who may read, and how often

    def test_a_handoff_is_used_once(self, holder, reader) -> None:
        given = holder.export("h", [1])
        assert reader.pull(given, [0], [1]).error is None
        reader.pool[:] = 0
        assert reader.pull(given, [0], [1]).error
        assert not reader.pool.any()
        assert holder.pulled == ["h"]

    def test_of_two_readers_at_once_one_succeeds(self, holder, reader, workers) -> None:
        other = workers("other")
        for number in range(10):
            given = holder.export(f"h{number}", list(range(32)))
            outcomes = [
                worker.begin_pull(given, list(range(32)), list(range(32))) for worker in (reader, other)
            ]
            errors = [outcome.result().error for outcome in outcomes]
            assert errors.count(None) == 1
        assert sorted(holder.pulled) == sorted(f"h{number}" for number in range(10))

    @pytest.mark.parametrize(
        "wrong",
        [
            {"params": b"\0" * 16},
            {"params": b""},
            {"holder": Incarnation("holder", 2)},
            {"holder": Incarnation("other", 1)},
            {"handoff_id": "other"},
            {"transport": "pigeon"},
        ],
        ids=lambda wrong: next(iter(wrong)),
    )
    def test_what_does_not_match_is_refused_and_does_not_use_it_up(self, holder, reader, wrong) -> None:
        given = holder.export("h", [1])
        assert reader.pull(changed(given, **wrong), [0], [1]).error
        assert not reader.pool.any()
        assert holder.pulled == []
        assert reader.pull(given, [0], [1]).error is None

    @pytest.mark.parametrize("indices", [[2], [-1], [0, 1, 0]], ids=str)
    def test_blocks_outside_the_handoff_are_refused(self, holder, reader, indices: list[int]) -> None:
        given = holder.export("h", [1, 2])
        assert reader.pull(given, indices, list(range(len(indices)))).error
        assert not reader.pool.any()
        assert reader.pull(given, [1], [1]).error is None

    def test_another_block_size_is_refused(self, holder, workers) -> None:
        reader = workers("reader", BLOCKS, BLOCK_BYTES * 2)
        assert "bytes" in reader.pull(holder.export("h", [1]), [0], [1]).error
        assert not reader.pool.any()

    @pytest.mark.parametrize("address", ["", "nonsense", "localhost:1", "127.0.0.1:1", "[::1]:99999999"])
    def test_an_address_where_nobody_listens_is_an_error(self, holder, reader, address: str) -> None:
        given = changed(holder.export("h", [1]), address=address)
        assert reader.pull(given, [0], [1], timeout_s=2.0).error

    # Retracting

    def test_what_was_retracted_before_is_refused(self, holder, reader) -> None:
        given = holder.export("h", [1])
        assert holder.transfer.retract("h")
        assert reader.pull(given, [0], [1]).error
        assert not reader.pool.any()
        assert holder.transfer.retract("h")
        assert holder.pulled == []

    def test_retracting_afterwards_or_the_unknown_frees_at_once(self, holder, reader) -> None:
        given = holder.export("h", [1])
        assert reader.pull(given, [0], [1]).error is None
        assert holder.transfer.retract("h")
        assert holder.transfer.retract("never seen")

    def test_retracting_during_a_pull_frees_or_fails_but_never_both(self, holder, reader) -> None:
        """Blocks are overwritten as soon as `retract` allows it: a good pull must not show that."""
        for number in range(60):
            holder.fill(number)
            before = holder.pool.copy()
            given = holder.export("h", list(range(BLOCKS)))
            outcome = reader.begin_pull(given, list(range(BLOCKS)), list(range(BLOCKS)))
            time.sleep(number * 20e-6)
            wait_until(lambda: holder.transfer.retract("h"))
            holder.pool[:] = 0
            if outcome.result().error is None:
                np.testing.assert_array_equal(reader.pool, before)
                assert holder.pulled == ["h"]
            else:
                assert holder.pulled == []
            holder.pulled.clear()

    # Callbacks and limits

    def test_callbacks_come_from_a_thread_of_its_own(self, holder, reader) -> None:
        outcome = reader.begin_pull(holder.export("h", [1]), [0], [1])
        assert outcome.result().error is None
        assert outcome.thread.startswith("kv-")

    def test_a_callback_that_raises_harms_nobody(self, holder, reader, caplog) -> None:
        called = threading.Event()

        def raises(_: object) -> None:
            called.set()
            raise RuntimeError("a defect of the caller")

        reader.transfer.pull(holder.export("h1", [1]), [0], [1], SOON_S, raises)
        assert called.wait(SOON_S)
        assert reader.pull(holder.export("h2", [1]), [0], [1]).error is None
        wait_until(lambda: "on_done failed" in caplog.text)  # written after the callback, on its thread

    def test_many_pulls_at_once(self, holder, workers) -> None:
        reader = workers("reader", max_pulls=4)
        given = [holder.export(f"h{number}", [number % BLOCKS]) for number in range(200)]
        outcomes = [reader.begin_pull(one, [0], [number % 50]) for number, one in enumerate(given)]
        assert [outcome.result().error for outcome in outcomes] == [None] * 200
        assert sorted(holder.pulled) == sorted(one.handoff_id for one in given)
        assert all(len(outcome.calls) == 1 for outcome in outcomes)

    def test_a_pull_too_many_fails_and_a_waiting_one_keeps_its_deadline(self, workers) -> None:
        reader = workers("reader", max_pulls=1, max_waiting_pulls=2)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            given = handoff(instance_id="holder", transport=self.transport, address=address)
            first = reader.begin_pull(given, [0], [0], timeout_s=4.0)
            with silent.accept()[0]:  # so it is under way
                waiting = [reader.begin_pull(given, [0], [0], timeout_s=0.3) for _ in range(2)]
                refused = reader.begin_pull(given, [0], [0], timeout_s=SOON_S)
                assert "wait already" in refused.result().error
                assert ["no puller" in outcome.result().error for outcome in waiting] == [True, True]
                assert first.calls == []
                assert "deadline" in first.result().error

    def test_a_callers_mistakes_are_raised(self, holder, reader) -> None:
        given = holder.export("h", [1])
        with pytest.raises(ValueError, match="one own block"):
            reader.transfer.pull(given, [0, 1], [0], SOON_S, Outcome())
        with pytest.raises(ValueError, match="one own block"):
            reader.transfer.pull(given, [0], [BLOCKS], SOON_S, Outcome())
        with pytest.raises(ValueError, match="exported already"):
            holder.transfer.export("h", [1])
        with pytest.raises(ValueError, match="outside the pool"):
            holder.transfer.export("g", [BLOCKS])

    def test_any_timeout_will_do(self, holder, reader) -> None:
        given = holder.export("h", [1])
        assert "deadline" in reader.pull(given, [0], [1], timeout_s=-1.0).error
        assert reader.pull(given, [0], [1], timeout_s=float("inf")).error is None

    # Faults

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
    @pytest.mark.parametrize("when", ["before", "midway"])
    def test_a_holder_that_dies_or_freezes(self, workers, number, when: str) -> None:
        reader = workers("reader", BLOCKS, 1 << 18)
        fault = f"{when}-{number.name}" if when == "midway" else "none"
        with holder_process(self.transport, fault, BLOCKS, 1 << 18) as process:
            if when == "before":
                process.signal(number)
            begun = time.monotonic()
            pulled = reader.pull(process.handoff, list(range(BLOCKS)), list(range(BLOCKS)), timeout_s=0.6)
            assert pulled.error
            assert (pulled.blocks, pulled.bytes) == (0, 0)
            assert time.monotonic() - begun < 0.6 + LITTLE_S
            reader.pool[:] = 99
            process.signal(signal.SIGCONT)
            time.sleep(0.3)
            assert (reader.pool == 99).all(), "written after on_done"
        with holder_process(self.transport, "none", BLOCKS, 1 << 18) as healthy:
            assert reader.pull(healthy.handoff, [3], [3]).error is None
            assert (reader.pool[3] == 3).all()

    def test_a_holder_that_restarts_at_the_same_port(self, make, workers, reader) -> None:
        port = free_port()
        first = workers("holder", port=port)
        assert reader.pull(first.export("h1", [1]), [0], [1]).error is None
        old = first.export("h2", [1])
        first.transfer.stop()
        assert reader.pull(old, [0], [1], timeout_s=2.0).error
        second = workers("holder", port=port)
        second.fill()
        assert reader.pull(second.export("h3", [1]), [0], [1]).error is None
        assert (reader.pool[1] == second.pool[1]).all()

    def test_stopping_ends_what_is_under_way(self, make, holder) -> None:
        reader = Worker(make("reader", max_pulls=1), "reader")
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            given = handoff(instance_id="holder", transport=self.transport, address=address)
            outcomes = [reader.begin_pull(given, [0], [0]) for _ in range(3)]
            with silent.accept()[0]:  # so the first is under way
                begun = time.monotonic()
                reader.transfer.stop()
                assert time.monotonic() - begun < LITTLE_S
                assert all(outcome.result().error for outcome in outcomes)
        with pytest.raises(RuntimeError, match="stopped"):
            reader.begin_pull(given, [0], [0])
        reader.transfer.stop()  # once more does no harm

    def test_no_thread_is_left_behind(self, make) -> None:
        before = set(threading.enumerate())
        holder, reader = Worker(make("holder"), "holder"), Worker(make("reader"), "reader")
        assert reader.pull(holder.export("h", [1]), [0], [1]).error is None
        holder.transfer.stop()
        reader.transfer.stop()
        assert set(threading.enumerate()) == before
