"""Plans a service: decides its command, flags, image, replicas and nodes, before its objects are
rendered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from penstock.errors import ConfigError
from penstock.graph.container_command import ServiceKind
from penstock.graph.manifest import Env, Manifest, ServiceSpec
from penstock.graph.placeholders import for_kubelet, placeholder, with_references
from penstock.graph.services import Graph, Service
from penstock.kubernetes.api import Object
from penstock.operator import names
from penstock.operator.rendering.vllm_flags import leader_flags
from penstock.operator.settings import ClusterFacts, Note, RenderSettings
from penstock.options.config import FrontendOptions, WorkerOptions
from penstock.options.discovery_url import parse_discovery
from penstock.options.flags import build_options
from penstock.shapes import Role

_ANY_ADDRESS = "0.0.0.0"
_DEFAULT_DISCOVERY = "kubernetes:"
_NAME_CHARS_MAX = 63  # of a label's value and of a Service's name
_GPU_ENGINES = ("vllm",)
_LINK_FLAGS = {
    "link-secret-file": "secret",
    "link-tls-cert": "tls.crt",
    "link-tls-key": "tls.key",
    "link-tls-ca": "ca.crt",
}
"""Flags of the link, each with the file in the link's Secret that it names."""

_PORT_MAPPINGS = ("advertise-port", "kv-advertise-port")
"""Flags for a port mapping in front of a worker. Pods reach each other without one."""


class ServicePlan(msgspec.Struct, frozen=True):
    """The plan of one service. Raw fields are taken from the manifest unchanged."""

    graph: Graph
    graph_env: tuple[Env, ...]  # variables of all services
    spec: ServiceSpec
    service: Service
    options: FrontendOptions | WorkerOptions  # the operator's flags included
    args: tuple[str, ...]  # after `penstock`, in the form for the kubelet
    pod_spec: Object  # raw, without its mainContainer
    container: Object  # raw: its mainContainer
    annotations: dict[str, str]  # of the graph and the service, for all objects of the service
    labels: dict[str, str]
    image: str
    keeps_image: bool  # whether it is the manifest's image
    reports_metrics: bool
    topology_key: str
    restart_id: str
    priority_class_name: str
    manifest_engine_args: tuple[str, ...]  # without the flags of a worker on several nodes
    replicas: int
    nodes: int

    @property
    def name(self) -> str:
        """The service's key in the manifest."""
        return self.service.name

    @property
    def object_name(self) -> str:
        """The name of the service's Deployment and Service."""
        return names.object_name(self.graph.name, self.name)

    @property
    def role(self) -> str:
        """frontend, prefill, decode or aggregated."""
        return self.service.label

    @property
    def is_frontend(self) -> bool:
        """Whether the service is a frontend."""
        return self.service.kind is ServiceKind.FRONTEND

    @property
    def component_type(self) -> str:
        """The manifest's componentType; without one, what the command runs."""
        return self.spec.component_type or ("frontend" if self.is_frontend else "worker")

    @property
    def needs_gpu_stack(self) -> bool:
        """Whether the engine runs on GPUs."""
        return isinstance(self.options, WorkerOptions) and self.options.engine in _GPU_ENGINES

    @property
    def sized_for_other_engine(self) -> bool:
        """Whether the manifest's amounts are for an engine that was replaced by one without GPUs. For a
        frontend: whether the engines of all workers were."""
        workers = [one for one in self.graph.services if one.kind is ServiceKind.WORKER]
        concerned = workers if self.is_frontend else [self.service]
        return all(one.replaced_engine and one.flags.get("engine") not in _GPU_ENGINES for one in concerned)

    @property
    def discovers_by_api(self) -> bool:
        """Whether the service finds workers by the API server. Workers need no discovery: their pods are
        found."""
        return self.is_frontend and parse_discovery(self.options.discovery).kind == "kubernetes"

    @property
    def own_account(self) -> str:
        """The ServiceAccount in the manifest; empty if there is none."""
        return str(self.pod_spec.get("serviceAccountName") or self.pod_spec.get("serviceAccount") or "")

    @property
    def frontend_options(self) -> FrontendOptions:
        """The options of a frontend."""
        assert isinstance(self.options, FrontendOptions)
        return self.options

    @property
    def worker_options(self) -> WorkerOptions:
        """The options of a worker."""
        assert isinstance(self.options, WorkerOptions)
        return self.options

    @property
    def system_port(self) -> int:
        """The port of a worker's probes; -1: none."""
        port = self.worker_options.system_port
        assert port is not None
        return port

    def selector(self) -> dict[str, str]:
        """The label that selects the service's pods. A Deployment's selector cannot be changed."""
        return {names.SELECTOR: self.object_name}


class ServicePlanner:
    """Plans all services of a graph, and collects mistakes and notes."""

    def __init__(
        self,
        manifest: Manifest,
        graph: Graph,
        document: Mapping[str, Any],
        settings: RenderSettings,
        cluster: ClusterFacts,
    ) -> None:
        self._manifest = manifest
        self._graph = graph
        self._document = document
        self._settings = settings
        self._cluster = cluster
        self.wrong: list[str] = []
        self.notes: list[Note] = []

    def plans(self) -> list[ServicePlan]:
        """The plans, in the order of the manifest."""
        found = []
        for service in self._graph.services:
            try:
                found.append(self._plan(service))
            except ConfigError as error:
                where = f"spec.services.{service.name}"
                self.wrong += [f"{where}: {with_references(line)}" for line in str(error).splitlines()]
        return found

    def control(self, service: str, name: str) -> str:
        """The value of an annotation for the operator: the service's, else the graph's."""
        spec = self._manifest.spec.services[service]
        pods = spec.extra_pod_metadata
        nearest_first = (
            pods.annotations if pods else {},
            spec.annotations,
            self._manifest.spec.annotations,
            self._manifest.metadata.annotations,
        )
        return next((layer[name] for layer in nearest_first if name in layer), "")

    def _plan(self, service: Service) -> ServicePlan:
        spec = self._manifest.spec.services[service.name]
        self._check_name(service)
        pod_spec = dict(self._document["spec"]["services"][service.name].get("extraPodSpec") or {})
        container = dict(pod_spec.pop("mainContainer", None) or {})
        flags = self._flags(service)
        options = _options(service, flags)
        nodes = self._nodes(service, spec, options)
        group = leader_flags(nodes) if nodes > 1 else []
        running = msgspec.structs.replace(service, flags=flags, engine_args=(*service.engine_args, *group))
        image, keeps_image = self._image(service, container)
        return ServicePlan(
            graph=self._graph,
            graph_env=self._manifest.spec.envs,
            spec=spec,
            service=service,
            options=options,
            args=tuple(map(for_kubelet, running.argv())),
            pod_spec=pod_spec,
            container=container,
            annotations={**self._manifest.spec.annotations, **spec.annotations},
            labels={**self._manifest.spec.labels, **spec.labels},
            image=image,
            keeps_image=keeps_image,
            reports_metrics=self.control(service.name, names.ENABLE_METRICS) != "false",
            topology_key=self.control(service.name, names.TOPOLOGY_KEY) or self._settings.topology_key,
            restart_id=self._manifest.spec.restart.id if self._manifest.spec.restart else "",
            priority_class_name=self._manifest.spec.priority_class_name or "",
            manifest_engine_args=service.engine_args,
            replicas=self._replicas(service, spec),
            nodes=nodes,
        )

    def _check_name(self, service: Service) -> None:
        name = names.object_name(self._graph.name, service.name)
        if len(name) > _NAME_CHARS_MAX:
            raise ConfigError(
                f"its objects would be called {name}, which is longer than {_NAME_CHARS_MAX} characters;"
                " shorten its name or the graph's"
            )
        if service.kind is ServiceKind.FRONTEND and not name[0].isalpha():
            raise ConfigError(
                f"its Service would be called {name}, and a Service's name begins with a letter"
            )

    def _replicas(self, service: Service, spec: ServiceSpec) -> int:
        if spec.scaling_adapter is not None and spec.scaling_adapter.enabled:
            replicas = self._cluster.adapter_replicas.get(service.name, spec.replicas)
            if replicas != spec.replicas:
                adapter = names.object_name(self._graph.name, service.name)
                message = f"replicas: what its scaling adapter {adapter} says counts, not the manifest"
                self._note("AdapterScales", message, service)
            return replicas
        return spec.replicas

    def _nodes(self, service: Service, spec: ServiceSpec, options: FrontendOptions | WorkerOptions) -> int:
        """The number of nodes of one replica; 1 for engines that run on one node."""
        nodes = spec.multinode.node_count if spec.multinode else _nodes_of_old(spec)
        if nodes > 1 and not (isinstance(options, WorkerOptions) and options.engine in _GPU_ENGINES):
            kind = options.engine if isinstance(options, WorkerOptions) else "frontend"
            self._note("MultinodeIgnored", f"{kind} runs on one node", service)
            return 1
        return nodes

    def _image(self, service: Service, container: Mapping[str, Any]) -> tuple[str, bool]:
        own = container.get("image")
        if chosen := self.control(service.name, names.IMAGE):
            return chosen, False
        if not own:
            return self._settings.image, False
        if service.translated:
            self._note(
                "ImageReplaced", f"{own} does not hold Penstock; {self._settings.image} runs", service
            )
            return self._settings.image, False
        return own, True

    def _flags(self, service: Service) -> dict[str, str]:
        """The manifest's flags, overridden by the operator's."""
        given = _options(service, service.flags)
        replaced = [name for name in service.flags if name.startswith("link-")]
        if replaced:
            words = ", ".join(f"--{name}" for name in replaced)
            self._note("FlagsReplaced", f"{words}: the operator makes the link's secrets", service)
        flags = {name: value for name, value in service.flags.items() if name not in _PORT_MAPPINGS}
        flags |= {
            "namespace": self._graph.name,
            "discovery": self._discovery(service, given),
        }
        flags |= {flag: f"{names.LINK_FOLDER}/{file}" for flag, file in _LINK_FLAGS.items()}
        if not _is_set(service, "drain-s", "PENSTOCK_DRAIN_S"):
            flags["drain-s"] = f"{self._settings.drain_s:g}"
        if isinstance(given, FrontendOptions):
            flags["link-tls-server-name"] = names.LINK_SERVER_NAME
            if not _is_set(service, "http-host", "PENSTOCK_HTTP_HOST", "DYN_HTTP_HOST"):
                flags["http-host"] = _ANY_ADDRESS
            if given.http_port == 0:  # a free port, which a Service could not name
                flags["http-port"] = str(names.HTTP_PORT)
            return flags
        return flags | {
            "instance-id": placeholder("POD_NAME"),
            "host": _ANY_ADDRESS,
            "port": str(names.LINK_PORT),
            "advertise-host": placeholder("POD_IP"),
            "kv-port": str(names.KV_PORT),
            "system-port": str(given.system_port or names.SYSTEM_PORT),
        }

    def _discovery(self, service: Service, given: FrontendOptions | WorkerOptions) -> str:
        chosen = self.control(service.name, names.DISCOVERY)
        if chosen:
            try:
                kind = parse_discovery(chosen).kind
            except ConfigError as error:
                raise ConfigError(f"annotation {names.DISCOVERY}: {error}") from None
            if kind == "file":
                raise ConfigError(
                    f"annotation {names.DISCOVERY}: pods have no common folder; expected etcd://..."
                )
            return chosen
        return given.discovery if parse_discovery(given.discovery).kind == "etcd" else _DEFAULT_DISCOVERY

    def _note(self, reason: str, message: str, service: Service) -> None:
        self.notes.append(Note(reason, with_references(message), service.name))


def serving_roles(plans: Iterable[ServicePlan]) -> tuple[str, ...]:
    """The roles of a graph, in the order in which a request passes them."""
    present = {plan.role for plan in plans}
    order = (ServiceKind.FRONTEND.value, *(role.value for role in Role))
    return tuple(role for role in order if role in present)


def _options(service: Service, flags: Mapping[str, str]) -> FrontendOptions | WorkerOptions:
    if service.kind is ServiceKind.FRONTEND:
        return build_options(FrontendOptions, flags, service.env)
    return build_options(WorkerOptions, flags, service.env, service.engine_args)


def _is_set(service: Service, flag: str, *variables: str) -> bool:
    return flag in service.flags or any(service.env.get(variable) for variable in variables)


def _nodes_of_old(spec: ServiceSpec) -> int:
    """The number of nodes in `resources`, where version 0.4.0 of the manifest API had it."""
    for place in ("limits", "requests"):
        amounts = getattr(spec.resources, place, None)
        if amounts is not None and amounts.nodes is not None:
            if not amounts.nodes.isascii() or not amounts.nodes.isdigit() or int(amounts.nodes) < 1:
                raise ConfigError(
                    f"resources.{place}.nodes: expected a whole number from 1, got {amounts.nodes!r}"
                )
            return int(amounts.nodes)
    return 1
