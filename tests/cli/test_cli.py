from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import penstock
from penstock import assembly
from penstock.cli import local, run, talk
from penstock.launcher.control import (
    ControlRequest,
    ControlResponse,
    ControlSocket,
    LocalGraphStatus,
    LocalServiceStatus,
    serving_control,
)
from penstock.launcher.replica import ReplicaState, ReplicaStatus
from penstock.launcher.state import StateFolder
from penstock.options.config import FrontendOptions, WorkerOptions
from penstock.shapes import Role

COMMANDS = (
    "up",
    "status",
    "scale",
    "restart",
    "logs",
    "down",
    "chat",
    "explain",
    "record",
    "frontend",
    "worker",
    "key",
    "bench",
    "version",
)


@pytest.fixture
def fails(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Runs a command in an empty folder; the one line it complains with, with exit code 2."""
    monkeypatch.chdir(tmp_path)

    def run_and_complain(*arguments: str, code: int = 2) -> str:
        assert run(arguments) == code
        out, errors = capsys.readouterr()
        assert out == ""
        assert errors.count("\n") == 1, errors
        return errors.rstrip("\n")

    return run_and_complain


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {command} " in out for command in COMMANDS)
    assert run([]) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    assert f"Usage: penstock {command}" in capsys.readouterr().out


def test_version_is_printed_by_the_command_and_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("version", "--version"):
        assert run([word]) == 0
        assert capsys.readouterr().out == f"{penstock.__version__}\n"


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys; from penstock.cli import run; run(['--help']); "
        "heavy = {'numpy', 'tokenizers', 'starlette', 'uvicorn', 'yaml', 'rich', 'jinja2', 'asyncio'}; "
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("upp", "no such command 'upp' (did you mean up?); all of them: penstock --help"),
        ("serve Qwen/Qwen3-0.6B", "no such command 'serve' (did you mean up?); all of them"),
        ("ps", "no such command 'ps' (did you mean status?)"),
        ("conjure", "no such command 'conjure'; all of them: penstock --help"),
        ("--vrsion", "no such option: --vrsion"),
        ("up", "up: missing argument 'FILE'"),
        ("up none.yaml", "cannot read none.yaml: No such file or directory"),
        ("up none.yaml --port x", "up: invalid value for '--port': 'x' is not a valid int"),
        ("up none.yaml --port 65536", "--port: expected an integer from 0 to 65535, got 65536"),
        ("up none.yaml --prt 3", "up: no such option: --prt"),
        ("status", "no graph is running (looked in"),
        ("status -g toy", "toy: not running (looked in"),
        ("down", "no graph is running (looked in"),
        ("logs", "no graph is known (looked in"),
        ("restart Worker", "no graph is running (looked in"),
        ("scale Worker", "expected SERVICE=N, e.g. PrefillWorker=3, got 'Worker'"),
        ("scale Worker=-1", "expected SERVICE=N, e.g. PrefillWorker=3, got 'Worker=-1'"),
        ("worker --role prefill", "--model: missing"),
        ("worker --model m --role x", '--role: expected one of prefill, decode, aggregated, got "x"'),
        ("worker --model m extra", "extra: the reference engine takes no arguments after --"),
        ("frontend --http-port 99999", "--http-port: expected an integer from -1 to 65535, got 99999"),
        ("frontend extra", "frontend: got unexpected extra argument"),
        ("chat hi --url ftp://x", "--url: expected http://HOST:PORT or unix:/PATH, got 'ftp://x'"),
        ("chat hi --url http://x:y", "--url: Port could not be cast to integer value as 'y'"),
    ],
)
def test_a_wrong_command_line_is_one_line(fails: Callable[..., str], words: str, complaint: str) -> None:
    assert fails(*words.split()).startswith(f"penstock: {complaint}")


def test_a_server_that_is_not_there_is_one_line(fails: Callable[..., str]) -> None:
    line = fails("chat", "hi", "--url", "http://127.0.0.1:1", code=1)
    assert line.startswith("penstock: http://127.0.0.1:1: ")


def test_every_wrong_field_of_a_manifest_is_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "g.yaml"
    manifest.write_text("apiVersion: 3\nkind: DynamoGraphDeployment\nmetadata: {}\n")
    assert run(["up", str(manifest)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "penstock: g.yaml: apiVersion: expected nvidia.com/v1alpha1 or nvidia.com/v1beta1, got 3",
        "penstock: g.yaml: apiVersion: expected a string, got 3",
        "penstock: g.yaml: metadata.name: missing",
        "penstock: g.yaml: spec: missing",
    ]


def test_flags_reach_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(assembly, "run_worker", started.append)
    monkeypatch.setattr(assembly, "run_frontend", started.append)
    monkeypatch.setenv("DYN_ROUTER_MODE", "random")
    assert run(["worker", "--model", "m", "--role", "decode", "--engine", "vllm", "--", "--seed", "1"]) == 0
    assert run(["frontend", "--http-port", "0", "--expect=prefill"]) == 0
    assert started == [
        WorkerOptions(model="m", role=Role.DECODE, engine="vllm", engine_args=("--seed", "1")),
        FrontendOptions(http_port=0, expect="prefill", router_mode="random"),
    ]


def test_python_m_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "penstock", "version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"{penstock.__version__}\n")


def test_status_shows_every_replica(capsys: pytest.CaptureFixture[str]) -> None:
    crashed = ReplicaStatus(
        "prefill-0", "toy-prefill-0", ReplicaState.WAITING, restarts=3, last_exit="exited with code 1"
    )
    ready = ReplicaStatus("decode-0", "toy-decode-0", ReplicaState.READY, 7, uptime_s=90.2, address="h:1")
    services = [
        LocalServiceStatus("Frontend", "frontend", 0, []),
        LocalServiceStatus("PrefillWorker", "prefill", 1, [crashed]),
        LocalServiceStatus("DecodeWorker", "decode", 1, [ready]),
    ]
    health = {"http://localhost:8000": {"status": "unreachable", "error": "refused"}}
    local.print_status(LocalGraphStatus("toy", 42, False, 7300, services, health))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "toy: not ready, up 2 h, supervisor pid 42",
        "SERVICE INSTANCE STATE PID UP RESTARTS ADDRESS LAST EXIT",
        "Frontend - no replicas",
        "PrefillWorker prefill-0 waiting - - 3 - exited with code 1",
        "DecodeWorker decode-0 ready 7 90 s 0 h:1",
        "http://localhost:8000/health: unreachable (refused)",
    ]


class TwoGraphs:
    """Two supervisors' folders and sockets, answering `status`."""

    def __init__(self, root: Path) -> None:
        self.started, self.ended = threading.Event(), threading.Event()
        self._root = root

    async def serve(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for graph, port in (("one", 9001), ("two", 9002)):
                folder = StateFolder(self._root, graph)
                stack.enter_context(folder.locked())
                health = {f"http://localhost:{port}": {"status": "healthy"}}

                async def handle(request: ControlRequest, name: str = graph, health: Any = health) -> Any:
                    return ControlResponse(status=LocalGraphStatus(name, 1, True, 1, [], health))

                await stack.enter_async_context(serving_control(ControlSocket(folder, handle)))
            self.started.set()
            await asyncio.to_thread(self.ended.wait)


@pytest.fixture
def two_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    graphs = TwoGraphs(tmp_path / ".penstock")
    thread = threading.Thread(target=asyncio.run, args=(graphs.serve(),))
    thread.start()
    assert graphs.started.wait(10)
    yield
    graphs.ended.set()
    thread.join(10)


def test_status_shows_all_graphs(two_graphs: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status"]) == 0
    shown = capsys.readouterr().out
    assert "one: ready" in shown
    assert "two: ready" in shown
    assert run(["status", "-g", "two"]) == 0
    assert "one" not in capsys.readouterr().out
    assert run(["status", "--json"]) == 2
    assert "there are several graphs, name one with --graph: one, two" in capsys.readouterr().err


def test_clients_find_the_graph_that_runs_or_ask_which(
    two_graphs: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["chat", "hi"], ["bench", "--requests", "1"]):
        assert run(words) == 2
        assert "several graphs run here (one, two): choose one's --url" in capsys.readouterr().err
    asked: list[str] = []
    bench = talk.at_running_graph(lambda **options: asked.append(options["url"]))
    bench(url="http://given")
    (Path(".penstock") / "two").rename("two")  # out of sight
    bench(url="")
    Path(".penstock").rename("elsewhere")
    bench(url="")
    assert asked == ["http://given", "http://localhost:9001", talk.DEFAULT_URL]


def test_a_detached_start_that_fails_says_why(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    manifest = Path(__file__).parents[2] / "deploy" / "multinode-vllm.yaml"
    assert fails("up", str(manifest), "-d") == (
        "penstock: multinode-vllm needs 4 GPUs (PrefillWorker 2, DecodeWorker 2), this machine has 0;"
        " try --engine reference --model MODEL"
    )
