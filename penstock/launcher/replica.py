"""Runs one replica: its process is started again whenever it ends, until the replica is stopped.

starting --ready--> ready --exit--> waiting --pause over--> starting
any but failed --stop--> stopping --exit--> stopped
starting, ready --exit with code 2--> failed            a wrong setting: the next start would fail as well
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum

import msgspec

from penstock.launcher.frontend_port import InheritedSockets
from penstock.launcher.launches import Launch
from penstock.launcher.output import Console, LineSplitter, LogFile
from penstock.launcher.places import Place
from penstock.launcher.process import Child, describe_exit, start_child
from penstock.launcher.settings import LauncherSettings

CONFIG_EXIT_CODE = 2  # of a Penstock command with a wrong setting

_LAST_OUTPUT_S = 2.0  # for reading the last output of a process that has ended


class ReplicaState(StrEnum):
    """The states in the table above."""

    STARTING = "starting"
    READY = "ready"
    WAITING = "waiting"
    FAILED = "failed"
    STOPPING = "stopping"
    STOPPED = "stopped"


class ReplicaStatus(msgspec.Struct, frozen=True):
    """A replica as `penstock status` shows it."""

    name: str
    instance_id: str
    state: ReplicaState
    pid: int | None = None  # while its process runs
    restarts: int = 0
    uptime_s: float = 0.0  # of the process
    address: str = ""  # URL of a frontend, host:port of a worker's link, once ready
    last_exit: str = ""  # in words
    gpus: tuple[str, ...] = ()


class Backoff:
    """Pauses between restarts. They double up to a limit; a stable run resets them to the shortest."""

    def __init__(self, settings: LauncherSettings) -> None:
        self._settings = settings
        self._next_s = settings.restart_min_s

    def pause_after(self, ran_s: float) -> float:
        """Seconds to wait after a process that ran for `ran_s`."""
        if ran_s >= self._settings.stable_s:
            self._next_s = self._settings.restart_min_s
        pause_s = self._next_s
        self._next_s = min(2 * pause_s, self._settings.restart_max_s)
        return pause_s


class Surroundings(msgspec.Struct, frozen=True):
    """What the supervisor gives to each replica.

    program: the command before the arguments of a launch.
    console: where output is shown besides the log files; None: nowhere.
    registered: waits until the worker with this launch and pid has registered; returns its address.
    notice: shows a line to the user.
    changed: called after each change of a replica's state.
    prepare: called before each start of a process; restores files that the process will read.
    """

    program: Sequence[str]
    settings: LauncherSettings
    console: Console | None
    registered: Callable[[Launch, int], Awaitable[str]]
    notice: Callable[[str], None]
    changed: Callable[[], None]
    prepare: Callable[[], Awaitable[None]]


class Replica:
    """Runs one launch. Call `run` once; `stop` and `kill` may be called any time on the same event loop."""

    def __init__(
        self, launch: Launch, index: int, place: Place, log: LogFile, surroundings: Surroundings
    ) -> None:
        self.launch = launch
        self.index = index
        self.place = place
        self.state = ReplicaState.STARTING
        self.last_line = ""
        self._log = log
        self._around = surroundings
        self._stop = asyncio.Event()
        self._force = asyncio.Event()
        self._child: Child | None = None
        self._started_at = 0.0
        self._restarts = 0
        self._was_ready = False
        self._address = ""
        self._last_exit = ""

    @property
    def leaving(self) -> bool:
        return self._stop.is_set()

    def stop(self) -> None:
        """Send SIGTERM, and SIGKILL once the drain time and a margin are over."""
        self._stop.set()

    def kill(self) -> None:
        """Stop it at once, without waiting for running requests."""
        self._stop.set()
        self._force.set()

    def status(self) -> ReplicaStatus:
        running = self._child is not None
        return ReplicaStatus(
            name=self.launch.name,
            instance_id=self.launch.instance_id,
            state=self.state,
            pid=self._child.pid if self._child else None,
            restarts=self._restarts,
            uptime_s=round(time.monotonic() - self._started_at, 1) if running else 0.0,
            address=self._address,
            last_exit=self._last_exit,
            gpus=self.place.gpus,
        )

    async def run(self) -> None:
        """Keep the process running until the replica is stopped."""
        backoff = Backoff(self._around.settings)
        while not self.leaving:
            self._become(ReplicaState.STARTING)
            self._started_at = time.monotonic()
            try:
                code = await self._run_once()
                self._last_exit = describe_exit(code)
            except OSError as error:  # for example no memory or no process number is left; that may pass
                code = 1
                self._last_exit = f"cannot be started ({error.strerror})"
            ran_s = time.monotonic() - self._started_at
            if self.leaving:
                break
            if code == CONFIG_EXIT_CODE:
                self._tell(f"{self._last_exit}, not starting it again: {self.last_line}")
                self._refuse_connections()
                self._become(ReplicaState.FAILED)
                await self._stop.wait()
                break
            pause_s = backoff.pause_after(ran_s)
            self._tell(f"{self._last_exit} after {ran_s:.1f} s, starting again in {pause_s:g} s")
            if pause_s > self._around.settings.refuse_after_s:
                self._refuse_connections()
            self._become(ReplicaState.WAITING)
            await self._stopped_within(pause_s)
            self._restarts += 1
        self._log.close()
        self._become(ReplicaState.STOPPED)

    async def _run_once(self) -> int:
        """One process from start to exit; the exit code. Raises OSError when it cannot be started."""
        argv = [*self._around.program, *self.launch.argv]
        await self._around.prepare()
        if self.place.port is None:
            return await self._accompany(await start_child(argv, self.launch.env), None)
        self.place.port.hold(self.place)
        with contextlib.closing(InheritedSockets(self.place.port, self._patience_s())) as sockets:
            child = await start_child(argv, self.launch.env | sockets.variables, sockets.descriptors)
            sockets.close_theirs()
            return await self._accompany(child, sockets)

    def _patience_s(self) -> float:
        """How long a new frontend process may look for its workers before it accepts connections."""
        settings = self._around.settings
        if self.place.for_successor and not self._was_ready:
            return settings.start_timeout_s  # the replica that it will replace still serves the port
        return settings.accept_after_s if self._restarts else 0.0

    async def _accompany(self, child: Child, sockets: InheritedSockets | None) -> int:
        self._child = child
        try:
            async with asyncio.TaskGroup() as tasks:
                output = tasks.create_task(self._copy_output(child))
                ready = tasks.create_task(self._await_ready(child, sockets))
                stopper = tasks.create_task(self._stop_when_told(child))
                code = await child.wait()
                ready.cancel()
                stopper.cancel()
                child.kill()  # ends processes that it started and left behind
                await asyncio.wait({output}, timeout=_LAST_OUTPUT_S)
                output.cancel()
        finally:
            child.kill()
            child.close()
            self._child = None
            self._address = ""
        return code

    async def _copy_output(self, child: Child) -> None:
        lines = LineSplitter()
        log_error = ""
        while chunk := await child.read():
            self._log.write(chunk)
            if self._log.error != log_error:
                log_error = self._log.error
                self._tell(log_error or "its log is written again")
            self._show(lines.feed(chunk))
        self._show(lines.flush())

    def _show(self, lines: Sequence[bytes]) -> None:
        console = self._around.console
        for line in lines:
            text = line.decode(errors="replace").rstrip()
            self.last_line = text.removeprefix("penstock: ") or self.last_line
            if console is not None:
                console.write(self.launch.name, text)

    async def _await_ready(self, child: Child, sockets: InheritedSockets | None) -> None:
        if sockets is not None:
            await sockets.ready()
            self._address = self.launch.url
        else:
            self._address = await self._around.registered(self.launch, child.pid)
        if not self.leaving:
            self._was_ready = True
            self._tell(f"ready after {time.monotonic() - self._started_at:.1f} s at {self._address}")
            self._become(ReplicaState.READY)

    async def _stop_when_told(self, child: Child) -> None:
        await self._stop.wait()
        self._become(ReplicaState.STOPPING)
        self._refuse_connections()
        child.terminate()
        grace_s = self.launch.drain_s + self._around.settings.kill_margin_s
        try:
            await asyncio.wait_for(self._force.wait(), grace_s)
        except TimeoutError:
            self._tell(f"has not ended within {grace_s:g} s of SIGTERM: killed")
        child.kill()

    def _refuse_connections(self) -> None:
        """Let the port close, unless another replica serves it. Connections would wait too long."""
        if self.place.port is not None:
            self.place.port.release(self.place)

    async def _stopped_within(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stop.wait(), seconds)
        except TimeoutError:
            pass

    def _become(self, state: ReplicaState) -> None:
        self.state = state
        self._around.changed()

    def _tell(self, what: str) -> None:
        self._around.notice(f"{self.launch.name} {what}")
