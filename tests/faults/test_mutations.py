"""Whether the simulation would notice: code is broken on purpose, and some seed must show it."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.core import membership
from penstock.core.admission import AdmissionQueue
from penstock.core.deadlines import Phase
from penstock.core.dispatcher import Dispatcher
from penstock.core.fair_queue import FairQueue
from penstock.core.lifecycle import Lifecycle
from penstock.core.membership import Membership
from penstock.core.pairing import KvFormat
from penstock.core.placement import Placement
from penstock.core.prefix_index import PrefixIndex
from penstock.core.progress import Progress
from penstock.core.suspects import Strikes, Suspects
from penstock.core.worker_load import WorkerLoad
from penstock.engines.block_pool import BlockPool
from penstock.engines.handoffs import HeldHandoffs
from penstock.engines.pulls import OpenPulls
from penstock.engines.scheduler import Scheduler
from penstock.errors import ProtocolError
from penstock.link.client import LinkClient
from penstock.link.connection import Connection
from penstock.link.session import Session
from penstock.router.router import Router
from penstock.wire import frames
from penstock.wire.reports import Reports
from penstock.worker.worker import Worker
from simulator.draw import QUIET_EVERY
from simulator.report import simulate
from simulator.scenario import Options

MOST_SEEDS = 120
"""Within which each must be found; most need one or two, and a change of anything moves them."""

QUIET = Options()
"""Only seeds in which nothing goes wrong."""

Break = Callable[[pytest.MonkeyPatch], None]


def releases_are_not_sent(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LinkClient, "release", lambda self, handoff_id, *, sent: None)


def cancels_are_not_sent(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LinkClient, "cancel", lambda self, attempt_id: None)


def late_outputs_are_taken(patch: pytest.MonkeyPatch) -> None:
    real = Lifecycle.on_output

    def on_output(self: Any, output: Any, now: float) -> Any:
        return real(self, msgspec.structs.replace(output, attempt_id=self.attempt_id), now)

    patch.setattr(Lifecycle, "on_output", on_output)


def the_next_attempt_forgets_what_was_generated(patch: pytest.MonkeyPatch) -> None:
    real = Lifecycle._send

    def send(self: Any, *args: Any, **options: Any) -> Any:
        effect = real(self, *args, **options)
        attempt = effect.attempt
        return msgspec.structs.replace(
            effect,
            attempt=msgspec.structs.replace(attempt, token_ids=attempt.token_ids[: attempt.prompt_len]),
        )

    patch.setattr(Lifecycle, "_send", send)


def a_lost_request_is_never_asked_for_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Router, "on_lost", lambda self, *args: None)
    patch.setattr(Lifecycle, "tick", lambda self, now: [])


def bookings_stay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Placement, "unbook", lambda self, placed: None)


def reports_do_not_settle_what_was_sent(patch: pytest.MonkeyPatch) -> None:
    def report(self: Any, seen: int, load: Any) -> None:
        self.reported = load

    patch.setattr(WorkerLoad, "report", report)


def the_index_keeps_a_lost_worker(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PrefixIndex, "remove_worker", lambda self, worker: None)


def evictions_are_not_indexed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PrefixIndex, "removed", lambda self, worker, hashes: None)


def a_cleared_cache_is_not_indexed(patch: pytest.MonkeyPatch) -> None:
    real = Placement.cache_changed

    def cache_changed(self: Any, instance_id: str, stored: Any, removed: Any, cleared: bool) -> None:
        real(self, instance_id, stored, removed, False)

    patch.setattr(Placement, "cache_changed", cache_changed)


def blocks_are_freed_while_they_are_read(patch: pytest.MonkeyPatch) -> None:
    real = HeldHandoffs.retracted
    patch.setattr(
        HeldHandoffs,
        "retracted",
        lambda self, handoff_id, done, now: real(self, handoff_id, True, now),
    )


def blocks_are_freed_while_they_are_written(patch: pytest.MonkeyPatch) -> None:
    real = OpenPulls.abandon

    def abandon(self: Any, attempt_id: str) -> None:
        pull = self._open[attempt_id]
        real(self, attempt_id)
        self._pool.release(pull.block_ids)
        pull.block_ids = []

    patch.setattr(OpenPulls, "abandon", abandon)


def a_failed_pull_counts_as_good(patch: pytest.MonkeyPatch) -> None:
    real = Scheduler.pull_done

    def pull_done(self: Any, attempt_id: str, pulled: Any, now: float) -> None:
        real(self, attempt_id, msgspec.structs.replace(pulled, error=None), now)

    patch.setattr(Scheduler, "pull_done", pull_done)


def preempted_attempts_keep_their_blocks(patch: pytest.MonkeyPatch) -> None:
    real = Scheduler._preempt

    def preempt(self: Any, active: Any) -> None:
        self.pool.acquire(active.block_ids[: active.cached_blocks])
        real(self, active)

    patch.setattr(Scheduler, "_preempt", preempt)


def a_reused_block_is_not_reported(patch: pytest.MonkeyPatch) -> None:
    real = BlockPool.drain
    patch.setattr(BlockPool, "drain", lambda self: (real(self)[0], []))


def orphans_run_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Worker, "on_peer_lost", lambda self, peer: None)


def a_worker_forgets_whose_attempt_it_was(patch: pytest.MonkeyPatch) -> None:
    real = Worker.on_generate

    def on_generate(self: Any, peer: Any, attempt: Any) -> None:
        real(self, peer, attempt)
        self._owners[attempt.attempt_id] = next(iter(self._server.peers))

    patch.setattr(Worker, "on_generate", on_generate)


def silence_is_not_noticed(patch: pytest.MonkeyPatch) -> None:
    real = Session.tick

    def tick(self: Any, seconds: float) -> None:
        self.connection.silent_s = 0.0
        real(self, 0.0)

    patch.setattr(Session, "tick", tick)


def wedged_engines_are_not_noticed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Progress, "stuck_s", lambda self, now: 0.0)


def a_new_incarnation_is_not_connected(patch: pytest.MonkeyPatch) -> None:
    real = Membership.discovered

    def discovered(self: Any, current: Any) -> Any:
        kept = {
            name: self.members[name].registration if name in self.members else registration
            for name, registration in current.items()
        }
        return real(self, kept)

    patch.setattr(Membership, "discovered", discovered)


def a_quarantine_ends_by_itself(patch: pytest.MonkeyPatch) -> None:
    """Later than one fault lasts, so that only several that overlap show it."""
    real = Progress.stuck_s

    def stuck_s(self: Any, now: float) -> float:
        still_s = real(self, now)
        return still_s if still_s < 12.0 else 0.0

    patch.setattr(Progress, "stuck_s", stuck_s)


def stuck_workers_are_connected_anew(patch: pytest.MonkeyPatch) -> None:
    """Each time the patience with them begins again, as if progress were forgotten with the link."""
    real = Router.on_stuck

    def on_stuck(self: Any, instance_id: str, reason: str) -> None:
        real(self, instance_id, reason)
        link = self.fleet.link(instance_id)
        if link is not None and link.up:
            link._session.connection.cut("its engine is stuck")
            self.fleet._links[instance_id].progress = None

    patch.setattr(Router, "on_stuck", on_stuck)


def a_worker_that_is_back_is_not_indexed(patch: pytest.MonkeyPatch) -> None:
    real = PrefixIndex.add_worker
    seen: set[tuple[int, str]] = set()

    def add_worker(self: Any, worker: str) -> None:
        if (id(self), worker) not in seen:
            real(self, worker)
        seen.add((id(self), worker))

    patch.setattr(PrefixIndex, "add_worker", add_worker)
    for name in ("cleared", "stored", "removed"):
        method = getattr(PrefixIndex, name)

        def if_there(self: Any, worker: str, *args: Any, method: Any = method) -> None:
            if worker in self._slots:
                method(self, worker, *args)

        patch.setattr(PrefixIndex, name, if_there)
    patch.setattr(PrefixIndex, "held", lambda self, worker: self._held.get(worker, 0))


def some_attempts_are_lost_on_arrival(patch: pytest.MonkeyPatch) -> None:
    """Which only their deadline ends."""
    real = Worker.on_generate

    def on_generate(self: Any, peer: Any, attempt: Any) -> None:
        if len(attempt.token_ids) % 7:
            real(self, peer, attempt)

    patch.setattr(Worker, "on_generate", on_generate)


def attempts_that_are_given_up_run_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lifecycle, "_abandon", lambda self: setattr(self, "attempt_id", "") or [])


def requests_wait_beside_idle_workers(patch: pytest.MonkeyPatch) -> None:
    real = AdmissionQueue.dispatch

    def dispatch(
        self: Any, request_id: str, wait_ms: float, workers: int, now: float, **options: Any
    ) -> float | None:
        entered, _ = self._entered.get(request_id, (-4.0, 0))
        if now - entered < 4.0:
            self.hold(request_id, workers, now)
            return None
        return real(self, request_id, wait_ms, workers, now, **options)

    patch.setattr(AdmissionQueue, "dispatch", dispatch)


def a_stall_is_not_noticed(patch: pytest.MonkeyPatch) -> None:
    real = Lifecycle.tick

    def tick(self: Any, now: float) -> Any:
        late = self.phase is Phase.QUEUED or now >= self._request_deadline
        return real(self, now) if late else []

    patch.setattr(Lifecycle, "tick", tick)


def a_quarantine_lasts_too_long(patch: pytest.MonkeyPatch) -> None:
    real = Membership.advancing
    left: dict[tuple[int, str], int] = {}

    def advancing(self: Any, instance_id: str) -> None:
        key = id(self), instance_id
        left[key] = left.get(key, 200) - 1
        if not left[key]:
            del left[key]
            real(self, instance_id)

    patch.setattr(Membership, "advancing", advancing)


def leaving_workers_do_not_drain(patch: pytest.MonkeyPatch) -> None:
    real = Worker._drain

    async def drain(self: Any, *args: Any) -> None:
        self._settings = msgspec.structs.replace(self._settings, drain_s=0.0)
        await real(self, *args)

    patch.setattr(Worker, "_drain", drain)


def priorities_are_turned_round(patch: pytest.MonkeyPatch) -> None:
    real = FairQueue.first

    def first(self: Any) -> Any:
        flows, self._flows = self._flows, {-it: of for it, of in self._flows.items()}
        try:
            return real(self)
        finally:
            self._flows = flows

    patch.setattr(FairQueue, "first", first)


def those_who_come_back_go_last(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("penstock.core.admission.RETURNED_PRIORITY", 2**31)


def nobody_is_the_cause(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Strikes, "is_cause", lambda self, max_deaths, *, alone: False)


def failures_are_not_counted(patch: pytest.MonkeyPatch) -> None:
    real = Strikes.add

    def add(self: Any, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        self.failures = 0

    patch.setattr(Strikes, "add", add)


def what_a_full_worker_said_is_kept(patch: pytest.MonkeyPatch) -> None:
    real = Dispatcher.lost

    def lost(self: Any, instance_id: str, *args: Any) -> Any:
        before = dict(self.full_until)
        events = real(self, instance_id, *args)
        self.full_until = before
        return events

    patch.setattr(Dispatcher, "lost", lost)


def suspects_are_never_forgotten(patch: pytest.MonkeyPatch) -> None:
    real = Suspects.note

    def note(self: Any, request_id: str, strikes: int, *instances: str) -> None:
        if strikes:
            real(self, request_id, strikes, *instances)

    patch.setattr(Suspects, "note", note)


def evictions_are_indexed_late(patch: pytest.MonkeyPatch) -> None:
    real = PrefixIndex.removed
    late: dict[int, list[Any]] = {}

    def removed(self: Any, worker: str, hashes: Any) -> None:
        late.setdefault(id(self), []).append((worker, hashes))

    ticks: dict[int, int] = {}
    real_tick = Router._tick

    def tick(self: Any) -> None:
        real_tick(self)
        index = self.placement.index
        ticks[id(index)] = ticks.get(id(index), 0) + 1
        if ticks[id(index)] % 100 == 0:
            for worker, hashes in late.pop(id(index), []):
                if worker in index._slots:
                    real(index, worker, hashes)

    patch.setattr(PrefixIndex, "removed", removed)
    patch.setattr(Router, "_tick", tick)


def everything_is_indexed_late(patch: pytest.MonkeyPatch) -> None:
    """What an index has is what the worker had once."""
    change, up, look = Placement.cache_changed, Placement.up, Router._tick
    late: dict[int, list[tuple[int, str, tuple[Any, ...]]]] = {}
    ticks: Counter[int] = Counter()

    def cache_changed(self: Any, instance_id: str, *what: Any) -> None:
        late.setdefault(id(self), []).append((ticks[id(self)] + 150, instance_id, what))

    def comes_up(self: Any, card: Any, *what: Any) -> None:
        late[id(self)] = [it for it in late.get(id(self), []) if it[1] != card.instance_id]
        up(self, card, *what)

    def tick(self: Any) -> None:
        look(self)
        placement = self.placement
        ticks[id(placement)] += 1
        changes, late[id(placement)] = late.get(id(placement), []), []
        for it in changes:
            if it[0] > ticks[id(placement)]:
                late[id(placement)].append(it)
            else:
                change(placement, it[1], *it[2])

    patch.setattr(Placement, "cache_changed", cache_changed)
    patch.setattr(Placement, "up", comes_up)
    patch.setattr(Router, "_tick", tick)


def blocks_leak_until_an_engine_is_idle(patch: pytest.MonkeyPatch) -> None:
    real, report = Scheduler._preempt, Scheduler.report

    def preempt(self: Any, active: Any) -> None:
        kept = active.block_ids[: active.cached_blocks]
        self.pool.acquire(kept)
        self.__dict__.setdefault("leaked", []).append(kept)
        real(self, active)

    def reported(self: Any) -> Any:
        if not self.busy:
            for kept in self.__dict__.pop("leaked", []):
                self.pool.release(kept)
        return report(self)

    patch.setattr(Scheduler, "_preempt", preempt)
    patch.setattr(Scheduler, "report", reported)


def idle_workers_are_not_believed(patch: pytest.MonkeyPatch) -> None:
    real = WorkerLoad.report

    def report(self: Any, seen: int, load: Any) -> None:
        before = self.reported
        real(self, seen, load if load.running or not before.steps else before)

    patch.setattr(WorkerLoad, "report", report)


def requests_go_to_any_revision_of_their_model(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(membership, "serves", lambda worker, revision: True)


def requests_wait_for_revisions_that_are_gone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Membership, "replaced", lambda self, model: False)


def replaced_revisions_go_on_being_served(patch: pytest.MonkeyPatch) -> None:
    real = Membership.elect

    def elect(self: Any) -> Any:
        before = dict(self.served)
        real(self)
        self.served.update(before)
        return []

    patch.setattr(Membership, "elect", elect)


def prompts_are_prefilled_for_workers_that_would_refuse_them(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("penstock.core.placement.kv_format", lambda it: KvFormat())


def held_kv_is_sent_to_whoever_decodes(patch: pytest.MonkeyPatch) -> None:
    real = Lifecycle.place

    def place(self: Any, decode: str, prefill: Any, now: float, *, local: bool) -> Any:
        return real(self, decode, prefill, now, local=False)

    patch.setattr(Lifecycle, "place", place)


def liars_are_not_cut_off(patch: pytest.MonkeyPatch) -> None:
    def guard(self: Any, call: Any, *args: Any) -> None:
        with contextlib.suppress(ProtocolError):
            call(*args)

    patch.setattr(Connection, "guard", guard)


def reports_are_believed(patch: pytest.MonkeyPatch) -> None:
    for name in ("load", "step", "bounce"):
        patch.setattr(Reports, name, lambda self, *args: None)


def loads_are_believed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Reports, "load", lambda self, seen, load: None)


def an_index_grows_beyond_its_pool(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("penstock.core.placement.most_blocks", lambda total_blocks: math.inf)


def blocks_that_were_not_there_may_go(patch: pytest.MonkeyPatch) -> None:
    real = PrefixIndex.removed

    def removed(self: Any, worker: str, hashes: Any) -> int:
        real(self, worker, hashes)
        return len(hashes)

    patch.setattr(PrefixIndex, "removed", removed)


def messages_are_not_looked_at_as_a_whole(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(frames, "check_attempt", lambda attempt: None)


def a_defect_ends_more_than_its_request(patch: pytest.MonkeyPatch) -> None:
    """It is the link's on which the request met it."""

    def reraise(self: Any, record: Any) -> None:
        error = sys.exc_info()[1]
        assert error is not None
        raise error

    patch.setattr(Router, "_break", reraise)


def a_defect_ends_only_the_attempt(patch: pytest.MonkeyPatch) -> None:
    """Its client waits on."""
    patch.setattr(Router, "_break", lambda self, record: None)


BREAKS: dict[Break, Options] = {
    # With the faults that show it soonest; none: all of them.
    releases_are_not_sent: QUIET,
    cancels_are_not_sent: QUIET,
    late_outputs_are_taken: Options(faults=("wedge",)),
    the_next_attempt_forgets_what_was_generated: Options(faults=("crash",)),
    a_lost_request_is_never_asked_for_again: Options(faults=("crash",)),
    bookings_stay: Options(),
    reports_do_not_settle_what_was_sent: Options(),
    the_index_keeps_a_lost_worker: Options(faults=("scale-down",)),
    evictions_are_not_indexed: Options(faults=("eviction-storm",)),
    a_cleared_cache_is_not_indexed: Options(faults=("eviction-storm",)),
    blocks_are_freed_while_they_are_read: Options(faults=("transfer-slow", "hang-ups")),
    blocks_are_freed_while_they_are_written: Options(faults=("transfer-slow", "hang-ups")),
    a_failed_pull_counts_as_good: Options(faults=("transfer-cut",)),
    preempted_attempts_keep_their_blocks: Options(),
    a_reused_block_is_not_reported: Options(),
    orphans_run_on: Options(faults=("frontend-crash",)),
    a_worker_forgets_whose_attempt_it_was: Options(),
    silence_is_not_noticed: Options(faults=("freeze",)),
    wedged_engines_are_not_noticed: Options(faults=("wedge",)),
    a_new_incarnation_is_not_connected: Options(faults=("crash",)),
    a_quarantine_ends_by_itself: Options(workers=2, faults=("wedge",)),
    stuck_workers_are_connected_anew: Options(faults=("wedge",)),
    a_worker_that_is_back_is_not_indexed: Options(faults=("reset",)),
    some_attempts_are_lost_on_arrival: Options(),
    attempts_that_are_given_up_run_on: Options(faults=("wedge",)),
    requests_wait_beside_idle_workers: Options(),
    a_stall_is_not_noticed: Options(faults=("stale-handoff", "wedge")),
    a_quarantine_lasts_too_long: Options(faults=("wedge",)),
    leaving_workers_do_not_drain: Options(
        faults=(
            "drain",
            "scale-down",
        )
    ),
    priorities_are_turned_round: Options(),
    those_who_come_back_go_last: Options(),
    nobody_is_the_cause: Options(faults=("poison",)),
    failures_are_not_counted: Options(faults=("poison",)),
    what_a_full_worker_said_is_kept: Options(),
    suspects_are_never_forgotten: Options(faults=("crash",)),
    evictions_are_indexed_late: Options(),
    everything_is_indexed_late: Options(),
    blocks_leak_until_an_engine_is_idle: Options(),
    idle_workers_are_not_believed: Options(),
    requests_go_to_any_revision_of_their_model: Options(faults=("replace-model",)),
    requests_wait_for_revisions_that_are_gone: Options(faults=("replace-model",)),
    replaced_revisions_go_on_being_served: Options(faults=("replace-model",)),
    prompts_are_prefilled_for_workers_that_would_refuse_them: Options(faults=("next-generation",)),
    held_kv_is_sent_to_whoever_decodes: Options(faults=("next-generation",)),
    liars_are_not_cut_off: Options(faults=("lying-worker",)),
    reports_are_believed: Options(faults=("lying-worker",)),
    loads_are_believed: Options(faults=("lying-worker",)),
    an_index_grows_beyond_its_pool: Options(faults=("lying-worker",)),
    blocks_that_were_not_there_may_go: Options(faults=("lying-worker",)),
    messages_are_not_looked_at_as_a_whole: Options(faults=("lying-worker", "lying-frontend")),
    a_defect_ends_more_than_its_request: Options(faults=("defect",)),
    a_defect_ends_only_the_attempt: Options(faults=("defect",)),
}


FOUND_BY = Path(__file__).with_name("found_by.json")
"""By which seed each was found when somebody last ran `python -m tests.faults.test_mutations`."""


def seeds_of(break_it: Break) -> list[int]:
    """Those to try, that which is known to find it first."""
    step = QUIET_EVERY if BREAKS[break_it] is QUIET else 1
    known = json.loads(FOUND_BY.read_text(encoding="utf-8")).get(break_it.__name__)
    seeds = list(range(0, MOST_SEEDS * step, step))
    return sorted(seeds, key=lambda seed: seed != known)


def finder_of(break_it: Break, seeds: Iterable[int]) -> int | None:
    """The first of these seeds that notices what is broken."""
    return next((seed for seed in seeds if simulate(seed, BREAKS[break_it]).violation), None)


@pytest.mark.parametrize("break_it", BREAKS, ids=lambda it: it.__name__)
def test_a_mistake_is_found(break_it: Break, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it(monkeypatch)
    assert finder_of(break_it, seeds_of(break_it)) is not None


def main() -> None:
    """Look for the first seed that finds each, and write it down: the tests then try that one first."""
    found = {}
    for break_it in BREAKS:
        with pytest.MonkeyPatch.context() as patch:
            break_it(patch)
            found[break_it.__name__] = finder_of(break_it, sorted(seeds_of(break_it)))
        print(break_it.__name__, found[break_it.__name__], flush=True)
    FOUND_BY.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
