from __future__ import annotations

import io
import shutil
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ConfigError
from penstock.launcher import output
from penstock.launcher.output import Console, LineSplitter, LogFile, prefixed
from penstock.launcher.state import StateFolder
from penstock.launcher.tail import last_lines, select_logs


def test_a_log_file_keeps_one_older_one(tmp_path: Path) -> None:
    path = tmp_path / "a" / "x.log"
    log = LogFile(path, bytes_max=10)
    for number in range(6):
        log.write(b"line %d\n" % number)
    log.close()
    assert path.read_bytes() == b"line 4\nline 5\n"
    assert path.with_name("x.log.1").read_bytes() == b"line 2\nline 3\n"
    log = LogFile(path, bytes_max=100)
    log.write(b"line 6\n")
    log.close()
    assert path.read_bytes().endswith(b"line 5\nline 6\n")


def test_a_log_that_cannot_be_written_says_why_and_recovers(tmp_path: Path) -> None:
    blocker = tmp_path / "a"
    blocker.write_text("")
    log = LogFile(blocker / "x.log", bytes_max=10)
    log.write(b"lost\n")
    assert "Not a directory" in log.error or "File exists" in log.error
    blocker.unlink()
    log.write(b"kept\n")
    assert log.error == ""
    log.close()
    assert (blocker / "x.log").read_bytes() == b"kept\n"


@given(st.lists(st.binary(max_size=50)))
def test_lines_do_not_depend_on_chunks(chunks: list[bytes]) -> None:
    splitter = LineSplitter()
    lines = [line for chunk in chunks for line in splitter.feed(chunk)] + splitter.flush()
    whole = b"".join(chunks).split(b"\n")
    assert lines == (whole if whole[-1] else whole[:-1])


def test_an_endless_line_is_shown_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_LINE_BYTES_MAX", 4)
    splitter = LineSplitter()
    assert splitter.feed(b"abcdefghi") == [b"abcd", b"efgh"]
    assert splitter.flush() == [b"i"]


def test_the_console_prefixes_and_colours() -> None:
    out = io.StringIO()
    console = Console(out, colour=True, width=6)
    console.write("a-0", "one")
    console.write("b-0", "two")
    console.close()
    assert out.getvalue() == "\x1b[36ma-0    |\x1b[0m one\n\x1b[33mb-0    |\x1b[0m two\n"
    assert prefixed("a", "x", 3) == "a   | x"


class Stopped(io.StringIO):
    """A terminal that takes nothing until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.blocked, self.go_on = threading.Event(), threading.Event()

    def write(self, text: str) -> int:
        self.blocked.set()
        self.go_on.wait(10)
        return super().write(text)


def test_a_stopped_terminal_holds_up_nobody_and_is_told_what_it_missed(monkeypatch) -> None:
    monkeypatch.setattr(output, "_PENDING_LINES_MAX", 3)
    out = Stopped()
    console = Console(out, colour=False, width=1)
    console.write("a", "0")
    assert out.blocked.wait(10)
    for number in range(1, 10):
        console.write("a", str(number))
    out.go_on.set()
    console.close()
    assert out.getvalue() == "a | 0\na | 1\na | 2\na | 3\npenstock | 6 lines not shown here\n"


def test_a_terminal_that_is_gone_is_forgotten() -> None:
    out = io.StringIO()
    out.close()
    console = Console(out, colour=False)
    console.write("a", "lost")
    console.close()


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    folder = StateFolder(tmp_path, "toy")
    for service, name in (("Prefill", "prefill-0"), ("Prefill", "prefill-1"), ("Decode", "decode-0")):
        path = folder.logs / service / f"{name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{name} {number}\n" for number in range(10)))
    (folder.logs / "supervisor.log").write_text("")
    return folder


def test_logs_are_chosen_by_service_role_or_instance(folder: StateFolder) -> None:
    assert list(select_logs(folder, [])) == ["decode-0", "prefill-0", "prefill-1"]
    assert list(select_logs(folder, ["PREFILL"])) == ["prefill-0", "prefill-1"]
    assert list(select_logs(folder, ["prefill"])) == ["prefill-0", "prefill-1"]
    assert list(select_logs(folder, ["toy-prefill-1", "decode"])) == ["prefill-1", "decode-0"]
    with pytest.raises(ConfigError, match=r"^prefil: no such service, .* \(did you mean Prefill\?\)"):
        select_logs(folder, ["prefil"])


def test_the_last_lines_may_reach_into_the_older_file(folder: StateFolder) -> None:
    path = folder.logs / "Decode" / "decode-0.log"
    assert last_lines(path, 2) == ["decode-0 8", "decode-0 9"]
    assert last_lines(path, 0) == []
    path.with_name("decode-0.log.1").write_text("older 0\nolder 1\n")
    assert last_lines(path, 11)[:2] == ["older 1", "decode-0 0"]
    assert len(last_lines(path, 100)) == 12


@given(lines=st.lists(st.integers(0, 300), max_size=400), count=st.integers(1, 50))
def test_last_lines_of_large_files(tmp_path_factory, lines: list[int], count: int) -> None:
    path = tmp_path_factory.mktemp("logs") / "x.log"
    texts = [f"{number}:" + "x" * length for number, length in enumerate(lines)]
    path.write_text("".join(f"{text}\n" for text in texts))
    assert last_lines(path, count) == texts[-count:]


def test_a_deleted_log_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "a.log"
    log = LogFile(path, 1000)
    log.write(b"before\n")
    shutil.rmtree(tmp_path / "logs")
    log.write(b"after\n")
    log.close()
    assert (path.read_bytes(), log.error) == (b"after\n", "")
