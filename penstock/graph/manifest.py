"""The DynamoGraphDeployment API, `nvidia.com/v1alpha1`, checked into structs. Manifests of
`nvidia.com/v1beta1` are turned into this version first.

Typed are the fields that mean something to a process, and those that the operator turns into objects of
its own. Parts that reach a cluster as they stand (probes, most of a PodSpec) are plain objects, or only
known by name (`ACCEPTED`), so that a user's manifest works and a typing error in it is still found.
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
NAME_CHARS_MAX = 45  # Kubernetes gives 63 to a pod's labels; the service's name and a suffix join this one
SERVICES_MAX = 25  # as in the API's next version
_FILE_BYTES_MAX = 1024 * 1024
_DEPTH_MAX = 64  # of lists and objects within each other; manifests have a dozen
_VALUES_MAX = 50_000  # 25 services with hundreds of values each have a tenth


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


class _Manifest(msgspec.Struct, frozen=True, rename="camel"):
    """Base: camelCase names."""

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
    nodes: str | None = None  # of 0.4.0, which had no `multinode`


class Resources(_Manifest, frozen=True):
    """What a replica asks for, and what it may use."""

    requests: Amounts | None = None
    limits: Amounts | None = None
    claims: tuple[dict[str, Any], ...] = ()


class Container(_Manifest, frozen=True):
    """What a replica runs."""

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
    """Labels and annotations of a service's pods alone."""

    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class Multinode(_Manifest, frozen=True):
    """One worker that spans several nodes."""

    node_count: Annotated[int, Meta(ge=2)]


class SharedMemory(_Manifest, frozen=True):
    """The memory at /dev/shm."""

    disabled: bool = False
    size: Quantity | None = None


class Claim(_Manifest, frozen=True):
    """A PersistentVolumeClaim, to be made or there already. `mount_point` is of 0.4, where each service had
    its own; since then services name it in `volumeMounts`."""

    name: str
    create: bool = False
    storage_class: str | None = None
    size: Quantity | None = None
    volume_access_mode: (
        Literal["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"] | None
    ) = None
    mount_point: str | None = None


class ClaimMount(_Manifest, frozen=True):
    """Where a service sees a claim."""

    name: str
    mount_point: str | None = None
    use_as_compilation_cache: bool = False


class IngressTls(_Manifest, frozen=True):
    """The Secret with an ingress's certificate."""

    secret_name: str | None = None


class IngressSpec(_Manifest, frozen=True):
    """How a frontend is reached from outside of the cluster."""

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
    """Whether a DynamoGraphDeploymentScalingAdapter owns the number of replicas."""

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
    """The graph: its services, and the environment that all of them share."""

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

    api_version: str  # as it was written: messages about the manifest use that version's words
    kind: str
    metadata: Metadata
    spec: Spec

    ACCEPTED: ClassVar[frozenset[str]] = _names("status")


def parse_manifest(text: str, source: str) -> Manifest:
    """The one DynamoGraphDeployment in a YAML text; other documents in it are left alone.

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
    """A DynamoGraphDeployment, as it stands in a file or comes from a cluster, as a struct.

    Args:
        source: the file's name, for messages; empty: none.

    Raises:
        ConfigError: one line for each wrong field, `source: path: expected ..., got ...`.
    """
    return manifest_of(checked_document(document, source), document["apiVersion"])


def manifest_of(checked: Mapping[str, Any], api_version: str) -> Manifest:
    """What `checked_document` returned, as a struct. `api_version` is that in which it was written."""
    return msgspec.structs.replace(converted(checked, Manifest), api_version=api_version)


def checked_document(document: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A DynamoGraphDeployment of any version as one of v1alpha1, in which all that is stated is right.
    Arguments and errors as of `checked_manifest`."""
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
    """Lines of a message, each with the file that it is about in front."""
    return "\n".join(f"{source}: {line}" if source else line for line in lines)


def with_frontend(graph: dict[str, Any]) -> dict[str, Any]:
    """A graph with a frontend of its own, where only its workers have one each, as a sidecar: those take
    requests from a gateway that chooses the worker, which is what a frontend does here."""
    services: dict[str, dict[str, Any]] = graph["spec"]["services"]
    has_sidecars = any(service.get("frontendSidecar") is not None for service in services.values())
    has_frontend = any(service.get("componentType") in FRONTEND_TYPES for service in services.values())
    if not has_sidecars or has_frontend or "frontend" in {name.lower() for name in services}:
        return graph
    added = {"Frontend": {"componentType": "frontend"}, **services}
    return {**graph, "spec": {**graph["spec"], "services": added}}


class _Loader(yaml.SafeLoader):
    """With a limit on nesting, whose cost would grow with its square."""

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
    """Whether it has more values than that where each alias counts as often as it stands there: a few lines
    of them can stand for billions, and one within itself for endless ones."""
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
    """The Kubernetes objects in documents, also those within a List, as `kubectl get -o yaml` writes it."""
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
