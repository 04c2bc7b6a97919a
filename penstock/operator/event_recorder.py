"""Writes events: `kubectl describe` shows them, and they say what the operator did to a graph, and why.

The same event is written once an hour at most, so that a graph that fails every minute does not fill etcd.
"""

from __future__ import annotations

import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Literal

from penstock.kubernetes.api import Api, ApiError, Object, name_of, namespace_of, uid_of
from penstock.kubernetes.kinds import EVENTS
from penstock.operator.names import MANAGER

log = logging.getLogger(__name__)

REPEAT_AFTER = timedelta(hours=1)
_REMEMBERED_MAX = 4096
_MESSAGE_MAX = 1000  # the API takes 1,024 bytes


class EventRecorder:
    """Writes events about graphs."""

    def __init__(
        self, api: Api, host: str, utc: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._api = api
        self._host = host
        self._utc = utc
        self._recorded: OrderedDict[tuple[str, str, str], datetime] = OrderedDict()

    async def record(
        self, graph: Object, reason: str, message: str, kind: Literal["Normal", "Warning"] = "Normal"
    ) -> None:
        """Write an event and a log line. A failure to write the event is logged and not raised, so that it
        does not stop the reconciliation."""
        now = self._utc()
        key = uid_of(graph), reason, message
        if key in self._recorded and now - self._recorded[key] < REPEAT_AFTER:
            return
        self._recorded[key] = now
        self._recorded.move_to_end(key)
        if len(self._recorded) > _REMEMBERED_MAX:
            self._recorded.popitem(last=False)
        level = logging.WARNING if kind == "Warning" else logging.INFO
        log.log(level, "%s/%s: %s: %s", namespace_of(graph), name_of(graph), reason, message)
        try:
            await self._api.create(EVENTS, self._event(graph, reason, message, kind, now))
        except ApiError as error:
            if not error.is_of_ending_namespace:
                log.warning(
                    "an event about %s/%s could not be written: %s",
                    namespace_of(graph),
                    name_of(graph),
                    error,
                )

    def _event(self, graph: Object, reason: str, message: str, kind: str, now: datetime) -> Object:
        time = now.strftime("%Y-%m-%dT%H:%M:%SZ")
        return {
            "apiVersion": EVENTS.api_version,
            "kind": EVENTS.name,
            "metadata": {
                "name": f"{name_of(graph)}.{secrets.token_hex(8)}",
                "namespace": namespace_of(graph),
            },
            "involvedObject": {
                "apiVersion": graph["apiVersion"],
                "kind": graph["kind"],
                "name": name_of(graph),
                "namespace": namespace_of(graph),
                "uid": uid_of(graph),
                "resourceVersion": graph["metadata"].get("resourceVersion", ""),
            },
            "reason": reason,
            "message": message[:_MESSAGE_MAX],
            "type": kind,
            "source": {"component": MANAGER, "host": self._host},
            "firstTimestamp": time,
            "lastTimestamp": time,
            "count": 1,
        }
