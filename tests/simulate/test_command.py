"""The command, as it is typed."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import msgspec
import pytest

from penstock.cli import run

SMALL = [
    "simulate",
    "--load",
    "chat",
    "--users",
    "3",
    "--duration",
    "20",
    "--workers",
    "2",
    "--cache-tokens",
    "20000",
]


def test_it_compares_policies_and_writes_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--json", str(tmp_path / "r.json"), "--csv", str(tmp_path / "r.csv")]
    assert run([*SMALL, "--policy", "kv,round-robin", "--seeds", "2", *files]) == 0
    shown = capsys.readouterr().out
    assert "round-robin" in shown
    assert "±" in shown
    reports = msgspec.json.decode((tmp_path / "r.json").read_bytes())
    assert [(it["policy"], it["seed"]) for it in reports] == [
        ("kv", 0),
        ("kv", 1),
        ("round-robin", 0),
        ("round-robin", 1),
    ]
    with (tmp_path / "r.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["policy"] for row in rows] == ["kv", "kv", "round-robin", "round-robin"]
    assert float(rows[0]["ttft_p90_ms"]) == pytest.approx(reports[0]["ttft_ms"]["p90"])


def test_several_jobs_give_the_same_reports(tmp_path: Path) -> None:
    reports = []
    for jobs in ("1", "2"):
        path = tmp_path / f"{jobs}.json"
        assert run([*SMALL, "--seeds", "2", "--jobs", jobs, "--json", str(path)]) == 0
        reports.append([it | {"cpu_s": 0} for it in msgspec.json.decode(path.read_bytes())])
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--policy", "best"], "router-mode: unknown policy 'best'"),
        (["--policy", "kv,kv"], "policy: `kv,kv` names one twice"),
        (["--policy", ","], "policy: nothing is given"),
        (["--load", "rain"], "load: `rain` is none of prompts"),
        (["--rate", "5"], "rate: give either --rate"),
        (["--arrival", "never"], "arrival: `never` is none of poisson"),
        (["--scale", "2,x"], "scale: `2,x`"),
        (["--scale", "0"], "scale: `0` must be above 0"),
        (["--workers", "0"], "workers: no worker decodes"),
        (["--prefill", "2"], "workers: no worker decodes"),
        (["--disagg", "maybe"], "disagg: `maybe`"),
        (["--cost-model", "abacus"], "unknown cost model 'abacus'"),
        (["--plot", "x.txt"], "plot: `x.txt` ends in none of ."),
        (["--graph", "nothing.yaml"], "cannot read nothing.yaml"),
        (["--trace", "x.jsonl"], "trace: it has its own arrival times"),
        (["--load", "agents", "--prompt-tokens", "5"], "prompt-tokens: the load `agents` has lengths"),
    ],
)
def test_what_is_wrong_is_named(
    arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*SMALL, *arguments]) == 2
    assert error in capsys.readouterr().err


def test_a_plot_has_what_was_compared(tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    arguments = ["--policy", "kv,round-robin", "--scale", "1,2", "--seeds", "2", "--plot", str(plot)]
    assert run([*SMALL, *arguments]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_its_package_is_refused_before_anything_is_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    assert run([*SMALL, "--plot", str(tmp_path / "plot.png")]) == 2
    captured = capsys.readouterr()
    assert "plot: needs one more package: pip install 'penstock-llm[plot]'" in captured.err
    assert not captured.out
