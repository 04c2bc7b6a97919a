from __future__ import annotations

import json

import pytest

from penstock.core.prefix_index import PrefixIndex
from simulator.__main__ import main
from simulator.faults import FAULTS
from simulator.report import SimulationReport, replay
from simulator.scenario import Options


def test_a_seed_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--seeds", "3..4", "--workers", "3", "--faults", "crash,freeze", "--jobs", "1"]
    assert main([*arguments, "--report", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["seeds"] == 2
    assert report["failures"] == []
    assert set(report["faults"]) <= {"crash", "freeze"}
    assert report["requests"] == report["ok"] + report["gone"] + sum(report["errors"].values())


def test_a_trace_and_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "3", "--workers", "3", "--trace"]) == 0
    out = capsys.readouterr().out
    assert " start w0 " in out
    assert "violations=0" in out


def test_a_violation_is_shown_with_what_replays_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PrefixIndex, "removed", lambda self, worker, hashes: None)
    assert main(["--seed", "0", "--faults", "eviction-storm", "--jobs", "1"]) == 1
    out, errors = capsys.readouterr()
    assert "violations=1" in out
    assert errors.startswith("seed 0 at ")
    assert "last events:" in errors
    assert "python -m simulator --seed 0 --faults eviction-storm --trace" in errors


def test_all_kinds_of_faults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--faults", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(FAULTS)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "give either --seed N or --seeds A..B"),
        (["--seed", "1", "--seeds", "1..2"], "give either"),
        (["--seeds", "5..1"], "argument --seeds: must be A..B"),
        (["--seed", "1", "--faults", "flood"], "unknown fault 'flood'"),
        (["--seed", "1", "--report", "xml"], "argument --report: invalid choice"),
        (["--seeds", "1..2", "--trace"], "--trace is for one seed"),
    ],
)
def test_what_cannot_be_asked(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert complaint in capsys.readouterr().err


def test_the_command_that_replays() -> None:
    options = Options(workers=5, faults=("crash", "wedge"))
    assert replay(7, options) == "python -m simulator --seed 7 --workers 5 --faults crash,wedge --trace"
    assert SimulationReport().failures == []
