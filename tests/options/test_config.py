from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from penstock.errors import ConfigError
from penstock.options.config import (
    FrontendOptions,
    WorkerOptions,
)
from penstock.options.discovery_url import DiscoveryUrl, discovery_directory, parse_discovery
from penstock.options.flags import build_options, flags_of
from penstock.shapes import Role


def errors_of(options: type, given: dict[str, str], environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build_options(options, given, environ or {})
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ()),
        ("org/m", ("org/m",)),
        ("org/m,chat, gpt", ("org/m", "chat", "gpt")),
        (" a,,a,b,a ", ("a", "b")),
    ],
)
def test_served_names_are_the_models_own_and_then_its_aliases(text: str, names: tuple[str, ...]) -> None:
    options = build_options(WorkerOptions, {"model": "m", "served-model-name": text}, {})
    assert options.served_names == names


def test_flags_as_text_become_typed_options() -> None:
    flags = {"model": "m", "role": "prefill", "port": "70", "handoff-ttl-s": "1.5", "block-size": "16"}
    worker = build_options(WorkerOptions, flags, {})
    assert worker.role is Role.PREFILL
    assert (worker.port, worker.handoff_ttl_s, worker.block_size, worker.max_running) == (70, 1.5, 16, None)
    assert build_options(FrontendOptions, {}, {}) == FrontendOptions()


def test_a_flag_wins_over_the_environment_and_that_over_the_default() -> None:
    environ = {"DYN_ROUTER_MODE": "random", "PENSTOCK_HTTP_HOST": "0.0.0.0", "PENSTOCK_DRAIN_S": ""}
    options = build_options(FrontendOptions, {}, environ)
    assert (options.router_mode, options.http_host, options.drain_s) == ("random", "0.0.0.0", 30.0)
    environ["PENSTOCK_ROUTER_MODE"] = "round-robin"
    assert build_options(FrontendOptions, {}, environ).router_mode == "round-robin"
    assert build_options(FrontendOptions, {"router-mode": "kv"}, environ).router_mode == "kv"


def test_every_wrong_flag_gets_a_line() -> None:
    wrong = {"http-port": "700000", "routr-mode": "kv", "disagg": "maybe", "max-body-bytes": "x"}
    assert errors_of(FrontendOptions, wrong) == [
        "--routr-mode: unknown flag (did you mean --router-mode?)",
        "--http-port: expected an integer from -1 to 65535, got 700000",
        '--max-body-bytes: expected an integer > 0, got "x"',
        '--disagg: expected one of always, auto, never, got "maybe"',
    ]
    assert errors_of(WorkerOptions, {}) == ["--model: missing"]
    assert errors_of(WorkerOptions, {"model": ""}) == ["--model: missing"]


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "1e400", "0x10", ""])
def test_numbers_are_finite_and_in_range(value: str) -> None:
    assert errors_of(WorkerOptions, {"model": "m", "handoff-ttl-s": value})[0].startswith(
        "--handoff-ttl-s: "
    )


@pytest.mark.parametrize(
    ("flag", "text", "expected"),
    [
        ("max-waiting", "0", "an integer >= 1"),  # every attempt waits for a step
        ("max-running", "0", "an integer >= 1"),
        ("max-batch-tokens", "0", "an integer >= 1"),
        ("max-model-len", "0", "an integer >= 1"),
        ("kv-cache-mib", "0", "an integer >= 1"),
        ("block-size", "0", "an integer >= 1"),
        ("max-wait-ms", "0", "a number > 0"),
        ("sim-speedup", "0", "a number > 0"),
        ("handoff-ttl-s", "1", "a number > 1"),  # with that little life left, none would be pulled
    ],
)
def test_a_limit_with_which_nothing_would_work_is_refused(flag: str, text: str, expected: str) -> None:
    shown = f"{float(text)}" if "number" in expected else text
    line = f"--{flag}: expected {expected}, got {shown}"
    assert errors_of(WorkerOptions, {"model": "m", flag: text}) == [line]


def test_a_wrong_variable_is_named() -> None:
    line = 'DYN_SYSTEM_PORT: expected an integer from -1 to 65535, got "x"'
    assert errors_of(WorkerOptions, {"model": "m"}, {"DYN_SYSTEM_PORT": "x"}) == [line]


@pytest.mark.parametrize("given", ["", "  ", "\n"])
def test_protection_that_was_not_filled_in_is_no_missing_one(given: str) -> None:
    """`value: {{ .Values.apiKey }}` that came out empty must not open the door."""
    names = {
        "api-key": "PENSTOCK_API_KEY",
        "api-keys-file": "PENSTOCK_API_KEYS_FILE",
        "link-secret-file": "PENSTOCK_LINK_SECRET_FILE",
        "etcd-ca": "PENSTOCK_ETCD_CA",
    }
    said = "is set to nothing; set it, or leave it out to go without"
    for flag, variable in names.items():
        assert errors_of(FrontendOptions, {}, {variable: given}) == [f"{variable}: {said}"]
        assert errors_of(FrontendOptions, {flag: given}) == [f"--{flag}: {said}"]
    for flag in ("link-tls-ca", "link-tls-cert", "link-tls-key", "http-tls-cert", "http-tls-key"):
        assert errors_of(FrontendOptions, {flag: given}) == [f"--{flag}: {said}"]
    both = build_options(FrontendOptions, {"api-key": "k"}, {"PENSTOCK_API_KEY": given})
    assert both.api_key == "k"


@pytest.mark.parametrize("url", ["etcd://me:of-etcd@a:1", "etcds://b,me:of-etcd@a"])
def test_a_password_in_an_address_is_refused_and_not_shown(url: str) -> None:
    (line,) = errors_of(FrontendOptions, {"discovery": url})
    assert line.startswith("--discovery: a user belongs in --etcd-user and its password in PENSTOCK_ETCD_")
    assert "of-etcd" not in line


@pytest.mark.parametrize(
    ("options", "flags", "error"),
    [
        (
            FrontendOptions,
            {"expect": "prefill,foo"},
            "--expect: expected roles of prefill, decode, aggregated",
        ),
        (
            FrontendOptions,
            {"cors-origin": "https://a.example/x"},
            "--cors-origin: expected https://HOST[:PORT]",
        ),
        (FrontendOptions, {"http-port": "-1"}, "--http-port: -1 opens no port, and then --uds is needed"),
        (FrontendOptions, {"root-path": "llm"}, "--root-path: expected a path such as /llm"),
        (FrontendOptions, {"root-path": "/llm/"}, "--root-path: expected a path such as /llm"),
        (FrontendOptions, {"root-path": "/a//b"}, "--root-path: expected a path such as /llm"),
        (FrontendOptions, {"root-path": "/a b"}, "--root-path: expected a path such as /llm"),
        (FrontendOptions, {"cors-origin": "a.example"}, "--cors-origin: expected https://HOST[:PORT]"),
        (FrontendOptions, {"http-tls-key": "k"}, "--http-tls-key: needs --http-tls-cert too"),
        (FrontendOptions, {"link-tls-cert": "k"}, "--link-tls-cert: needs --link-tls-key too"),
        (FrontendOptions, {"namespace": "../x"}, "--namespace: expected letters, digits, -, _ and ., got"),
        (FrontendOptions, {"discovery": "zookeeper:x"}, "--discovery: expected file:, etcd://HOST:PORT or"),
        (
            WorkerOptions,
            {"model": "m", "discovery": "etcd:"},
            "--discovery: expected file:, etcd://HOST:PORT",
        ),
        (FrontendOptions, {"discovery": "etcd://a:70000"}, "--discovery: expected etcd://HOST:PORT[,HOST"),
        (
            FrontendOptions,
            {"discovery": "etcd://http://a:1"},
            "--discovery: expected etcd://HOST:PORT[,HOST",
        ),
        (FrontendOptions, {"etcd-cert": "c"}, "--etcd-cert: needs --etcd-key too"),
        (
            FrontendOptions,
            {"discovery": "etcd://a", "etcd-ca": "c"},
            "--discovery: --etcd-ca and --etcd-cert need TLS",
        ),
        (
            WorkerOptions,
            {"model": "m", "engine": "sim", "transfer": "nixl"},
            "--transfer: the sim engine has no",
        ),
    ],
)
def test_flags_must_make_sense_together(options: type, flags: dict[str, str], error: str) -> None:
    assert errors_of(options, flags)[0].startswith(error)


def test_engine_arguments_are_for_vllm() -> None:
    options = build_options(WorkerOptions, {"model": "m", "engine": "vllm"}, {}, ["--enforce-eager"])
    assert options.engine_args == ("--enforce-eager",)
    with pytest.raises(ConfigError, match=r"^--enforce-eager: the reference engine takes no arguments"):
        build_options(WorkerOptions, {"model": "m"}, {}, ["--enforce-eager"])


def test_expected_roles() -> None:
    assert FrontendOptions(expect="prefill, decode").expected_roles == (Role.PREFILL, Role.DECODE)
    assert FrontendOptions().expected_roles == ()


@pytest.mark.parametrize("options", [FrontendOptions, WorkerOptions])
def test_every_flag_has_help_of_one_sentence(options: type) -> None:
    flags = flags_of(options)
    assert {flag.field for flag in flags.values()} | {"engine_args"} >= set(options.__struct_fields__)
    for flag in flags.values():
        assert flag.help.endswith("."), flag.name


def test_discovery_urls() -> None:
    assert parse_discovery("file:/a/b") == parse_discovery("file:///a/b") == DiscoveryUrl("file", "/a/b")
    assert parse_discovery("etcd://a:1,b:2") == DiscoveryUrl("etcd", "a:1,b:2")
    assert parse_discovery("etcds://[::1],b/") == DiscoveryUrl("etcd", "[::1]:2379,b:2379", tls=True)
    assert parse_discovery("kubernetes:") == parse_discovery("kubernetes") == DiscoveryUrl("kubernetes", "")


def test_namespaces_do_not_share_a_directory() -> None:
    url = DiscoveryUrl("file", "/shared")
    assert discovery_directory(url, "a", {}) == Path("/shared/a")
    own = DiscoveryUrl("file", "")
    assert discovery_directory(own, "a", {"XDG_RUNTIME_DIR": "/run/u"}) == Path(
        "/run/u/penstock/discovery/a"
    )
    assert discovery_directory(own, "a", {}) == Path.home() / ".cache/penstock/discovery/a"


def test_options_are_frozen() -> None:
    with pytest.raises(AttributeError):
        FrontendOptions().http_port = 1
    assert msgspec.structs.replace(FrontendOptions(), http_port=1).http_port == 1
