"""One process of a graph: its options in, a running frontend or worker out.

The only place where concrete adapters are chosen: discovery, engine, KV transfer, store of responses. An
adapter's module is imported when it is chosen, so a frontend never loads numpy, and a worker never loads an
HTTP server.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import secrets
import signal
import socket
import time
from collections.abc import Callable, Collection, Coroutine, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from penstock.discovery.file import FileDiscovery
from penstock.engines.settings import SchedulerSettings
from penstock.errors import ConfigError, PenstockError
from penstock.link.secret import LinkSecret
from penstock.link.settings import ClientSettings, ServerSettings, TlsSettings
from penstock.link.tls import renewed_client_context
from penstock.logs.setup import setup_logging
from penstock.metrics import Metrics
from penstock.net.address import is_loopback, split_address
from penstock.net.listening import inherited_listener
from penstock.options.config import SECRET_VARIABLE, FrontendOptions, WorkerOptions
from penstock.options.discovery_url import (
    ETCD_PASSWORD_VARIABLE,
    DiscoveryUrl,
    discovery_directory,
    parse_discovery,
)
from penstock.ports import ChatParsers, Discovery, Engine, KvTransfer, ResponseStore, Tracing
from penstock.shapes import Incarnation, Role

log = logging.getLogger("penstock.process")

GC_ALLOCATIONS = 10_000
"""Net allocations of a frontend between two looks for cycles among young objects; Python's 700 come with
every few requests, and cost 3 % of its CPU."""

OTLP_ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""OpenTelemetry's: where traces go."""

DESCRIPTORS = 32_768
"""Open files and connections that a process asks the system for: of a frontend's clients and workers, of a
worker's frontends and the readers of its KV."""


def run(main: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    """Run a process's coroutine; SIGTERM and SIGINT set its stop event, a second one ends it at once.

    Errors of the tree are raised as they are, one of several when tasks failed together.
    """

    async def with_signals() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def interrupted(number: int) -> None:
            if stop.is_set():
                log.warning("%s again: ending without waiting", signal.Signals(number).name)
                logging.shutdown()
                os._exit(128 + number)  # whatever still runs here; what is lost goes on elsewhere
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, interrupted, number)
        await main(stop)

    _raise_descriptor_limit()
    with _one_error(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(with_signals())


def run_frontend(options: FrontendOptions) -> None:
    """Serve HTTP until a signal. Raises ConfigError when an option or address is wrong."""
    setup_logging(options.log_level, options.log_format)
    from penstock.frontend.app import App
    from penstock.frontend.http.server import serve
    from penstock.frontend.settings import FrontendSettings
    from penstock.options.routing import router_settings
    from penstock.router.router import Router

    routing = router_settings(options)
    deadlines = routing.deadlines
    settings = FrontendSettings(
        host=options.http_host,
        port=options.http_port,
        api_key=options.api_key,
        api_keys_file=options.api_keys_file,
        uds=options.uds,
        root_path=options.root_path,
        max_body_bytes=options.max_body_bytes,
        cors_origins=options.cors_origins,
        sse_keep_alive_s=options.sse_keep_alive_s,
        stored_response_age_s=options.stored_response_age_s,
        tls_cert=options.http_tls_cert,
        tls_key=options.http_tls_key,
        tokenizing=msgspec.structs.replace(FrontendSettings().tokenizing, max_wait_ms=options.max_wait_ms),
        prepare_timeout_s=min(deadlines.queue_s, deadlines.request_s),
        request_timeout_s=2 * deadlines.request_s,
    )
    link_settings = ClientSettings(secret=_link_secret(options), tls=_tls(options))
    if link_settings.tls is not None:
        renewed_client_context(link_settings.tls)  # files that cannot be used refuse to start
    inherited = inherited_listener(os.environ)

    async def main(stop: asyncio.Event) -> None:
        metrics = Metrics()
        discovery = _discovery(options)
        store = _response_store(options, metrics)
        metrics.watch_discovery(lambda: discovery.trouble)
        frontend_id = _unique_name("frontend")
        router = Router(discovery, routing, link_settings, metrics.router, frontend_id=frontend_id)
        tracing = _tracing("penstock-frontend", frontend_id)
        async with asyncio.TaskGroup() as tasks:
            app = App(router, settings, metrics, _chat_parsers(), store, tracing)
            following = [tasks.create_task(router.run(app.prepare))]
            if store is not None:
                following.append(tasks.create_task(store.check()))
            await serve(app, settings, stop=stop, grace_s=options.drain_s, inherited=inherited)
            for task in following:
                task.cancel()
        if tracing is not None:
            await tracing.close()
        if store is not None:
            await store.close()
        await discovery.close()

    # What is imported stays for good, and looking through it would stop all streams for 30 ms; nearly all
    # that a request allocates is freed by its reference counts.
    gc.freeze()
    gc.set_threshold(GC_ALLOCATIONS)
    run(main)


def run_worker(options: WorkerOptions) -> None:
    """Serve attempts until a signal, then drain. Raises ConfigError; RemoteError when the engine dies."""
    setup_logging(options.log_level, options.log_format)
    from penstock.worker.metrics import WorkerMetrics
    from penstock.worker.worker import Worker, WorkerSettings

    instance_id = options.instance_id or _unique_name(options.role)
    incarnation = Incarnation(instance_id, epoch=int(time.time() * 1000))
    settings = WorkerSettings(
        incarnation=incarnation,
        role=options.role,
        advertise_host=options.advertise_host,
        advertise_port=options.advertise_port,
        max_wait_ms=options.max_wait_ms,
        max_waiting=options.max_waiting,
        drain_s=options.drain_s,
        aliases=options.served_names[1:],
        kv_events=options.kv_events == "on",
    )
    link_settings = ServerSettings(
        host=options.host, port=options.port, secret=_link_secret(options), tls=_tls(options)
    )
    engine = _engine(options, incarnation)

    async def main(stop: asyncio.Event) -> None:
        discovery = _discovery(options)
        tracing = _tracing("penstock-worker", instance_id)
        metrics = WorkerMetrics()
        worker = Worker(engine, discovery, settings, link_settings, metrics=metrics, tracing=tracing)
        async with contextlib.AsyncExitStack() as around:
            if tracing is not None:
                around.push_async_callback(tracing.close)
            if options.system_port != -1:
                from penstock.worker.probes import probes

                def exposition() -> bytes:
                    return metrics.render() + engine.exposition()

                port = options.system_port
                await around.enter_async_context(probes(options.host, port, worker.health, exposition))
            await worker.run(stop)
        await discovery.close()

    run(main)


# --- adapters ---------------------------------------------------------------------------------------


def _discovery(options: FrontendOptions | WorkerOptions) -> Discovery:
    url = parse_discovery(options.discovery)
    match url.kind:
        case "file":
            return FileDiscovery(discovery_directory(url, options.namespace, os.environ))
        case "etcd":
            return _etcd_discovery(options, url)
        case "kubernetes":
            return _kubernetes_discovery(options, url)


def _kubernetes_discovery(options: FrontendOptions | WorkerOptions, url: DiscoveryUrl) -> Discovery:
    from penstock.discovery.kubernetes import LINK_PORT, KubernetesDiscovery

    if isinstance(options, WorkerOptions):
        # Its pod says who and where it is, so here it must be the same.
        if not options.instance_id:
            raise ConfigError("--instance-id: with --discovery kubernetes: it is the name of the pod")
        if not options.port:
            raise ConfigError(
                f"--port: with --discovery kubernetes: it is the port that the pod names {LINK_PORT!r}"
            )
        return KubernetesDiscovery(None, "", options.namespace)
    if find_spec("lightkube") is None:
        raise ConfigError(
            "--discovery: kubernetes needs more packages: pip install 'penstock-llm[kubernetes]'"
        )
    from penstock.kubernetes.client import connect, own_namespace

    return KubernetesDiscovery(connect(), url.location or own_namespace(), options.namespace)


def _etcd_discovery(options: FrontendOptions | WorkerOptions, url: DiscoveryUrl) -> Discovery:
    if find_spec("httpx2") is None:
        raise ConfigError("--discovery: etcd needs one more package: pip install 'httpx2>=2.12,<3'")
    from penstock.discovery.etcd import EtcdDiscovery
    from penstock.discovery.etcd_settings import EtcdSettings

    password = os.environ.get(ETCD_PASSWORD_VARIABLE, "")
    if options.etcd_user and not password:
        raise ConfigError(f"--etcd-user: needs its password in {ETCD_PASSWORD_VARIABLE}")
    scheme = "https" if url.tls else "http"
    members = url.location.split(",")
    if options.etcd_user and not url.tls and not all(is_loopback(split_address(m)[0]) for m in members):
        log.warning(
            "--discovery: etcd:// sends the password of --etcd-user and all other data unencrypted to %s;"
            " use etcds:// for TLS",
            url.location,
        )
    settings = EtcdSettings(
        endpoints=tuple(f"{scheme}://{member}" for member in members),
        namespace=options.namespace,
        user=options.etcd_user,
        password=password,
        ca_file=options.etcd_ca,
        cert_file=options.etcd_cert,
        key_file=options.etcd_key,
    )
    return EtcdDiscovery(settings)


def _response_store(options: FrontendOptions, metrics: Metrics) -> ResponseStore | None:
    """None for the frontend's own memory."""
    if options.response_store == "memory":
        return None
    if options.response_store == "none":
        from penstock.frontend.responses_api.memory_store import MemoryResponseStore

        return MemoryResponseStore(max_responses=0, max_bytes=0, max_age_s=0.0)
    if find_spec("redis") is None:
        raise ConfigError("--response-store: needs one more package: pip install 'penstock-llm[redis]'")
    from penstock.frontend.responses_api.redis_store import (
        RedisResponseStore,
        RedisSettings,
        parse_redis_url,
    )

    store_settings = RedisSettings(
        address=parse_redis_url(options.response_store),
        namespace=options.namespace,
        age_s=options.stored_response_age_s,
    )
    return RedisResponseStore(store_settings, metrics.count_store_failures().inc)


def _engine(options: WorkerOptions, incarnation: Incarnation) -> Engine:
    if options.engine == "reference":
        return _reference_engine(options, incarnation)
    make = _sim_engine if options.engine == "sim" else _vllm_engine
    return make(options, incarnation)


def _own_name(options: WorkerOptions) -> str:
    """The model's name, for engines and routers, which know no aliases; empty: the folder's."""
    return next(iter(options.served_names), "")


def _reference_engine(options: WorkerOptions, incarnation: Incarnation) -> Engine:
    from penstock.engines.reference.engine import ReferenceSettings, reference_engine
    from penstock.frontend.parsers.built_in import REASONING_MARKS, TOOL_FORMATS

    _check_parser("--tool-call-parser", options.tool_call_parser, TOOL_FORMATS)
    _check_parser("--reasoning-parser", options.reasoning_parser, REASONING_MARKS)
    if not Path(options.model).is_dir():
        raise ConfigError(
            f"--model: {options.model} is not a folder; the reference engine needs a model folder,"
            " only --engine vllm accepts a model's name"
        )
    settings = ReferenceSettings(
        model=options.model,
        served_name=_own_name(options),
        tool_parser=options.tool_call_parser,
        reasoning_parser=options.reasoning_parser,
        reasoning_marks=REASONING_MARKS.get(options.reasoning_parser, ("", "")),
        scheduler=_scheduler(options, incarnation),
        **_given(options, "block_size", "max_model_len", "kv_cache_bytes"),
    )
    return reference_engine(settings, _transfer(options, incarnation))


def _check_parser(flag: str, name: str, known: Collection[str]) -> None:
    if name and name not in known:
        raise ConfigError(f"{flag}: the reference engine has no parser {name}; it has {', '.join(known)}")


def _sim_engine(options: WorkerOptions, incarnation: Incarnation) -> Engine:
    from penstock.engines.sim import SimSettings, sim_engine

    given = _given(options, "block_size", "max_model_len")
    if options.sim_cost_model:
        given["cost_model"] = options.sim_cost_model
    folder = Path(options.model)
    settings = SimSettings(
        model=_own_name(options) or folder.name,
        speedup=options.sim_speedup,
        assets=str(folder) if folder.is_dir() else "",
        scheduler=_scheduler(options, incarnation),
        **given,
    )
    if options.sim_cache_tokens is not None:
        blocks = max(1, options.sim_cache_tokens // settings.block_size)
        settings = msgspec.structs.replace(settings, total_blocks=blocks)
    return sim_engine(settings, _transfer(options, incarnation))


def _vllm_engine(options: WorkerOptions, incarnation: Incarnation) -> Engine:
    from penstock.engines.vllm.engine import VllmEngine
    from penstock.engines.vllm.settings import VllmSettings

    given = _given(
        options, "block_size", "max_model_len", "max_running", "max_batch_tokens", "kv_cache_bytes"
    )
    flags = {"--tool-call-parser": options.tool_call_parser, "--reasoning-parser": options.reasoning_parser}
    parsers = [part for flag, name in flags.items() if name for part in (flag, name)]
    settings = VllmSettings(
        model=options.model,
        role=options.role,
        incarnation=incarnation,
        served_name=_own_name(options),
        host=options.advertise_host or options.host,
        kv_port=options.kv_port,
        handoff_ttl_s=options.handoff_ttl_s,
        engine_args=(*parsers, *options.engine_args),
        **given,
    )
    return VllmEngine(settings)


def _chat_parsers() -> ChatParsers | None:
    """vLLM's, where it is installed and not too old; None for the built-in ones."""
    from penstock.engines.vllm.installed import OLDEST_TESTED, installed_version, minor

    if minor(installed_version()) < OLDEST_TESTED:
        return None
    from penstock.engines.vllm.parsing import VllmParsers

    return VllmParsers()


def _scheduler(options: WorkerOptions, incarnation: Incarnation) -> SchedulerSettings:
    return SchedulerSettings(
        holder=incarnation,
        handoff_ttl_s=options.handoff_ttl_s,
        **_given(options, "max_batch_tokens", "max_running"),
    )


def _transfer(options: WorkerOptions, incarnation: Incarnation) -> KvTransfer | None:
    """None for aggregated workers: nobody hands over to them, nor they to anybody."""
    if options.role is Role.AGGREGATED:
        return None
    kind = options.transfer
    if kind == "auto":
        kind = "nixl" if find_spec("nixl") is not None and options.engine != "sim" else "tcp"
    where: dict[str, Any] = {
        "host": options.host,
        "port": options.kv_port,
        "advertise_host": options.advertise_host or options.host,
        "advertise_port": options.kv_advertise_port,
    }
    if kind == "nixl":
        from penstock.transfer.nixl import NixlTransfer, NixlTransferSettings

        return NixlTransfer(incarnation, NixlTransferSettings(**where))
    from penstock.transfer.tcp import TcpTransfer, TcpTransferSettings

    return TcpTransfer(incarnation, TcpTransferSettings(**where))


def _tracing(service: str, instance: str) -> Tracing | None:
    """Where the standard variables name a collector. Clusters may set them for all pods alike, so that what
    is missing here is no reason not to start."""
    endpoint = next(filter(None, map(os.environ.get, OTLP_ENDPOINT_VARIABLES)), None)
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if endpoint is None or off or os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        return None
    if find_spec("opentelemetry") is None or find_spec("opentelemetry.sdk") is None:
        log.warning("no traces are sent, which needs more packages: pip install 'penstock-llm[otel]'")
        return None
    from penstock.tracing import otel_tracing

    return otel_tracing(service, instance, endpoint, os.environ)


def _given(options: WorkerOptions, *names: str) -> dict[str, Any]:
    """The options among these that are set; what is not is the engine's choice."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _link_secret(options: FrontendOptions | WorkerOptions) -> LinkSecret:
    if options.link_secret_file:
        return LinkSecret(path=options.link_secret_file)
    try:
        return LinkSecret(os.environ.get(SECRET_VARIABLE))
    except ConfigError as error:
        raise ConfigError(f"{SECRET_VARIABLE}: {error}") from None


def _tls(options: FrontendOptions | WorkerOptions) -> TlsSettings | None:
    if not (options.link_tls_cert or options.link_tls_ca):
        return None
    name = options.link_tls_server_name if isinstance(options, FrontendOptions) else ""
    return TlsSettings(
        cert_file=options.link_tls_cert,
        key_file=options.link_tls_key,
        ca_file=options.link_tls_ca,
        server_name=name,
    )


def _unique_name(kind: str) -> str:
    return f"{kind}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"


def _raise_descriptor_limit() -> None:
    """The usual 1,024 are for programs that call select(), which none of this does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
    """Out of a task group's errors, raise the first one that a person can act on; if others are among them,
    which are mistakes of ours, all of them.

    Without `except*`: what is raised inside it comes wrapped into another group before Python 3.11.4.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        _, others = group.split(PenstockError)
        if others is not None:
            raise
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
