from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock.launcher.state import (
    AlreadyRunning,
    StateFolder,
    find_state,
    own_command,
    running_states,
    state_root,
)


def test_everything_is_private_and_the_secret_new_each_time(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "s", "toy")
    with folder.locked():
        first = folder.secret.read_text()
        assert len(first) >= 32
        assert folder.secret.stat().st_mode & 0o777 == 0o600
        assert folder.path.stat().st_mode & 0o777 == 0o700
        assert folder.is_running()
    assert not folder.is_running()
    with folder.locked():
        assert folder.secret.read_text() != first


def test_the_lock_holds_only_one(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path, "toy")
    with (
        folder.locked(),
        pytest.raises(ConfigError, match=r"^toy is already running \(pid \d+\)"),
        folder.locked(),
    ):
        pass


@pytest.mark.parametrize("gone", ["", "lock", "secret"])
def test_what_is_deleted_of_a_held_folder_is_made_again(tmp_path: Path, gone: str) -> None:
    folder = StateFolder(tmp_path / "s", "toy")
    with folder.locked():
        assert not folder.restore()
        secret = folder.secret.read_text()
        shutil.rmtree(folder.path.parent) if not gone else (folder.path / gone).unlink()
        assert folder.restore()
        assert not folder.restore()
        assert folder.secret.read_text() == secret
        assert folder.secret.stat().st_mode & 0o777 == 0o600
        assert {folder.path.stat().st_mode & 0o777, folder.logs.stat().st_mode & 0o777} == {0o700}
        assert folder.is_running()
    assert not folder.is_running()


def test_a_deleted_folder_that_another_process_made_again_is_its_own(tmp_path: Path) -> None:
    ours, theirs = StateFolder(tmp_path, "toy"), StateFolder(tmp_path, "toy")
    with ours.locked():
        shutil.rmtree(ours.path)
        with theirs.locked():
            with pytest.raises(AlreadyRunning, match=r"^toy is already running \(pid \d+\)"):
                ours.restore()
            secret = theirs.secret.read_text()
            assert ours.secret.read_text() == secret


def test_without_locks_nothing_counts_as_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    folder = StateFolder(tmp_path, "toy")
    with folder.locked():
        pass
    monkeypatch.setattr("fcntl.flock", refuse)
    for look in (folder.is_running, lambda: folder.locked().__enter__()):
        with pytest.raises(ConfigError, match=r"^cannot lock .*/lock: No locks available$"):
            look()


def test_graphs_are_found(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^no graph is running \(looked in "):
        find_state(tmp_path)
    one, two = StateFolder(tmp_path, "one"), StateFolder(tmp_path, "two")
    with one.locked():
        assert find_state(tmp_path).graph == "one"
        with two.locked():
            with pytest.raises(ConfigError, match=r"name one with --graph: one, two$"):
                find_state(tmp_path)
            assert find_state(tmp_path, "two").graph == "two"
            assert [folder.graph for folder in running_states(tmp_path)] == ["one", "two"]
        with pytest.raises(ConfigError, match=r"^two: not running "):
            find_state(tmp_path, "two")
        assert find_state(tmp_path, "two", running=False).graph == "two"


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^cannot write to .*: (Not a directory|File exists)$"):
        StateFolder(tmp_path / "file", "toy").prepare()


def test_the_default_root_keeps_out_of_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert state_root({}) == Path(".penstock")
    assert state_root({"PENSTOCK_STATE_DIR": "/x"}) == Path("/x")
    StateFolder(state_root({}), "toy").prepare()
    assert (tmp_path / ".penstock" / ".gitignore").read_text() == "*\n"


def test_socket_paths_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    with pytest.raises(
        ConfigError, match="too long for a socket; set PENSTOCK_STATE_DIR to a shorter path"
    ):
        _ = StateFolder(deep, "toy").socket
    monkeypatch.chdir(deep)
    assert StateFolder(Path(".penstock"), "toy").socket == ".penstock/toy/control.sock"


def test_hints_name_a_program_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "venv" / "bin"
    programs.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", str(programs / "python"))
    monkeypatch.setenv("PATH", "")
    assert own_command() == "venv/bin/python -m penstock"  # as in an environment that only has vLLM
    script = programs / "penstock"
    script.touch(mode=0o755)
    assert own_command() == "venv/bin/penstock"
    other = tmp_path / "other" / "penstock"
    other.parent.mkdir()
    other.touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{other.parent}:{programs}")
    assert own_command() == "venv/bin/penstock"  # another one comes first
    monkeypatch.setenv("PATH", str(programs))
    assert own_command() == "penstock"
