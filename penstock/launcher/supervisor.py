"""The supervisor: keeps the replicas of a graph running, and serves the control socket."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from penstock.checked import suggestion
from penstock.discovery.file import FileDiscovery
from penstock.errors import ConfigError
from penstock.graph import Graph, ServiceKind
from penstock.launcher.control import (
    ControlRequest,
    ControlResponse,
    ControlSocket,
    LocalGraphStatus,
    serving_control,
)
from penstock.launcher.fleet import Fleet, ready_lines
from penstock.launcher.health import fetch_health
from penstock.launcher.launches import (
    Launch,
    Site,
    check_gpus,
    labels,
    manifest_port,
    plan_frontend,
    plan_worker,
)
from penstock.launcher.output import Console, LogFile
from penstock.launcher.places import Place, Places
from penstock.launcher.replica import Replica, ReplicaState, Surroundings
from penstock.launcher.rolling import RollingRestart
from penstock.launcher.settings import LauncherSettings
from penstock.launcher.state import AlreadyRunning, StateFolder
from penstock.options.discovery_url import DiscoveryUrl, discovery_directory
from penstock.shapes import Registration

PROGRAM = (sys.executable, "-m", "penstock")
NAME = "penstock"  # the prefix of the supervisor's own lines


class Supervisor:
    """Runs a graph until it is stopped. The folder must be locked while it runs."""

    def __init__(
        self,
        graph: Graph,
        folder: StateFolder,
        gpus: Sequence[str],
        environ: Mapping[str, str],
        settings: LauncherSettings,
        console: Console,
        *,
        show_output: bool = True,
        program: Sequence[str] = PROGRAM,
    ) -> None:
        """Raises ConfigError when the graph cannot run here: too many replicas, too few GPUs or ports."""
        self._graph = graph
        self._folder = folder
        self._settings = settings
        self._console = console
        self._notices = LogFile(folder.logs / "supervisor.log", settings.log_file_bytes)
        self._around = Surroundings(
            program,
            settings,
            console if show_output else None,
            self._until_registered,
            self.notice,
            self._look,
            self._restore_folder,
        )
        self._site = Site(graph, folder.discovery, folder.secret, settings.http_host, environ, os.getpid())
        self._fleets = [Fleet(service, labels(graph)[service.name]) for service in graph.services]
        self._warnings = [*graph.notes, *check_gpus(graph, len(gpus))]
        for service in graph.services:
            self._check_count(service.name, service.replicas)
        self._registered: Mapping[str, Registration] = {}
        self._places = Places(gpus, settings.http_host, self._wanted_port())
        self._places.check_port()
        self._started_at = time.monotonic()
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
        self._was_ready = False
        self._failure = ""
        self._rolling = RollingRestart(self, settings.start_timeout_s)
        self._control = ControlSocket(folder, self._handle)
        self._restoring = asyncio.Lock()
        self._folder_trouble = ""

    async def run(self) -> None:
        """Start all replicas, keep them running, and stop them in order after `stop`.

        Raises:
            ConfigError: a process refused to start before the graph was first ready.
        """
        discovery = FileDiscovery(
            discovery_directory(
                DiscoveryUrl("file", str(self._folder.discovery)), self._graph.namespace, {}
            )
        )
        for warning in self._warnings:
            self.notice(f"note: {warning}")
        async with serving_control(self._control), asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            watch = tasks.create_task(self._follow(discovery))
            announce = tasks.create_task(self._announce())
            keep = tasks.create_task(self._keep_folder())
            try:
                self._start_all()
                await self._stopping.wait()
                announce.cancel()
                self._rolling.cancel()
                await self._stop_all()
            finally:
                watch.cancel()
                announce.cancel()
                keep.cancel()
                self._rolling.cancel()
        self._notices.close()
        if self._failure:
            raise ConfigError(self._failure)

    def stop(self) -> None:
        """Begin to stop all replicas in order. Further calls change nothing."""
        if not self._stopping.is_set():
            self.notice("stopping (again to stop without waiting for requests)")
            self._stopping.set()

    def interrupt(self) -> None:
        """Begin to stop all replicas in order; the second call kills them."""
        if self._stopping.is_set():
            for replica in self.replicas:
                replica.kill()
        self.stop()

    @property
    def is_ready(self) -> bool:
        """Whether every service has all its replicas, and they are ready."""
        return all(fleet.is_ready for fleet in self._fleets)

    def notice(self, text: str) -> None:
        """Write a line of the supervisor's own to the terminal and to its log."""
        self._console.write(NAME, text)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._notices.write(f"{stamp} {text}\n".encode())

    # --- replicas -----------------------------------------------------------------------------------

    @property
    def replicas(self) -> list[Replica]:
        """The replicas of all services, those that are ending included."""
        return [replica for fleet in self._fleets for replica in fleet.replicas]

    def start(self, fleet: Fleet, place: Place) -> Replica:
        """Start one more replica at this place."""
        service, index = fleet.service, fleet.next_index
        if place.port is not None:
            launch = plan_frontend(self._site, service, index, place.port.port)
        else:
            launch = plan_worker(self._site, service, index, place.gpus)
        path = self._folder.logs / service.name / f"{launch.name}.log"
        log = LogFile(path, self._settings.log_file_bytes)
        replica = Replica(launch, index, place, log, self._around)
        fleet.replicas.append(replica)
        self._tasks.create_task(self._run_replica(fleet, replica), name=launch.name)
        return replica

    def _grow(self, more: Mapping[Fleet, int]) -> None:
        """Start the given numbers of new replicas, or none. Raises ConfigError if GPUs or ports are
        missing."""
        taken: list[tuple[Fleet, Place]] = []
        try:
            for fleet, count in more.items():
                taken.extend((fleet, self._places.take(fleet.service)) for _ in range(count))
        except ConfigError:
            for _, place in taken:
                self._places.give_back(place)
            raise
        for fleet, place in taken:
            self.start(fleet, place)

    def place_beside(self, replica: Replica) -> Place | None:
        """A place for the successor of a replica that still runs; None when this machine has none."""
        return self._places.take_beside(replica.place)

    def _start_all(self) -> None:
        try:
            self._grow({fleet: fleet.service.replicas for fleet in self._fleets})
        except ConfigError as error:
            self._fail(str(error))

    async def _run_replica(self, fleet: Fleet, replica: Replica) -> None:
        try:
            await replica.run()
        finally:
            fleet.replicas.remove(replica)
            if fleet.reserved is not replica.place:
                self._places.give_back(replica.place)
            self._look()

    async def _stop_all(self) -> None:
        """Stop frontends before workers: their running requests still need the workers."""
        for kind in (ServiceKind.FRONTEND, ServiceKind.WORKER):
            fleets = [fleet for fleet in self._fleets if fleet.service.kind is kind]
            for replica in [replica for fleet in fleets for replica in fleet.replicas]:
                replica.stop()
            await self.until(partial(_all_gone, fleets))

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until `holds` is true; it is called after each change of a replica."""
        while not holds():
            self._changed.clear()
            await self._changed.wait()

    def _wanted_port(self) -> int:
        """The port of the first frontend."""
        for fleet in self._fleets:
            if fleet.service.kind is ServiceKind.FRONTEND:
                wanted = self._settings.http_port
                return manifest_port(fleet.service) if wanted is None else wanted
        raise ConfigError(f"{self._graph.name} has no frontend")

    # --- readiness ----------------------------------------------------------------------------------

    def _look(self) -> None:
        """Called after each change of a replica."""
        self._changed.set()
        failed = [replica for replica in self.replicas if replica.state is ReplicaState.FAILED]
        if failed and not self._was_ready and not self._failure:
            self._fail(f"{failed[0].launch.name} refused to start: {failed[0].last_line}")

    def _fail(self, reason: str) -> None:
        """Stop the graph, and have `run` raise a ConfigError with this reason."""
        self._failure = reason
        self._stopping.set()

    async def _announce(self) -> None:
        await self.until(lambda: self.is_ready)
        self._was_ready = True
        model = next((registration.model for registration in self._registered.values()), "MODEL")
        for line in ready_lines(self._urls(), model, time.monotonic() - self._started_at):
            self.notice(line)

    def _urls(self) -> list[str]:
        urls = [replica.launch.url for fleet in self._fleets for replica in fleet.wanted]
        return list(dict.fromkeys(url for url in urls if url))  # a successor's is the same

    async def _keep_folder(self) -> None:
        while True:
            await asyncio.sleep(self._settings.folder_poll_s)
            await self._restore_folder()

    async def _restore_folder(self) -> None:
        """Make again what was deleted of the state folder. Without it no command reaches this graph, and
        its processes cannot be started again."""
        trouble = ""
        async with self._restoring:
            try:
                restored = await asyncio.to_thread(self._folder.restore)
                if not self._control.is_reachable():
                    await self._control.open()
                    restored = True
                if restored:
                    self.notice(f"{self._folder.path} was deleted, at least in part; it was made again")
            except AlreadyRunning as error:
                self._fail(f"{self._folder.path} was deleted, and another launcher uses it now: {error}")
            except ConfigError as error:
                trouble = f"{error}. No command reaches this graph; to stop it: kill {os.getpid()}"
        if trouble and trouble != self._folder_trouble:
            self.notice(trouble)
        self._folder_trouble = trouble

    async def _until_registered(self, launch: Launch, pid: int) -> str:
        """Wait until this worker's process is registered; return its address."""
        while True:
            registration = self._registered.get(launch.instance_id)
            if registration is not None and registration.pid == pid:
                return registration.address
            await asyncio.sleep(self._settings.ready_poll_s)

    async def _follow(self, discovery: FileDiscovery) -> None:
        async for instances in discovery.watch():
            self._registered = instances

    # --- control ------------------------------------------------------------------------------------

    async def _handle(self, request: ControlRequest) -> ControlResponse:
        if request.op == "down":
            self.stop()
            return ControlResponse()
        if request.op == "scale":
            return ControlResponse(scaled=self.scale(request.replicas))
        if request.op == "restart":
            return ControlResponse(restarting=self.restart(request.services))
        return ControlResponse(status=await self.status())

    def scale(self, targets: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        """Start or stop replicas. All targets are checked before any is acted on.

        Args:
            targets: replicas wanted, by service name or label.

        Returns:
            service name: replicas wanted before and now.

        Raises:
            ConfigError: no such service, a number out of range, too few GPUs, or the graph is stopping.
        """
        if self._stopping.is_set():
            raise ConfigError(f"{self._graph.name} is stopping")
        wanted = {self._fleet(name): count for name, count in targets.items()}
        for fleet, count in wanted.items():
            self._check_count(fleet.service.name, count)
        before = {fleet: fleet.count for fleet in wanted}
        self._grow({fleet: max(0, count - before[fleet]) for fleet, count in wanted.items()})
        for fleet, count in wanted.items():
            if count != before[fleet]:
                self.notice(f"{fleet.service.name}: {count} replicas wanted")
            self._shrink(fleet, before[fleet] - count)
        return {fleet.service.name: (before[fleet], wanted[fleet]) for fleet in wanted}

    def _shrink(self, fleet: Fleet, count: int) -> None:
        """Stop `count` replicas, the newest first. A reserved place is given up before any of them."""
        if count > 0 and fleet.reserved is not None:
            place, fleet.reserved = fleet.reserved, None
            if not any(replica.place is place for replica in fleet.replicas):
                self._places.give_back(place)
            count -= 1
        for replica in fleet.newest_first[: max(0, count)]:
            replica.stop()

    def restart(self, names: Sequence[str]) -> list[str]:
        """Begin to replace all replicas of these services, of all when there are none, one by one: workers
        first, since a frontend without one of its roles, which may wait for its restart, is never ready.

        Returns:
            the replicas' names, in order.

        Raises:
            ConfigError: no such service, the graph is stopping, or a restart is under way.
        """
        if self._stopping.is_set():
            raise ConfigError(f"{self._graph.name} is stopping")
        fleets = [self._fleet(name) for name in names] or self._fleets
        fleets = sorted(dict.fromkeys(fleets), key=lambda one: one.service.kind is ServiceKind.FRONTEND)
        return self._rolling.begin(fleets, self._tasks)

    def _check_count(self, name: str, count: int) -> None:
        if not 0 <= count <= self._settings.replicas_max:
            raise ConfigError(f"{name}: expected 0 to {self._settings.replicas_max} replicas, got {count}")

    def _fleet(self, name: str) -> Fleet:
        for fleet in self._fleets:
            if fleet.answers_to(name):
                return fleet
        known = [fleet.service.name for fleet in self._fleets]
        raise ConfigError(f"{name}: no such service{suggestion(name, known)}; there are {', '.join(known)}")

    async def status(self) -> LocalGraphStatus:
        """The status of the graph. Fetches each frontend's /health."""
        urls = self._urls()
        answers = await asyncio.gather(
            *(fetch_health(url, self._settings.health_timeout_s) for url in urls)
        )
        return LocalGraphStatus(
            graph=self._graph.name,
            pid=os.getpid(),
            ready=self.is_ready and not self._stopping.is_set(),
            uptime_s=round(time.monotonic() - self._started_at, 1),
            services=[fleet.status() for fleet in self._fleets],
            health=dict(zip(urls, answers, strict=True)),
            notes=self._warnings,
            restarting=self._rolling.left,
            replaced=self._rolling.replaced,
            restart_error=self._rolling.error,
        )


def _all_gone(fleets: Sequence[Fleet]) -> bool:
    return not any(fleet.replicas for fleet in fleets)
