"""Listening sockets that were lent: what a process takes, and what it refuses."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import pytest

from penstock.errors import ConfigError
from penstock.net.listening import LOAN_VARIABLE, Loan, borrow_listener, listen


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with listen("127.0.0.1", 0) as listening:
        yield listening


def lend(listener: socket.socket) -> tuple[dict[str, str], socket.socket]:
    """As the launcher does, with copies that are the borrower's."""
    ours, theirs = socket.socketpair()
    loan = Loan(os.dup(listener.fileno()), theirs.detach(), 1.5)
    return {LOAN_VARIABLE: msgspec.json.encode(loan).decode(), "PATH": "/bin"}, ours


def test_nothing_lent() -> None:
    assert borrow_listener({}, 7) is None
    assert borrow_listener({"LISTEN_FDS": "1", "LISTEN_PID": "8"}, 7) is None
    assert borrow_listener({"LISTEN_PID": "7"}, 7) is None


def test_a_lent_listener_and_its_channel(listener: socket.socket) -> None:
    environ, ours = lend(listener)
    lent = borrow_listener(environ, 7)
    assert environ == {"PATH": "/bin"}
    assert lent is not None
    assert lent.socket.getsockname() == listener.getsockname()
    assert lent.patience_s == 1.5
    assert not os.get_inheritable(lent.socket.fileno())
    lent.tell_ready()
    assert ours.recv(9) == b"1"
    assert not lent.has_successor()
    ours.shutdown(socket.SHUT_WR)
    assert lent.has_successor()
    ours.close()
    lent.tell_ready()  # nobody hears it
    lent.close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("7", "PENSTOCK_LISTENER: Expected `object`"),
        ('{"listener": 1, "channel": 2}', "PENSTOCK_LISTENER: .*patience_s"),
        ('{"listener": 9999, "channel": 2, "patience_s": 1}', "PENSTOCK_LISTENER: descriptor 9999: Bad"),
    ],
)
def test_a_loan_that_makes_no_sense(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        borrow_listener({LOAN_VARIABLE: text}, 7)


def test_what_is_no_listener() -> None:
    with socket.socket() as idle:
        environ, ours = lend(idle)
        with pytest.raises(ConfigError, match="is no listening TCP socket"):
            borrow_listener(environ, 7)
        ours.close()


def test_systemd_lends_one_socket_from_descriptor_3(listener: socket.socket) -> None:
    with pytest.raises(ConfigError, match=r"^LISTEN_FDS: expected one socket, got 2$"):
        borrow_listener({"LISTEN_FDS": "2", "LISTEN_PID": "7"}, 7)
    script = """if True:
        import os
        from penstock.net.listening import borrow_listener
        lent = borrow_listener(os.environ, 7)
        print(lent.socket.getsockname()[1], lent.has_successor(), "LISTEN_FDS" in os.environ)
    """
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "LISTEN_FDS": "1", "LISTEN_PID": "7"},
        pass_fds=(3,),
        preexec_fn=lambda: os.dup2(listener.fileno(), 3),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == f"{listener.getsockname()[1]} False False\n"
