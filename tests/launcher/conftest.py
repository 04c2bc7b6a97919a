from __future__ import annotations

import asyncio
import io
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from penstock.graph import Graph, Overrides, build_graph, parse_manifest
from penstock.launcher.control import ControlRequest, call
from penstock.launcher.output import Console
from penstock.launcher.settings import LauncherSettings
from penstock.launcher.state import StateFolder
from penstock.launcher.supervisor import Supervisor
from tests.waiting import until

STUB = (sys.executable, str(Path(__file__).with_name("stub.py")))
QUICK = LauncherSettings(
    http_port=0, restart_min_s=0.1, restart_max_s=0.4, stable_s=60.0, kill_margin_s=30.0, ready_poll_s=0.02
)
EVENTUALLY_S = 60.0

MANIFEST = """
apiVersion: nvidia.com/v1alpha1
kind: DynamoGraphDeployment
metadata: {{name: toy}}
spec:
  services:
    Frontend:
      replicas: {frontends}
      envs: [{frontend_envs}]
      extraPodSpec: {{mainContainer: {{command: [penstock, frontend, --drain-s, "0"]}}}}
    PrefillWorker:
      replicas: {prefill}
      resources: {{limits: {{gpu: "1"}}}}
      envs: [{prefill_envs}]
      extraPodSpec:
        mainContainer:
          command: [penstock, worker, --role, prefill, --engine, {engine}, --model, m]
          args: [--drain-s, "{drain_s}"]
    DecodeWorker:
      replicas: {decode}
      extraPodSpec: {{mainContainer: {{command: [penstock, worker, --role, decode, --model, m]}}}}
"""


def manifest(
    frontends: int = 1,
    prefill: int = 1,
    decode: int = 1,
    drain_s: float = 0.2,
    engine: str = "sim",
    frontend: str = "",
    **env: str,
) -> str:
    """Environment variables are the prefill workers'; `frontend` is how frontends behave (stub.py)."""
    envs = ", ".join(f'{{name: {name}, value: "{value}"}}' for name, value in env.items())
    return MANIFEST.format(
        frontends=frontends,
        frontend_envs=f'{{name: STUB, value: "{frontend}"}}',
        prefill=prefill,
        decode=decode,
        drain_s=drain_s,
        engine=engine,
        prefill_envs=envs,
    )


def toy_graph(**changes: object) -> Graph:
    return build_graph(parse_manifest(manifest(**changes), "toy.yaml"), Overrides(), "toy.yaml")


def alive(pid: int) -> bool:
    """Whether there is such a process, and not just what is left of it."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


async def ask(graph: RunningGraph, **fields: Any) -> Any:
    """The launcher's answer to this request."""
    return await asyncio.to_thread(call, graph.folder, ControlRequest(**fields))


class RunningGraph:
    """A supervisor at work in this process, with what it prints."""

    def __init__(
        self, graph: Graph, folder: StateFolder, settings: LauncherSettings, gpus: Sequence[str]
    ) -> None:
        self.folder = folder
        self.out = io.StringIO()
        self.console = Console(self.out, colour=False, width=10)
        self.supervisor = Supervisor(graph, folder, gpus, os.environ, settings, self.console, program=STUB)
        self.task = asyncio.create_task(self.supervisor.run())

    def replicas(self, label: str) -> list:
        """Those of a service."""
        replicas = self.supervisor.replicas
        return [it.status() for it in replicas if it.launch.name.rpartition("-")[0] == label]

    async def prints(self, text: str) -> None:
        await until(lambda: text in self.out.getvalue() or self.task.done(), f"never printed {text!r}")
        assert text in self.out.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    return StateFolder(tmp_path / "s", "toy")


@pytest.fixture
def running(folder: StateFolder):
    @asynccontextmanager
    async def run(
        settings: LauncherSettings = QUICK, gpus: Sequence[str] = (), **changes: object
    ) -> AsyncIterator[RunningGraph]:
        with folder.locked():
            graph = RunningGraph(toy_graph(**changes), folder, settings, gpus)
            try:
                await until(lambda: graph.supervisor.replicas or graph.task.done())
                yield graph
            finally:
                if not graph.task.done():
                    graph.supervisor.interrupt()
                async with asyncio.timeout(EVENTUALLY_S):
                    await asyncio.gather(graph.task, return_exceptions=True)
                graph.console.close()

    return run
