from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from penstock.errors import ConfigError
from penstock.graph import Overrides, ServiceKind, build_graph, load_graph, parse_manifest
from penstock.shapes import Role

DEPLOY = Path(__file__).parents[2] / "deploy"

WORKER = """\
      dynamoNamespace: multinode-vllm
      envFromSecret: hf-token-secret
      componentType: worker
      replicas: 2
      resources:
        requests: {cpu: "8", memory: "16Gi", gpu: "1"}
        limits: {cpu: "8", memory: "16Gi", gpu: "1"}
      envs:
        - {name: DYN_LOG, value: debug}
        - {name: DYN_SYSTEM_ENABLED, value: "true"}
        - {name: DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS, value: '["generate"]'}
        - {name: DYN_SYSTEM_PORT, value: "9090"}
      livenessProbe: {httpGet: {path: /live, port: 9090}, periodSeconds: 5, failureThreshold: 3}
      readinessProbe: {httpGet: {path: /health, port: 9090}, periodSeconds: 10, failureThreshold: 60}
      extraPodSpec:
        mainContainer:
          startupProbe: {httpGet: {path: /health, port: 9090}, periodSeconds: 10, failureThreshold: 60}
          image: nvcr.io/nvidia/ai-dynamo/vllm-runtime:v0.4.0
          workingDir: /workspace/components/backends/vllm
          command: [/bin/sh, -c]
"""
# A manifest of Dynamo 0.4 with Secret and all, as its users have it.
UPSTREAM = f"""\
apiVersion: v1
kind: Secret
metadata: {{name: hf-token-secret}}
stringData: {{HF_TOKEN: hf_xxx}}
---
apiVersion: nvidia.com/v1alpha1
kind: DynamoGraphDeployment
metadata:
  name: multinode-vllm
spec:
  services:
    Frontend:
      dynamoNamespace: multinode-vllm
      componentType: main
      replicas: 1
      livenessProbe:
        httpGet: {{path: /health, port: 8000}}
        initialDelaySeconds: 60
      readinessProbe:
        exec:
          command: [/bin/sh, -c, 'curl -s http://localhost:8000/health | jq -e ".status == \\"healthy\\""']
      resources:
        requests: {{cpu: "2", memory: "4Gi"}}
        limits: {{cpu: "2", memory: "4Gi"}}
      envs: [{{name: DYN_LOG, value: debug}}]
      extraPodSpec:
        mainContainer:
          image: nvcr.io/nvidia/ai-dynamo/vllm-runtime:v0.4.0
          workingDir: /workspace/components/backends/vllm
          command: [/bin/sh, -c]
          args: ["python3 -m dynamo.frontend --http-port 8000 --router-mode kv"]
    PrefillWorker:
{WORKER}\
          args:
            - "python3 -m dynamo.vllm --model Qwen/Qwen3-0.6B --is-prefill-worker 2>&1 | tee prefill.log"
    DecodeWorker:
{WORKER}\
          args: ["python3 -m dynamo.vllm --model Qwen/Qwen3-0.6B 2>&1 | tee decode.log"]
---
"""

NO_OVERRIDES = Overrides()


def graph_of(text: str, overrides: Overrides = NO_OVERRIDES):
    return build_graph(parse_manifest(text, "local.yaml"), overrides, "local.yaml")


def small(services: str, extra: str = "") -> str:
    head = "apiVersion: nvidia.com/v1alpha1\nkind: DynamoGraphDeployment\nmetadata: {name: small}\n"
    indented = "\n".join(f"    {line}" for line in services.strip().splitlines())
    return f"{head}spec:\n{extra}  services:\n{indented}\n"


def service(name: str, command: str, extra: str = "") -> str:
    """YAML of one service; `extra` are further fields in flow style."""
    return f"{name}: {{{extra}extraPodSpec: {{mainContainer: {{command: {command}}}}}}}"


FRONTEND = service("Frontend", "[penstock, frontend]")
OWN_WORKER = service("Worker", "[penstock, worker, --model, tiny]")


def errors_of(text: str, overrides: Overrides = NO_OVERRIDES) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        graph_of(text, overrides)
    return str(caught.value).splitlines()


def test_the_upstream_manifest_runs_unchanged() -> None:
    graph = graph_of(UPSTREAM)
    assert (graph.name, graph.namespace, graph.notes) == ("multinode-vllm", "multinode-vllm", ())
    assert graph.roles == (Role.PREFILL, Role.DECODE)
    frontend, prefill, decode = graph.services
    assert frontend.argv() == ["frontend", "--http-port", "8000", "--router-mode", "kv"]
    assert (frontend.kind, frontend.role, frontend.replicas, frontend.gpus) == (
        ServiceKind.FRONTEND,
        None,
        1,
        0,
    )
    model = ["--engine", "vllm", "--model", "Qwen/Qwen3-0.6B"]
    assert prefill.argv() == ["worker", *model, "--role", "prefill"]
    assert decode.argv() == ["worker", *model, "--role", "decode"]
    assert (prefill.label, decode.label, frontend.label) == ("prefill", "decode", "frontend")
    assert (prefill.replicas, prefill.gpus, prefill.env["DYN_SYSTEM_PORT"]) == (2, 1, "9090")


def test_without_prefill_workers_the_others_are_aggregated() -> None:
    text = small(f"{FRONTEND}\n{service('W', '[python3, -m, dynamo.vllm, --model, m]')}")
    assert graph_of(text).services[1].role is Role.AGGREGATED


def test_engine_and_model_can_be_overridden() -> None:
    graph = graph_of(UPSTREAM, Overrides("reference", "models/tiny"))
    assert graph.services[1].argv() == [
        *("worker", "--engine", "reference", "--model", "models/tiny", "--role", "prefill")
    ]
    assert "--engine" not in graph.services[0].argv()


def test_vllm_arguments_are_passed_on_and_dropped_for_other_engines() -> None:
    words = "[python3, -m, dynamo.vllm, --model, m, --tensor-parallel-size, '2', --enforce-eager]"
    text = small(f"{FRONTEND}\n{service('W', words)}")
    assert graph_of(text).services[1].argv()[-4:] == [
        "--",
        "--tensor-parallel-size",
        "2",
        "--enforce-eager",
    ]
    graph = graph_of(text, Overrides(engine="reference"))
    assert "--" not in graph.services[1].argv()
    assert graph.notes == ("W: --tensor-parallel-size 2 --enforce-eager is for vLLM and is ignored",)


def test_every_wrong_field_gets_a_line() -> None:
    services = """
Frontend: {replcas: 1}
PrefillWorker:
  replicas: two
  componentType: wrker
  resources: {limits: {gpu: 1}}
  extraPodSpec: {mainContainer: {env: [{name: PORT, value: 9090}], arg: [a]}}
Nothing: 3
"""
    types = "decode, epp, frontend, main, planner, prefill, worker"
    assert sorted(errors_of(small(services))) == [
        "local.yaml: spec.services.Frontend.replcas: unknown field (did you mean replicas?)",
        "local.yaml: spec.services.Nothing: expected an object, got 3",
        f'local.yaml: spec.services.PrefillWorker.componentType: expected one of {types}, got "wrker"',
        "local.yaml: spec.services.PrefillWorker.extraPodSpec.mainContainer.arg: unknown field"
        " (did you mean args?)",
        "local.yaml: spec.services.PrefillWorker.extraPodSpec.mainContainer.env[0].value: expected a"
        " string, got 9090",
        'local.yaml: spec.services.PrefillWorker.replicas: expected an integer >= 0, got "two"',
        "local.yaml: spec.services.PrefillWorker.resources.limits.gpu: expected a string, got 1",
    ]


@pytest.mark.parametrize(
    ("services", "error"),
    [
        (
            f"{FRONTEND}\n{service('W', '[sleep, 1s]')}",
            "spec.services.W: cannot run 'sleep 1s': expected penstock",
        ),
        (f"{FRONTEND}\nW: {{}}", "spec.services.W: the command is missing"),
        (FRONTEND, "spec.services: there is no worker"),
        (OWN_WORKER, "spec.services: there is no frontend"),
        (
            f"{FRONTEND}\n{service('W', '[penstock, worker, --modle, tiny]')}",
            "spec.services.W: --modle: unknown flag (did you mean --model?)",
        ),
        (
            f"{service('F', '[penstock, frontend, --http-port, a]')}\n{OWN_WORKER}",
            'spec.services.F: --http-port: expected an integer from -1 to 65535, got "a"',
        ),
        (
            f"{service('F', '[penstock, frontend, --uds, /s, --http-port=-1]')}\n{OWN_WORKER}",
            "spec.services.F: --http-port: the frontend of a graph needs a port",
        ),
        (
            f"{service('F', '[python3, -m, dynamo.frontend, --router-mod, kv]')}\n{OWN_WORKER}",
            "spec.services.F: --router-mod: unknown flag of dynamo.frontend (did you mean --router-mode?)",
        ),
        (
            f"{service('F', '[penstock, frontend]', 'componentType: worker, ')}\n{OWN_WORKER}",
            "spec.services.F: componentType is worker, but its command runs a frontend",
        ),
        (
            f"{FRONTEND}\n"
            + service("W", "[penstock, worker, --model, m]", "resources: {limits: {gpu: one}}, "),
            "spec.services.W: resources.limits.gpu: expected a whole number, got 'one'",
        ),
        (
            f"{service('F', '[penstock, frontend]', 'dynamoNamespace: a, ')}\n"
            + service("W", "[penstock, worker, --model, m]", "dynamoNamespace: b, "),
            "spec.services: expected one dynamoNamespace, got a, b",
        ),
        ("a/b: {}", 'spec.services: expected a name of letters, digits and -, got "a/b"'),
        ("Aa: {}\naA: {}", "spec.services: two names differ only in upper and lower case"),
        ("3: {}", "spec.services: expected a string as name, got 3"),
    ],
)
def test_what_cannot_run_is_named(services: str, error: str) -> None:
    first = errors_of(small(services))[0]
    assert first.startswith(f"local.yaml: {error}")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "expected one DynamoGraphDeployment, found none"),
        (small(FRONTEND) + "---\n" + small(FRONTEND), "expected one DynamoGraphDeployment, found 2"),
        ("a: [", "line 1: not YAML: expected the node content, but found '<stream end>'"),
        ("\x00", "not YAML: unacceptable character #x0000: special characters are not allowed"),
        (
            small(FRONTEND).replace("v1alpha1", "v1beta1"),
            "spec.services: unknown field",
        ),
        (
            small(FRONTEND).replace("v1alpha1", "v2"),
            'apiVersion: expected nvidia.com/v1alpha1 or nvidia.com/v1beta1, got "nvidia.com/v2"',
        ),
        (small(FRONTEND).replace("name: small", "name: Small_"), "metadata.name: expected at most 45 of"),
        (
            "kind: DynamoGraphDeployment\nmetadata: {name: a}\napiVersion: nvidia.com/v1alpha1",
            "spec: missing",
        ),
    ],
)
def test_what_is_no_graph_is_refused(text: str, error: str) -> None:
    assert errors_of(text)[0].startswith(f"local.yaml: {error}")


def test_planners_are_left_out_with_a_note() -> None:
    graph = graph_of(small(f"{FRONTEND}\n{OWN_WORKER}\nPlanner: {{componentType: planner}}"))
    assert [service.name for service in graph.services] == ["Frontend", "Worker"]
    assert graph.notes == ("Planner: planners are not run",)


def test_a_frontend_without_a_command_runs_the_default() -> None:
    graph = graph_of(small(f"F: {{componentType: frontend}}\n{OWN_WORKER}"))
    assert graph.services[0].argv() == ["frontend"]


def test_environment_is_layered_and_expanded() -> None:
    worker = """
W:
  envs: [{name: A, value: service}, {name: B, value: "$(A)-$(SHARED)-$(OTHER)"}]
  extraPodSpec:
    mainContainer:
      command: [penstock, worker, --model, $(MODEL)]
      env:
        - {name: MODEL, value: from-env}
        - {name: TOKEN, valueFrom: {secretKeyRef: {name: s, key: k}}}
"""
    text = small(
        f"{FRONTEND}\n{worker}", extra="  envs: [{name: A, value: graph}, {name: SHARED, value: s}]\n"
    )
    graph = graph_of(text)
    assert graph.services[1].env == {
        "A": "service",
        "SHARED": "s",
        "MODEL": "from-env",
    }
    assert graph.services[1].flags["model"] == "from-env"
    assert graph.notes == (
        "W: B is left out, for $(OTHER) is not set here",
        "W: TOKEN is set by the cluster; set it yourself if it is needed",
    )


@pytest.mark.parametrize("kind", ["List", "DynamoGraphDeploymentList"])
def test_a_graph_within_a_list_is_read(kind: str) -> None:
    graph = small(f"{FRONTEND}\n{OWN_WORKER}")
    item = "\n".join(f"  {line}" for line in graph.splitlines())
    listed = f"apiVersion: v1\nkind: {kind}\nitems:\n- kind: Secret\n-\n{item}\n"
    assert graph_of(listed) == graph_of(graph)


def test_what_is_found_instead_of_a_graph_is_named() -> None:
    text = "kind: DynamoComponentDeployment\n---\nkind: ConfigMap\n"
    assert errors_of(text) == [
        "local.yaml: expected one DynamoGraphDeployment, found none; there is ConfigMap,"
        " DynamoComponentDeployment"
    ]


def test_what_is_ignored_is_told_in_a_line_a_service() -> None:
    frontend = service("F", "[python3, -m, dynamo.frontend, --router-kv-events, --enable-anthropic-api]")
    worker = service("W", "[python3, -m, dynamo.vllm, --model, m]", "envs: [{name: DYN_NEW, value: x}], ")
    assert graph_of(small(f"{frontend}\n{worker}")).notes == (
        "F: --router-kv-events: ignored, no meaning here",
        "F: --enable-anthropic-api: ignored, /v1/messages is always served",
        "W: DYN_NEW: ignored, no meaning here",
    )


def test_a_frontends_parsers_are_told_to_the_workers() -> None:
    frontend = service("F", "[python3, -m, dynamo.frontend, --tool-call-parser, hermes]")
    worker = service("W", "[python3, -m, dynamo.vllm, --model, m, --enforce-eager]")
    graph = graph_of(small(f"{frontend}\n{worker}"))
    assert graph.services[1].engine_args == ("--tool-call-parser", "hermes", "--enforce-eager")


def test_fields_of_the_cluster_and_nulls_are_accepted() -> None:
    worker = """
W:
  replicas: 0
  envs:
  autoscaling: {enabled: true}
  sharedMemory: {size: 8Gi}
  extraPodSpec:
    tolerations: [{key: gpu}]
    mainContainer: {command: [penstock, worker, --model, m], volumeMounts: [], securityContext: {}}
"""
    graph = graph_of(small(f"{FRONTEND}\n{worker}"))
    assert graph.services[1].replicas == 0
    assert graph.roles == ()


def test_models_are_found_beside_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = tmp_path / "deploy" / "g.yaml"
    manifest.parent.mkdir()
    manifest.write_text(small(f"{FRONTEND}\n{OWN_WORKER}"))
    assert load_graph(manifest).services[1].flags["model"] == "tiny"  # a name, for the engine to download
    elsewhere = tmp_path / "elsewhere"
    for folder in (elsewhere / "tiny", tmp_path / "tiny", manifest.parent / "tiny"):
        folder.mkdir(parents=True)
        monkeypatch.chdir(elsewhere)
        assert load_graph(manifest).services[1].flags["model"] == str(folder.resolve())
    overridden = load_graph(manifest, Overrides(model="tiny"))
    assert overridden.services[1].flags["model"] == str((elsewhere / "tiny").resolve())


def test_a_missing_manifest_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^cannot read .*none.yaml: No such file or directory$"):
        load_graph(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary.yaml: not UTF-8 text$"):
        load_graph(tmp_path / "binary.yaml")


@pytest.mark.parametrize("name", ["local.yaml", "multinode-vllm.yaml"])
def test_the_shipped_manifests_load(name: str) -> None:
    graph = load_graph(DEPLOY / name)
    assert graph.notes == ()
    assert [(service.name, service.label, service.replicas) for service in graph.services] == [
        ("Frontend", "frontend", 1),
        ("PrefillWorker", "prefill", 2),
        ("DecodeWorker", "decode", 2),
    ]
    assert os.path.isabs(graph.services[1].flags["model"]) == (name == "local.yaml")


def test_the_shipped_manifest_keeps_the_upstream_names() -> None:
    ours, theirs = ((DEPLOY / "multinode-vllm.yaml").read_text(), UPSTREAM)
    spec, upstream = yaml.safe_load(ours)["spec"], list(yaml.safe_load_all(theirs))[1]["spec"]
    for name, service in upstream["services"].items():
        for field in ("dynamoNamespace", "componentType", "replicas", "resources"):
            assert spec["services"][name][field] == service[field], (name, field)
