"""The manifest that `penstock plan` writes, run with the sim engine, and `penstock calibrate` there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.engines.cost_models import MeasuredCosts
from penstock.plan.candidates import PlannedGraph
from penstock.plan.kinds import worker_kinds
from penstock.plan.manifest import manifest
from tests.e2e.conftest import running

(KIND,) = worker_kinds("qwen3-0.6b/h200/tp1")


def test_a_planned_graph_runs_with_the_sim_engine_and_is_measured(tmp_path: Path) -> None:
    file, costs_file = tmp_path / "graph.yaml", tmp_path / "costs.json"
    file.write_text(manifest(PlannedGraph(KIND, aggregated=1), 2_000, ["For a test."]))
    with running(file, tmp_path / "state", "--engine", "sim", instances=1) as graph:
        (worker,) = json.loads(graph.get("/health")[1])["instances"]
        cache_tokens = worker["cache_tokens"]
        assert cache_tokens == pytest.approx(KIND.cache_tokens, abs=16), "whole blocks"
        wrong = graph.command("calibrate", "--write", "x.json", "--url", graph.url, "--model", "other")
        assert (wrong.returncode, wrong.stderr) == (2, "penstock: model: `other` is not served there\n")
        arguments = ["--write", str(costs_file), "--url", graph.url, "--gpus", "2"]
        done = graph.command("calibrate", *arguments, timeout_s=240)
    assert done.returncode == 0, done.stderr
    assert f"Written to {costs_file}" in done.stdout
    measured = MeasuredCosts.read(costs_file)
    assert (measured.model, measured.gpus, measured.cache_tokens) == ("Qwen3-0.6B", 2, cache_tokens)
    # On a busy machine everything takes longer than the cost model says, and never less.
    costs = measured.costs
    prompt_ms = costs.c0 + costs.c1 * 8192 + costs.c2 * 8192 * 8192 / 2
    assert 0.9 * 27.8 < prompt_ms < 10 * 27.8
    decode_ms = costs.a0 + costs.a1 * 32 + costs.a2 * 32 * 4096
    assert 0.9 * 5.0 < decode_ms < 20 * 5.0
