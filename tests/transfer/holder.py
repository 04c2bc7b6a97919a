"""A holder in a process of its own, for tests that kill and freeze it.

    python holder.py {tcp,nixl} FAULT BLOCKS BLOCK_BYTES

Block b is filled with byte b % 256. Prints a handoff of all blocks as JSON, then waits for the end of its
input. FAULT is `none`, or `midway-SIGKILL` or `midway-SIGSTOP`: it sends itself that signal while it lends,
with half of the bytes sent (tcp) or the read just granted (nixl).
"""

from __future__ import annotations

import os
import signal
import sys

import msgspec
import numpy as np

from penstock.shapes import Handoff, Incarnation
from penstock.transfer.stream import Stream


def strike_midway(number: signal.Signals) -> None:
    """Have the signal sent when the rows are half sent, or the reader is waited for."""
    send_rows, receive = Stream.send_rows, Stream.receive

    def send_half(self: Stream, rows: list[memoryview], deadline: float) -> None:
        merged = rows[0][: sum(map(len, rows)) // 2]
        send_rows(self, [merged], deadline)
        os.kill(os.getpid(), number)

    def receive_done(self: Stream, kind: type, deadline: float) -> object:
        if kind.__name__ == "Done":
            os.kill(os.getpid(), number)
        return receive(self, kind, deadline)

    Stream.send_rows = send_half
    Stream.receive = receive_done


def main() -> None:
    transport, fault, blocks, block_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    if transport == "tcp":
        from penstock.transfer.tcp import TcpTransfer as Transfer
    else:
        from penstock.transfer.nixl import NixlTransfer as Transfer
    if fault != "none":
        strike_midway(signal.Signals[fault.removeprefix("midway-")])
    pool = np.empty((blocks, block_bytes), np.uint8)
    pool[:] = np.arange(blocks)[:, None] % 256
    transfer = Transfer(Incarnation("holder", 1))
    transfer.start(pool.data, lambda handoff_id: None)
    address, params = transfer.export("h", range(blocks))
    given = Handoff("h", Incarnation("holder", 1), 1, 1, 0, "", 60.0, transport, address, params)
    print(msgspec.json.encode(given).decode(), flush=True)
    sys.stdin.read()
    transfer.stop()


if __name__ == "__main__":
    main()
