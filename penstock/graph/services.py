"""Builds a `Graph` from a manifest: its services as Penstock commands, for the launcher and the
operator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from penstock.errors import ConfigError
from penstock.graph.container_command import (
    Command,
    ServiceKind,
    expand_references,
    parse_command,
    unresolved_reference,
)
from penstock.graph.manifest import (
    FRONTEND_TYPES,
    Container,
    Env,
    Manifest,
    ServiceSpec,
    Spec,
    in_source,
    parse_manifest,
)
from penstock.graph.placeholders import names_used, placeholder, with_references
from penstock.graph.versions import in_words_of
from penstock.options.config import FrontendOptions, WorkerOptions
from penstock.options.flags import build_options, flags_of
from penstock.shapes import Role

_NOT_RUN = {"planner": "planners", "epp": "endpoint pickers"}
_DEFAULT_ENGINE = flags_of(WorkerOptions)["engine"].default
_DEFAULT_FRONTEND = ("python3", "-m", "dynamo.frontend")


class Service(msgspec.Struct, frozen=True):
    """One service of a graph: a Penstock command and its number of replicas."""

    name: str  # the key in spec.services
    kind: ServiceKind
    role: Role | None  # None for frontends
    replicas: int
    flags: dict[str, str]  # names without the leading dashes, checked against config.py
    engine_args: tuple[str, ...]
    env: dict[str, str]
    gpus: int  # per replica
    translated: bool = False  # whether its command was Dynamo's
    replaced_engine: str = ""  # the manifest's engine, if an override replaced it

    @property
    def label(self) -> str:
        """The short name: frontend, prefill, decode or aggregated."""
        return (self.role or self.kind).value

    def argv(self) -> list[str]:
        """The words after `penstock`."""
        flags = [word for name, value in self.flags.items() for word in (f"--{name}", value)]
        tail = ["--", *self.engine_args] if self.engine_args else []
        return [self.kind.value, *flags, *tail]


class Graph(msgspec.Struct, frozen=True):
    """The services of a manifest. `notes` say which parts of the manifest have no effect."""

    name: str
    namespace: str
    services: tuple[Service, ...]
    notes: tuple[str, ...] = ()

    @property
    def roles(self) -> tuple[Role, ...]:
        """The workers' roles with at least one replica, in the order in which a request passes them."""
        present = {service.role for service in self.services if service.replicas}
        return tuple(role for role in Role if role in present)


class Overrides(msgspec.Struct, frozen=True):
    """Values from a command line or an annotation that override the manifest's workers. Empty: no
    override."""

    engine: str = ""
    model: str = ""


class ClusterRules(msgspec.Struct, frozen=True):
    """Rules for a graph that runs on a cluster."""

    variables: tuple[str, ...] = ()
    """Variables that the cluster sets in each pod, besides those that the manifest takes from Secrets and
    so on."""

    overrides: Mapping[str, Overrides] = {}
    """Overrides of single services; they take precedence over those of the graph."""


def load_graph(path: Path, overrides: Overrides = Overrides()) -> Graph:  # noqa: B008 - frozen
    """The graph of a manifest file.

    A relative model folder is looked up in the file's folder, in the parent of that, and in the working
    directory, in this order. If there is none, the value is taken for a model's name. A model from
    `overrides` is looked up in the working directory only.

    Raises:
        ConfigError: one line for each mistake.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"cannot read {path}: {reason}") from error
    graph = build_graph(parse_manifest(text, path.name), overrides, path.name)
    folder = path.resolve().parent
    places = [Path.cwd()] if overrides.model else [folder, folder.parent, Path.cwd()]
    services = tuple(_with_model_found(service, places) for service in graph.services)
    return msgspec.structs.replace(graph, services=services)


def build_graph(
    manifest: Manifest,
    overrides: Overrides,
    source: str = "manifest",
    cluster: ClusterRules | None = None,
) -> Graph:
    """The graph of a checked manifest.

    Args:
        cluster: None where no cluster runs it. With one, variables that it sets are held open
            (placeholders.py), and a model is served under the name that the manifest gives it, as Dynamo
            does.

    Raises:
        ConfigError: one line for each mistake, `source: path: reason`.
    """
    builder = _Builder(manifest.spec, overrides, cluster)
    services = builder.services()
    namespace = builder.namespace()
    if builder.wrong:
        wrong = [in_words_of(manifest.api_version, with_references(line)) for line in builder.wrong]
        raise ConfigError(in_source(wrong, source))
    name = manifest.metadata.name
    return Graph(name, namespace or name, services, tuple(map(with_references, builder.notes)))


class _Builder:
    """Builds all services, and collects all mistakes instead of stopping at the first."""

    def __init__(self, spec: Spec, overrides: Overrides, cluster: ClusterRules | None) -> None:
        self._spec = spec
        self._overrides = overrides
        self._cluster = cluster
        self.wrong: list[str] = []
        self.notes: list[str] = []

    def namespace(self) -> str:
        """The Dynamo namespace of all services; empty if none has one."""
        names = sorted(
            {spec.dynamo_namespace for spec in self._spec.services.values() if spec.dynamo_namespace}
        )
        if len(names) > 1:
            self.wrong.append(f"spec.services: expected one dynamoNamespace, got {', '.join(names)}")
        return names[0] if names else ""

    def services(self) -> tuple[Service, ...]:
        commands = dict(self._commands())
        has_prefill = any(command.flags.get("role") == Role.PREFILL for command in commands.values())
        given = [word for command in commands.values() for word in command.workers_args]
        services = []
        for name, command in commands.items():
            if command.decode_or_aggregated:
                command.flags["role"] = Role.DECODE if has_prefill else Role.AGGREGATED
            if command.flags.get("engine") == "vllm":
                command.engine_args = [*given, *command.engine_args]
            with self._noting(name):
                services.append(self._service(name, command))
        if not self.wrong:
            kinds = {service.kind for service in services}
            self.wrong += [
                f"spec.services: there is no {kind}" for kind in ServiceKind if kind not in kinds
            ]
        return tuple(services)

    def _commands(self) -> Iterator[tuple[str, Command]]:
        for name, spec in self._spec.services.items():
            if spec.component_type in _NOT_RUN:
                self.notes.append(f"{name}: {_NOT_RUN[spec.component_type]} are not run")
                continue
            if spec.frontend_sidecar is not None:
                self.notes.append(f"{name}: its frontend sidecar is not run, the graph's frontend is")
            with self._noting(name):
                command = self._command(name, spec)
                if command.not_run:
                    self.notes.append(f"{name}: not run, {command.not_run}")
                else:
                    yield name, command

    def _command(self, name: str, spec: ServiceSpec) -> Command:
        container = _container(spec)
        env = self._environment(name, (*self._spec.envs, *spec.envs, *container.env))
        is_frontend = spec.component_type in FRONTEND_TYPES
        argv = [*container.command, *container.args]
        if self._cluster is not None and (spec.env_from_secret or container.env_from):
            env |= {used: placeholder(used) for used in names_used(argv, env)}  # they may come from there
        if is_frontend and (not argv or argv == ["python3"]):
            argv = list(_DEFAULT_FRONTEND)
        elif is_frontend and argv[0] == "-m":  # Dynamo's operator says python3 where a manifest does not
            argv = [_DEFAULT_FRONTEND[0], *argv]
        command = parse_command(argv, env)
        if spec.component_type is not None and is_frontend != (command.kind is ServiceKind.FRONTEND):
            raise ConfigError(
                f"componentType is {spec.component_type}, but its command runs a {command.kind}"
            )
        return msgspec.structs.replace(command, env=env | command.env)

    def _environment(self, name: str, entries: Iterable[Env]) -> dict[str, str]:
        """The environment. Later entries override earlier ones, and may refer to them as `$(NAME)`."""
        env = (
            {variable: placeholder(variable) for variable in self._cluster.variables}
            if self._cluster
            else {}
        )
        for entry in entries:
            if entry.value_from is not None and self._cluster is not None:
                env[entry.name] = placeholder(entry.name)
            elif entry.value_from is not None:
                self.notes.append(
                    f"{name}: {entry.name} is set by the cluster; set it yourself if it is needed"
                )
            elif entry.value is not None:
                value = expand_references(entry.value, env)
                left = unresolved_reference(value)
                if left and self._cluster is None:
                    self.notes.append(f"{name}: {entry.name} is left out, for {left} is not set here")
                else:
                    env[entry.name] = value
        return env

    def _service(self, name: str, command: Command) -> Service:
        role = None
        replaced_engine = ""
        self.notes += [
            f"{name}: {', '.join(what)}: ignored, {why}" for why, what in command.ignored.items()
        ]
        if command.kind is ServiceKind.WORKER:
            replaced_engine = self._override(name, command)
            role = build_options(WorkerOptions, command.flags, command.env, command.engine_args).role
        else:
            if build_options(FrontendOptions, command.flags, command.env).http_port == -1:
                raise ConfigError("--http-port: the frontend of a graph needs a port")
        spec = self._spec.services[name]
        return Service(
            name=name,
            kind=command.kind,
            role=role,
            replicas=spec.replicas,
            flags=command.flags,
            engine_args=tuple(command.engine_args),
            env=command.env,
            gpus=_gpus(spec),
            translated=command.translated,
            replaced_engine=replaced_engine,
        )

    def _override(self, name: str, command: Command) -> str:
        """Apply the overrides to a command. Returns the engine that was replaced; empty if none was."""
        own = self._cluster.overrides.get(name) if self._cluster else None
        engine = (own and own.engine) or self._overrides.engine
        model = (own and own.model) or self._overrides.model
        if self._cluster is not None and command.flags.get("model"):
            command.flags.setdefault("served-model-name", _model_name(command.flags["model"]))
        before = command.flags.get("engine") or _DEFAULT_ENGINE
        if engine:
            command.flags["engine"] = engine
            if command.engine_args and engine != "vllm":
                self.notes.append(f"{name}: {' '.join(command.engine_args)} is for vLLM and is ignored")
                command.engine_args = []
        if model:
            command.flags["model"] = model
        return before if engine and engine != before else ""

    @contextmanager
    def _noting(self, name: str) -> Iterator[None]:
        try:
            yield
        except ConfigError as error:
            self.wrong += [f"spec.services.{name}: {line}" for line in str(error).splitlines()]


def _container(spec: ServiceSpec) -> Container:
    pod = spec.extra_pod_spec
    return pod.main_container if pod and pod.main_container else Container()


def _model_name(model: str) -> str:
    """The served name of a model without an explicit one: the model's name, or its folder's."""
    return Path(model).name if model.startswith(("/", ".")) else model


def _gpus(spec: ServiceSpec) -> int:
    """The GPUs of one replica: from its limits, else its requests."""
    resources = spec.resources
    for place, amounts in (
        ("limits", resources and resources.limits),
        ("requests", resources and resources.requests),
    ):
        if amounts and amounts.gpu is not None:
            if not amounts.gpu.isascii() or not amounts.gpu.isdigit():
                raise ConfigError(f"resources.{place}.gpu: expected a whole number, got {amounts.gpu!r}")
            return int(amounts.gpu)
    return 0


def _with_model_found(service: Service, places: Sequence[Path]) -> Service:
    model = service.flags.get("model", "")
    if not model or Path(model).is_absolute():
        return service
    for place in places:
        if (place / model).is_dir():
            flags = {**service.flags, "model": str((place / model).resolve())}
            return msgspec.structs.replace(service, flags=flags)
    return service
