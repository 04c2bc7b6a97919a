"""What is simulated of a manifest, and what it cannot say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from penstock.cli import run
from penstock.errors import ConfigError
from penstock.simulate.manifest import described_graph

SIM = ["--engine", "sim", "--model", "x"]


def manifest(folder: Path, **services: tuple[int, list[str]]) -> Path:
    """A graph of services by name: replicas, and what follows `penstock`."""
    document: dict[str, Any] = {
        "apiVersion": "nvidia.com/v1alpha1",
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": "g"},
        "spec": {
            "services": {
                name: {
                    "componentType": arguments[0],
                    "replicas": replicas,
                    "extraPodSpec": {"mainContainer": {"command": ["penstock", *arguments]}},
                }
                for name, (replicas, arguments) in services.items()
            }
        },
    }
    file = folder / "graph.yaml"
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    return file


FRONTEND = (1, ["frontend", "--router-mode", "lmetric", "--disagg", "always", "--max-wait-ms", "5000"])


def test_workers_and_routing_are_those_of_the_manifest(tmp_path: Path) -> None:
    cost = ["--sim-cost-model", "qwen3-8b/h200/tp1", "--block-size", "32", "--max-batch-tokens", "4096"]
    file = manifest(
        tmp_path,
        Frontend=FRONTEND,
        Prefill=(3, ["worker", "--role", "prefill", *SIM, *cost]),
        Decode=(2, ["worker", "--role", "decode", *SIM, *cost]),
        Idle=(0, ["worker", "--role", "decode", "--engine", "vllm", "--model", "y"]),
    )
    found = described_graph(file, {})
    graph, router = found.graph, found.router
    assert (graph.aggregated, graph.prefill, graph.decode) == (0, 3, 2)
    assert (graph.cost_model, graph.block_size, graph.cache_tokens) == ("qwen3-8b/h200/tp1", 32, 16384 * 32)
    assert graph.scheduler.max_batch_tokens == 4096
    assert (router.policy, router.disagg, router.admission.max_wait_ms) == ("lmetric", "always", 5000)
    assert found.frontends == 1


def test_what_a_manifest_cannot_say_is_asked_for(tmp_path: Path) -> None:
    worker = ["worker", "--engine", "vllm", "--model", "Qwen/Qwen3-32B"]
    file = manifest(tmp_path, Frontend=FRONTEND, Worker=(2, worker))
    with pytest.raises(ConfigError) as caught:
        described_graph(file, {})
    costs, cache = str(caught.value).splitlines()
    assert "Worker: how long steps of Qwen3-32B take with the vllm engine is not known" in costs
    assert "--cost-model, one of " in costs
    assert "Worker: how many tokens its KV cache holds is not known; give --cache-tokens" in cache
    found = described_graph(file, {"cost_model": "qwen3-32b/h100/tp2", "cache_tokens": 300_000})
    assert (found.graph.aggregated, found.graph.cache_tokens, found.graph.block_size) == (2, 300_000, 16)


def test_workers_that_differ_are_named(tmp_path: Path) -> None:
    file = manifest(
        tmp_path,
        Frontend=FRONTEND,
        Small=(1, ["worker", *SIM]),
        Large=(1, ["worker", *SIM, "--block-size", "64"]),
    )
    with pytest.raises(ConfigError, match=r"Small has block_size 16 and Large has 64, .*give --block-size"):
        described_graph(file, {})


@pytest.mark.parametrize(
    ("services", "said"),
    [
        ({"Frontend": FRONTEND, "Worker": (0, ["worker", *SIM])}, "has no workers with replicas"),
        (
            {"Frontend": FRONTEND, "Worker": (1, ["worker", *SIM, "--sim-speedup", "2"])},
            "Worker: --sim-speedup is not simulated",
        ),
    ],
)
def test_what_cannot_be_simulated_is_refused(tmp_path: Path, services: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        described_graph(manifest(tmp_path, **services), {})


@pytest.mark.parametrize(
    ("flags", "policy"),
    [([], "lmetric"), (["--policy", "kv", "--workers", "1", "--cache-tokens", "30000"], "kv")],
)
def test_a_manifest_is_simulated_and_flags_count_instead_of_it(
    tmp_path: Path, flags: list[str], policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file, reports = (
        manifest(tmp_path, Frontend=(2, FRONTEND[1]), Worker=(2, ["worker", *SIM])),
        tmp_path / "r",
    )
    load = ["--users", "3", "--duration", "20", "--json", str(reports)]
    assert run(["simulate", "--graph", str(file), *load, *flags]) == 0
    assert [it["policy"] for it in msgspec.json.decode(reports.read_bytes())] == [policy]
    assert "has 2 frontends; one is simulated" in capsys.readouterr().err
