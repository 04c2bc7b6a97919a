"""A queue for each revision of each model, which share a bound on memory."""

from __future__ import annotations

from random import Random

from penstock.core.admission import AdmissionSettings, Queue
from penstock.core.room import Room


class Queues(dict[tuple[str, str], Queue]):
    """The queues by model and revision. Requests of one revision do not wait behind those of another, whose
    workers they could not use."""

    def __init__(self, settings: AdmissionSettings, rng: Random) -> None:
        super().__init__()
        self._settings = settings
        self._rng = rng
        self._room = Room(settings.max_queued_bytes)

    def of(self, model: str, revision: str) -> Queue:
        """The queue of this revision, made when it is first asked for."""
        queue = self.get((model, revision))
        if queue is None:
            queue = self[model, revision] = Queue(self._settings, self._rng, room=self._room)
        return queue
