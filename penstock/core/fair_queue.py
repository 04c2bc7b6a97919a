"""The order in which what waits is served: by priority, and fairly between tenants.

Work may be in any unit. Members that are served together make an entry; the entries of one tenant with one
priority are a flow.

- Between priorities: the lowest number first. While anything of it waits, nothing of a higher number is
  served. Waiting does not raise a priority.
- Between the tenants of one priority: start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996). The
  flow with the lowest start tag is served next. All tags are in units of work:

      the start tag of a flow grows by the work of it that is served;
      the virtual time of a priority is the start tag that the flow served last had before;
      a flow that had nothing waiting starts at the virtual time, or at its own start tag if that is later.

  The last rule keeps a tenant from saving up a share that it did not use.
- Within a flow: first in, first out.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Entry:
    """Members that are served together."""

    flow: Flow
    key: str
    members: dict[str, float] = field(default_factory=dict)  # the work of each

    @property
    def work(self) -> float:
        return sum(self.members.values())


@dataclass(slots=True, eq=False)
class Flow:
    """A tenant's entries with one priority."""

    priority: int
    tenant: str
    start_tag: float
    entries: dict[str, Entry] = field(default_factory=dict)  # by key, in order of arrival
    work: float = 0.0


class FairQueue:
    """What waits. Pure: it knows no time.

    `first` is the entry to be served next. Whoever serves it charges its flow, and removes its members
    or, of members that are served in parts, the work.
    """

    def __init__(self) -> None:
        self.entries = 0
        self._flows: dict[int, dict[str, Flow]] = {}  # by priority, while anything of it waits, and tenant
        self._virtual_times: dict[int, float] = {}  # of these priorities
        self._entry_of: dict[str, Entry] = {}  # by member

    def __len__(self) -> int:
        return len(self._entry_of)

    def __contains__(self, member: str) -> bool:
        return member in self._entry_of

    def __getitem__(self, member: str) -> Entry:
        """The entry that this member is of."""
        return self._entry_of[member]

    @property
    def work(self) -> float:
        """Of all that waits."""
        return sum(flow.work for flows in self._flows.values() for flow in flows.values())

    def flows_of(self, tenant: str) -> list[Flow]:
        """The flows of a tenant, some of which may be empty."""
        return [flows[tenant] for flows in self._flows.values() if tenant in flows]

    def add(self, member: str, key: str, tenant: str, priority: int, work: float) -> Entry:
        """Add to the entry of this flow with this key, or as a new entry at the end of the flow."""
        virtual_time = self._virtual_times.setdefault(priority, 0.0)
        flows = self._flows.setdefault(priority, {})
        flow = flows.setdefault(tenant, Flow(priority, tenant, virtual_time))
        if not flow.entries:
            flow.start_tag = max(flow.start_tag, virtual_time)
        if key not in flow.entries:
            flow.entries[key] = Entry(flow, key)
            self.entries += 1
        entry = self._entry_of[member] = flow.entries[key]
        entry.members[member] = work
        flow.work += work
        return entry

    def first(self) -> Entry | None:
        """The entry to be served next; None when nothing waits."""
        if not self._flows:
            return None
        flows = self._flows[min(self._flows)].values()
        flow = min((flow for flow in flows if flow.entries), key=lambda flow: flow.start_tag)
        return next(iter(flow.entries.values()))

    def charge(self, entry: Entry, work: float) -> None:
        """So much of this entry is being served."""
        self._virtual_times[entry.flow.priority] = entry.flow.start_tag
        entry.flow.start_tag += work

    def cut(self, member: str, work: float) -> None:
        """So much of a member's work does not wait any more."""
        entry = self._entry_of[member]
        entry.members[member] -= work
        entry.flow.work -= work

    def remove(self, member: str) -> Flow:
        """A member leaves, and its entry with the last. Returns the flow that it was in."""
        entry = self._entry_of.pop(member)
        flow = entry.flow
        flow.work -= entry.members.pop(member)
        if not entry.members:
            del flow.entries[entry.key]
            self.entries -= 1
        if not flow.entries:
            flow.work = 0.0  # without rounding errors
            if not any(other.entries for other in self._flows[flow.priority].values()):
                del self._flows[flow.priority], self._virtual_times[flow.priority]
        return flow

    def ahead(self, tenant: str, priority: int, work: float = 0.0) -> tuple[float, float]:
        """The work that is served before a newcomer of this flow, if nothing else comes, and how much of it
        is the flow's own. `work` is the newcomer's, if others may be served between its parts: then it is
        what is served before the last part."""
        ahead = 0.0
        own = self._flows.get(priority, {}).get(tenant)
        tag = self._virtual_times.get(priority, 0.0)  # of the newcomer
        if own is not None:
            tag = max(tag, own.start_tag) + own.work
        for level, flows in self._flows.items():
            for flow in flows.values() if level <= priority else ():
                share = 1.0
                if level == priority and flow is not own and flow.work:
                    share = min(1.0, max(0.0, (tag + work - flow.start_tag) / flow.work))
                ahead += share * flow.work
        return ahead, own.work if own is not None else 0.0
