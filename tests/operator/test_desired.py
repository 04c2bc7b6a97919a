"""Manifests in, objects out. What is rendered lies in golden/: `PENSTOCK_GOLDEN=write` writes it anew, and
the difference is then read by a person."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import yaml

from penstock.kubernetes.api import Object
from penstock.kubernetes.kinds import DISRUPTION_BUDGETS, DISRUPTION_BUDGETS_BETA
from penstock.operator import names
from penstock.operator.rendering.desired import desired
from penstock.operator.settings import OPTIONAL_KINDS, ClusterFacts, Desired, RenderSettings

HERE = Path(__file__).parent
MANIFESTS = HERE / "manifests"
SHIPPED = HERE.parents[1] / "deploy" / "multinode-vllm.yaml"

SETTINGS = RenderSettings(image="penstock:dev")
NEW_CLUSTER = ClusterFacts(frozenset(OPTIONAL_KINDS))
OLD_CLUSTER = ClusterFacts(frozenset({DISRUPTION_BUDGETS_BETA}))


class Case(NamedTuple):
    manifest: Path
    cluster: ClusterFacts = NEW_CLUSTER
    annotations: dict[str, str] = {}


CASES = {
    "shipped": Case(SHIPPED),
    "upstream": Case(MANIFESTS / "upstream-multinode-vllm.yaml", OLD_CLUSTER),
    "upstream-on-cpus": Case(
        MANIFESTS / "upstream-multinode-vllm.yaml",
        OLD_CLUSTER,
        {names.ENGINE: "reference", names.MODEL: "/models/tiny"},
    ),
    "every-field": Case(MANIFESTS / "every-field.yaml"),
    "nodes": Case(MANIFESTS / "nodes.yaml"),
    "scaled": Case(
        MANIFESTS / "scaled.yaml", ClusterFacts(NEW_CLUSTER.served, adapter_replicas={"Decode": 5})
    ),
}


def read(path: Path, annotations: dict[str, str] | None = None) -> dict[str, Any]:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    if annotations:
        document["metadata"].setdefault("annotations", {}).update(annotations)
    return document


def rendered(name: str) -> Desired:
    case = CASES[name]
    return desired(read(case.manifest, case.annotations), SETTINGS, case.cluster)


class _Dumper(yaml.SafeDumper):
    """Without anchors: what is equal is written out."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def as_text(found: Desired) -> str:
    told = {"notes": found.notes, "services": found.services, "adapters": found.adapters}
    return yaml.dump_all(
        [*found.objects, msgspec.to_builtins(told)],
        Dumper=_Dumper,
        sort_keys=False,
        width=108,
        explicit_start=True,
    )


@pytest.mark.parametrize("name", CASES)
def test_what_is_rendered_is_as_it_was_read_last(name: str) -> None:
    golden = HERE / "golden" / f"{name}.yaml"
    text = as_text(rendered(name))
    if os.environ.get("PENSTOCK_GOLDEN") == "write":
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


# --- what must be true of every case ------------------------------------------------------------------

WORKLOADS = ("Deployment", "LeaderWorkerSet")


def templates(item: Object) -> list[Object]:
    """The pod templates of a workload."""
    if item["kind"] == "LeaderWorkerSet":
        group = item["spec"]["leaderWorkerTemplate"]
        return [group["leaderTemplate"], group["workerTemplate"]]
    return [item["spec"]["template"]] if item["kind"] == "Deployment" else []


def of_kind(found: Desired, kind: str) -> dict[str, Object]:
    return {item["metadata"]["name"]: item for item in found.objects if item["kind"] == kind}


@pytest.mark.parametrize("name", CASES)
def test_objects_are_found_by_their_labels_and_pods_by_one(name: str) -> None:
    found = rendered(name)
    graph = found.objects[0]["metadata"]["labels"][names.GRAPH_NAME]
    pods = [template for item in found.objects for template in templates(item)]
    for item in (*found.objects, *found.adapters):
        labels = item["metadata"]["labels"]
        assert labels == labels | names.common_labels(graph, labels["app.kubernetes.io/component"])
        assert "ownerReferences" not in item["metadata"]
        if item["kind"] == "Deployment":
            selector = item["spec"]["selector"]["matchLabels"]
            assert list(selector) == [names.SELECTOR]
            assert [
                pod for pod in pods if pod["metadata"]["labels"][names.SELECTOR] in selector.values()
            ] == [item["spec"]["template"]]
    keys = [(item["kind"], item["metadata"]["name"]) for item in found.objects]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("name", CASES)
def test_pods_run_penstock_itself_and_find_all_that_they_mount(name: str) -> None:
    for item in rendered(name).objects:
        for template in templates(item):
            spec = template["spec"]
            volumes = {volume["name"] for volume in spec["volumes"]}
            main = spec["containers"][0]
            assert main["command"][0] in ("penstock", "vllm")
            assert {mount["name"] for mount in main["volumeMounts"]} <= volumes
            assert len({mount["mountPath"] for mount in main["volumeMounts"]}) == len(main["volumeMounts"])
            assert len({variable["name"] for variable in main["env"]}) == len(main["env"])
            ports = {port["name"] for port in main.get("ports", ())}
            for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
                port = main.get(probe, {}).get("httpGet", {}).get("port", 0)
                assert isinstance(port, int) or port in ports
            assert spec["enableServiceLinks"] is False
            assert "\ue000" not in repr(item)


@pytest.mark.parametrize("name", CASES)
def test_nothing_that_was_given_is_changed_and_the_answer_is_always_the_same(name: str) -> None:
    case = CASES[name]
    document = read(case.manifest, case.annotations)
    before = repr(document)
    first = as_text(desired(document, SETTINGS, case.cluster))
    second = as_text(desired(document, SETTINGS, case.cluster))
    assert first == second
    assert repr(document) == before


@pytest.mark.parametrize("name", CASES)
def test_a_budget_never_blocks_the_only_replica(name: str) -> None:
    found = rendered(name)
    several = {service.object_name for service in found.services if service.replicas > 1}
    assert set(of_kind(found, DISRUPTION_BUDGETS.name)) == several


def test_the_documents_selectors_find_what_they_promise() -> None:
    """`-l app=GRAPH` all that serves, `-l app=GRAPH-ROLE` the relay of that role; a Deployment's selector
    neither."""
    labels = {
        name: item["spec"]["template"]["metadata"]["labels"]
        for name, item in of_kind(rendered("scaled"), "Deployment").items()
    }
    assert {name: found["app"] for name, found in labels.items()} == {
        "scaled-frontend": "scaled",
        "scaled-prefill": "scaled",
        "scaled-decode": "scaled",
        "scaled-log-relay-frontend": "scaled-frontend",
        "scaled-log-relay-prefill": "scaled-prefill",
        "scaled-log-relay-decode": "scaled-decode",
    }
    found_by_frontends = [name for name, found in labels.items() if names.DISCOVERED_BY in found]
    assert found_by_frontends == ["scaled-frontend", "scaled-prefill", "scaled-decode"]
