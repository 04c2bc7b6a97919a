"""A NIXL agent. This module alone uses NIXL's interface, and translates its errors.

NIXL's Python wrapper makes agents whose progress thread uses a whole core. So this uses the binding below
the wrapper, in which the thread's sleep can be set. Written for NIXL 1.5.1.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.errors import ConfigError, PenstockError, RemoteError
from penstock.net.address import is_loopback

log = logging.getLogger(__name__)

# The extra `penstock-llm[nixl]` installs it as well, but with torch, which NIXL requires and does not need.
_INSTALL = "pip install --no-deps nixl==1.5.1 nixl-cu13==1.5.1"
_PLUGIN = "UCX"
_LOOPBACK_DEVICE = "lo"
_HOST_MEMORY = 0  # the device number that goes with memory of the host

Descriptors = NDArray[np.uint64]  # shape (reads, 3): address, bytes, device number


class Agent:
    """A named NIXL agent over UCX. Thread-safe.

    Args:
        name: unique among all agents that may ever read from each other, incarnations included.
        progress_interval_s: longest sleep of the agent's thread; events wake it earlier.
        host: where this process may listen. UCX would listen on every network device; with a loopback
            address it is restricted to the loopback device, unless `UCX_NET_DEVICES` is set.

    Raises:
        ConfigError: NIXL is not installed, or finds no transport.
    """

    def __init__(self, name: str, progress_interval_s: float, host: str) -> None:
        self.name = name
        if is_loopback(host):
            os.environ.setdefault("UCX_NET_DEVICES", _LOOPBACK_DEVICE)
        self._nixl = _bindings()
        with self._mapped(ConfigError, "cannot start"):
            config = self._nixl.nixlAgentConfig()
            config.useProgThread = True
            config.pthrDelay = round(progress_interval_s * 1e6)
            config.syncMode = self._nixl.NIXL_THREAD_SYNC_STRICT
            self._agent = self._nixl.nixlAgent(name, config)
            self._plugin = self._agent.createBackend(_PLUGIN, {})
        self._registered: list[Any] = []
        transports = os.environ.get("UCX_TLS", "chosen by UCX for each peer")
        log.info("transfer: NIXL agent %s over %s, transports: %s", name, _PLUGIN, transports)

    def register(self, memory: NDArray[np.uint8]) -> None:
        """Pin memory until `close`, so that peers can read from it or own reads can write to it.

        Raises:
            ConfigError: the memory cannot be pinned, for example because of a limit of locked memory.
        """
        with self._mapped(ConfigError, f"cannot register {memory.nbytes} bytes of memory"):
            region = [(memory.ctypes.data, memory.nbytes, _HOST_MEMORY, "")]
            descriptors = self._nixl.nixlRegDList(self._nixl.DRAM_SEG, region)
            self._agent.registerMem(descriptors, [self._plugin])
        self._registered.append(descriptors)

    def metadata(self) -> bytes:
        """The data that a peer needs to read from this agent. Complete once all memory is registered."""
        with self._mapped(ConfigError, "has no metadata"):
            return bytes(self._agent.getLocalMD())

    def add_peer(self, name: str, metadata: bytes) -> None:
        """Load a peer, so that its memory can be read. Raises RemoteError if the metadata is not this
        peer's."""
        with self._mapped(RemoteError, "cannot load the holder's metadata"):
            found = self._agent.loadRemoteMD(metadata)
        if (found.decode() if isinstance(found, bytes) else found) != name:
            self.remove_peer(str(found))
            raise RemoteError(f"NIXL: the holder's metadata is not that of {name[:60]!r}")

    def remove_peer(self, name: str) -> None:
        """Unload a peer. No read from it may be under way: the read would go on unnoticed."""
        with self._mapped(RemoteError, "cannot forget a peer"):
            self._agent.invalidateRemoteMD(name)

    def post(self, peer: str, own: Descriptors, theirs: Descriptors) -> int:
        """Start reading a peer's memory. Returns the read; call `is_done` until it has ended."""
        with self._mapped(RemoteError, "cannot read from the holder"):
            own_list = self._nixl.nixlXferDList(self._nixl.DRAM_SEG, own)
            their_list = self._nixl.nixlXferDList(self._nixl.DRAM_SEG, theirs)
            read = self._agent.createXferReq(self._nixl.NIXL_READ, own_list, their_list, peer, "", [])
            try:
                self._agent.postXferReq(read, "")
            except BaseException:
                self._agent.releaseXferReq(read)
                raise
        return int(read)

    def is_done(self, read: int) -> bool:
        """Whether a read has ended. The read is released once it has.

        Raises:
            RemoteError: the read has failed, and was released.
        """
        try:
            with self._mapped(RemoteError, "reading from the holder failed"):
                done = self._agent.getXferStatus(read) == self._nixl.NIXL_SUCCESS
        except RemoteError:
            self._forget(read)
            raise
        if done:
            self._forget(read)
        return bool(done)

    def close(self) -> None:
        """Unpin all memory and end the agent. No read may be under way."""
        for descriptors in self._registered:
            try:
                with self._mapped(RemoteError, "cannot unregister memory"):
                    self._agent.deregisterMem(descriptors, [self._plugin])
            except RemoteError as error:
                log.warning("transfer: %s", error)
        self._registered.clear()
        del self._agent

    def _forget(self, read: int) -> None:
        with self._mapped(RemoteError, "cannot release a read"):
            self._agent.releaseXferReq(read)

    @contextmanager
    def _mapped(self, kind: type[PenstockError], what: str) -> Iterator[None]:
        """Translate NIXL's exceptions. Their module is all they have in common; pybind11 adds
        RuntimeError."""
        try:
            yield
        except PenstockError:
            raise
        except Exception as error:
            if type(error).__module__ != self._nixl.__name__ and not isinstance(error, RuntimeError):
                raise
            raise kind(f"NIXL: {what}: {str(error) or type(error).__name__}") from error


def _bindings() -> Any:
    try:
        return importlib.import_module("nixl._bindings")
    except ImportError as error:
        raise ConfigError(f"transfer nixl: {error}; {_INSTALL}") from error
