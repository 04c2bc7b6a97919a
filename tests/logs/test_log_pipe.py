"""A log's reader may be slow, stand still or be gone: whoever logs never waits for it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator

import pytest

from penstock.logs.log_pipe import MAX_KEPT_BYTES, LogPipe, unblocked
from tests.waiting import wait_until

LINE = "x" * 200


@pytest.fixture
def pipe() -> Iterator[tuple[int, LogPipe]]:
    """The reading end, and a log into the other."""
    reader, writer = os.pipe()
    log = LogPipe(writer)
    yield reader, log
    log.close()
    for descriptor in (reader, writer):
        with contextlib.suppress(OSError):  # a test has closed it
            os.close(descriptor)


def write(log: LogPipe, numbers: range) -> None:
    for number in numbers:
        log.write(f"number={number} {LINE}\n")


def read_until(descriptor: int, last: str, timeout_s: float = 60.0) -> str:
    """What can be read up to the line that ends like this."""
    text = ""
    deadline = time.monotonic() + timeout_s
    while not text.endswith(f"{last}\n"):
        assert time.monotonic() < deadline, text[-1000:]
        text += os.read(descriptor, 64 * 1024).decode()
    return text


def read_while_kept(descriptor: int, log: LogPipe) -> str:
    """What can be read until the log keeps nothing more."""
    text = ""
    while log._kept:
        if select.select([descriptor], [], [], 0.01)[0]:
            text += os.read(descriptor, 4096).decode()
    return text


def check(text: str, written: int) -> tuple[int, int]:
    """That these are `written` numbered lines in order, where any that are missing are counted where they
    are missed. Returns how many were lost, and in how many places."""
    expected = losses = lost = 0
    for line in text.splitlines():
        if gap := re.fullmatch(r"lines_lost=(\d+): nobody read them", line):
            expected += int(gap[1])
            lost += int(gap[1])
            losses += 1
        elif number := re.match(r"number=(\d+) ", line):
            assert int(number[1]) == expected
            expected += 1
    assert expected == written
    return lost, losses


def test_what_a_reader_that_stands_still_has_no_room_for_is_kept_up_to_a_limit(pipe) -> None:
    reader, log = pipe
    write(log, range(10_000))
    assert log._kept_bytes <= MAX_KEPT_BYTES
    assert log._writing_pid
    text = read_until(reader, "nobody read them")
    lost, losses = check(text, 10_000)
    assert losses == 1
    assert len(text) > MAX_KEPT_BYTES + fcntl.fcntl(reader, fcntl.F_GETPIPE_SZ) / 2
    log.write("last\n")
    assert read_until(reader, "last") == "last\n"
    wait_until(lambda: not log._writing_pid, "the thread ends")
    assert lost > 5000


def test_a_slow_reader_gets_whole_stretches_in_order_with_what_is_missing_counted(pipe) -> None:
    reader, log = pipe
    text, written = "", 0
    while written < 20_000:
        write(log, range(written, written + 100))
        written += 100
        text += os.read(reader, 4096).decode()  # a fifth of it
    text += read_while_kept(reader, log)
    log.write("last\n")
    text += read_until(reader, "last")
    lost, losses = check(text, written)
    assert losses <= 2 + lost / 100, "a word about each line that was lost, or nearly"


def test_a_line_longer_than_the_pipe_takes_as_a_whole_arrives_as_one(pipe) -> None:
    reader, log = pipe
    text = "".join(f"{number:09d}," for number in range(30_000)) + "end\n"
    log.write(text)
    assert read_until(reader, "end") == text


def test_others_may_fill_the_pipe_at_any_time(pipe) -> None:
    reader, log = pipe
    with open(f"/proc/self/fd/{log._descriptor}", "wb", buffering=0) as others:
        others.write(b"x" * fcntl.fcntl(reader, fcntl.F_GETPIPE_SZ))
        log.write("kept\n")
        log.write("last\n")
        assert os.read(reader, 1024 * 1024).strip(b"x") == b""
        assert read_until(reader, "last") == "kept\nlast\n"
    assert os.get_blocking(log._descriptor), "that would change it for all who share it"


def test_a_reader_that_is_gone_stops_nobody(pipe) -> None:
    reader, log = pipe
    write(log, range(1000))  # some of it is kept
    os.close(reader)
    write(log, range(10_000))
    wait_until(lambda: not log._kept, "it is kept for nobody")
    write(log, range(10))
    assert not log._kept


def terminal() -> tuple[int, int, Callable[[], None], Callable[[], None]]:
    """A terminal's two ends, and what Ctrl-S and Ctrl-Q do there."""
    reader, writer = pty.openpty()
    return (
        reader,
        writer,
        lambda: termios.tcflow(writer, termios.TCOOFF),
        lambda: termios.tcflow(writer, termios.TCOON),
    )


def test_a_terminal_that_is_held_stops_nobody() -> None:
    reader, writer, hold, release = terminal()
    with open(writer, "w") as stream:
        log = unblocked(stream)
        assert isinstance(log, LogPipe)
        hold()
        write(log, range(1000))
        release()
        text = read_while_kept(reader, log)
        log.write("last\n")
        text += read_until(reader, "last\r")  # what a terminal has been given may come later
        check(text, 1000)
        log.close()
    os.close(reader)


def test_a_socket_that_nobody_reads_stops_nobody() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, open(ours.fileno(), "w", closefd=False) as stream:
        log = unblocked(stream)
        assert isinstance(log, LogPipe)
        write(log, range(10_000))
        check(read_until(theirs.fileno(), "nobody read them"), 10_000)
        assert os.get_blocking(ours.fileno())
        log.close()


def test_where_a_write_may_wait_only_the_thread_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with another user's pipe, which cannot be opened anew."""
    reader, writer = os.pipe()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "denied")))
        log = LogPipe(writer)
    write(log, range(10_000))
    check(read_until(reader, "nobody read them"), 10_000)
    log.close()
    os.close(reader)
    os.close(writer)


def test_a_regular_file_is_written_as_it_is(tmp_path) -> None:
    with open(tmp_path / "log", "w") as stream:
        assert unblocked(stream) is stream


def test_a_process_that_ends_waits_a_moment_for_its_last_lines_to_be_read() -> None:
    script = f"""
import sys
from penstock.logs.log_pipe import unblocked
log = unblocked(sys.stderr)
for number in range(500):
    log.write(f"number={{number}} {LINE}\\n")
"""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    time.sleep(0.5)
    _, text = process.communicate(timeout=30)
    assert check(text, 500) == (0, 0)


def test_a_process_that_ends_does_not_wait_for_a_reader_that_stands_still() -> None:
    script = (
        "import sys; from penstock.logs.log_pipe import unblocked as u; u(sys.stderr).write('x' * 200_000)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
    assert process.wait(timeout=30) == 0
    process.stderr.close()
