"""An event loop on virtual time, and processes within it that can be frozen and killed.

Time jumps to the next timer when nothing else is left to do, so an hour in which little happens takes
seconds. Whatever a process starts (tasks, timers, callbacks) carries the process
in its context; while the process is held, its callbacks are kept, as the kernel keeps what happens to a
stopped one, and run when it goes on. A killed process is held until the end of the simulation.

All processes share one processor: while one does something, for `callback_s`, nothing else happens, but
what is due meanwhile comes between two callbacks of a series.

Nothing depends on addresses in memory: tasks and futures hash by the order of their creation, so that the
sets which asyncio keeps of them have one order.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar, TypeVarTuple, Unpack

MAX_CALLBACKS_AT_ONCE = 200_000
"""Callbacks without time passing, after which the simulation is said to be going in circles."""

_Result = TypeVar("_Result")
_Arguments = TypeVarTuple("_Arguments")


class StandsStill(Exception):
    """Nothing is left that could ever happen, or everything happens and no time passes."""


class Connector(Protocol):
    """What carries the connections of the processes (network.py)."""

    def listen(self, factory: Callable[[], asyncio.Protocol], host: str, port: int) -> Any:
        """As create_server."""

    async def connect(
        self, factory: Callable[[], asyncio.Protocol], host: str, port: int
    ) -> tuple[asyncio.Transport, asyncio.Protocol]:
        """As create_connection."""


class Process:
    """What would be a process of the operating system: a name (its host), a clock, tasks, and a fate."""

    def __init__(self, loop: VirtualLoop, name: str) -> None:
        self.name = name
        self.loop = loop
        self.dead = False
        self.frozen = 0  # how many faults hold it
        self.tasks: list[asyncio.Task[Any]] = []
        self.clock = ProcessClock(loop)
        self.read_bytes_per_s: float | None = None  # None: it reads as fast as bytes arrive
        self.backlog: deque[asyncio.Handle] = deque()
        self.context = contextvars.copy_context()
        self.context.run(_process.set, self)
        loop.processes.append(self)

    @property
    def held(self) -> bool:
        """Whether nothing of it runs."""
        return self.dead or self.frozen > 0

    def spawn(self, coroutine: Coroutine[Any, Any, _Result], name: str = "") -> asyncio.Task[_Result]:
        """Run this as a part of the process."""
        task: asyncio.Task[_Result]
        task = self.loop.create_task(coroutine, name=name or self.name, context=self.context)
        return task

    def soon(self, callback: Callable[..., object], *args: Any) -> asyncio.Handle:
        """Call this as a part of the process."""
        return self.loop.call_soon(callback, *args, context=self.context)

    def freeze(self) -> None:
        """As SIGSTOP."""
        self.frozen += 1

    def thaw(self) -> None:
        """As SIGCONT: everything that it missed happens now."""
        self.frozen -= 1
        if not self.held:
            self.loop.run_backlog(self)

    def running_tasks(self) -> list[str]:
        """The names of its tasks that have not ended."""
        self.tasks = [task for task in self.tasks if not task.done()]
        return [task.get_name() for task in self.tasks]


_process: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


def current_process() -> Process:
    """The process that is running now."""
    process = _process.get()
    assert process is not None, "this is not called by a process"
    return process


class ProcessClock:
    """One process's clock: the loop's, and what it has jumped."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self.ahead_s = 0.0

    def now(self) -> float:
        return self._loop.time() + self.ahead_s

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class _Task(asyncio.Task[Any]):
    def __init__(self, *args: Any, loop: VirtualLoop, **options: Any) -> None:
        self._number = next(loop.numbers)
        super().__init__(*args, loop=loop, **options)

    def __hash__(self) -> int:
        return self._number


class _Future(asyncio.Future[Any]):
    def __init__(self, *args: Any, loop: VirtualLoop, **options: Any) -> None:
        self._number = next(loop.numbers)
        super().__init__(*args, loop=loop, **options)

    def __hash__(self) -> int:
        return self._number


class VirtualLoop(asyncio.BaseEventLoop):
    """See above. `network` is what its connections go over."""

    network: Connector

    def __init__(self, callback_s: float = 0.0) -> None:
        super().__init__()
        self.callback_s = callback_s  # how long each callback takes
        self.callbacks = 0  # run so far
        self.processes: list[Process] = []
        self.numbers = itertools.count()  # of tasks and futures
        self._now = 0.0
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._order = itertools.count()
        self._at_once = 0
        self._ready: deque[asyncio.Handle]

    def time(self) -> float:
        return self._now

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[_Arguments]], object],
        *args: *_Arguments,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    def call_later(
        self,
        delay: float,
        callback: Callable[[Unpack[_Arguments]], object],
        *args: *_Arguments,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_soon_threadsafe(
        self,
        callback: Callable[[Unpack[_Arguments]], object],
        *args: *_Arguments,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)  # there is one thread

    def create_task(self, coro: Any, *, name: Any = None, context: Any = None, **options: Any) -> Any:
        task = _Task(coro, loop=self, name=name, context=context, **options)
        process = context.get(_process) if context is not None else _process.get()
        if process is not None:
            process.tasks.append(task)
            if len(process.tasks) > 1000:
                process.running_tasks()
        return task

    def create_future(self) -> Any:
        return _Future(loop=self)

    async def create_connection(
        self, protocol_factory: Any, host: Any = None, port: Any = None, **options: Any
    ) -> Any:
        return await self.network.connect(protocol_factory, host, port)

    async def create_server(
        self, protocol_factory: Any, host: Any = None, port: Any = None, **options: Any
    ) -> Any:
        return self.network.listen(protocol_factory, host, port)

    def forgive(self) -> None:
        """Go on after StandsStill."""
        self._at_once = 0

    def run_backlog(self, process: Process) -> None:
        """Let a process that is not held any more catch up."""
        self._ready.extend(process.backlog)
        process.backlog.clear()

    def _run_once(self) -> None:
        ready, timers = self._ready, self._timers
        if not ready or (timers and timers[0][0] <= self._now):
            self._advance()
        self._at_once += len(ready)
        if self._at_once > MAX_CALLBACKS_AT_ONCE:
            raise StandsStill(f"{self._at_once} callbacks at {self._now:.6f} s; the next is {ready[0]!r}")
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle.cancelled():
                continue
            process = handle._context.get(_process)  # type: ignore[attr-defined]
            if process is not None and process.held:
                process.backlog.append(handle)
            else:
                self.callbacks += 1
                self._now += self.callback_s
                handle._run()

    def _advance(self) -> None:
        timers = self._timers
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
        if not timers and not self._ready:
            raise StandsStill("nothing is left that could happen")
        if timers and not self._ready and timers[0][0] > self._now:
            self._now = timers[0][0]
        while timers and timers[0][0] <= self._now:
            timer = heapq.heappop(timers)[2]
            if not timer.cancelled():
                self._ready.append(timer)
                self._at_once = 0

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Cancelled timers are left out when they are due."""

    def _process_events(self, event_list: Any) -> None:
        """There is no selector."""

    def _write_to_self(self) -> None:
        """There is no other thread to be woken from."""
