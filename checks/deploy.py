"""deploy/ by the tools that are made for such files: Helm, shellcheck, and promtool. `make test-deploy`.

Helm is Helm 4 as a library (helm-python-sdk), the same code as the command, which no index has. promtool
is on PATH, or from Debian's package, which is unpacked and not installed: it would start a Prometheus.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_python import chart as helm
from helm_python.chart import Chart
from helm_python.errors import HelmError

from checks.kubernetes.cluster import packages, places
from tests.deploy.manifests import (
    CONNECTIONS,
    DEPLOY,
    PLAIN,
    allows,
    documents,
    objects,
    of_kind,
    pod_labels,
)

CHART = DEPLOY / "helm/penstock"
MONITOR_KINDS = {"PodMonitor", "PrometheusRule"}


def generator() -> Any:
    """deploy/kubernetes/generate.py, which is no module of a package."""
    spec = spec_from_file_location("generate", PLAIN / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rendered(values: dict[str, Any] | None = None, namespace: str = "ns") -> list[dict[str, Any]]:
    """What `helm template` would print, as objects."""
    with Chart.load(CHART) as chart:
        chart.validate_schema(values or {})
        texts = chart.render(values or {}, name="penstock", namespace=namespace)
    return [item for path, text in texts.items() if not path.endswith(".txt") for item in documents(text)]


def notes(values: dict[str, Any] | None = None) -> str:
    with Chart.load(CHART) as chart:
        texts = chart.render(values or {}, name="penstock", namespace="ns")
    [text] = [text for path, text in texts.items() if path.endswith("NOTES.txt")]
    return text


def test_helm_lint_finds_nothing() -> None:
    report = helm.lint(CHART, strict=True)
    assert report["errors"] == []
    assert [message["error"] for message in report["messages"]] == ["icon is recommended"]


def test_the_plain_manifests_are_what_the_chart_makes() -> None:
    generate = generator()
    for name in generate.FILES:
        assert (PLAIN / name).read_text(encoding="utf-8") == generate.content(name), (
            f"{name} is not up to date: python deploy/kubernetes/generate.py"
        )


def test_an_installation_without_values() -> None:
    found = rendered()
    assert sorted({item["kind"] for item in found}) == [
        "ClusterRole",
        "ClusterRoleBinding",
        "CustomResourceDefinition",
        "Deployment",
        "NetworkPolicy",
        "Role",
        "RoleBinding",
        "Service",
        "ServiceAccount",
    ]
    for item in found:
        assert item["metadata"].get("namespace", "ns") == "ns"
        assert item["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "Helm"
    assert "graphs of the namespace ns" in notes()
    assert "graphs of all namespaces" in notes({"clusterWide": True})


WRONG_VALUES = [
    ({"replica": 2}, "replica"),
    ({"replicas": "two"}, "replicas"),
    ({"image": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
    ({"monitoring": {"podMonitors": "maybe"}}, "podMonitors"),
    ({"monitoring": {"interval": "15"}}, "interval"),
    ({"networkPolicy": {"graphs": ["Not_A_Name"]}}, "graphs"),
    ({"huggingFace": {"existingSecret": "a b"}}, "existingSecret"),
    ({"extraArgs": [1]}, "extraArgs"),
]


@pytest.mark.parametrize(("values", "named"), WRONG_VALUES, ids=[named for _, named in WRONG_VALUES])
def test_a_wrong_value_is_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(HelmError, match=named):
        rendered(values)


@pytest.mark.parametrize("wanted", [True, "true", False, "false", "auto"])
def test_monitors_are_there_when_wanted(wanted: object) -> None:
    """`auto` asks the cluster, and here is none."""
    found = rendered({"monitoring": {"podMonitors": wanted, "rules": wanted}})
    kinds = MONITOR_KINDS & {item["kind"] for item in found}
    assert kinds == (MONITOR_KINDS if wanted in (True, "true") else set())


def test_labels_that_prometheus_selects_by_are_on_monitors_and_rules_alone() -> None:
    values = {"podMonitors": True, "rules": True, "podMonitorLabels": {"release": "prometheus"}}
    found = rendered({"monitoring": values})
    labelled = [item["kind"] for item in found if item["metadata"]["labels"].get("release") == "prometheus"]
    assert sorted(labelled) == ["PodMonitor", "PodMonitor", "PodMonitor", "PrometheusRule"]


def test_the_dashboard_of_the_chart_is_the_plain_one() -> None:
    dashboard = of_kind(rendered({"monitoring": {"dashboard": True}}), "ConfigMap")["penstock-dashboard"]
    plain = json.loads((DEPLOY / "monitoring/dashboard.json").read_text(encoding="utf-8"))
    assert json.loads(dashboard["data"]["penstock.json"]) == plain


@pytest.mark.parametrize("keep", [True, False])
def test_crds_stay_when_asked_to(keep: bool) -> None:
    crds = of_kind(rendered({"crds": {"keep": keep}}), "CustomResourceDefinition")
    plain = [objects(f"crds/{name}") for name in objects("crds/kustomization.yaml")[0]["resources"]]
    assert len(crds) == len(plain) == 2
    for [written] in plain:
        crd = crds[written["metadata"]["name"]]
        policy = crd["metadata"].get("annotations", {}).get("helm.sh/resource-policy")
        assert policy == ("keep" if keep else None)
        assert crd["spec"]["versions"] == written["spec"]["versions"]
        # The operator says where objects are converted. An upgrade must not take that back.
        assert "conversion" not in crd["spec"]
    assert of_kind(rendered({"crds": {"install": False}}), "CustomResourceDefinition") == {}


def test_without_the_webhook_there_is_nothing_of_it() -> None:
    found = rendered({"webhook": {"enabled": False}, "crds": {"install": False}})
    assert not {"ClusterRole", "ClusterRoleBinding"} & {item["kind"] for item in found}
    [container] = of_kind(found, "Deployment")["penstock-operator"]["spec"]["template"]["spec"][
        "containers"
    ]
    assert container["args"][-2:] == ["--webhook-port", "-1"]
    ports = of_kind(found, "Service")["penstock-operator"]["spec"]["ports"]
    assert [port["name"] for port in ports] == ["system"]


def test_the_token_comes_from_a_value_or_is_there_already_but_not_both() -> None:
    made = of_kind(rendered({"huggingFace": {"token": "hf_x"}}), "Secret")["hf-token-secret"]
    assert made["stringData"] == {"HF_TOKEN": "hf_x"}
    assert of_kind(rendered({"huggingFace": {"existingSecret": "mine"}}), "Secret") == {}
    assert "envFromSecret: mine" in notes({"huggingFace": {"existingSecret": "mine"}})
    with pytest.raises(HelmError, match="either token or existingSecret, not both"):
        rendered({"huggingFace": {"existingSecret": "mine", "token": "hf_x"}})


def test_extra_objects_may_use_templates() -> None:
    extra = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "extra", "namespace": "{{ .Release.Namespace }}"},
    }
    assert (
        of_kind(rendered({"extraObjects": [extra]}), "ConfigMap")["extra"]["metadata"]["namespace"] == "ns"
    )


@pytest.mark.parametrize(("source", "role", "port", "allowed"), CONNECTIONS)
def test_policies_for_single_graphs_allow_the_same_within_a_graph(
    source: dict[str, str] | None, role: str, port: int, allowed: bool
) -> None:
    found = rendered({"networkPolicy": {"graphs": ["mine", "other"]}})
    policies = list(of_kind(found, "NetworkPolicy").values())
    assert allows(policies, pod_labels("mine", role), port, source) is allowed


def test_policies_for_single_graphs_keep_graphs_apart() -> None:
    together = list(of_kind(rendered(), "NetworkPolicy").values())
    found = rendered({"networkPolicy": {"graphs": ["mine", "other"]}})
    apart = list(of_kind(found, "NetworkPolicy").values())
    to, source = pod_labels("mine", "decode"), pod_labels("other", "frontend")
    assert allows(together, to, 7000, source)
    assert not allows(apart, to, 7000, source)


def test_shellcheck_finds_nothing() -> None:
    scripts = ["deploy.sh", "test.sh", "cleanup.sh"]
    program = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run(
        [program, "--external-sources", *scripts], cwd=DEPLOY, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


# --- alerts, by Prometheus' own evaluation ----------------------------------------------------------------

# Each alert: series as promtool writes them (a+bxn: from a, n steps of b, one a minute), when it is asked,
# and whether it fires.
GRAPH = 'namespace="ns", graph="g"'
REJECTED = f'penstock_rejected_total{{{GRAPH}, reason="wait"}}'
REQUESTS = f'penstock_requests_total{{{GRAPH}, model="m", outcome="%s"}}'
WORKER = f'{{{GRAPH}, instance="w", role="decode", pod="%s"%s}}'
STORE_FAILURES = 'penstock_response_store_failures_total{namespace="n",graph="g"}'
CASES: list[tuple[str, dict[str, str], str, bool]] = [
    ("PenstockRequestsFail", {REQUESTS % "ok": "0+600x30", REQUESTS % "failed": "0+60x30"}, "20m", True),
    ("PenstockRequestsFail", {REQUESTS % "ok": "0+600x30", REQUESTS % "failed": "0+1x30"}, "20m", False),
    ("PenstockRequestsFail", {REQUESTS % "ok": "0+600x30"}, "20m", False),
    (
        "PenstockRequestsRejected",
        {REJECTED: "0+60x30"},
        "20m",
        True,
    ),
    (
        "PenstockRequestsRejected",
        {REJECTED: "0+1x30"},
        "20m",
        False,
    ),
    ("PenstockResponseStoreFails", {STORE_FAILURES: "0+6x30"}, "20m", True),
    ("PenstockResponseStoreFails", {STORE_FAILURES: "6x30"}, "20m", False),
    ("PenstockWorkerNotConnected", {"penstock_worker_connected" + WORKER % ("a", ""): "0x30"}, "20m", True),
    (  # One frontend of two is enough to be reached by.
        "PenstockWorkerNotConnected",
        {
            "penstock_worker_connected" + WORKER % ("a", ""): "0x30",
            "penstock_worker_connected" + WORKER % ("b", ""): "1x30",
        },
        "20m",
        False,
    ),
    (
        "PenstockWorkerStandsStill",
        {"penstock_instance_state" + WORKER % ("a", ', state="quarantined"'): "1x30"},
        "20m",
        True,
    ),
    ("PenstockRoleMissing", {f'penstock_tasks{{{GRAPH}, pod="a"}}': "5x30"}, "20m", True),
    (
        "PenstockRoleMissing",
        {
            f'penstock_tasks{{{GRAPH}, pod="a"}}': "5x30",
            "penstock_worker_connected" + WORKER % ("a", ""): "1x30",
        },
        "20m",
        False,
    ),
    ("PenstockDiscoveryDown", {f'penstock_discovery_up{{{GRAPH}, pod="a"}}': "0x30"}, "20m", True),
    ("PenstockDiscoveryDown", {f'penstock_discovery_up{{{GRAPH}, pod="a"}}': "1x30"}, "20m", False),
    (
        "PenstockFirstTokenSlow",
        {
            f'penstock_time_to_first_token_seconds_bucket{{{GRAPH}, model="m", le="5.0"}}': "0+0x30",
            f'penstock_time_to_first_token_seconds_bucket{{{GRAPH}, model="m", le="10.0"}}': "0+60x30",
            f'penstock_time_to_first_token_seconds_bucket{{{GRAPH}, model="m", le="+Inf"}}': "0+60x30",
        },
        "20m",
        True,
    ),
    (
        "PenstockTokensSlow",
        {
            f'penstock_inter_token_latency_seconds_bucket{{{GRAPH}, model="m", le="0.05"}}': "0+60x30",
            f'penstock_inter_token_latency_seconds_bucket{{{GRAPH}, model="m", le="+Inf"}}': "0+60x30",
        },
        "20m",
        False,
    ),
    (
        "PenstockIndexWrong",
        {
            f"penstock_predicted_cached_tokens_total{{{GRAPH}}}": "0+60000x120",
            f"penstock_actual_cached_tokens_total{{{GRAPH}}}": "0+600x120",
        },
        "90m",
        True,
    ),
    (
        "PenstockWorkerDistrusted",
        {"penstock_worker_distrusted" + WORKER % ("a", ', cause="events_off"'): "1x30"},
        "20m",
        True,
    ),
    (  # It is trusted again at times.
        "PenstockWorkerDistrusted",
        {"penstock_worker_distrusted" + WORKER % ("a", ', cause="events_lost"'): "1x9 stale _x4 1x12"},
        "28m",
        False,
    ),
    (  # It was started so.
        "PenstockWorkerDistrusted",
        {"penstock_worker_distrusted" + WORKER % ("a", ', cause="no_events"'): "1x30"},
        "20m",
        False,
    ),
    ("PenstockGraphFailed", {'penstock_operator_graphs{state="failed"}': "1x30"}, "20m", True),
    ("PenstockGraphFailed", {'penstock_operator_graphs{state="failed"}': "0x30"}, "20m", False),
    ("PenstockOperatorMissing", {'penstock_operator_leads{pod="a"}': "0x30"}, "20m", True),
    (
        "PenstockOperatorMissing",
        {'penstock_operator_leads{pod="a"}': "0x30", 'penstock_operator_leads{pod="b"}': "1x30"},
        "20m",
        False,
    ),
    (
        "PenstockAttemptsFail",
        {
            f'penstock_attempts_total{{{GRAPH}, role="decode", outcome="stop"}}': "0+60x40",
            f'penstock_attempts_total{{{GRAPH}, role="decode", outcome="lost"}}': "0+60x40",
        },
        "30m",
        True,
    ),
]


@pytest.fixture(scope="session")
def promtool() -> str:
    if found := shutil.which("promtool"):
        return found
    folder = places.CACHE / "prometheus"
    if not folder.exists():
        unfinished = folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        packages.refresh()
        packages.unpack(["prometheus"], unfinished)
        unfinished.rename(folder)
    return str(folder / "usr/bin/promtool")


@pytest.mark.parametrize(
    ("alert", "series", "at", "fires"), CASES, ids=[f"{alert}-{fires}" for alert, _, _, fires in CASES]
)
def test_alerts_fire_when_they_should(
    alert: str, series: dict[str, str], at: str, fires: bool, promtool: str, tmp_path: Path
) -> None:
    """promtool compares alerts with all their texts, so each is asked for by the series that it makes."""
    query = f'count(ALERTS{{alertname="{alert}", alertstate="firing"}}) or vector(0)'
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {"expr": query, "eval_time": at, "exp_samples": [{"labels": "{}", "value": int(fires)}]}
        ],
    }
    rules = str(DEPLOY / "monitoring/alerts.yaml")
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"rule_files": [rules], "tests": [test]}))
    done = subprocess.run(
        [promtool, "test", "rules", "test.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case() -> None:
    [alerts] = objects("monitoring/alerts.yaml")
    names = {rule["alert"] for group in alerts["groups"] for rule in group["rules"]}
    assert names == {alert for alert, _, _, _ in CASES}
