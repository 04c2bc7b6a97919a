"""What waits in a queue (core/admission.py): calls, in flows by tenant, in lines by priority."""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.core.pace import Drain


@dataclass(slots=True, eq=False)
class Call:
    """What waits: the requests of one client's call."""

    flow: Flow
    key: str
    since: float
    requests: dict[str, float] = field(default_factory=dict)  # work by request id
    sizes: dict[str, int] = field(default_factory=dict)  # bytes that they take

    @property
    def work(self) -> float:
        return sum(self.requests.values())


@dataclass(slots=True, eq=False)
class Flow:
    """A tenant in a line. It is kept while the line is, even with nothing in it."""

    line: Line
    tenant: str
    start: float  # virtual time at which its next call begins
    drain: Drain
    calls: dict[str, Call] = field(default_factory=dict)  # in order of arrival
    work: float = 0.0

    @property
    def own_ms(self) -> float:
        """How long what waits of it takes at its own pace; 0 as long as that is not known."""
        return self.drain.pace * self.work


@dataclass(slots=True, eq=False)
class Line:
    """A priority. It is kept while something of it waits."""

    priority: int
    half_s: float  # of its flows' paces
    flows: dict[str, Flow] = field(default_factory=dict)
    calls: int = 0
    work: float = 0.0
    virtual: float = 0.0  # the virtual start of the call that went last

    def flow(self, tenant: str) -> Flow:
        found = self.flows.get(tenant)
        if found is None:
            found = self.flows[tenant] = Flow(self, tenant, self.virtual, Drain(self.half_s))
        return found


def flow_start(flow: Flow) -> float:
    """What flows of a line take turns by."""
    return flow.start
