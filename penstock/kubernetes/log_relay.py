"""Merges the logs of all pods of one role into one, since `kubectl logs -l` selects pods by one label only.

The relay follows each pod's log from its last lines on; if the pod is newer than the relay, from its first
line. When a connection ends, the log is requested again from the time of the last line, and lines of that
time that were shown before are left out. Lines written while the API server did not answer are shown
afterwards, unless the container was replaced meanwhile: Kubernetes only shows the log of the latest
container.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from datetime import datetime

import msgspec

from penstock.clock import Clock, MonotonicClock
from penstock.kubernetes.api import Api, ApiError, LogLine, Object, name_of, uid_of
from penstock.kubernetes.kinds import PODS
from penstock.kubernetes.reflector import Reflector, ReflectorSettings

log = logging.getLogger(__name__)

CONTAINER = "main"


class RelaySettings(msgspec.Struct, frozen=True):
    """The settings of a log relay.

    tail_lines: number of old lines that are shown of a pod that is older than the relay.
    retry_min_s, retry_max_s: pause before a log is requested again; it doubles while no new line comes.
    last_lines_s: how long the log of a deleted pod is still read.
    asked_s: a log that was followed for this long was read from its beginning, even if it had no lines.
    pods: times of the watch on pods.
    """

    tail_lines: int = 10
    retry_min_s: float = 0.5
    retry_max_s: float = 30.0
    last_lines_s: float = 10.0
    asked_s: float = 1.0
    pods: ReflectorSettings = ReflectorSettings()


class LogRelay:
    """Follows the logs of the pods of `namespace` that match `labels`.

    Args:
        write: called with the name of a pod and a line of its log.
    """

    def __init__(
        self,
        api: Api,
        namespace: str,
        labels: str,
        write: Callable[[str, str], None],
        settings: RelaySettings = RelaySettings(),  # noqa: B008 - frozen
        clock: Clock | None = None,
    ) -> None:
        self._api = api
        self._namespace = namespace
        self._write = write
        self._settings = settings
        self._clock = clock or MonotonicClock()
        self._sources: dict[str, _Source] = {}  # by the pod's uid
        self._pods = Reflector(
            api,
            PODS,
            namespace,
            labels,
            on_change=self._on_change,
            trim=_what_matters,
            settings=settings.pods,
            clock=clock,
        )
        self._tasks: asyncio.TaskGroup  # set by `run`, as is

    async def run(self) -> None:
        """Relay until cancelled."""
        async with asyncio.TaskGroup() as self._tasks:
            await self._pods.run()

    def _on_change(self, before: Object | None, after: Object | None) -> None:
        if before is not None and (after is None or uid_of(after) != uid_of(before)):
            self._gone(uid_of(before))
        if after is None:
            return
        source = self._sources.get(uid_of(after))
        if source is None:
            tail_lines = None if self._pods.synced else self._settings.tail_lines
            source = _Source(name_of(after), _Position(tail_lines))
            self._sources[uid_of(after)] = source
            source.following = self._tasks.create_task(self._follow(source), name=f"log {source.pod}")
        if before is None or _process(before) != _process(after):
            source.changed.set()

    def _gone(self, uid: str) -> None:
        source = self._sources.pop(uid, None)
        if source is not None:
            source.gone = True
            source.changed.set()
            self._tasks.create_task(self._end(source), name=f"the end of {source.pod}")

    async def _end(self, source: _Source) -> None:
        assert source.following is not None
        pausing = asyncio.create_task(self._clock.sleep(self._settings.last_lines_s))
        await asyncio.wait({source.following, pausing}, return_when=asyncio.FIRST_COMPLETED)
        pausing.cancel()
        source.following.cancel()

    async def _follow(self, source: _Source) -> None:
        """Follow one pod's log, also after a connection or a container has ended."""
        fruitless = 0
        while not source.gone:
            source.changed.clear()
            fruitless = 0 if await self._read(source) else fruitless + 1
            longest_s = min(
                self._settings.retry_min_s * 2.0 ** min(fruitless, 16), self._settings.retry_max_s
            )
            await self._pause(source, longest_s * random.uniform(0.5, 1.0))

    async def _read(self, source: _Source) -> bool:
        """Read until the log or the connection ends. Returns whether any line was new."""
        position = source.position
        before, began = position.shown, self._clock.now()
        reading = self._api.logs(
            source.pod,
            self._namespace,
            CONTAINER,
            since=position.time,
            tail_lines=position.tail_lines,
        )
        try:
            position.begin()
            async with contextlib.aclosing(reading):
                async for line in reading:
                    if position.is_new(line):
                        self._write(source.pod, line.text)
        except ApiError as error:
            log.debug("the log of %s ended: %s", source.pod, error)
        if self._clock.now() - began >= self._settings.asked_s:
            position.tail_lines = None
        return position.shown > before

    async def _pause(self, source: _Source, seconds: float) -> None:
        """Wait for some time, or until the pod has a new container or was deleted."""
        waits = {
            asyncio.create_task(source.changed.wait()),
            asyncio.create_task(self._clock.sleep(seconds)),
        }
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)


class _Source:
    """A pod whose log is followed."""

    def __init__(self, pod: str, position: _Position) -> None:
        self.pod = pod
        self.position = position
        self.changed = asyncio.Event()  # the pod has a new container, or was deleted
        self.gone = False
        self.following: asyncio.Task[None] | None = None


class _Position:
    """How far a log has been shown. When lines since some time are requested, the server begins up to a
    second earlier.

    tail_lines: the number of old lines to begin with while no line has been shown; None: all.
    """

    def __init__(self, tail_lines: int | None) -> None:
        self.tail_lines = tail_lines
        self.time = ""  # of the latest shown line, as the server wrote it
        self.shown = 0
        self._nanoseconds = 0  # `time` as a number
        self._shown_of_then = 0  # shown lines of exactly that time
        self._seen_of_then = 0  # lines of exactly that time since `begin`
        self._caught_up = False  # whether a new line came since `begin`: then all further lines are new

    def begin(self) -> None:
        """Begin to read the log again, from `time` on."""
        self._seen_of_then = 0
        self._caught_up = False

    def is_new(self, line: LogLine) -> bool:
        """Whether the line is new. A new line counts as shown from now on."""
        nanoseconds = nanoseconds_of(line.time)
        if nanoseconds == self._nanoseconds:
            self._seen_of_then += 1
        if not self._caught_up and (
            nanoseconds < self._nanoseconds
            or (nanoseconds == self._nanoseconds and self._seen_of_then <= self._shown_of_then)
        ):
            return False
        self._caught_up = True
        if nanoseconds != self._nanoseconds:
            self._nanoseconds, self.time = nanoseconds, line.time
            self._seen_of_then = 1
        self._shown_of_then = self._seen_of_then
        self.tail_lines = None
        self.shown += 1
        return True


def nanoseconds_of(time: str) -> int:
    """The nanoseconds since 1970 of a time in RFC 3339, with any number of digits. 0 if it is invalid."""
    whole, point, rest = time.partition(".")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    zone = rest[len(digits) :] if point else ""
    try:
        seconds = int(datetime.fromisoformat(whole + zone).timestamp())
    except ValueError:
        return 0
    return seconds * 1_000_000_000 + int(digits[:9].ljust(9, "0"))


def _process(pod: Object) -> tuple[object, ...]:
    """A value that changes with each new container of a pod, since each has a log of its own."""
    return pod["restarts"], pod["state"]


def _what_matters(pod: Object) -> Object:
    metadata = pod["metadata"]
    containers = pod.get("status", {}).get("containerStatuses") or ()
    main: Object = next((found for found in containers if found["name"] == CONTAINER), {})
    return {
        "metadata": {name: metadata[name] for name in ("name", "namespace", "uid", "resourceVersion")},
        "restarts": main.get("restartCount", 0),
        "state": next(iter(main.get("state", {})), ""),
    }
