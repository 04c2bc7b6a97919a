"""Alerts, dashboard and examples name metrics and labels that frontends and the operator really have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock.metrics import Metrics, QueueView
from penstock.operator.metrics import OperatorMetrics
from penstock.shapes import Load
from tests.deploy.manifests import DEPLOY, objects, of_kind, pod_labels

# Prometheus' own, or given to a target by scrape.yaml and the PodMonitors.
TARGET_LABELS = {"namespace", "graph", "pod", "le"}


def series() -> dict[str, set[str]]:
    """The labels of each metric of frontends and the operator, once they have seen everything."""
    metrics = Metrics()
    metrics.watch_discovery(lambda: "")
    metrics.count_store_failures()
    frontend, router, tokenizer = metrics.frontend, metrics.router, metrics.tokenizer
    model = frontend.of("m")
    frontend.requests.labels("chat_completions", "m", "200", "ok").inc()
    model.inter_token_latency.observe(0.01, 1)
    tokenizer.rejected("wait")
    router.rejected("wait")
    router.decided("kv", "remote")
    router.attempt_ended("decode", "stop")
    router.bounced("decode")
    router.state("w", "decode", "ready")
    router.load("w", Load())
    router.distrusted_from({"w": "events_off"})
    router.queues_from(lambda: [QueueView("m", 1, 2.0)])
    operator = OperatorMetrics()
    operator.graphs_from(lambda: ["failed"])
    operator.leads_from(lambda: True)
    families = text_string_to_metric_families((metrics.render() + operator.render()).decode())
    found: dict[str, set[str]] = {}
    for sample in (sample for family in families for sample in family.samples):
        found.setdefault(sample.name, set()).update(sample.labels)
    return found


def expressions() -> Iterator[tuple[str, str]]:
    """Where each PromQL expression of deploy/ stands, and what it says."""
    [alerts] = objects("monitoring/alerts.yaml")
    for rule in (rule for group in alerts["groups"] for rule in group["rules"]):
        yield rule["alert"], rule["expr"]
    board = json.loads((DEPLOY / "monitoring/dashboard.json").read_text(encoding="utf-8"))
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for path in sorted((DEPLOY / "examples").glob("*.yaml")):
        for item in objects(str(path.relative_to(DEPLOY))):
            for trigger in item["spec"].get("triggers", ()):
                yield path.name, trigger["metadata"]["query"]


EXPRESSIONS = list(expressions())


@pytest.mark.parametrize(("place", "expression"), EXPRESSIONS, ids=[place for place, _ in EXPRESSIONS])
def test_what_is_asked_for_exists(place: str, expression: str) -> None:
    known = series()
    used = re.findall(r"(penstock_\w+)(?:\{([^}]*)\})?", expression)
    assert used
    labels = TARGET_LABELS.union(*(known.get(name, set()) for name, _ in used))
    for name, matchers in used:
        assert name in known, f"{place}: nobody has {name}"
        asked = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
        assert asked <= known[name] | TARGET_LABELS, f"{place}: {name} has no label {asked - known[name]}"
    for grouping in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
        assert set(re.findall(r"\w+", grouping)) <= labels, f"{place}: by ({grouping})"


def test_every_alert_tells_what_it_means_and_what_to_do() -> None:
    [alerts] = objects("monitoring/alerts.yaml")
    for rule in (rule for group in alerts["groups"] for rule in group["rules"]):
        assert set(rule["annotations"]) == {"summary", "description"}, rule["alert"]
        if "graph" in rule["expr"].partition("by (")[2]:
            assert "{{ $labels.graph }}" in rule["annotations"]["summary"], rule["alert"]


def test_monitors_select_the_pods_of_frontends_and_name_their_ports() -> None:
    monitors = of_kind(objects("kubernetes/monitoring/monitoring.yaml"), "PodMonitor")
    selector = monitors["penstock-frontends"]["spec"]["selector"]["matchLabels"]
    assert selector.items() <= pod_labels("mine", "frontend").items()
    assert not selector.items() <= pod_labels("mine", "decode").items()
    [endpoint] = monitors["penstock-frontends"]["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"], endpoint["honorLabels"]) == ("http", "/metrics", True)


def test_monitors_select_the_pods_of_workers_and_name_their_ports() -> None:
    monitor = of_kind(objects("kubernetes/monitoring/monitoring.yaml"), "PodMonitor")["penstock-workers"]
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("system", "/metrics")
    selector = monitor["spec"]["selector"]
    [roles] = selector["matchExpressions"]
    selected = {
        role
        for role in ("prefill", "decode", "frontend")
        if selector["matchLabels"].items() <= pod_labels("mine", role).items()
        and pod_labels("mine", role)[roles["key"]] in roles["values"]
    }
    assert selected == {"prefill", "decode"}


def test_the_rules_for_prometheus_operator_are_the_plain_ones() -> None:
    rule = of_kind(objects("kubernetes/monitoring/monitoring.yaml"), "PrometheusRule")["penstock"]
    assert [rule["spec"]] == objects("monitoring/alerts.yaml")


def test_panels_have_a_place_of_their_own() -> None:
    board = json.loads((DEPLOY / "monitoring/dashboard.json").read_text(encoding="utf-8"))
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
