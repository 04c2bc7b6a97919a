"""Write the plain manifests in this folder, from the Helm chart, so that both say the same.

    python deploy/kubernetes/generate.py            (it takes Helm: pip install helm-python-sdk)

A test fails when they are not up to date.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from helm_python.chart import Chart

HERE = Path(__file__).resolve().parent
CHART = HERE.parent / "helm" / "penstock"
NAMESPACE = "dynamo-cloud"
NOT_HERE: dict[str, Any] = {
    "crds": {"install": False},
    "networkPolicy": {"enabled": False},
    "monitoring": {"podMonitors": False, "rules": False},
}
# These name no namespace: `kubectl apply -n` does.
ANYWHERE = {"network-policies/policies.yaml"}
# Each file: what it is, the values of the chart, and the templates that it is made of.
FILES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "namespaced/operator.yaml": (
        "Penstock's operator for the graphs of one namespace.",
        NOT_HERE,
        ["service-account", "rbac", "deployment", "service"],
    ),
    "cluster-wide/operator.yaml": (
        "Penstock's operator for the graphs of all namespaces.",
        {**NOT_HERE, "clusterWide": True},
        ["service-account", "rbac", "deployment", "service"],
    ),
    "network-policies/policies.yaml": (
        "Who may connect to the pods of graphs, and to the operator.",
        {**NOT_HERE, "networkPolicy": {"enabled": True}},
        ["network-policies"],
    ),
    "monitoring/monitoring.yaml": (
        "For clusters with Prometheus' operator: what it collects, and alerts.",
        {**NOT_HERE, "clusterWide": True, "monitoring": {"podMonitors": True, "rules": True}},
        ["monitoring"],
    ),
}


def render(values: dict[str, Any], namespace: str = NAMESPACE) -> dict[str, str]:
    """What the chart makes of these values, by the name of the template."""
    with Chart.load(CHART) as chart:
        chart.validate_schema(values)
        rendered = chart.render(values, name="penstock", namespace=namespace)
    return {Path(path).name.removesuffix(".yaml"): text for path, text in rendered.items()}


def plain(text: str, left_out: tuple[str, ...]) -> Iterator[str]:
    """The documents of a rendered template, without empty lines and those with anything of `left_out`."""
    for document in text.split("\n---\n"):
        if yaml.safe_load(document) is None:
            continue
        lines = document.strip().removeprefix("---").splitlines()
        yield "\n".join(
            line for line in lines if line.strip() and not any(text in line for text in left_out)
        )


def content(name: str) -> str:
    about, values, templates = FILES[name]
    rendered = render(values)
    left_out = ("managed-by: Helm", *([f"namespace: {NAMESPACE}"] if name in ANYWHERE else []))
    documents = [document for template in templates for document in plain(rendered[template], left_out)]
    return (
        "\n---\n".join([f"# {about}\n# Made from the chart in deploy/helm by generate.py.", *documents])
        + "\n"
    )


def main() -> None:
    for name in FILES:
        path = HERE / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content(name), encoding="utf-8")


if __name__ == "__main__":
    main()
