"""The same load through Dynamo's frontend with its mocker workers, and through Penstock with sim workers.

    make bench-dynamo                                           everything, 40 minutes
    make bench-dynamo ARGS='cpu --only "stream 64"'             some scenarios of the frontends' CPU time
    make bench-dynamo ARGS='service --only chat --seeds 1'      what clients get, and what was simulated
    make bench-dynamo ARGS='show --plots docs/images'           the file's results, as tables and plots

Results are kept in a file; what is measured again replaces what is there.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import socket
import struct
from pathlib import Path

import msgspec

from benchmarks.dynamo.figures import draw, tables
from benchmarks.dynamo.frontend import CpuCost, measure_cpu
from benchmarks.dynamo.service import Runs, Served, measure_service

GET_FLAGS, SET_FLAGS, UP = 0x8913, 0x8914, 0x1  # netdevice(7)


class Results(msgspec.Struct):
    """All that was measured."""

    cpu: list[CpuCost] = []
    service: list[Served] = []

    def add_cpu(self, cost: CpuCost) -> None:
        """Replaces an earlier one of the same."""
        key = (cost.scenario, cost.system)
        self.cpu = [it for it in self.cpu if (it.scenario, it.system) != key] + [cost]

    def add_served(self, served: Served) -> None:
        """Replaces an earlier one of the same."""
        self.service = [it for it in self.service if it.key() != served.key()] + [served]


def loopback_up() -> None:
    """In a network of its own (`unshare --net`) even the loopback interface is down at first."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        name = b"lo".ljust(16, b"\0")
        answer = fcntl.ioctl(any_socket, GET_FLAGS, name + bytes(16))
        (flags,) = struct.unpack_from("H", answer, 16)
        if not flags & UP:
            fcntl.ioctl(any_socket, SET_FLAGS, name + struct.pack("H", flags | UP) + bytes(14))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("all", "cpu", "service", "show"), default="all")
    parser.add_argument("--only", default="", help="part of the names of the scenarios or loads")
    parser.add_argument("--rounds", type=int, default=5, help="of a scenario, of which the median counts")
    parser.add_argument("--seeds", type=int, default=2, help="with which each load is sent")
    parser.add_argument("--duration", type=float, default=40.0, help="of a load, in seconds")
    parser.add_argument(
        "--scales", type=float, nargs="*", default=(), help="of loads; all of each by default"
    )
    parser.add_argument(
        "--slowness", type=float, default=1.0, help="of workers, for a small or busy machine"
    )
    parser.add_argument("--file", type=Path, default=Path("build/dynamo.json"), help="of the results")
    parser.add_argument("--plots", type=Path, help="a folder to draw plots into")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in the frontend
    loopback_up()
    results = Results()
    options.file.parent.mkdir(exist_ok=True)
    if options.file.exists():
        results = msgspec.json.decode(options.file.read_bytes(), type=Results)
    if options.what in ("all", "cpu"):
        for cost in measure_cpu(options.only, options.rounds):
            print(f"{cost.scenario:24} {cost.system:9} {cost.median_us:9.1f} us a {cost.unit}", flush=True)
            results.add_cpu(cost)
            options.file.write_bytes(msgspec.json.encode(results))
    runs = Runs(options.seeds, options.duration, options.slowness, tuple(options.scales))
    if options.what in ("all", "service"):
        for served in measure_service(options.only, runs):
            print(served.line(), flush=True)
            results.add_served(served)
            options.file.write_bytes(msgspec.json.encode(results))
    print(tables(results.cpu, results.service))
    if options.plots is not None:
        draw(results.cpu, results.service, options.plots)


if __name__ == "__main__":
    main()
