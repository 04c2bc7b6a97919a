"""Listening sockets that a process inherits, and Unix sockets that it makes."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import msgspec
import pytest

from penstock.errors import ConfigError
from penstock.net.listening import (
    INHERITED_VARIABLE,
    InheritedDescriptors,
    UnixListener,
    inherited_listener,
    listen,
)


def test_no_variable_names_no_listener() -> None:
    assert inherited_listener({"PATH": "/bin"}) is None


def test_inherited_listener_reports_ready_and_is_inherited_no_further() -> None:
    with listen("127.0.0.1", 0) as listener:
        ours, theirs = socket.socketpair()
        descriptors = InheritedDescriptors(os.dup(listener.fileno()), theirs.detach(), 1.5)
        environ = {INHERITED_VARIABLE: msgspec.json.encode(descriptors).decode(), "PATH": "/bin"}
        inherited = inherited_listener(environ)
        assert environ == {"PATH": "/bin"}
        assert inherited is not None
        assert inherited.socket.getsockname() == listener.getsockname()
        assert inherited.patience_s == 1.5
        assert not os.get_inheritable(inherited.socket.fileno())
        inherited.report_ready()
        assert ours.recv(9) == b"1"
        ours.close()
        inherited.report_ready()  # the launcher is gone
        inherited.close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("7", "PENSTOCK_LISTENER: Expected `object`"),
        ('{"listener": 1, "channel": 2}', "PENSTOCK_LISTENER: .*patience_s"),
        ('{"listener": 9999, "channel": 2, "patience_s": 1}', "PENSTOCK_LISTENER: .*Bad file descriptor"),
    ],
)
def test_variable_that_names_no_sockets_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        inherited_listener({INHERITED_VARIABLE: text})


def test_socket_that_was_taken_over_is_left_to_its_new_process(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    old = UnixListener(str(path), 8, take_over=False)
    new = UnixListener(str(path), 8, take_over=True)
    old.close()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        new.socket.accept()[0].close()
    new.close()
    assert not path.exists()


def test_socket_file_that_somebody_has_removed_does_not_disturb_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    listener = UnixListener(str(path), 8, take_over=False)
    path.unlink()
    listener.close()
    assert not path.exists()
