"""What can be set about a frontend or a worker: one struct each, for the CLI, the launcher and manifests.

A field is a flag (`http_port` is `--http-port`) with its type, limits, default and help. A field may also
name environment variables, the first that is set counts; a flag wins over them. `flags.py` builds the
structs from text. Anything wrong is a ConfigError that names the flag or variable.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from penstock.checked import shown
from penstock.core.deadlines import Deadlines, parse_deadlines
from penstock.errors import ConfigError
from penstock.net.address import PORT_MAX
from penstock.options.discovery_url import ETCD_PASSWORD_VARIABLE, parse_discovery
from penstock.shapes import Role

Port = Annotated[int, Meta(ge=0, le=PORT_MAX)]
Count = Annotated[int, Meta(ge=1)]

SECRET_VARIABLE = "PENSTOCK_LINK_SECRET"
STATE_VARIABLE = "PENSTOCK_STATE_DIR"
SUPERVISOR_VARIABLE = "PENSTOCK_SUPERVISOR_PID"

_NAMESPACE = re.compile(r"[A-Za-z0-9][-\w.]*", re.ASCII)
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?", re.ASCII)
_ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)+", re.ASCII)

LogFormat = Literal["text", "json"]  # as logs/setup.py has them, whose import would load asyncio


def flag(help_text: str, *variables: str, protects: bool = False) -> Meta:
    """A field's help, and the environment variables that may set it. `protects`: it keeps somebody out, so
    that set to nothing (a secret that was not filled in) it is an error, and not the same as unset."""
    return Meta(description=help_text, extra={"env": variables, "protects": protects})


class CommonOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What frontends and workers have in common."""

    namespace: Annotated[
        str,
        flag("Namespace: a frontend only uses workers of its own.", "PENSTOCK_NAMESPACE", "DYN_NAMESPACE"),
    ] = "default"
    discovery: Annotated[
        str,
        flag(
            "Where workers are listed: file:[DIRECTORY], etcd://HOST:PORT[,...] (etcds:// with TLS) or "
            "kubernetes:[NAMESPACE].",
            "PENSTOCK_DISCOVERY",
        ),
    ] = "file:"
    etcd_user: Annotated[
        str,
        flag(f"User for etcd; the password comes from {ETCD_PASSWORD_VARIABLE}.", "PENSTOCK_ETCD_USER"),
    ] = ""
    etcd_ca: Annotated[
        str,
        flag(
            "PEM file with the authorities of etcd's certificates; the system's when unset.",
            "PENSTOCK_ETCD_CA",
            protects=True,
        ),
    ] = ""
    etcd_cert: Annotated[
        str, flag("PEM file with this process's certificate for etcd.", "PENSTOCK_ETCD_CERT", protects=True)
    ] = ""
    etcd_key: Annotated[
        str, flag("PEM file with the private key of --etcd-cert.", "PENSTOCK_ETCD_KEY", protects=True)
    ] = ""
    link_secret_file: Annotated[
        str,
        flag(
            f"File with the link secret, which all workers and frontends share; it is read again when it "
            f"changes. Or put the secret itself into {SECRET_VARIABLE}.",
            "PENSTOCK_LINK_SECRET_FILE",
            protects=True,
        ),
    ] = ""
    link_tls_cert: Annotated[
        str, flag("PEM file with this process's certificate for the link, and its chain.", protects=True)
    ] = ""
    link_tls_key: Annotated[
        str, flag("PEM file with the private key of --link-tls-cert.", protects=True)
    ] = ""
    link_tls_ca: Annotated[
        str, flag("PEM file with the authorities of the other side's certificate.", protects=True)
    ] = ""
    max_wait_ms: Annotated[
        float,
        Meta(gt=0),
        flag("Longest predicted wait of a request, for a worker or inside one, in milliseconds."),
    ] = 10_000.0
    drain_s: Annotated[
        float,
        Meta(ge=0),
        flag("Seconds that running requests have to end after SIGTERM.", "PENSTOCK_DRAIN_S"),
    ] = 30.0
    log_level: Annotated[
        str | None, flag("debug, info, warning or error (also PENSTOCK_LOG, DYN_LOG).")
    ] = None
    log_format: Annotated[
        LogFormat, flag("text, or json: one object in each line.", "PENSTOCK_LOG_FORMAT")
    ] = "text"

    def __post_init__(self) -> None:
        if not _NAMESPACE.fullmatch(self.namespace):
            raise ConfigError(
                f"--namespace: expected letters, digits, -, _ and ., got {shown(self.namespace)}"
            )
        _both(self, "link_tls_cert", "link_tls_key")
        _both(self, "etcd_cert", "etcd_key")
        url = parse_discovery(self.discovery)
        if (self.etcd_ca or self.etcd_cert) and url.kind == "etcd" and not url.tls:
            raise ConfigError("--discovery: --etcd-ca and --etcd-cert need TLS: use etcds://")


class FrontendOptions(CommonOptions, frozen=True, kw_only=True):
    """The flags of `penstock frontend`."""

    http_host: Annotated[
        str,
        flag(
            "Address to listen on for HTTP; use 0.0.0.0 in a container.",
            "PENSTOCK_HTTP_HOST",
            "DYN_HTTP_HOST",
        ),
    ] = "127.0.0.1"
    http_port: Annotated[
        Annotated[int, Meta(ge=-1, le=PORT_MAX)],
        flag(
            "Port to listen on for HTTP; 0 takes a free one, -1 opens none (see --uds).",
            "PENSTOCK_HTTP_PORT",
            "DYN_HTTP_PORT",
        ),
    ] = 8000
    uds: Annotated[str, flag("Path of a Unix socket to listen on for HTTP, beside the port.")] = ""
    http_tls_cert: Annotated[
        str, flag("PEM file with a certificate and its chain, to serve HTTPS.", protects=True)
    ] = ""
    http_tls_key: Annotated[
        str, flag("PEM file with the private key of --http-tls-cert.", protects=True)
    ] = ""
    api_key: Annotated[
        str,
        flag(
            "One API key for clients. Other users can see flags: use PENSTOCK_API_KEY instead.",
            "PENSTOCK_API_KEY",
            protects=True,
        ),
    ] = ""
    api_keys_file: Annotated[
        str,
        flag(
            "File with API keys as hashes, one line of `penstock key` each.",
            "PENSTOCK_API_KEYS_FILE",
            protects=True,
        ),
    ] = ""
    root_path: Annotated[
        str,
        flag(
            "Prefix of all paths at a reverse proxy in front, as in /llm. Paths with and without it are"
            " served, so the proxy may cut it off or not."
        ),
    ] = ""
    max_body_bytes: Annotated[int, Meta(gt=0), flag("Largest request body.")] = 16 * 1024 * 1024
    cors_origin: Annotated[
        str,
        flag(
            "Origins of web pages that may use the frontend from a browser, e.g. https://chat.example.com,"
            "http://localhost:3000; * for any."
        ),
    ] = ""
    sse_keep_alive_s: Annotated[
        float,
        Meta(ge=0),
        flag("Longest silence of a stream, in seconds, before it sends a comment; 0: no comments."),
    ] = 40.0
    response_store: Annotated[
        str,
        flag(
            "Where responses of /v1/responses are kept: memory, none, or redis://HOST:PORT (rediss:// with"
            " TLS). Other users can see flags: put an address with a password into the variable.",
            "PENSTOCK_RESPONSE_STORE",
            protects=True,
        ),
    ] = "memory"
    stored_response_age_s: Annotated[
        float,
        Meta(gt=0),
        flag("Seconds for which such a response is kept after it was made or last used."),
    ] = 24 * 3600.0
    router_mode: Annotated[
        str,
        flag(
            "Routing policy: how a worker is chosen. docs/use.md lists them; another one may be installed.",
            "PENSTOCK_ROUTER_MODE",
            "DYN_ROUTER_MODE",
        ),
    ] = "kv"
    disagg: Annotated[
        Literal["auto", "always", "never"],
        flag("Whether a prefill worker computes the prompt; auto: when that is faster."),
    ] = "auto"
    deadlines: Annotated[
        str,
        flag(
            "Longest time of each phase of a request, in seconds, as in first_token=60,stall=20. Phases are"
            " queue, prefill, transfer, first_token, stall and request.",
            "PENSTOCK_DEADLINES",
        ),
    ] = ""
    slo_itl_ms: Annotated[
        float,
        Meta(ge=0),
        flag("Mean time between tokens, in ms, that as many requests as possible should keep to; 0: any."),
    ] = 25.0
    link_tls_server_name: Annotated[
        str, flag("Name that workers' certificates must have; the host of their address when empty.")
    ] = ""
    expect: Annotated[
        str, flag("Roles that must be connected before /health is 200, e.g. prefill,decode; empty: any.")
    ] = ""

    def __post_init__(self) -> None:
        _both(self, "http_tls_cert", "http_tls_key")
        CommonOptions.__post_init__(self)
        self.expected_roles  # noqa: B018 - checks it
        self.cors_origins  # noqa: B018 - likewise
        parse_deadlines(self.deadlines, Deadlines())
        if self.http_port == -1 and not self.uds:
            raise ConfigError("--http-port: -1 opens no port, and then --uds is needed")
        if self.root_path and not _ROOT_PATH.fullmatch(self.root_path):
            raise ConfigError(
                f"--root-path: expected a path such as /llm, without a slash at its end, got"
                f" {shown(self.root_path)}"
            )

    @property
    def expected_roles(self) -> tuple[Role, ...]:
        """`expect` as roles."""
        names = [name.strip() for name in self.expect.split(",") if name.strip()]
        for name in names:
            if name not in list(Role):
                raise ConfigError(f"--expect: expected roles of {', '.join(Role)}, got {shown(name)}")
        return tuple(Role(name) for name in names)

    @property
    def cors_origins(self) -> tuple[str, ...]:
        """`cors_origin` as origins, in lower case as browsers write them."""
        origins = tuple(name.strip().lower() for name in self.cors_origin.split(",") if name.strip())
        for origin in origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"--cors-origin: expected https://HOST[:PORT] without a path, or *, got {shown(origin)}"
                )
        return origins


class WorkerOptions(CommonOptions, frozen=True, kw_only=True):
    """The flags of `penstock worker`. What follows `--` goes to the engine as it is."""

    role: Annotated[
        Role, flag("Role of this worker: compute prompts (prefill), generate answers (decode), or both.")
    ] = Role.AGGREGATED
    engine: Annotated[
        Literal["reference", "vllm", "sim"],
        flag("reference runs Qwen3 and Llama on the CPU; vllm is for production; sim computes nothing."),
    ] = "reference"
    model: Annotated[
        str, flag("Model folder; for vllm also a name that vLLM can download; for sim any name.")
    ]
    served_model_name: Annotated[
        str,
        flag(
            "Name of the model for clients; the folder's name when empty. Aliases may follow, separated by"
            " commas."
        ),
    ] = ""
    host: Annotated[str, flag("Address to listen on for links.", "PENSTOCK_HOST")] = "127.0.0.1"
    port: Annotated[Port, flag("Port to listen on for links; 0 takes a free one.")] = 0
    advertise_host: Annotated[
        str,
        flag(
            "Host under which frontends and other workers reach this worker; --host when empty.",
            "PENSTOCK_ADVERTISE_HOST",
        ),
    ] = ""
    advertise_port: Annotated[
        Port,
        flag(
            "Port under which frontends reach this worker, where a port mapping changes it; 0: the port on"
            " which it listens.",
            "PENSTOCK_ADVERTISE_PORT",
        ),
    ] = 0
    kv_port: Annotated[
        Port,
        flag(
            "Port on which other workers pull KV from this one; 0 takes a free one. With vllm, each"
            " data-parallel rank has a port, and this is the first.",
            "PENSTOCK_KV_PORT",
        ),
    ] = 0
    kv_advertise_port: Annotated[
        Port,
        flag(
            "Port under which other workers reach --kv-port, where a port mapping changes it; 0: the same"
            " port.",
            "PENSTOCK_KV_ADVERTISE_PORT",
        ),
    ] = 0
    instance_id: Annotated[
        str,
        flag("Name of this worker; made of role, host and process when empty.", "PENSTOCK_INSTANCE_ID"),
    ] = ""
    system_port: Annotated[
        Annotated[int, Meta(ge=-1, le=PORT_MAX)] | None,
        flag(
            "Port of /live and /health; 0 takes a free one, -1 opens none. Default: 9090, or a free one.",
            "PENSTOCK_SYSTEM_PORT",
            "DYN_SYSTEM_PORT",
        ),
    ] = None
    block_size: Annotated[Count | None, flag("Tokens per KV block; the engine's choice when unset.")] = None
    kv_cache_mib: Annotated[
        Count | None, flag("Size of the KV cache, in MiB; the engine's choice when unset.")
    ] = None
    max_model_len: Annotated[Count | None, flag("Longest context, in tokens; the model's when unset.")] = (
        None
    )
    max_batch_tokens: Annotated[
        Count | None, flag("Most tokens in one engine step; the engine's choice when unset.")
    ] = None
    max_running: Annotated[
        Count | None, flag("Most requests in one engine step; the engine's choice when unset.")
    ] = None
    max_waiting: Annotated[
        Count,
        flag("Most attempts that may wait in this worker; the next one goes to another worker."),
    ] = 256
    kv_events: Annotated[
        Literal["on", "off"],
        flag(
            "Whether frontends are told which KV blocks are cached here; off: they go by what they sent to"
            " this worker."
        ),
    ] = "on"
    transfer: Annotated[Literal["auto", "tcp", "nixl"], flag("How KV moves between workers.")] = "auto"
    handoff_ttl_s: Annotated[
        float,
        Meta(gt=Deadlines().handoff_margin_s),  # what has less left when it is to be pulled is not used
        flag("Seconds for which a prefill worker keeps KV that nobody has pulled."),
    ] = 30.0
    tool_call_parser: Annotated[
        str,
        flag(
            "Parser of the model's tool calls: for the reference engine hermes, llama3_json, llama4_json or"
            " mistral, for vllm any of vLLM's. Without one, tools are refused."
        ),
    ] = ""
    reasoning_parser: Annotated[
        str,
        flag(
            "Parser of the model's reasoning: for the reference engine qwen3 or deepseek_r1, for vllm any"
            " of vLLM's. Without one, reasoning stays in the content."
        ),
    ] = ""
    sim_cost_model: Annotated[
        str, flag("Whose timing the sim engine has, e.g. qwen3-8b/h200/tp1; zero: takes no time.")
    ] = ""
    sim_speedup: Annotated[
        float, Meta(gt=0), flag("How much faster than --sim-cost-model the sim engine runs.")
    ] = 1.0
    sim_cache_tokens: Annotated[
        Count | None, flag("Size of the sim engine's KV cache, in tokens; 16,384 blocks when unset.")
    ] = None
    engine_args: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("--model: missing")
        if self.engine_args and self.engine != "vllm":
            raise ConfigError(
                f"{self.engine_args[0]}: the {self.engine} engine takes no arguments after --"
            )
        if self.engine == "sim" and (self.tool_call_parser or self.reasoning_parser):
            name = "--tool-call-parser" if self.tool_call_parser else "--reasoning-parser"
            raise ConfigError(f"{name}: the sim engine writes nothing that could be parsed")
        if self.transfer == "tcp" and self.engine == "vllm":
            raise ConfigError("--transfer: the vllm engine moves KV with nixl only")
        if self.kv_advertise_port and self.engine == "vllm":
            raise ConfigError(
                "--kv-advertise-port: the vllm engine can only be reached on its own port (--kv-port)"
            )
        if self.transfer == "nixl" and self.engine == "sim":
            raise ConfigError("--transfer: the sim engine has no KV to move over nixl")
        CommonOptions.__post_init__(self)

    @property
    def kv_cache_bytes(self) -> int | None:
        """`kv_cache_mib` in bytes."""
        return self.kv_cache_mib * 1024 * 1024 if self.kv_cache_mib is not None else None

    @property
    def served_names(self) -> tuple[str, ...]:
        """`served_model_name` as names: the model's own, then its aliases."""
        names = (name.strip() for name in self.served_model_name.split(","))
        return tuple(dict.fromkeys(name for name in names if name))


class OperatorOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The flags of `penstock operator`."""

    watch_namespace: Annotated[
        str,
        flag(
            "Namespace whose graphs this operator manages; all namespaces when empty.",
            "PENSTOCK_WATCH_NAMESPACE",
        ),
    ] = ""
    image: Annotated[
        str,
        flag(
            "Image for graphs whose manifests name no image of Penstock, and for log relays.",
            "PENSTOCK_IMAGE",
        ),
    ] = "penstock:latest"
    image_pull_policy: Annotated[
        Literal["", "Always", "IfNotPresent", "Never"],
        flag(
            "Pull policy of images whose manifest gives none; the cluster's choice when empty.",
            "PENSTOCK_IMAGE_PULL_POLICY",
        ),
    ] = ""
    image_pull_secrets: Annotated[
        str,
        flag(
            "Secrets with which every pod pulls images, separated by commas.", "PENSTOCK_IMAGE_PULL_SECRETS"
        ),
    ] = ""
    drain_s: Annotated[
        float,
        Meta(ge=0),
        flag(
            "Seconds that running requests have to end, where the manifest sets none.", "PENSTOCK_DRAIN_S"
        ),
    ] = 180.0
    topology_key: Annotated[
        str,
        flag(
            "Label of nodes; prefill and decode workers prefer nodes with the same value of it.",
            "PENSTOCK_TOPOLOGY_KEY",
        ),
    ] = "topology.kubernetes.io/zone"
    lease_namespace: Annotated[
        str,
        flag(
            "Namespace of the Lease by which operators elect the one that acts; its own when empty.",
            "POD_NAMESPACE",
        ),
    ] = ""
    lease_name: Annotated[str, flag("Name of the Lease of --lease-namespace.")] = "penstock-operator"
    host: Annotated[
        str, flag("Address to listen on. When empty: all in a pod, loopback elsewhere.", "PENSTOCK_HOST")
    ] = ""
    system_port: Annotated[Port, flag("Port of /live, /health and /metrics; 0 takes a free one.")] = 8081
    webhook_port: Annotated[
        Annotated[int, Meta(ge=-1, le=PORT_MAX)],
        flag("Port of the webhook that converts graphs between API versions; -1: none."),
    ] = -1
    webhook_service: Annotated[
        str, flag("Service in --lease-namespace through which the API server reaches the webhook.")
    ] = "penstock-operator"
    kubeconfig: Annotated[
        str,
        flag("Kubeconfig of the cluster. When empty: this pod's account, $KUBECONFIG or ~/.kube/config."),
    ] = ""
    log_level: Annotated[
        str | None, flag("debug, info, warning or error (also PENSTOCK_LOG, DYN_LOG).")
    ] = None
    log_format: Annotated[
        LogFormat, flag("text, or json: one object in each line.", "PENSTOCK_LOG_FORMAT")
    ] = "text"


def _both(options: CommonOptions, one: str, other: str) -> None:
    """Two flags that only make sense together."""
    if bool(getattr(options, one)) != bool(getattr(options, other)):
        given, missing = (one, other) if getattr(options, one) else (other, one)
        raise ConfigError(f"--{given.replace('_', '-')}: needs --{missing.replace('_', '-')} too")
