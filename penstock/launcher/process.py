"""Starts a child process in a process group of its own, and reads its output."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence

_READ_BYTES = 64 * 1024


class Child:
    """A running process. Read its output to the end: a process whose output nobody reads blocks."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        output: asyncio.StreamReader,
        transport: asyncio.ReadTransport,
    ) -> None:
        self._process = process
        self._output = output
        self._transport = transport
        self._buried = False  # it has ended, and the processes it left behind were killed

    @property
    def pid(self) -> int:
        return self._process.pid

    async def read(self) -> bytes:
        """The next piece of stdout and stderr, in the order of writing; empty at the end."""
        return await self._output.read(_READ_BYTES)

    async def wait(self) -> int:
        """The exit code; a negative signal number when a signal ended the process."""
        return await self._process.wait()

    def terminate(self) -> None:
        """Send SIGTERM to the process alone: it ends its own children in order."""
        if self._process.returncode is None:
            self._process.terminate()

    def kill(self) -> None:
        """Send SIGKILL to the process and to all that it started. After the process has ended, only the
        first call sends anything: the number of its group may be used again."""
        if self._buried:
            return
        self._buried = self._process.returncode is not None
        # The group may be gone, or its number may belong to another one.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Stop reading, even if another process still has the other end open."""
        self._transport.close()


async def start_child(
    argv: Sequence[str], env: Mapping[str, str], descriptors: Sequence[int] = ()
) -> Child:
    """Start a program that inherits `descriptors`. Raises OSError when it cannot be started."""
    read_end, write_end = os.pipe()
    reader = asyncio.StreamReader(limit=_READ_BYTES)
    # Before the program starts: nothing may fail between its start and the return of its `Child`.
    transport = await _connect(reader, read_end, write_end)
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            env=dict(env),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=write_end,
            stderr=write_end,
            pass_fds=descriptors,
            process_group=0,  # a terminal's Ctrl-C reaches the supervisor alone, which stops all in order
        )
    except BaseException:
        transport.close()
        raise
    finally:
        os.close(write_end)
    return Child(process, reader, transport)


async def _connect(reader: asyncio.StreamReader, read_end: int, write_end: int) -> asyncio.ReadTransport:
    output = os.fdopen(read_end, "rb", buffering=0)
    try:
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), output
        )
    except BaseException:
        output.close()
        os.close(write_end)
        raise
    return transport


def describe_exit(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
