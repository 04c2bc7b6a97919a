from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.graph.crds import files, graph_crd, scaling_adapter_crd, with_conversion

FOLDER = Path(__file__).parents[2] / "deploy" / "crds"


def test_the_files_are_what_the_structs_say() -> None:
    written = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("nvidia.com_*.yaml")}
    assert written == files(), "run: python -m penstock.graph.crds deploy/crds"


def _schemas(schema: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, inner in schema.get("properties", {}).items():
        yield from _schemas(inner, f"{path}.{name}")
    for name in ("items", "additionalProperties"):
        if name in schema:
            yield from _schemas(schema[name], f"{path}.{name}")


@pytest.mark.parametrize("crd", [graph_crd(), scaling_adapter_crd()])
def test_schemas_are_structural(crd: dict[str, Any]) -> None:
    """The rules by which an API server takes a schema at all."""
    for version in crd["spec"]["versions"]:
        for path, schema in _schemas(version["schema"]["openAPIV3Schema"], version["name"]):
            is_open = schema.get("x-kubernetes-preserve-unknown-fields") is True
            assert "type" in schema or is_open or schema.get("x-kubernetes-int-or-string"), path
            assert not ("properties" in schema and "additionalProperties" in schema), path
            assert set(schema.get("required", ())) <= set(schema.get("properties", ())), path
            for key in schema.get("x-kubernetes-list-map-keys", ()):
                assert key in schema["items"]["required"], path


def _at(crd: dict[str, Any], version: int, path: str) -> Any:
    schema = crd["spec"]["versions"][version]["schema"]["openAPIV3Schema"]
    for name in path.split("."):
        schema = (
            schema["properties"][name] if name not in ("items", "additionalProperties") else schema[name]
        )
    return schema


def test_values_are_bounded_where_the_structs_bound_them() -> None:
    crd = graph_crd()
    service = "spec.services.additionalProperties"
    assert _at(crd, 0, f"{service}.replicas")["minimum"] == 0
    assert "prefill" in _at(crd, 0, f"{service}.componentType")["enum"]
    assert _at(crd, 0, f"{service}.extraPodSpec")["x-kubernetes-preserve-unknown-fields"]
    assert _at(crd, 0, "metadata.name")["maxLength"] == 45
    components = _at(crd, 1, "spec.components")
    assert (components["maxItems"], components["x-kubernetes-list-map-keys"]) == (25, ["name"])
    nodes = _at(crd, 1, "spec.components.items.multinode.nodeCount")
    assert (nodes["minimum"], nodes["default"]) == (2, 2)
    limits = _at(crd, 1, "spec.components.items.podTemplate.spec.containers.items.resources.limits")
    assert limits["additionalProperties"] == {"x-kubernetes-int-or-string": True}


def test_v1beta1_is_served_once_a_webhook_converts_it() -> None:
    crd = graph_crd()
    assert [version["served"] for version in crd["spec"]["versions"]] == [True, False]
    assert "conversion" not in crd["spec"]
    changed = with_conversion(crd, "penstock-system", "penstock-operator", "Q0E=")
    assert [version["served"] for version in changed["spec"]["versions"]] == [True, True]
    assert [version["storage"] for version in changed["spec"]["versions"]] == [True, False]
    assert changed["spec"]["conversion"]["webhook"]["clientConfig"] == {
        "service": {
            "namespace": "penstock-system",
            "name": "penstock-operator",
            "path": "/convert",
            "port": 443,
        },
        "caBundle": "Q0E=",
    }
    assert crd == graph_crd()
