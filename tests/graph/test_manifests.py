"""Manifests in the shapes that people have for Dynamo."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock.errors import ConfigError
from penstock.graph import Graph, Overrides, build_graph, parse_manifest
from penstock.graph.v1beta1 import API_VERSION as V1BETA1
from penstock.graph.versions import to_v1alpha1, to_v1beta1

FOLDER = Path(__file__).parent / "manifests"

EXPECTED: dict[str, tuple[list[tuple[str, str, int, int]], list[str]]] = {
    # services: name, label, replicas, GPUs of one; notes that are among those given
    "v1beta1-disagg": (
        [("Frontend", "frontend", 2, 0), ("Prefill", "prefill", 2, 4), ("decode", "decode", 1, 0)],
        [
            "Planner: planners are not run",
            "Prefill: --kv-transfer-config: ignored, no meaning here",
            "Prefill: --dyn-enable-structural-tag: ignored, response_format and tool_choice are held to a"
            " grammar as vLLM does it, request by request",
        ],
    ),
    "v1beta1-script": (
        [("Frontend", "frontend", 1, 0), ("Worker", "aggregated", 1, 4)],
        [
            "Frontend: --router-kv-events: ignored, no meaning here",
            "Worker: `test`, `visible=$(...)`, `if`, `for`: ignored, the script is not run by a shell here",
        ],
    ),
    "v1beta1-config-map": (
        [("Frontend", "frontend", 1, 0), ("agg", "aggregated", 8, 1)],
        ["agg: --enable-multimodal: ignored, text is served, requests with images are refused"],
    ),
    "v1beta1-gateway": (
        [("Frontend", "frontend", 1, 0), ("Worker", "aggregated", 1, 0)],
        [
            "Picker: endpoint pickers are not run",
            "Worker: its frontend sidecar is not run, the graph's frontend is",
        ],
    ),
    "v1beta1-mocker": (
        [("Frontend", "frontend", 1, 0), ("decode", "decode", 1, 0), ("prefill", "prefill", 1, 0)],
        ["prefill: --num-workers: ignored, a replica is one worker; replicas sets how many there are"],
    ),
    "v1alpha1-multinode": (
        [
            ("Frontend", "frontend", 1, 0),
            ("PrefillWorker", "prefill", 1, 8),
            ("DecodeWorker", "decode", 1, 8),
        ],
        [],
    ),
}


def graph_of(text: str) -> Graph:
    return build_graph(parse_manifest(text, "it.yaml"), Overrides(), "it.yaml")


@pytest.mark.parametrize("name", EXPECTED)
def test_a_manifest_of_dynamos_becomes_a_graph(name: str) -> None:
    services, notes = EXPECTED[name]
    graph = graph_of((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    assert [(one.name, one.label, one.replicas, one.gpus) for one in graph.services] == services
    assert set(notes) <= set(graph.notes)


def test_values_come_from_a_config_map_and_scripts_from_arrays() -> None:
    agg = graph_of((FOLDER / "v1beta1-config-map.yaml").read_text()).services[1]
    assert agg.engine_args == ("--speculative-config", '{"method": "eagle3", "num_speculative_tokens": 3}')
    frontend, worker = graph_of((FOLDER / "v1beta1-script.yaml").read_text()).services
    assert frontend.flags == {"router-mode": "kv", "http-port": "8000"}
    assert worker.flags["served-model-name"] == "big"
    assert worker.engine_args == ("--compilation_config.custom_ops+=+quant_fp8,+rms_norm",)
    assert "DEVICES" not in worker.env


def _documents(name: str) -> list[Any]:
    documents = list(yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")))
    return [one for document in documents for one in document.get("items", [document])]


@pytest.mark.parametrize("name", EXPECTED)
def test_both_versions_of_a_manifest_are_the_same_graph(name: str) -> None:
    *others, found = _documents(name)
    is_beta = found["apiVersion"] == V1BETA1
    there, back = (to_v1alpha1, to_v1beta1) if is_beta else (to_v1beta1, to_v1alpha1)
    other = there(found)
    assert back(other) == found
    graphs = [graph_of(yaml.safe_dump_all([*others, one])) for one in (found, other)]
    in_order = [sorted(graph.services, key=lambda service: service.name) for graph in graphs]
    assert in_order[0] == in_order[1]


def broken(**changes: Any) -> str:
    component: dict[str, Any] = {"name": "W", "type": "worker", **changes}
    frontend = {"name": "F", "type": "frontend"}
    spec = {"components": [frontend, component]}
    return yaml.safe_dump(
        {"apiVersion": V1BETA1, "kind": "DynamoGraphDeployment", "metadata": {"name": "g"}, "spec": spec}
    )


def main(**fields: Any) -> dict[str, Any]:
    return {"podTemplate": {"spec": {"containers": [{"name": "main", "image": "i", **fields}]}}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (broken(typ="x"), "spec.components[1].typ: unknown field (did you mean type?)"),
        (broken(type="werker"), "spec.components[1].type: expected one of decode, epp, frontend, planner"),
        (broken(replicas=-1), "spec.components[1].replicas: expected an integer >= 0, got -1"),
        (broken(name="f"), 'spec.components[1].name: "f" is taken, if only in another case'),
        (
            broken(name="a_b"),
            'spec.components[1].name: expected a name of letters, digits and -, got "a_b"',
        ),
        (
            broken(multinode={"nodeCount": 1}),
            "spec.components[1].multinode.nodeCount: expected an integer >= 2",
        ),
        (
            broken(frontendSidecar="x"),
            'spec.components[1].frontendSidecar: no container is named "x"',
        ),
        (
            broken(**main(comand=["x"])),
            "spec.components[1].podTemplate.spec.containers[0].comand: unknown field (did you mean command",
        ),
        (broken(**main(command=["x"])), "spec.components[W]: cannot run 'x'"),
        (
            broken(**main(command=["penstock", "frontend"])),
            "spec.components[W]: type is worker, but its command runs a frontend",
        ),
        (
            broken(
                **main(
                    command=["penstock", "worker", "--model", "m"],
                    resources={"limits": {"nvidia.com/gpu": "1.5"}},
                )
            ),
            "spec.components[W]: podTemplate.spec.containers[main].resources.limits[nvidia.com/gpu]:"
            " expected a whole number, got '1.5'",
        ),
    ],
)
def test_a_mistake_is_told_in_the_words_of_its_version(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        graph_of(text)
    assert any(line.startswith(f"it.yaml: {message}") for line in str(caught.value).splitlines()), (
        caught.value
    )
