"""The structs of a DynamoGraphDeployment of `nvidia.com/v1beta1`.

They serve for two things only: to find mistakes, so that a message names the field as the user wrote it,
and to generate the CRD's schema. For everything else, `versions.py` converts the manifest to v1alpha1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from penstock.checked import problems, shown

API_VERSION = "nvidia.com/v1beta1"
MAIN_CONTAINER = "main"
"""The name of Penstock's container in a pod template. All other containers are the user's."""

Quantity = str | int | float
"""Kubernetes' notation of an amount: `8Gi`, `500m`, or a plain number."""

_NAME = re.compile(r"^[A-Za-z]([-A-Za-z0-9]*[A-Za-z0-9])?$")
_NAME_CHARS_MAX = 63
_COMPONENTS_MAX = 25


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


class _Struct(msgspec.Struct, frozen=True, rename="camel"):
    """The base of the structs: fields have camelCase names in YAML."""

    ACCEPTED: ClassVar[frozenset[str]] = frozenset()


class EnvironmentVariable(_Struct, frozen=True):
    """An environment variable. `valueFrom` needs a cluster."""

    name: str
    value: str | None = None
    value_from: dict[str, Any] | None = None


class ResourceAmounts(_Struct, frozen=True):
    """The resources of a Kubernetes Container."""

    requests: dict[str, Quantity] | None = None
    limits: dict[str, Quantity] | None = None

    ACCEPTED: ClassVar[frozenset[str]] = _names("claims")


class PodContainer(_Struct, frozen=True):
    """A Kubernetes Container."""

    name: str
    image: str | None = None
    working_dir: str | None = None
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    env: tuple[EnvironmentVariable, ...] = ()
    resources: ResourceAmounts | None = None

    ACCEPTED: ClassVar[frozenset[str]] = _names(
        "envFrom imagePullPolicy lifecycle livenessProbe ports readinessProbe resizePolicy restartPolicy"
        " securityContext startupProbe stdin stdinOnce terminationMessagePath terminationMessagePolicy tty"
        " volumeDevices volumeMounts"
    )


class TemplatePodSpec(_Struct, frozen=True):
    """A Kubernetes PodSpec. The container named `main` is Penstock's."""

    containers: tuple[PodContainer, ...] = ()

    ACCEPTED: ClassVar[frozenset[str]] = _names(
        "activeDeadlineSeconds affinity automountServiceAccountToken dnsConfig dnsPolicy enableServiceLinks"
        " ephemeralContainers hostAliases hostIPC hostNetwork hostPID hostUsers hostname imagePullSecrets"
        " initContainers nodeName nodeSelector os overhead preemptionPolicy priority priorityClassName"
        " readinessGates resourceClaims resources restartPolicy runtimeClassName schedulerName"
        " schedulingGates securityContext serviceAccount serviceAccountName setHostnameAsFQDN"
        " shareProcessNamespace subdomain terminationGracePeriodSeconds tolerations"
        " topologySpreadConstraints volumes"
    )


class PodMetadata(_Struct, frozen=True):
    """Labels and annotations of a component's pods."""

    annotations: dict[str, str] | None = None
    labels: dict[str, str] | None = None

    ACCEPTED: ClassVar[frozenset[str]] = _names("creationTimestamp name")


class PodTemplate(_Struct, frozen=True):
    """A Kubernetes PodTemplateSpec."""

    metadata: PodMetadata | None = None
    spec: TemplatePodSpec | None = None


class Nodes(_Struct, frozen=True):
    """The number of nodes that one worker spans."""

    node_count: Annotated[int, Meta(ge=2)] = 2


class ServedModel(_Struct, frozen=True):
    """The model that a component serves."""

    name: str
    revision: str | None = None


class CompilationCache(_Struct, frozen=True):
    """A PersistentVolumeClaim for the compilation cache of engines."""

    pvc_name: str
    mount_path: str | None = None


class Component(_Struct, frozen=True):
    """One component: replicas of one pod template."""

    name: Annotated[str, Meta(min_length=1, max_length=_NAME_CHARS_MAX, pattern=_NAME.pattern)]
    type: Literal["frontend", "worker", "prefill", "decode", "planner", "epp"] | None = None
    replicas: Annotated[int, Meta(ge=0)] | None = None
    pod_template: PodTemplate | None = None
    multinode: Nodes | None = None
    shared_memory_size: Quantity | None = None
    model_ref: ServedModel | None = None
    scaling_adapter: dict[str, Any] | None = None
    frontend_sidecar: str | None = None
    compilation_cache: CompilationCache | None = None
    global_dynamo_namespace: bool | None = None

    ACCEPTED: ClassVar[frozenset[str]] = _names(
        "device dynamoSidecar engineGroup eppConfig experimental minAvailable providerOverride roles"
        " runtimeVersionOverride topologyConstraint"
    )


class RestartStrategy(_Struct, frozen=True):
    """Whether components restart one after the other, and in which order."""

    type: Literal["Sequential", "Parallel"] | None = None
    order: tuple[str, ...] = ()


class Restart(_Struct, frozen=True):
    """A new `id` restarts the graph."""

    id: Annotated[str, Meta(min_length=1)]
    strategy: RestartStrategy | None = None


class GraphSpec(_Struct, frozen=True):
    """The graph: its components, and the settings of all components."""

    components: Annotated[tuple[Component, ...], Meta(min_length=1, max_length=_COMPONENTS_MAX)]
    env: tuple[EnvironmentVariable, ...] = ()
    backend_framework: Literal["vllm", "sglang", "trtllm"] | None = None
    annotations: dict[str, str] | None = None
    labels: dict[str, str] | None = None
    priority_class_name: str | None = None
    restart: Restart | None = None

    ACCEPTED: ClassVar[frozenset[str]] = _names("experimental providerOverride topologyConstraint")


class _Document(_Struct, frozen=True):
    spec: GraphSpec

    ACCEPTED: ClassVar[frozenset[str]] = _names("apiVersion kind metadata status")


def v1beta1_problems(document: dict[str, Any]) -> Iterator[str]:
    """The mistakes in the spec of a v1beta1 graph, one line each, with the paths that the user wrote."""
    wrong = [line.removeprefix(".") for line in problems(document, _Document, "")]
    yield from wrong
    if wrong:
        return
    components = document["spec"]["components"]
    if not 1 <= len(components) <= _COMPONENTS_MAX:
        yield f"spec.components: expected 1 to {_COMPONENTS_MAX} components, got {len(components)}"
    folded: set[str] = set()
    for index, component in enumerate(components):
        yield from _component_problems(component, f"spec.components[{index}]")
        name = component["name"].lower()
        if name in folded:
            taken = shown(component["name"])
            yield f"spec.components[{index}].name: {taken} is taken, if only in another case"
        folded.add(name)


def _component_problems(component: dict[str, Any], path: str) -> Iterator[str]:
    name = component["name"]
    if not _NAME.fullmatch(name) or len(name) > _NAME_CHARS_MAX:
        yield f"{path}.name: expected a name of letters, digits and -, got {shown(name)}"
    template = component.get("podTemplate") or {}
    containers = [one["name"] for one in (template.get("spec") or {}).get("containers") or []]
    for twice in sorted({one for one in containers if containers.count(one) > 1}):
        yield f"{path}.podTemplate.spec.containers: two are named {shown(twice)}"
    sidecar = component.get("frontendSidecar")
    if sidecar is not None and sidecar not in containers:
        yield f"{path}.frontendSidecar: no container is named {shown(sidecar)}"
