import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import ConfigError
from penstock.graph.v1beta1 import API_VERSION as V1BETA1
from penstock.graph.versions import ORIGINALS, V1ALPHA1, merge_patched, to_v1alpha1, to_v1beta1

NAMES = st.sampled_from(["Frontend", "Prefill", "decode", "a", "Z9"])
WORDS = st.sampled_from(["x", "y/z", "8Gi", "0", "true"])
AMOUNTS = st.dictionaries(
    st.sampled_from(["cpu", "memory", "nvidia.com/gpu", "rdma/ib"]), st.sampled_from(["1", 2, "500m", 1.5])
)
LABELS = st.dictionaries(st.sampled_from(["a", "penstock.dev/engine", "nvidia.com/x"]), WORDS, min_size=1)
ENV = st.lists(
    st.sampled_from(
        [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}, {"name": "B", "valueFrom": {"x": {}}}]
    ),
    max_size=3,
)
ENV_FROM = st.lists(st.sampled_from([{"secretRef": {"name": "s"}}, {"configMapRef": {"name": "c"}}]))
PROBE = st.fixed_dictionaries({"httpGet": st.just({"path": "/live", "port": 9090})})


def fields(**optional: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=optional)


def container(*names: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(
        lambda name, others: {"name": name, **others},
        st.sampled_from(names),
        fields(
            image=WORDS,
            command=st.lists(WORDS),
            env=ENV,
            envFrom=ENV_FROM,
            livenessProbe=PROBE,
            resources=fields(requests=AMOUNTS, limits=AMOUNTS, claims=st.just([{"name": "gpu"}])),
            volumeMounts=st.just([{"name": "cache", "mountPath": "/c"}]),
        ),
    )


MULTINODE = st.just({"nodeCount": 2})
COMPONENT = fields(
    type=st.sampled_from(["frontend", "worker", "prefill", "decode", "planner"]),
    replicas=st.integers(0, 3),
    multinode=MULTINODE,
    sharedMemorySize=st.sampled_from(["0", 0, "8Gi", 1024]),
    scalingAdapter=st.just({}),
    frontendSidecar=st.sampled_from(["side", "main"]),
    compilationCache=fields(pvcName=WORDS, mountPath=WORDS),
    minAvailable=st.integers(1, 2),
    experimental=fields(checkpoint=st.just({"enabled": True}), failover=st.just({"mode": "IntraPod"})),
    podTemplate=fields(
        metadata=fields(labels=LABELS, annotations=LABELS, name=WORDS),
        spec=fields(
            containers=st.lists(container("main", "side", "log"), max_size=3),
            nodeSelector=LABELS,
            volumes=st.just([{"name": "cache", "emptyDir": {}}]),
        ),
    ),
)
SERVICE_AMOUNTS = fields(
    cpu=WORDS, gpu=WORDS, gpuType=st.just("gpu.intel.com/xe"), custom=st.just({"rdma/ib": "1"})
)
SERVICE = fields(
    componentType=st.sampled_from(["main", "frontend", "worker", "prefill", "epp"]),
    subComponentType=st.sampled_from(["prefill", "decode", "other"]),
    dynamoNamespace=WORDS,
    replicas=st.integers(0, 3),
    multinode=MULTINODE,
    resources=fields(requests=SERVICE_AMOUNTS, limits=SERVICE_AMOUNTS, claims=st.just([{"name": "gpu"}])),
    envs=ENV,
    envFromSecret=WORDS,
    annotations=LABELS,
    labels=LABELS,
    extraPodMetadata=fields(labels=LABELS, annotations=LABELS),
    extraPodSpec=st.builds(
        lambda pod, main: {**pod, **main},
        fields(containers=st.lists(container("side", "log"), max_size=2), nodeSelector=LABELS),
        fields(mainContainer=container("main", "odd")),
    ),
    livenessProbe=PROBE,
    readinessProbe=PROBE,
    sharedMemory=fields(disabled=st.booleans(), size=WORDS),
    scalingAdapter=fields(enabled=st.booleans()),
    frontendSidecar=fields(image=WORDS, args=st.lists(WORDS), envs=ENV, envFromSecret=WORDS),
    volumeMounts=st.lists(
        fields(name=WORDS, mountPoint=WORDS, useAsCompilationCache=st.booleans()), max_size=3
    ),
    ingress=st.just({"enabled": True}),
    autoscaling=st.just({"enabled": True}),
    checkpoint=st.just({"enabled": False}),
)
SHARED = {
    "backendFramework": st.just("vllm"),
    "annotations": LABELS,
    "restart": st.just({"id": "1"}),
}
METADATA = st.builds(
    lambda name, others: {"name": name, **others},
    WORDS,
    fields(labels=LABELS, annotations=LABELS, resourceVersion=WORDS),
)


def graphs(version: str, spec: st.SearchStrategy[Any], status: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(
        lambda metadata, spec, others: {
            "apiVersion": version,
            "kind": "DynamoGraphDeployment",
            "metadata": metadata,
            "spec": spec,
            **others,
        },
        METADATA,
        spec,
        fields(status=st.just({"state": "pending", status: {"a": {"replicas": 1}}})),
    )


ALPHA = graphs(
    V1ALPHA1,
    st.builds(
        lambda services, others: {"services": services, **others},
        st.dictionaries(NAMES, SERVICE, min_size=1, max_size=3),
        fields(envs=ENV, pvcs=st.just([{"name": "p"}]), dynamoGraph=WORDS, **SHARED),
    ),
    "services",
)
BETA = graphs(
    V1BETA1,
    st.builds(
        lambda components, others: {
            "components": [{"name": name, **rest} for name, rest in components.items()],
            **others,
        },
        st.dictionaries(NAMES, COMPONENT, min_size=1, max_size=3),
        fields(env=ENV, providerOverride=st.just({"target": "x"}), **SHARED),
    ),
    "components",
)


@given(ALPHA)
@settings(max_examples=300, deadline=None)
def test_v1alpha1_is_the_same_after_a_round_trip(graph: dict[str, Any]) -> None:
    before = copy.deepcopy(graph)
    other = json.loads(json.dumps(to_v1beta1(graph), sort_keys=True))
    assert other["apiVersion"] == V1BETA1
    assert to_v1alpha1(other) == graph == before


@given(BETA)
@settings(max_examples=300, deadline=None)
def test_v1beta1_is_the_same_after_a_round_trip(graph: dict[str, Any]) -> None:
    before = copy.deepcopy(graph)
    other = json.loads(json.dumps(to_v1alpha1(graph), sort_keys=True))
    assert other["apiVersion"] == V1ALPHA1
    assert to_v1beta1(other) == graph == before


def _without_originals(graph: dict[str, Any]) -> dict[str, Any]:
    graph = copy.deepcopy(graph)
    annotations = graph["metadata"].get("annotations", {})
    for name in ORIGINALS.values():
        annotations.pop(name, None)
    if not annotations:
        graph["metadata"].pop("annotations", None)
    return graph


@given(ALPHA, ALPHA)
@settings(max_examples=300, deadline=None)
def test_a_later_change_in_v1beta1_always_wins(was: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Whatever the stored v1alpha1 object knows beyond v1beta1: who writes v1beta1 reads it again."""
    seen = to_v1beta1(was)
    change = _without_originals(to_v1beta1(wanted))
    carried = {k: v for k, v in seen["metadata"].get("annotations", {}).items() if k in ORIGINALS.values()}
    written = copy.deepcopy(change)
    if carried:
        written["metadata"].setdefault("annotations", {}).update(carried)
    assert _without_originals(to_v1beta1(to_v1alpha1(written))) == change


@given(BETA, BETA)
@settings(max_examples=300, deadline=None)
def test_a_later_change_in_v1alpha1_always_wins(was: dict[str, Any], wanted: dict[str, Any]) -> None:
    seen = to_v1alpha1(was)
    change = _without_originals(to_v1alpha1(wanted))
    carried = {k: v for k, v in seen["metadata"].get("annotations", {}).items() if k in ORIGINALS.values()}
    written = copy.deepcopy(change)
    if carried:
        written["metadata"].setdefault("annotations", {}).update(carried)
    assert _without_originals(to_v1alpha1(to_v1beta1(written))) == change


DISAGG = {
    "apiVersion": V1BETA1,
    "kind": "DynamoGraphDeployment",
    "metadata": {"name": "g", "annotations": {"penstock.dev/model": "tiny"}},
    "spec": {
        "env": [{"name": "DYN_LOG", "value": "debug"}],
        "components": [
            {
                "name": "Worker",
                "type": "prefill",
                "replicas": 2,
                "minAvailable": 1,
                "sharedMemorySize": "16Gi",
                "scalingAdapter": {},
                "podTemplate": {
                    "metadata": {"annotations": {"penstock.dev/engine": "sim", "note": "mine"}},
                    "spec": {
                        "tolerations": [{"operator": "Exists"}],
                        "containers": [
                            {"name": "log", "image": "logger"},
                            {
                                "name": "main",
                                "image": "runtime",
                                "args": ["--model", "m"],
                                "resources": {"limits": {"nvidia.com/gpu": 2, "cpu": "4", "rdma/ib": "1"}},
                            },
                        ],
                    },
                },
            }
        ],
    },
    "status": {
        "components": {"Worker": {"readyReplicas": 2}},
        "rollingUpdate": {"updatedComponents": ["Worker"]},
    },
}


def test_a_component_becomes_a_service() -> None:
    graph = to_v1alpha1(DISAGG)
    carried = graph["metadata"]["annotations"].pop(ORIGINALS[V1BETA1])
    assert json.loads(carried)["components"]["Worker"]["minAvailable"] == 1
    assert graph == {
        "apiVersion": V1ALPHA1,
        "kind": "DynamoGraphDeployment",
        "metadata": DISAGG["metadata"],
        "spec": {
            "envs": [{"name": "DYN_LOG", "value": "debug"}],
            "services": {
                "Worker": {
                    "componentType": "worker",
                    "subComponentType": "prefill",
                    "replicas": 2,
                    "sharedMemory": {"size": "16Gi"},
                    "scalingAdapter": {"enabled": True},
                    "annotations": {"penstock.dev/engine": "sim"},
                    "extraPodMetadata": {"annotations": {"note": "mine"}},
                    "resources": {"limits": {"gpu": "2", "cpu": "4", "custom": {"rdma/ib": "1"}}},
                    "extraPodSpec": {
                        "tolerations": [{"operator": "Exists"}],
                        "containers": [{"name": "log", "image": "logger"}],
                        "mainContainer": {"image": "runtime", "args": ["--model", "m"]},
                    },
                }
            },
        },
        "status": {
            "services": {"Worker": {"readyReplicas": 2}},
            "rollingUpdate": {"updatedServices": ["Worker"]},
        },
    }


def test_what_is_carried_survives_a_change_beside_it() -> None:
    stored = to_v1alpha1(DISAGG)
    stored["spec"]["services"]["Worker"]["replicas"] = 5
    stored["spec"]["services"]["Worker"]["ingress"] = {"enabled": True}
    [component] = to_v1beta1(stored)["spec"]["components"]
    assert component == {**DISAGG["spec"]["components"][0], "replicas": 5}  # type: ignore[index]
    assert to_v1alpha1(to_v1beta1(stored))["spec"] == stored["spec"]


@pytest.mark.parametrize("text", ["", "x", "[]", '{"services": 1}', '{"components": {"Worker": 3}}'])
def test_an_annotation_that_somebody_wrote_into_carries_nothing(text: str) -> None:
    stored = to_v1alpha1(DISAGG)
    stored["metadata"]["annotations"][ORIGINALS[V1BETA1]] = text
    [component] = to_v1beta1(stored)["spec"]["components"]
    assert "minAvailable" not in component
    assert component["replicas"] == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"components": {}}, "spec.components: expected a list"),
        (
            {"components": [{"name": "a"}, {"name": "a"}]},
            "spec.components[1].name: expected a name that no other component has",
        ),
        ({"components": [3]}, "spec.components[0].name"),
        ({"components": [{"name": "a", "podTemplate": 1}]}, "podTemplate: expected an object, got 1"),
    ],
)
def test_another_shape_is_told_in_one_line(spec: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        to_v1alpha1({"apiVersion": V1BETA1, "metadata": {"name": "g"}, "spec": spec})
    assert message in str(caught.value)


def test_a_patch_in_the_words_of_v1alpha1_means_the_same_in_v1beta1() -> None:
    """kubectl takes the newest version that a cluster serves, also for a patch that names `services`."""
    stored = v1alpha1_graph({"Worker": {"replicas": 2, "componentType": "worker", "dynamoNamespace": "d"}})
    read = to_v1beta1(stored)
    patched = {**read, "spec": {**read["spec"], "services": {"Worker": {"replicas": 3}}}}
    after = to_v1alpha1(patched)
    assert after["spec"]["services"]["Worker"] == {**stored["spec"]["services"]["Worker"], "replicas": 3}
    again = to_v1beta1(after)
    assert "services" not in again["spec"]
    assert [component["replicas"] for component in again["spec"]["components"]] == [3]
    assert to_v1alpha1(again) == after


def test_a_patch_of_a_service_that_is_not_there_is_refused_by_name() -> None:
    read = to_v1beta1(v1alpha1_graph({"Worker": {"replicas": 2}}))
    read["spec"]["services"] = {"Wroker": {"replicas": 3}}
    with pytest.raises(
        ConfigError, match=r"spec\.services\.Wroker: no component has this name, only Worker"
    ):
        to_v1alpha1(read)


def test_null_in_a_patch_removes_a_field() -> None:
    assert merge_patched({"a": 1, "b": {"c": 2, "d": 3}}, {"a": None, "b": {"c": None, "e": 4}}) == {
        "b": {"d": 3, "e": 4}
    }


def v1alpha1_graph(services: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "nvidia.com/v1alpha1",
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": "g"},
        "spec": {"services": services},
    }
