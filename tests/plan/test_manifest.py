"""The manifest of a plan is one that `penstock up` takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.graph import Overrides, build_graph, parse_manifest
from penstock.options.config import WorkerOptions
from penstock.options.flags import build_options
from penstock.plan.candidates import PlannedGraph
from penstock.plan.kinds import worker_kinds
from penstock.plan.manifest import manifest
from penstock.shapes import Role
from penstock.simulate.manifest import described_graph

(KIND,) = worker_kinds("qwen3-32b/h200/tp2")
AGGREGATED = PlannedGraph(KIND, aggregated=3, policy="sticky", max_batch_tokens=2048)
DISAGGREGATED = PlannedGraph(KIND, prefill=2, decode=5)


@pytest.mark.parametrize("candidate", [AGGREGATED, DISAGGREGATED])
def test_the_manifest_has_the_planned_services(candidate: PlannedGraph) -> None:
    text = manifest(candidate, 10_000, ["For this: a, b."])
    assert text.startswith("# For this: a, b.\n#\n# On a laptop")
    graph = build_graph(parse_manifest(text, "planned.yaml"), Overrides())
    frontend, *workers = graph.services
    assert frontend.flags["router-mode"] == candidate.policy
    replicas = {service.role: service.replicas for service in workers}
    planned = {Role.AGGREGATED: candidate.aggregated, Role.PREFILL: candidate.prefill}
    planned[Role.DECODE] = candidate.decode
    assert replicas == {role: count for role, count in planned.items() if count}
    for service in workers:
        options = build_options(WorkerOptions, service.flags, {}, service.engine_args)
        assert (options.engine, options.model) == ("vllm", "Qwen/Qwen3-32B")
        assert options.max_batch_tokens == candidate.max_batch_tokens
        assert options.max_model_len is None
        assert service.engine_args == ("--tensor-parallel-size", "2")
        assert service.gpus == 2


def test_with_the_sim_engine_it_has_the_planned_timing_and_cache() -> None:
    parsed = parse_manifest(manifest(DISAGGREGATED, 10_000, []), "planned.yaml")
    for service in build_graph(parsed, Overrides(engine="sim")).services[1:]:
        options = build_options(WorkerOptions, service.flags, {}, service.engine_args)
        assert options.engine == "sim"
        assert options.sim_cost_model == "qwen3-32b/h200/tp2"
        assert options.sim_cache_tokens == KIND.cache_tokens


def test_it_is_simulated_as_it_was_planned(tmp_path: Path) -> None:
    path = tmp_path / "planned.yaml"
    path.write_text(manifest(DISAGGREGATED, 10_000, []))
    described, planned = described_graph(path, {}).graph, DISAGGREGATED.graph()
    for name in ("prefill", "decode", "cost_model", "cache_tokens", "scheduler"):
        assert getattr(described, name) == getattr(planned, name), name


def test_long_requests_get_a_longer_context() -> None:
    graph = build_graph(parse_manifest(manifest(AGGREGATED, 130_500, []), "planned.yaml"), Overrides())
    assert graph.services[1].flags["max-model-len"] == "131524"
