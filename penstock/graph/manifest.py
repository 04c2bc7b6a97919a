"""Reads a DynamoGraphDeployment of `nvidia.com/v1alpha1` and checks it into structs. Manifests of
`nvidia.com/v1beta1` are converted to this version first.

Fields that affect a process, and fields that the operator turns into objects, have types. Parts that are
passed on to the cluster unchanged (probes, most of a PodSpec) are plain objects, or only their names are
known (`ACCEPTED`). So a manifest with them works, and a misspelt field is still found.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import yaml
from msgspec import Meta

from penstock.checked import converted, problems, shown, without_nulls
from penstock.errors import ConfigError
from penstock.graph.config_maps import with_config_values
from penstock.graph.v1beta1 import API_VERSION as V1BETA1
from penstock.graph.v1beta1 import v1beta1_problems
from penstock.graph.versions import in_words_of, to_v1alpha1

ComponentType = Literal["main", "frontend", "worker", "prefill", "decode", "planner", "epp"]
Quantity = str | int  # an amount in Kubernetes' notation: 8Gi, or bytes

FRONTEND_TYPES = ("main", "frontend")
API_VERSION = "nvidia.com/v1alpha1"
KIND = "DynamoGraphDeployment"

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_SERVICE_NAME = re.compile(r"[A-Za-z]([-A-Za-z0-9]*[A-Za-z0-9])?")
NAME_CHARS_MAX = 45  # Kubernetes allows 63 in a label; the service's name and a suffix are appended
SERVICES_MAX = 25  # as in v1beta1
_FILE_BYTES_MAX = 1024 * 1024
_DEPTH_MAX = 64  # levels of nested lists and objects; manifests have about twelve
_VALUES_MAX = 50_000  # ten times as many as in 25 services with hundreds of values each


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


class _Manifest(msgspec.Struct, frozen=True, rename="camel"):
    """The base of the structs: fields have camelCase names in YAML."""

    ACCEPTED: ClassVar[frozenset[str]] = frozenset()


class Env(_Manifest, frozen=True):
    """An environment variable. `value_from` needs a cluster."""

    name: str
    value: str | None = None
    value_from: dict[str, Any] | None = None


class Amounts(_Manifest, frozen=True):
    """Resource amounts, as strings in Kubernetes' notation."""

    cpu: str | None = None
    memory: str | None = None
    gpu: str | None = None
    gpu_type: str | None = None  # the resource that `gpu` counts; nvidia.com/gpu when unset
    custom: dict[str, str] = {}  # other resources by name, e.g. rdma/ib
    nodes: str | None = None  # from version 0.4.0 of the API, which had no `multinode`


class Resources(_Manifest, frozen=True):
    """The resource requests and limits of a replica."""

    requests: Amounts | None = None
    limits: Amounts | None = None
    claims: tuple[dict[str, Any], ...] = ()


class Container(_Manifest, frozen=True):
    """The container of a replica."""

    image: str | None = None
    working_dir: str | None = None
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    env: tuple[Env, ...] = ()
    env_from: tuple[dict[str, Any], ...] = ()

    ACCEPTED: ClassVar[frozenset[str]] = _names(
        "imagePullPolicy lifecycle livenessProbe name ports readinessProbe resizePolicy resources"
        " restartPolicy securityContext startupProbe stdin stdinOnce terminationMessagePath"
        " terminationMessagePolicy tty volumeDevices volumeMounts"
    )


class PodSpec(_Manifest, frozen=True):
    """A Kubernetes PodSpec, and `mainContainer` for the container that Dynamo names `main`."""

    main_container: Container | None = None

    ACCEPTED: ClassVar[frozenset[str]] = _names(
        "activeDeadlineSeconds affinity automountServiceAccountToken containers dnsConfig dnsPolicy"
        " enableServiceLinks ephemeralContainers hostAliases hostIPC hostNetwork hostPID hostUsers hostname"
        " imagePullSecrets initContainers nodeName nodeSelector os overhead preemptionPolicy priority"
        " priorityClassName readinessGates resourceClaims restartPolicy runtimeClassName schedulerName"
        " schedulingGates securityContext serviceAccount serviceAccountName setHostnameAsFQDN"
        " shareProcessNamespace subdomain terminationGracePeriodSeconds tolerations"
        " topologySpreadConstraints volumes"
    )


class PodMetadata(_Manifest, frozen=True):
    """Labels and annotations of the pods of a service, and of no other objects."""

    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class Multinode(_Manifest, frozen=True):
    """The number of nodes that one worker spans."""

    node_count: Annotated[int, Meta(ge=2)]


class SharedMemory(_Manifest, frozen=True):
    """The memory at /dev/shm."""

    disabled: bool = False
    size: Quantity | None = None


class Claim(_Manifest, frozen=True):
    """A PersistentVolumeClaim that the operator creates, or that exists already. `mount_point` is from
    version 0.4 of the API, where each service had claims; since then services mount claims by
    `volumeMounts`."""

    name: str
    create: bool = False
    storage_class: str | None = None
    size: Quantity | None = None
    volume_access_mode: (
        Literal["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"] | None
    ) = None
    mount_point: str | None = None


class ClaimMount(_Manifest, frozen=True):
    """The mount of a claim in the pods of a service."""

    name: str
    mount_point: str | None = None
    use_as_compilation_cache: bool = False


class IngressTls(_Manifest, frozen=True):
    """The Secret with an ingress's certificate."""

    secret_name: str | None = None


class IngressSpec(_Manifest, frozen=True):
    """The Ingress of a frontend, for clients outside of the cluster."""

    enabled: bool = False
    host: str | None = None
    host_prefix: str | None = None
    host_suffix: str | None = None
    annotations: dict[str, str] = {}
    labels: dict[str, str] = {}
    tls: IngressTls | None = None
    ingress_controller_class_name: str | None = None
    use_virtual_service: bool = False
    virtual_service_gateway: str | None = None


class ScalingAdapter(_Manifest, frozen=True):
    """Whether a DynamoGraphDeploymentScalingAdapter sets the number of replicas."""

    enabled: bool = False


class Restart(_Manifest, frozen=True):
    """A new `id` restarts all services."""

    id: str

    ACCEPTED: ClassVar[frozenset[str]] = _names("strategy")


class ServiceSpec(_Manifest, frozen=True):
    """One service: replicas of one container."""

    component_type: ComponentType | None = None
    dynamo_namespace: str | None = None
    replicas: Annotated[int, Meta(ge=0)] = 1
    resources: Resources | None = None
    envs: tuple[Env, ...] = ()
    env_from_secret: str | None = None
    extra_pod_spec: PodSpec | None = None
    frontend_sidecar: Any = None
    annotations: dict[str, str] = {}
    labels: dict[str, str] = {}
    extra_pod_metadata: PodMetadata | None = None
    liveness_probe: dict[str, Any] | None = None
    readiness_probe: dict[str, Any] | None = None
    multinode: Multinode | None = None
    shared_memory: SharedMemory | None = None
    pvc: Claim | None = None
    pvcs: tuple[Claim, ...] = ()
    volume_mounts: tuple[ClaimMount, ...] = ()
    ingress: IngressSpec | None = None
    scaling_adapter: ScalingAdapter | None = None

    ACCEPTED: ClassVar[frozenset[str]] = _names(
        "autoscaling checkpoint eppConfig failover globalDynamoNamespace gpuMemoryService modelRef"
        " serviceName subComponentType topologyConstraint"
    )


class Spec(_Manifest, frozen=True):
    """The graph: its services, and the environment variables of all services."""

    services: dict[str, ServiceSpec]
    envs: tuple[Env, ...] = ()
    backend_framework: Literal["vllm", "sglang", "trtllm"] | None = None
    annotations: dict[str, str] = {}
    labels: dict[str, str] = {}
    pvcs: tuple[Claim, ...] = ()
    restart: Restart | None = None
    priority_class_name: str | None = None

    ACCEPTED: ClassVar[frozenset[str]] = _names("dynamoGraph experimental topologyConstraint")


class Metadata(_Manifest, frozen=True):
    """The object's name."""

    name: str
    namespace: str | None = None
    annotations: dict[str, str] = {}

    ACCEPTED: ClassVar[frozenset[str]] = _names(
        "creationTimestamp deletionGracePeriodSeconds deletionTimestamp finalizers generateName generation"
        " labels managedFields ownerReferences resourceVersion selfLink uid"
    )


class Manifest(_Manifest, frozen=True):
    """A DynamoGraphDeployment."""

    api_version: str  # the version in which the manifest was written; messages use its field paths
    kind: str
    metadata: Metadata
    spec: Spec

    ACCEPTED: ClassVar[frozenset[str]] = _names("status")


def parse_manifest(text: str, source: str) -> Manifest:
    """Read the only DynamoGraphDeployment in a YAML text. Other objects in the text are ignored.

    Args:
        text: one or several YAML documents.
        source: the file's name, for messages.

    Raises:
        ConfigError: one line for each wrong field, `source: path: expected ..., got ...`.
    """
    objects = list(_objects(_documents(text, source)))
    graphs = [found for found in objects if found.get("kind") == KIND]
    if len(graphs) != 1:
        others = (
            sorted({str(found["kind"]) for found in objects if found.get("kind")}) if not graphs else []
        )
        beside = f"; there is {', '.join(others)}" if others else ""
        raise ConfigError(f"{source}: expected one {KIND}, found {len(graphs) or 'none'}{beside}")
    return checked_manifest(with_config_values(graphs[0], objects), source)


def checked_manifest(document: Mapping[str, Any], source: str) -> Manifest:
    """Check a DynamoGraphDeployment from a file or a cluster, and return it as a struct.

    Args:
        source: the file's name, for messages; empty: none.

    Raises:
        ConfigError: one line for each wrong field, `source: path: expected ..., got ...`.
    """
    return manifest_of(checked_document(document, source), document["apiVersion"])


def manifest_of(checked: Mapping[str, Any], api_version: str) -> Manifest:
    """The struct of a checked document. `api_version` is the version in which it was written."""
    return msgspec.structs.replace(converted(checked, Manifest), api_version=api_version)


def checked_document(document: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Check a DynamoGraphDeployment of any version, and convert it to v1alpha1. Takes the same arguments
    and raises the same errors as `checked_manifest`."""
    graph = without_nulls(document)
    written = graph.get("apiVersion")
    wrong = list(v1beta1_problems(graph)) if written == V1BETA1 else []
    if written == V1BETA1 and not wrong:
        graph = to_v1alpha1(graph)
    wrong = wrong or [in_words_of(written, line) for line in _manifest_problems(graph)]
    if wrong:
        raise ConfigError(in_source(wrong, source))
    return with_frontend(graph)


def in_source(lines: Iterable[str], source: str) -> str:
    """The lines of a message, each preceded by the name of the file."""
    return "\n".join(f"{source}: {line}" if source else line for line in lines)


def with_frontend(graph: dict[str, Any]) -> dict[str, Any]:
    """Add a frontend to a graph whose workers have a frontend each, as a sidecar. Such sidecars take
    requests from a gateway that chooses the worker; in Penstock, the frontend chooses it."""
    services: dict[str, dict[str, Any]] = graph["spec"]["services"]
    has_sidecars = any(service.get("frontendSidecar") is not None for service in services.values())
    has_frontend = any(service.get("componentType") in FRONTEND_TYPES for service in services.values())
    if not has_sidecars or has_frontend or "frontend" in {name.lower() for name in services}:
        return graph
    added = {"Frontend": {"componentType": "frontend"}, **services}
    return {**graph, "spec": {**graph["spec"], "services": added}}


class _Loader(yaml.SafeLoader):
    """A YAML loader with a limit on nesting: the cost of parsing grows with its square."""

    def fetch_more_tokens(self) -> None:
        if self.flow_level + len(self.indents) > _DEPTH_MAX:
            message = f"nested to more than {_DEPTH_MAX} levels"
            raise yaml.scanner.ScannerError(None, None, message, self.get_mark())
        super().fetch_more_tokens()


def _documents(text: str, source: str) -> list[Any]:
    if len(text) > _FILE_BYTES_MAX:
        raise ConfigError(f"{source}: larger than {_FILE_BYTES_MAX} bytes")
    try:
        documents = list(yaml.load_all(text, _Loader))
        if _is_larger(documents, _VALUES_MAX):
            raise ConfigError(f"{source}: more than {_VALUES_MAX} values, aliases written out")
        return documents
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise ConfigError(f"{source}:{line} not YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not YAML: {str(error).splitlines()[0]}") from error


def _is_larger(document: Any, values_max: int) -> bool:
    """Whether a document has too many values. Each use of an alias counts: a few lines with aliases can
    stand for billions of values, and an alias within itself for endlessly many."""
    waiting, values = [document], 0
    while waiting:
        value = waiting.pop()
        values += 1
        if isinstance(value, dict | list):
            values += len(value)
            waiting += value.values() if isinstance(value, dict) else value
        if values > values_max:
            return True
    return False


def _objects(documents: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """The Kubernetes objects in documents, including those in a List, as `kubectl get -o yaml` writes
    it."""
    for document in documents:
        if not isinstance(document, dict):
            continue
        items = document.get("items")
        if str(document.get("kind", "")).endswith("List") and isinstance(items, list):
            yield from _objects(items)
        else:
            yield document


def _manifest_problems(document: Mapping[str, Any]) -> Iterator[str]:
    version = document.get("apiVersion")
    if version != API_VERSION:
        yield f"apiVersion: expected {API_VERSION} or {V1BETA1}, got {shown(version)}"
    wrong = list(problems(document, Manifest, ""))
    if wrong:
        yield from (line.removeprefix(".") for line in wrong)
        return
    name, services = document["metadata"]["name"], document["spec"]["services"]
    if not _NAME.fullmatch(name) or len(name) > NAME_CHARS_MAX:
        yield (
            f"metadata.name: expected at most {NAME_CHARS_MAX} of a-z, 0-9 and -, starting and ending with"
            f" a letter or digit, got {shown(name)}"
        )
    if not 1 <= len(services) <= SERVICES_MAX:
        yield f"spec.services: expected 1 to {SERVICES_MAX} services, got {len(services)}"
    for service in services:
        if not _SERVICE_NAME.fullmatch(service):
            yield f"spec.services: expected a name of letters, digits and -, got {shown(service)}"
    folded = {service.lower() for service in services}
    if len(folded) < len(services):
        yield "spec.services: two names differ only in upper and lower case"
