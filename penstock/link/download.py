"""A file on its way from a worker, part by part, checked by its hash."""

from __future__ import annotations

import asyncio
import hashlib

from penstock.wire.messages import Asset


class Download:
    """Collects the parts of one file.

    Args:
        sha256: hex digest of the whole content, and its name.
        max_bytes: a longer one is not kept.
    """

    def __init__(self, sha256: str, max_bytes: int) -> None:
        self.done: asyncio.Future[bytes | str] = asyncio.get_running_loop().create_future()
        """The content, or why there is none."""
        self._sha256 = sha256
        self._max_bytes = max_bytes
        self._content = bytearray()
        self.size = 0  # in bytes, so far
        self._digest = hashlib.sha256()

    def add(self, part: Asset) -> None:
        """Take the next part; the last one resolves `done`."""
        self.size += len(part.data)
        if self.size <= self._max_bytes:
            self._content += part.data
            self._digest.update(part.data)  # part by part, so that no single call takes long
        if part.last:
            self._finish(part.missing)

    def fail(self, reason: str) -> None:
        """Resolve `done` without content."""
        if not self.done.done():
            self.done.set_result(reason)

    def _finish(self, missing: bool) -> None:
        if missing:
            self.fail("the worker does not have it")
        elif self.size > self._max_bytes:
            self.fail(f"it has {self.size} bytes, where {self._max_bytes} may be")
        elif self._digest.hexdigest() != self._sha256:
            self.fail("its content has another hash")
        elif not self.done.done():
            self.done.set_result(bytes(self._content))
