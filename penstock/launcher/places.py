"""Gives each replica what it needs of this machine: GPUs to a worker, a port to a frontend."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.errors import ConfigError
from penstock.graph import Service, ServiceKind
from penstock.launcher.frontend_port import FrontendPort
from penstock.launcher.gpus import GpuPool
from penstock.launcher.launches import gpus_needed

_PORT_TRIES = 100
_PORT_MAX = 65535
_DYING_S = 1.0
_DYING_POLL_S = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """The GPUs or the port of one replica."""

    gpus: tuple[str, ...] = ()
    port: FrontendPort | None = None
    for_successor: bool = False  # of a replica that still runs and has a place of its own


class Places:
    """The places of all replicas of all services.

    Args:
        host, port: where the first frontend listens; the next ones take the ports after it. 0: a free port.
    """

    def __init__(self, gpus: Sequence[str], host: str, port: int) -> None:
        self._gpus = GpuPool(gpus)
        self._host = host
        self._first_port = port
        self._taken: list[Place] = []

    def check_port(self) -> None:
        """Raises ConfigError if the first frontend's port is in use, or the host is not this machine's.
        Tries for a second: the frontends of a launcher that was just killed end a moment after it."""
        deadline = time.monotonic() + _DYING_S
        while True:
            try:
                self._open_first().release(None)
                return
            except ConfigError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_DYING_POLL_S)

    def take(self, service: Service) -> Place:
        """A place for one more replica. Raises ConfigError if no GPU or port is free."""
        if service.kind is ServiceKind.FRONTEND:
            place = Place(port=self._next_port())
        else:
            place = Place(gpus=self._gpus.take(gpus_needed(service)))
        self._add(place)
        return place

    def take_beside(self, place: Place) -> Place | None:
        """A place for the successor of the replica at `place`, beside it: the same port, or as many GPUs.
        None if too few GPUs are free."""
        if place.port is None and len(place.gpus) > self._gpus.free:
            return None
        beside = Place(self._gpus.take(len(place.gpus)), place.port, for_successor=True)
        self._add(beside)
        return beside

    def give_back(self, place: Place) -> None:
        """Free the GPUs and release the port."""
        self._taken.remove(place)
        self._gpus.give_back(place.gpus)
        if place.port is not None:
            place.port.release(place)

    def _add(self, place: Place) -> None:
        self._taken.append(place)
        if place.port is not None:
            place.port.hold(place)

    def _next_port(self) -> FrontendPort:
        taken = {place.port.port for place in self._taken if place.port is not None}
        if self._first_port not in taken:
            first = self._open_first()
            self._first_port = first.port
            return first
        start = self._first_port + 1
        for port in range(start, min(start + _PORT_TRIES, _PORT_MAX + 1)):
            if port not in taken:
                try:
                    return FrontendPort(self._host, port)
                except OSError:
                    continue
        raise ConfigError(f"no free port from {start} on for another frontend")

    def _open_first(self) -> FrontendPort:
        try:
            return FrontendPort(self._host, self._first_port)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
            where = f"port {self._first_port} on {self._host}"
            raise ConfigError(f"{where}: {reason}; choose another with --port") from error
