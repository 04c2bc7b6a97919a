"""Manifests in, objects out. What is rendered lies in golden/: `PENSTOCK_GOLDEN=write` writes it anew, and
the difference is then read by a person."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import yaml

from penstock.operator import names
from penstock.operator.desired import desired
from penstock.operator.settings import (
    INGRESS,
    LEADER_WORKER_SET,
    PDB,
    ClusterFacts,
    Desired,
    RenderSettings,
)

HERE = Path(__file__).parent
MANIFESTS = HERE / "manifests"
SHIPPED = HERE.parents[1] / "deploy" / "multinode-vllm.yaml"

SETTINGS = RenderSettings(image="penstock:dev")
NEW_CLUSTER = ClusterFacts(
    frozenset({("policy/v1", PDB), ("policy/v1beta1", PDB), INGRESS, LEADER_WORKER_SET})
)
OLD_CLUSTER = ClusterFacts(frozenset({("policy/v1beta1", PDB)}))


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
