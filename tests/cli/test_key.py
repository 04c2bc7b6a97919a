"""`penstock key`."""

import io

import pytest

from penstock.cli import run
from penstock.frontend.http.api_keys import ApiKeys


@pytest.fixture(name="line_of")
def _line_of(capsys):
    def run_and_read(*arguments):
        assert run(["key", *arguments]) == 0
        return capsys.readouterr()

    return run_and_read


def test_makes_a_key_and_its_line(line_of, tmp_path):
    out, errors = line_of("team-a")
    key = errors.split()[-1]
    assert errors == f"key of team-a, shown this once: {key}\n"
    path = tmp_path / "keys"
    path.write_text(out)
    assert key not in out
    assert ApiKeys("", str(path)).check(f"Bearer {key}".encode()) == "team-a"
    assert line_of("team-a").err != errors


def test_hashes_a_key_from_elsewhere(line_of, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a-key-made-elsewhere-1\n"))
    out, errors = line_of("b", "--hash")
    assert errors == ""
    path = tmp_path / "keys"
    path.write_text(out)
    assert ApiKeys("", str(path)).check(b"Bearer a-key-made-elsewhere-1") == "b"


@pytest.mark.parametrize(
    ("arguments", "given", "complaint"),
    [
        (["a b"], "", "penstock: name: expected up to 64 letters"),
        (["a", "--hash"], "", "penstock: key: expected at least 20 printable"),
        (["a", "--hash"], "secret\n", "penstock: key: expected at least 20 printable"),
        ([], "", "penstock: key: "),
    ],
)
def test_what_will_not_do(capsys, monkeypatch, arguments, given, complaint):
    monkeypatch.setattr("sys.stdin", io.StringIO(given))
    assert run(["key", *arguments]) == 2
    out, errors = capsys.readouterr()
    assert out == ""
    assert errors.startswith(complaint)
    assert errors.count("\n") == 1
    assert not given or given.strip() not in errors
