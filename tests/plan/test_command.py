"""The command, as it is typed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from penstock.cli import run
from penstock.graph import load_graph

SMALL = ["plan", "--load", "prompts", "--rate", "4", "--duration", "60", "--jobs", "1", "--policy", "kv"]
CPU_S = ["--cpu-s", "5"]
TRACE = '{"timestamp": %d, "input_length": 900, "output_length": 20, "hash_ids": [%d, %d]}\n'


def test_it_prints_the_best_graphs_and_writes_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--write", str(tmp_path / "graph.yaml"), "--json", str(tmp_path / "plan.json")]
    assert run([*SMALL, *CPU_S, "--gpus", "2", "--slo", "ttft=1s,itl=30ms", *files]) == 0
    shown = capsys.readouterr().out
    assert "1 aggregated" in shown
    assert "qwen3-32b/h200/tp2" in shown
    assert "Assumed: the step times of" in shown
    plans = msgspec.json.decode((tmp_path / "plan.json").read_bytes())
    assert plans[0]["candidate"]["kind"]["gpus"] in (1, 2)
    graph = load_graph(tmp_path / "graph.yaml")
    workers = sum(service.replicas * service.gpus for service in graph.services)
    assert workers == 2


def test_without_gpus_it_says_how_many_a_trace_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "some.jsonl"
    trace.write_text("".join(TRACE % (200 * it, it % 7, 1000 + it) for it in range(200)))
    arguments = [
        "plan",
        "--trace",
        str(trace),
        "--cost-model",
        "qwen3-8b",
        "--slo",
        "ttft=2s",
        "--jobs",
        "1",
    ]
    assert run([*arguments, *CPU_S, "--policy", "kv"]) == 0
    assert (
        "Planned for some.jsonl and ttft=2000ms,share=90%: 1 aggregated, 1 GPUs." in capsys.readouterr().out
    )


def test_what_the_budget_did_not_suffice_for_is_not_claimed(capsys: pytest.CaptureFixture[str]) -> None:
    """One second is used up by the first simulations."""
    assert run([*SMALL, "--cpu-s", "1", "--gpus", "8", "--slo", "ttft=1s,itl=60ms"]) == 0
    shown = capsys.readouterr().out
    assert "> 1" in shown
    assert "How much more it bears than 1 times the load is not known: the budget of CPU time" in shown
    assert "> 4" not in shown


def test_an_objective_out_of_reach_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*SMALL, *CPU_S, "--slo", "itl=1ms"]) == 1
    assert "no graph meets itl=1ms,share=90%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--slo", "tpot=1s"], "slo: `tpot=1s` is not like"),
        (["--cost-model", "abacus"], "cost-model: `abacus` is none of"),
        (["--cost-model", "llama-3.1-70b/h200", "--gpus", "3"], "gpus: 3 are too few; a worker takes 4"),
        (["--trace", "x.jsonl"], "trace: it has its own arrival times"),
        (["--policy", "best", "--gpus", "2"], "unknown policy 'best'"),
        (["--users", "3"], "rate: give either --rate"),
    ],
)
def test_what_is_wrong_is_named_at_once(
    arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*SMALL, *arguments]) == 2
    assert error in capsys.readouterr().err
