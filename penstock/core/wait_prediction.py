"""How long a newcomer to a queue would wait, and the refusal of one that would wait too long.

    wait_ms = head_ms + max(pace * work_ahead / (1 - share_before), own_pace * own_work)

- `head_ms`: how long the servers have yet to work before they can begin what is first, as they say.
- `pace`, ms per unit of work: time in which something waited, divided by the work that was served in it.
  So it shows whatever limits the servers: prompts, decoding, memory, or what other queues send them.
- `work_ahead`: the work that is served before the newcomer if nothing else comes (core/fair_queue.py).
- `share_before`, 0 to 1: the part of the servers' time that was lately spent on better priorities, whose
  newcomers will go first too. It is `pace` times their work per second.
- `own_pace`, `own_work`: the pace of the newcomer's flow (tenant and priority) alone, and the work of it
  that waits. The work that other tenants send meanwhile makes this pace slower.
"""

from __future__ import annotations

import math
from random import Random

import msgspec

from penstock.core.fair_queue import FairQueue, Flow

ACCEPT_SHARE = 0.8
"""A newcomer is let in while its predicted wait is at most this part of the bound. Predictions err; with
this margin, few of those let in wait for longer than the bound."""

LARGEST_SHARE = 0.99
"""Upper limit of `share_before`: better priorities may stop coming at any time."""

MAX_RETRY_S = 60.0
"""Longest Retry-After, before it is spread: no prediction reaches further."""

FORGOTTEN_PART = 0.02
"""By how much an entry served makes those before it count less in a pace: the last 50 or so count, or all
of the last `half_life_s` where there were more. Workers that end many answers with one step take as many
new requests at once: 50 may be a fraction of what one step set free."""

PRIOR_COUNTS = 8
"""Counts before a measured pace is used; a guess weighs as much as that many."""

MAX_PRIORITIES = 256
"""Priorities whose recent work is remembered."""


class Pace:
    """Milliseconds of a server per unit of work, measured while something waits.

    Args:
        half_life_s: what was measured keeps half of its weight for so long at least (FORGOTTEN_PART).
    """

    def __init__(self, half_life_s: float) -> None:
        self.known = False  # guessed, or measured often enough
        self._half_life_ms = half_life_s * 1e3
        self._counts = 0
        self._ms = 0.0
        self._work = 0.0
        self._forgettable = 0.0  # how much the time that has passed allows to forget
        self._since: float | None = None  # when the time not counted yet began; None: nothing waits

    @property
    def ms_per_unit(self) -> float:
        """0 as long as it is not known."""
        return self._ms / self._work if self.known and self._work else 0.0

    def start(self, now: float) -> None:
        """Something waits, perhaps not only since now."""
        if self._since is None:
            self._since = now

    def stop(self) -> None:
        """Nothing waits, or time passes that is not to count."""
        self._since = None

    def count(self, work: float, now: float, servers: int = 1) -> None:
        """So many servers took the time since the last count, or since `start`, for so much work."""
        if self._since is None:
            return
        elapsed_ms = (now - self._since) * 1e3
        self._since = now
        allowed = self._forgettable + elapsed_ms * math.log(2) / self._half_life_ms
        forgotten = min(FORGOTTEN_PART, allowed)
        self._forgettable = min(1.0, allowed - forgotten)
        self._ms = self._ms * math.exp(-forgotten) + elapsed_ms * servers
        self._work = self._work * math.exp(-forgotten) + work
        self._counts += 1
        self.known = self.known or self._counts >= PRIOR_COUNTS

    def guess(self, ms: float, work: float) -> None:
        """Until it is measured: so much work takes so long. 0 ms: there is nothing to guess from."""
        if ms > 0.0:
            self._ms += PRIOR_COUNTS * ms
            self._work += PRIOR_COUNTS * work
            self.known = True


class Refusal(msgspec.Struct, frozen=True):
    """Why a newcomer is not let in."""

    reason: str  # wait: predicted too long; full: a limit is reached
    wait_ms: float  # as predicted for it
    bound_ms: float
    retry_after_s: float  # whole seconds
    awaited: str  # what it would wait for
    limit: str = ""  # if full: what there are too many of

    def __str__(self) -> str:
        limit = f" limit={self.limit}" if self.limit else ""
        return (
            f"Too many requests are waiting for {self.awaited} (reason={self.reason}{limit} "
            f"wait_ms={self.wait_ms:.0f} bound_ms={self.bound_ms:.0f})."
        )


class WaitPrediction:
    """Predicts the waits of newcomers to a queue, and refuses them. `now` in seconds.

    Args:
        awaited: what newcomers wait for, in the words of a refusal.
        bound_ms: the longest wait. Half of it is the half-life of what is measured.
        rng: spreads the retries of newcomers that are refused.
        pace: of all that is served, if it has another half-life.
    """

    def __init__(
        self, queue: FairQueue, awaited: str, bound_ms: float, rng: Random, pace: Pace | None = None
    ) -> None:
        self._queue = queue
        self._awaited = awaited
        self._bound_ms = bound_ms
        self._rng = rng
        self._half_life_s = bound_ms / 2e3
        self.pace = pace or Pace(self._half_life_s)
        self.head_ms = 0.0
        self.servers = 1  # how many work side by side
        self._flows: dict[tuple[int, str], Pace] = {}  # of those that had to wait
        self._recent: dict[int, tuple[float, float]] = {}  # work by priority, a sum that halves; as of when

    def newcomer_ms(self, tenant: str, priority: int, now: float, work: float = 0.0) -> float:
        """How long a newcomer would wait, by the formula above. `work` is its own, if it is served in
        parts: then the wait is for the last one."""
        work_ahead, own_work = self._queue.ahead(tenant, priority, work)
        recent = sum(self._recent_work(other, now) for other in self._recent if other < priority)
        share_before = self.served_in_ms(recent * math.log(2) / self._half_life_s) / 1e3
        ahead_ms = self.served_in_ms(work_ahead) / (1.0 - min(LARGEST_SHARE, share_before))
        own = self._flows.get((priority, tenant))
        own_ms = own.ms_per_unit * own_work if own is not None else 0.0
        return self.head_ms + max(ahead_ms, own_ms)

    def refuse(self, wait_ms: float, limit: str = "") -> Refusal | None:
        """The refusal of a newcomer, if it would wait too long or there are too many of `limit`. It may
        come back when the wait will be within the bound, each newcomer at another moment."""
        over_s = min(max(0.0, wait_ms - ACCEPT_SHARE * self._bound_ms) / 1e3, MAX_RETRY_S)
        if not over_s and not limit:
            return None
        reason, limit = ("wait", "") if over_s else ("full", limit)
        retry_after_s = math.ceil(over_s + self._rng.random() * max(1.0, over_s / 4))
        return Refusal(reason, wait_ms, self._bound_ms, float(max(1, retry_after_s)), self._awaited, limit)

    def served_in_ms(self, work: float) -> float:
        """How long the servers take for so much work."""
        return self.pace.ms_per_unit / self.servers * work

    def flow_waits(self, flow: Flow, now: float) -> None:
        """Something of this flow has to wait."""
        self._flows.setdefault((flow.priority, flow.tenant), Pace(self._half_life_s)).start(now)

    def flow_served(self, flow: Flow, work: float, now: float) -> None:
        """So much of this flow was served."""
        pace = self._flows.get((flow.priority, flow.tenant))
        if pace is not None:
            pace.count(work, now)
        recent = self._recent_work(flow.priority, now) + work
        self._recent.pop(flow.priority, None)
        self._recent[flow.priority] = recent, now
        if len(self._recent) > MAX_PRIORITIES:
            del self._recent[next(iter(self._recent))]  # the one not served for the longest time

    def flow_shrank(self, flow: Flow) -> None:
        """Something of this flow has left. Once nothing of it waits, its pace is forgotten."""
        if not flow.entries:
            self._flows.pop((flow.priority, flow.tenant), None)

    def stop(self) -> None:
        """The time until something has to wait again says nothing about any pace."""
        self.head_ms = 0.0
        for pace in (self.pace, *self._flows.values()):
            pace.stop()

    def _recent_work(self, priority: int, now: float) -> float:
        work, at = self._recent.get(priority, (0.0, now))
        return work * math.exp2((at - now) / self._half_life_s)
