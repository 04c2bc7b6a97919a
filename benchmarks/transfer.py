"""What moving KV costs: bytes a second, CPU a byte, the latency of a small pull, and idling.

    python benchmarks/transfer.py [tcp nixl ...] [--repeats 20]

Two processes on this machine, a holder and a reader. Source blocks and destination rows are shuffled, so
that no two are neighbours. CPU is that of both processes. NIXL between processes on one host copies memory
to memory; `UCX_TLS=tcp` shows it without that.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import numpy as np

from penstock.ports import KvTransfer, Pulled
from penstock.shapes import Handoff, Incarnation
from penstock.transfer.nixl import NixlTransfer
from penstock.transfer.tcp import TcpTransfer

SHAPES = [  # blocks of a pull, bytes of a block
    (1024, 64 * 1024),
    (256, 256 * 1024),
    (4096, 16 * 1024),
    (64, 64 * 1024),
    (8, 32 * 1024),
    (1, 32 * 1024),
]
TIMEOUT_S = 30.0
IDLE_S = 3.0
WARM_UP = 3
GIB = 2**30


def make(transport: str, instance_id: str) -> KvTransfer:
    incarnation = Incarnation(instance_id, 1)
    return TcpTransfer(incarnation) if transport == "tcp" else NixlTransfer(incarnation)


def hold(transport: str, blocks: int, block_bytes: int, orders: Connection) -> None:
    """The holder's process: exports on demand, and says how much CPU it has used."""
    pool = np.ones((2 * blocks, block_bytes), np.uint8)
    transfer = make(transport, "holder")
    transfer.start(pool.data, lambda handoff_id: None)
    rng = random.Random(0)
    while (order := orders.recv()) != "stop":
        if order == "cpu":
            orders.send(time.process_time())
            continue
        address, params = transfer.export(order, rng.sample(range(2 * blocks), blocks))
        orders.send(Handoff(order, Incarnation("holder", 1), 1, 1, 0, "", 60.0, transport, address, params))
    transfer.stop()


@contextmanager
def holder(transport: str, blocks: int, block_bytes: int) -> Iterator[Connection]:
    spawning = multiprocessing.get_context("spawn")
    ours, theirs = spawning.Pipe()
    process = spawning.Process(target=hold, args=(transport, blocks, block_bytes, theirs))
    process.start()
    try:
        yield ours
        ours.send("stop")
    finally:
        process.join(TIMEOUT_S)
        process.kill()


def cpu_s(orders: Connection) -> float:
    """CPU seconds of both processes so far."""
    orders.send("cpu")
    return float(orders.recv()) + time.process_time()


def pull(transfer: KvTransfer, given: Handoff, rows: list[int]) -> float:
    """Seconds from the call of `pull` to its callback."""
    ended = threading.Event()
    results: list[Pulled] = []

    def on_done(pulled: Pulled) -> None:
        results.append(pulled)
        ended.set()

    start = time.perf_counter()
    transfer.pull(given, range(len(rows)), rows, TIMEOUT_S, on_done)
    ended.wait(TIMEOUT_S)
    took = time.perf_counter() - start
    assert results[0].error is None, results[0].error
    return took


def bench(transport: str, blocks: int, block_bytes: int, repeats: int) -> None:
    """Print one row: a shape's throughput, latency and CPU, and what both ends use while idle."""
    rng = random.Random(1)
    pool = np.ones((2 * blocks, block_bytes), np.uint8)
    size = blocks * block_bytes
    transfer = make(transport, "reader")
    transfer.start(pool.data, lambda handoff_id: None)
    with holder(transport, blocks, block_bytes) as orders:
        times = []
        spent = 0.0
        for number in range(repeats + WARM_UP):
            orders.send(f"h{number}")
            given = orders.recv()
            before = cpu_s(orders)
            took = pull(transfer, given, rng.sample(range(2 * blocks), blocks))
            if number >= WARM_UP:
                spent += cpu_s(orders) - before
                times.append(took)
        before = cpu_s(orders)
        time.sleep(IDLE_S)
        idle = (cpu_s(orders) - before) / IDLE_S
    transfer.stop()
    median_s = statistics.median(times)
    print(
        f"{transport:>5} {blocks:>5} x {block_bytes // 1024:>3} KiB {size / GIB / median_s:>8.2f}"
        f" {size / GIB / min(times):>8.2f} {median_s * 1e3:>9.3f} {spent / (repeats * size / GIB):>9.2f}"
        f" {spent / repeats * 1e3:>9.3f} {idle * 50:>7.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("transports", nargs="*", default=["tcp", "nixl"])
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    print("       blocks        median     best    median       CPU       CPU    idle")
    print("                      GiB/s    GiB/s        ms     s/GiB   ms/pull  % each")
    for transport in args.transports:
        for blocks, block_bytes in SHAPES:
            bench(transport, blocks, block_bytes, args.repeats)


if __name__ == "__main__":
    main()
