"""One service's replicas, and what people are told once a graph is ready."""

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
    """The replicas of a service: those wanted, and those on their way out.

    While one is replaced, it is counted once: either its successor is on trial beside it, or it leaves
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
        """The wanted ones, but for one on trial."""
        return [replica for replica in self.wanted if replica is not self.on_trial]

    @property
    def count(self) -> int:
        """How many people want."""
        return len(self.settled) + (self.reserved is not None)

    @property
    def newest_first(self) -> list[Replica]:
        """The settled ones, in the order in which a smaller fleet gives them up."""
        return sorted(self.settled, key=lambda replica: replica.index, reverse=True)

    @property
    def next_index(self) -> int:
        """The number of the next replica. A leaving one keeps its own."""
        return lowest_free_index(replica.index for replica in self.replicas)

    @property
    def is_ready(self) -> bool:
        return self.reserved is None and all(
            replica.state is ReplicaState.READY for replica in self.settled
        )

    def answers_to(self, name: str) -> bool:
        """Whether people mean this service: its name in any case, or its label."""
        return name.lower() in (self.service.name.lower(), self.label)

    def status(self) -> LocalServiceStatus:
        return LocalServiceStatus(
            name=self.service.name,
            label=self.label,
            wanted=self.count,
            replicas=[replica.status() for replica in self.replicas],
        )


def ready_lines(urls: Sequence[str], model: str, took_s: float) -> list[str]:
    """The banner: where the graph is served, and a first request that can be pasted.

    Args:
        urls: of the frontends.
        model: a served name.
        took_s: from the start until all was healthy.
    """
    if not urls:
        return [f"Ready after {took_s:.1f} s, without a frontend"]
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "What is my name?"}}]}}'
    return [
        f"Ready: {', '.join(urls)}  (after {took_s:.1f} s)",
        f"try: {own_command()} chat --url {urls[0]}",
        f"or:  curl {urls[0]}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'",
    ]
