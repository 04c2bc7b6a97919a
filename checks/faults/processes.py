"""The graph under test: plain `penstock frontend` and `penstock worker` processes, started and ended.

Every worker listens on a loopback address of its own and advertises another one, where proxies stand in
front of its link and of its KV transfer, so links can be cut without anybody's privileges.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from checks.faults.http import get
from penstock.options.config import SUPERVISOR_VARIABLE
from tests.discovery.etcd_server import Etcd
from tests.ports import free_port
from tests.proxy import Proxy, Weather

ROOT = Path(__file__).parents[2]
START_S = 90.0  # a busy machine starts many Python processes
LINK_PORT = 7000
SECRET = "the fault lab's own secret"
DRAIN_S = 20.0
_BALANCER_S = 0.2  # between two looks at /health
_LISTENING = "0A"  # in /proc/net/tcp


@dataclass(eq=False)
class Part:
    """One process of the graph, over all its incarnations."""

    name: str
    kind: str  # frontend, prefill or decode
    arguments: list[str]
    log: Path
    host: str = ""  # a worker's own address
    front: str = ""  # what it advertises: its proxies' address
    port: int = 0  # of its HTTP: a frontend's API, a worker's probes
    process: subprocess.Popen[bytes] | None = None
    link: Proxy | None = None
    transfer: Proxy | None = None
    output: Path | None = None  # where it logs instead of `log`, once started anew
    exits: list[int] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://{self.host or '127.0.0.1'}:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        if self.running:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def limit(self, which: int, soft: int | None) -> int:
        """Set a soft resource limit of the running process, None for as much as allowed; what it was."""
        before, hard = resource.prlimit(self.pid, which)
        resource.prlimit(self.pid, which, (hard if soft is None else soft, hard))
        return before

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))


class Graph:
    """Frontends, prefill and decode workers. They find each other in a directory, or in a running etcd."""

    def __init__(
        self,
        folder: Path,
        model: Sequence[str],
        *,
        frontends: int = 2,
        prefill: int = 2,
        decode: int = 3,
        etcd: Etcd | None = None,
    ) -> None:
        self.folder = folder
        self.directory = folder / "discovery"
        self.etcd = etcd
        self.net = random.SystemRandom().randint(10, 250)  # 127.NET.*.*: two labs do not meet
        discovery = etcd.endpoint.replace("http:", "etcd:") if etcd else f"file:{self.directory}"
        common = ["--discovery", discovery, "--drain-s", str(DRAIN_S)]
        self._worker_flags = [*common, *model]
        self.frontends = [self._frontend(index, common) for index in range(frontends)]
        workers = ["prefill"] * prefill + ["decode"] * decode
        self.workers = [self._worker(role, number) for number, role in enumerate(workers)]
        self._named = len(workers)
        self.env = {
            "PENSTOCK_LOG": "info",
            **os.environ,
            "PENSTOCK_LINK_SECRET": SECRET,
            SUPERVISOR_VARIABLE: str(os.getpid()),  # they do not outlive the lab
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": str(ROOT),
        }
        self.urls: list[str] = []  # of the frontends that have become healthy, as a balancer would know
        self._watchers: set[asyncio.Task[None]] = set()

    def _frontend(self, index: int, common: Sequence[str]) -> Part:
        port = free_port()
        arguments = ["frontend", "--http-port", str(port), "--expect", "prefill,decode"]
        arguments += ["--disagg", "always", *common]
        name = f"frontend-{index}"
        return Part(name, "frontend", arguments, self._log(name), port=port)

    def _worker(self, role: str, number: int) -> Part:
        name = f"{role}-{number}"
        host, front = f"127.{self.net}.1.{number + 1}", f"127.{self.net}.2.{number + 1}"
        arguments = ["worker", "--role", role, "--instance-id", name, *self._worker_flags]
        arguments += ["--host", host, "--port", str(LINK_PORT), "--advertise-host", front]
        port = free_port()
        arguments += ["--system-port", str(port)]
        return Part(name, role, arguments, self._log(name), host=host, front=front, port=port)

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    # --- who there is ---------------------------------------------------------------------------

    @property
    def parts(self) -> list[Part]:
        return [*self.frontends, *self.workers]

    def role(self, role: str) -> list[Part]:
        return [part for part in self.workers if part.kind == role]

    async def busiest(self, role: str) -> Part:
        """The worker of this role that has most to do."""
        load = {}
        for one in (await self.first_health())["instances"]:
            load[one["instance_id"]] = one["load"]["running"] + one["load"]["waiting"]
        return max(self.role(role), key=lambda part: load.get(part.name, 0))

    # --- lives ------------------------------------------------------------------------------------

    async def start(self) -> None:
        for part in self.workers:
            await self._open_link(part)
        await asyncio.gather(*(self.launch(part) for part in self.parts))
        await self.ready()

    async def launch(self, part: Part) -> None:
        """Start its process anew. Returns when its ports are open, or it has ended."""
        assert not part.running
        with (part.output or part.log).open("ab") as log:
            part.process = subprocess.Popen(
                [sys.executable, "-m", "penstock", *part.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.env,
                cwd=ROOT,
            )
        if part.kind != "frontend":
            await self._open_transfer(part)
            return
        watcher = asyncio.create_task(self._offer(part))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)

    async def _offer(self, part: Part) -> None:
        """Send clients to a new frontend once it is healthy."""
        if part.url in self.urls:
            self.urls.remove(part.url)
        while part.running:
            if (await self.health(part)).get("status") == "healthy":
                self.urls.append(part.url)
                return
            await asyncio.sleep(0.05)

    async def _open_link(self, part: Part) -> None:
        part.link = Proxy((part.front, LINK_PORT), (part.host, LINK_PORT))
        await part.link.start()

    async def add(self, role: str) -> Part:
        """One more worker, which nobody has seen before."""
        part = self._worker(role, self._named)
        self._named += 1
        await self._open_link(part)
        await self.launch(part)
        self.workers.append(part)
        return part

    async def remove(self, part: Part) -> int:
        """Have it leave for good; its exit code."""
        part.signal(signal.SIGTERM)
        code = await self.wait_exit(part)
        self.workers.remove(part)
        for proxy in (part.link, part.transfer):
            if proxy is not None:
                await proxy.stop()
        return code

    @contextlib.asynccontextmanager
    async def twin(self, part: Part) -> AsyncIterator[Part]:
        """Another process of the same name, at another address."""
        twin = self._worker(part.kind, self._named)
        self._named += 1
        name = twin.arguments.index("--instance-id") + 1
        twin.arguments[name] = part.name
        await self._open_link(twin)
        await self.launch(twin)
        try:
            yield twin
        finally:
            twin.kill()
            for proxy in (twin.link, twin.transfer):
                if proxy is not None:
                    await proxy.stop()

    async def _open_transfer(self, part: Part) -> None:
        """A proxy for the port of its KV transfer, which each incarnation chooses anew."""
        deadline = time.monotonic() + START_S
        while part.running and time.monotonic() < deadline:
            ports = [port for port in listening(part.host) if port not in (LINK_PORT, part.port)]
            if ports:
                if part.transfer is not None:
                    await part.transfer.stop()
                part.transfer = Proxy((part.front, ports[0]), (part.host, ports[0]))
                await part.transfer.start()
                return
            await asyncio.sleep(0.02)

    async def wait_exit(self, part: Part, timeout_s: float = DRAIN_S + 45.0) -> int:
        """Its exit code. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while part.running:
                await asyncio.sleep(0.02)
        assert part.process is not None
        code = part.process.returncode
        part.exits.append(code)
        return code

    async def restart(self, part: Part, after_s: float = 0.5) -> None:
        """As a supervisor does once it has ended."""
        await self.wait_exit(part)
        await asyncio.sleep(after_s)
        await self.launch(part)

    async def drain(self, part: Part) -> int:
        """SIGTERM, and a new process in its place once it has ended; the exit code of the old one. Clients
        are sent to a leaving frontend until a balancer has seen its /health."""
        part.signal(signal.SIGTERM)
        if part.kind == "frontend":
            await asyncio.sleep(_BALANCER_S)
            self.urls.remove(part.url)
        code = await self.wait_exit(part)
        await self.launch(part)
        return code

    def weather(self, parts: Sequence[Part], weather: Weather, *, transfer: bool = False) -> None:
        for part in parts:
            proxy = part.transfer if transfer else part.link
            if proxy is not None:
                proxy.set(weather)

    async def ready(self, timeout_s: float = START_S) -> None:
        """Until every frontend sees every worker ready. Raises TimeoutError with who is missing."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            missing = await self.missing()
            if not missing:
                return
            await asyncio.sleep(0.1)
        raise TimeoutError(f"not ready after {timeout_s:g} s: {missing}")

    async def missing(self) -> list[str]:
        """What is not ready, in words."""
        wanted = {part.name for part in self.workers}
        found = [f"{part.name} has ended" for part in self.parts if not part.running]
        for part in self.frontends:
            if part.running and part.url not in self.urls:
                found.append(f"{part.name} is not offered to clients")
            health = await self.health(part)
            states = {one["instance_id"]: one["state"] for one in health.get("instances", [])}
            ready = {name for name, state in states.items() if state == "ready"}
            if health.get("status") != "healthy" or ready != wanted:
                found.append(f"{part.name}: {health.get('status', 'no answer')}, {states}")
        return found

    async def health(self, part: Part) -> dict:  # type: ignore[type-arg]
        try:
            return json.loads((await get(f"{part.url}/health"))[1])  # type: ignore[no-any-return]
        except (OSError, ValueError, TimeoutError):
            return {}

    async def first_health(self) -> dict:  # type: ignore[type-arg]
        """Of the first frontend that answers."""
        for part in self.frontends:
            health = await self.health(part)
            if health:
                return health
        return {"instances": []}

    async def metric(self, name: str) -> dict[str, float]:
        """A counter's sum by frontend; without those that do not answer."""
        found = {}
        for part in self.frontends:
            with contextlib.suppress(OSError, ValueError, TimeoutError):
                lines = (await get(f"{part.url}/metrics"))[1].decode().splitlines()
                values = [
                    line.rsplit(" ", 1)[1] for line in lines if line.startswith((name + "{", name + " "))
                ]
                found[part.name] = sum(map(float, values))
        return found

    async def stop(self) -> None:
        for watcher in self._watchers:
            watcher.cancel()
        for part in self.parts:
            part.signal(signal.SIGCONT)
            part.signal(signal.SIGTERM)
        deadline = time.monotonic() + 10.0
        while time.monotonic() < deadline and any(part.running for part in self.parts):
            await asyncio.sleep(0.05)
        for part in self.parts:
            part.kill()
            if part.process is not None:
                part.process.wait()
            for proxy in (part.link, part.transfer):
                if proxy is not None:
                    await proxy.stop()


def listening(host: str) -> list[int]:
    """TCP ports that somebody listens on at this IPv4 address."""
    wanted = socket.inet_aton(host)[::-1].hex().upper()
    ports = []
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        address, _, port = fields[1].partition(":")
        if address == wanted and fields[3] == _LISTENING:
            ports.append(int(port, 16))
    return ports
