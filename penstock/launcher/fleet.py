"""The replicas of one service, and the lines that a ready graph prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.graph import Service
from penstock.launcher.control import LocalServiceStatus
from penstock.launcher.launches import lowest_free_index
from penstock.launcher.places import Place
from penstock.launcher.replica import Replica, ReplicaState
from penstock.launcher.state import own_command


@dataclass(slots=True, eq=False)
class Fleet:
    """The replicas of a service: those that are wanted, and those that are stopping.

    A replica that is being replaced counts once. Either its successor is on trial beside it, or it stops
    first, and its place is reserved for the successor.
    """

    service: Service
    label: str
    replicas: list[Replica] = field(default_factory=list)
    on_trial: Replica | None = None
    reserved: Place | None = None

    @property
    def wanted(self) -> list[Replica]:
        return [replica for replica in self.replicas if not replica.leaving]

    @property
    def settled(self) -> list[Replica]:
        """The wanted replicas, without a successor that is on trial."""
        return [replica for replica in self.wanted if replica is not self.on_trial]

    @property
    def count(self) -> int:
        """The number of replicas that the user asked for."""
        return len(self.settled) + (self.reserved is not None)

    @property
    def newest_first(self) -> list[Replica]:
        """The settled replicas, in the order in which scaling down stops them."""
        return sorted(self.settled, key=lambda replica: replica.index, reverse=True)

    @property
    def next_index(self) -> int:
        """The number of the next replica. A replica that is stopping keeps its number."""
        return lowest_free_index(replica.index for replica in self.replicas)

    @property
    def is_ready(self) -> bool:
        return self.reserved is None and all(
            replica.state is ReplicaState.READY for replica in self.settled
        )

    def answers_to(self, name: str) -> bool:
        """Whether `name` is this service's name, in any case, or its label."""
        return name.lower() in (self.service.name.lower(), self.label)

    def status(self) -> LocalServiceStatus:
        return LocalServiceStatus(
            name=self.service.name,
            label=self.label,
            wanted=self.count,
            replicas=[replica.status() for replica in self.replicas],
        )


def ready_lines(urls: Sequence[str], model: str, took_s: float) -> list[str]:
    """The lines that say where the graph is served, with a first request to paste.

    Args:
        urls: of the frontends.
        model: the served name of a model.
        took_s: seconds from the start until all replicas were ready.
    """
    if not urls:
        return [f"Ready after {took_s:.1f} s, without a frontend"]
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "What is my name?"}}]}}'
    return [
        f"Ready: {', '.join(urls)}  (after {took_s:.1f} s)",
        f"try: {own_command()} chat --url {urls[0]}",
        f"or:  curl {urls[0]}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'",
    ]
