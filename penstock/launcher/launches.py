"""The command line and the environment of each replica's process. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from penstock.errors import ConfigError
from penstock.graph import Graph, Service
from penstock.launcher.gpus import VISIBLE_VARIABLE
from penstock.net.listening import INHERITED_VARIABLE
from penstock.options.config import SUPERVISOR_VARIABLE, FrontendOptions, WorkerOptions
from penstock.options.flags import build_options

_LOOPBACK = "127.0.0.1"
_GPU_ENGINES = ("vllm",)
# A fixed port suits one worker in a pod; here many workers share the machine. And what this process
# inherited is not for them.
_DROPPED_VARIABLES = ("DYN_SYSTEM_PORT", "PENSTOCK_SYSTEM_PORT", INHERITED_VARIABLE)
# Processes that each use all cores for matrix products slow each other down.
_SINGLE_THREADED = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Launch(msgspec.Struct, frozen=True):
    """The process of one replica, as it is to be started."""

    service: str
    name: str  # "prefill-0"
    instance_id: str  # "local-prefill-0"
    argv: tuple[str, ...]  # after `penstock`
    env: dict[str, str]
    drain_s: float
    url: str = ""  # of a frontend
    gpus: tuple[str, ...] = ()


class Site(msgspec.Struct, frozen=True):
    """The settings that all replicas of a running graph share."""

    graph: Graph
    discovery: Path
    secret: Path
    http_host: str
    environ: Mapping[str, str]
    supervisor_pid: int


def labels(graph: Graph) -> dict[str, str]:
    """The label of each service: its role, and its name as well where two services have the same role."""
    taken = [service.label for service in graph.services]
    return {
        service.name: service.label
        if taken.count(service.label) == 1
        else f"{service.label}-{service.name.lower()}"
        for service in graph.services
    }


def gpus_needed(service: Service) -> int:
    """The number of GPUs for one replica. Engines on the CPU need none, whatever the manifest reserves."""
    return service.gpus if service.flags.get("engine") in _GPU_ENGINES else 0


def check_gpus(graph: Graph, available: int) -> list[str]:
    """Warnings about GPUs that the manifest reserves and the graph does not use.

    Raises:
        ConfigError: the machine has too few GPUs for the engines that need them.
    """
    needs = {service.name: service.replicas * gpus_needed(service) for service in graph.services}
    if sum(needs.values()) > available:
        wanted = ", ".join(f"{name} {count}" for name, count in needs.items() if count)
        raise ConfigError(
            f"{graph.name} needs {sum(needs.values())} GPUs ({wanted}), this machine has {available};"
            " try --engine reference --model MODEL"
        )
    spared = [service.name for service in graph.services if service.gpus and not gpus_needed(service)]
    return [f"{', '.join(spared)}: no GPUs are used, this engine runs on the CPU"] if spared else []


def plan_worker(site: Site, service: Service, index: int, gpus: Sequence[str]) -> Launch:
    """The launch of a worker's replica number `index`."""
    name = f"{labels(site.graph)[service.name]}-{index}"
    instance_id = f"{site.graph.name}-{name}"
    flags = service.flags | {
        "host": _LOOPBACK,
        "port": "0",
        "advertise-host": _LOOPBACK,
        "advertise-port": "0",
        "kv-port": "0",
        "kv-advertise-port": "0",
        "instance-id": instance_id,
        "system-port": "0",
        **_shared_flags(site),
    }
    env = _environment(site, service, _SINGLE_THREADED)
    if gpus:
        env[VISIBLE_VARIABLE] = ",".join(gpus)
    options = build_options(WorkerOptions, flags, env, service.engine_args)
    argv = msgspec.structs.replace(service, flags=flags).argv()
    return Launch(service.name, name, instance_id, tuple(argv), env, options.drain_s, gpus=tuple(gpus))


def plan_frontend(site: Site, service: Service, index: int, port: int) -> Launch:
    """The launch of a frontend's replica number `index`, listening on `port`."""
    name = f"{labels(site.graph)[service.name]}-{index}"
    flags = {
        "expect": ",".join(site.graph.roles),
        **service.flags,
        "http-host": site.http_host,
        "http-port": str(port),
        **_shared_flags(site),
    }
    env = _environment(site, service, {})
    options = build_options(FrontendOptions, flags, env)
    argv = msgspec.structs.replace(service, flags=flags).argv()
    url = f"{'https' if options.http_tls_cert else 'http'}://{_url_host(site.http_host)}:{port}"
    instance_id = f"{site.graph.name}-{name}"
    return Launch(service.name, name, instance_id, tuple(argv), env, options.drain_s, url=url)


def _url_host(host: str) -> str:
    """The host of a URL by which this machine reaches a server that listens on `host`."""
    if host in (_LOOPBACK, "0.0.0.0", "::"):
        return "localhost"
    return f"[{host}]" if ":" in host else host


def manifest_port(service: Service) -> int:
    """The port that a frontend's manifest asks for."""
    return build_options(FrontendOptions, service.flags, service.env).http_port


def lowest_free_index(taken: Iterable[int]) -> int:
    """The smallest number that no replica has, stopping replicas included."""
    used = set(taken)
    return next(index for index in range(len(used) + 1) if index not in used)


def _shared_flags(site: Site) -> dict[str, str]:
    return {
        "namespace": site.graph.namespace,
        "discovery": f"file:{site.discovery}",
        "link-secret-file": str(site.secret),
    }


def _environment(site: Site, service: Service, defaults: Mapping[str, str]) -> dict[str, str]:
    """The defaults, overridden by this process's environment, overridden by the manifest's."""
    env = {**defaults, **site.environ, **service.env}
    for variable in _DROPPED_VARIABLES:
        env.pop(variable, None)
    return env | {SUPERVISOR_VARIABLE: str(site.supervisor_pid), "PYTHONUNBUFFERED": "1"}
