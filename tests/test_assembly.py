"""Options to running processes: what is chosen, and what refuses to start with one clear line."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from penstock.assembly import (
    DESCRIPTORS,
    _discovery,
    _response_store,
    _transfer,
    run,
    run_frontend,
    run_worker,
)
from penstock.errors import ConfigError, RemoteError
from penstock.frontend.responses_api.redis_store import RedisResponseStore
from penstock.metrics import Metrics
from penstock.options.config import FrontendOptions, WorkerOptions
from penstock.ports import StoredResponse
from penstock.shapes import Incarnation, Role


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def worker(**options: object) -> WorkerOptions:
    return msgspec.convert({"model": "models/tiny", **options}, WorkerOptions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "vllm"}, "--engine: vllm is not installed: pip install 'vllm>=0.30,<0.33' 'nixl"),
        ({"engine": "vllm", "transfer": "tcp"}, "--transfer: the vllm engine"),
        (
            {"model": "Qwen/Qwen3-0.6B"},
            "--model: Qwen/Qwen3-0.6B is not a folder; the reference engine needs",
        ),
        ({"engine": "sim", "sim_cost_model": "abacus"}, "abacus"),
        (
            {"discovery": "etcd://127.0.0.1", "etcd_user": "me"},
            "--etcd-user: needs its password in PENSTOCK",
        ),
        ({"discovery": "etcds://127.0.0.1:2379", "etcd_ca": "/no.pem"}, "--etcd-ca: cannot read /no.pem"),
        ({"discovery": "kubernetes:", "port": 7000}, "--instance-id: .* the name of the pod"),
        ({"discovery": "kubernetes:", "instance_id": "w-0"}, "--port: .* that the pod names 'link'"),
        ({"max_batch_tokens": 4}, "max_batch_tokens"),
        ({"block_size": 5000}, "block_size"),
        ({"link_tls_cert": "/no.pem", "link_tls_key": "/no.key"}, "/no.pem"),
    ],
)
def test_a_worker_refuses_what_it_cannot_do(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_worker(worker(**options))


def test_a_frontend_refuses_tls_files_that_it_cannot_use() -> None:
    with pytest.raises(ConfigError, match=r"tls\.ca_file: cannot read '/nowhere/ca\.pem'"):
        run_frontend(FrontendOptions(link_tls_ca="/nowhere/ca.pem"))


@pytest.mark.parametrize("secret", ["", " ", "\n", "too short"])
def test_a_secret_that_was_not_filled_in_refuses_to_start(
    monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    monkeypatch.setenv("PENSTOCK_LINK_SECRET", secret)
    with pytest.raises(ConfigError, match=r"^PENSTOCK_LINK_SECRET: "):
        run_worker(worker())
    with pytest.raises(ConfigError, match=r"^PENSTOCK_LINK_SECRET: "):
        run_frontend(FrontendOptions())


@pytest.mark.parametrize(
    ("discovery", "warned"),
    [
        ("etcd://127.0.0.1,localhost:1,[::1]:2", False),
        ("etcds://etcd.example", False),
        ("etcd://127.0.0.1,etcd.example", True),
    ],
)
def test_a_password_in_the_clear_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, discovery: str, warned: bool
) -> None:
    monkeypatch.setenv("PENSTOCK_ETCD_PASSWORD", "of-etcd")
    _discovery(worker(discovery=discovery, etcd_user="me"))
    assert ("sends the password of --etcd-user" in caplog.text) == warned
    assert "of-etcd" not in caplog.text
    caplog.clear()
    _discovery(worker(discovery=discovery))
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("store", "message"),
    [
        ("rediss://:of-redis@host/zero", "--response-store: expected memory, none, or redis://"),
        ("postgres://of-redis@host", "--response-store: expected memory, none, or redis://"),
        ("Memory", "--response-store: expected memory, none, or redis://"),
    ],
)
def test_store_of_responses_that_cannot_be_is_refused_without_being_shown(store: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        _response_store(FrontendOptions(response_store=store), Metrics())
    assert "of-redis" not in str(raised.value)


async def test_store_of_responses_is_the_one_that_is_named() -> None:
    assert _response_store(FrontendOptions(), Metrics()) is None  # the frontend's own
    nothing = _response_store(FrontendOptions(response_store="none"), Metrics())
    assert nothing is not None
    assert not await nothing.put("t", StoredResponse("resp_1", b"{}", b"[]", ""))
    shared = _response_store(FrontendOptions(response_store="redis://localhost"), Metrics())
    assert isinstance(shared, RedisResponseStore)
    await shared.close()


@pytest.mark.parametrize(
    ("store", "warned"),
    [
        ("redis://:of-redis@127.0.0.1:1", False),
        ("rediss://:of-redis@redis.invalid:1", False),
        ("redis://:of-redis@redis.invalid:1", True),
    ],
)
async def test_conversations_in_the_clear_are_warned_of(
    caplog: pytest.LogCaptureFixture, store: str, warned: bool
) -> None:
    # A process makes it before it serves: reading the certificates of authorities takes 30 ms and more.
    shared = await asyncio.to_thread(_response_store, FrontendOptions(response_store=store), Metrics())
    assert shared is not None
    await shared.check()
    await shared.close()
    assert ("unencrypted; use rediss:// for TLS" in caplog.text) == warned
    assert "of-redis" not in caplog.text


def test_of_errors_that_come_together_the_first_is_raised() -> None:
    async def main(stop: asyncio.Event) -> None:
        raise ExceptionGroup("two", [ExceptionGroup("one", [ConfigError("first")]), RemoteError("second")])

    with pytest.raises(ConfigError, match=r"^first$"):
        run(main)


def test_a_mistake_of_ours_is_not_hidden_behind_another_error() -> None:
    async def main(stop: asyncio.Event) -> None:
        raise ExceptionGroup("two", [ConfigError("first"), KeyError("ours")])

    with pytest.raises(ExceptionGroup) as caught:
        run(main)
    assert caught.group_contains(KeyError)


_LIMITED = """
import resource
from penstock.assembly import run

async def main(stop):
    print(resource.getrlimit(resource.RLIMIT_NOFILE))

hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
run(main)
"""


def test_every_process_asks_for_descriptors() -> None:
    command = [sys.executable, "-c", _LIMITED]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    allowed = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    assert ended.stdout == f"({allowed}, {hard})\n"


_SLOW_TO_LEAVE = """
import asyncio
from penstock.assembly import run

async def main(stop):
    print("up", flush=True)
    await stop.wait()
    print("draining", flush=True)
    await asyncio.sleep(600)

run(main)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_wait(number: signal.Signals) -> None:
    command = [sys.executable, "-c", _SLOW_TO_LEAVE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for word in ("up", "draining"):
            assert process.stdout.readline() == f"{word}\n"
            process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number


def test_etcd_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(ConfigError, match=r"--discovery: etcd needs .* pip install 'httpx2>=2\.12,<3'"):
        run_frontend(FrontendOptions(http_port=0, discovery="etcd://127.0.0.1"))


def test_kubernetes_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "penstock.assembly.find_spec", lambda name: None if name == "lightkube" else real(name)
    )
    with pytest.raises(ConfigError, match=r"--discovery: .* pip install 'penstock-llm\[kubernetes\]'"):
        run_frontend(FrontendOptions(http_port=0, discovery="kubernetes:"))


def test_redis_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ConfigError, match=r"--response-store: .* pip install 'penstock-llm\[redis\]'"):
        run_frontend(FrontendOptions(http_port=0, response_store="redis://127.0.0.1"))


def test_outside_of_clusters_a_kubeconfig_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "/dev/null")
    with pytest.raises(ConfigError, match="Kubernetes: "):
        run_frontend(FrontendOptions(http_port=0, discovery="kubernetes:"))


def test_a_frontend_refuses_an_address_that_is_not_its_own() -> None:
    with pytest.raises(ConfigError, match=r"203\.0\.113\.7"):
        run_frontend(FrontendOptions(http_host="203.0.113.7", http_port=0))


def test_a_frontend_refuses_a_file_without_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# none yet\n")
    with pytest.raises(ConfigError, match=rf"^API keys: {path} has none$"):
        run_frontend(FrontendOptions(http_port=0, api_keys_file=str(path), discovery=f"file:{tmp_path}"))


def test_the_transfer_is_what_was_asked_for_and_what_is_there(tmp_path: Path) -> None:
    def name(**options: object) -> str | None:
        transfer = _transfer(worker(**options), Incarnation("w", 1))
        return transfer and transfer.name

    has_nixl = importlib.util.find_spec("nixl") is not None
    assert name(role=Role.AGGREGATED) is None
    assert name(role=Role.DECODE, transfer="tcp") == "tcp"
    assert name(role=Role.PREFILL, transfer="nixl") == "nixl"
    assert name(role=Role.PREFILL) == ("nixl" if has_nixl else "tcp")
    assert name(role=Role.PREFILL, engine="sim") == "tcp"
