"""What must be true whenever a frontend sends an attempt, or refuses a request."""

from __future__ import annotations

from penstock.core.catalog import serves
from penstock.core.deadlines import Deadlines
from penstock.core.dispatcher import RequestRecord
from penstock.core.pairing import kv_format
from penstock.core.suspects import MAX_DEATHS
from penstock.shapes import Attempt, Card, EngineCard, Handoff
from simulator.monitor import Monitor
from simulator.processes import SimulatedFrontend
from simulator.world import World

REFUSED_S = 1.5
"""A request that is refused although some worker had nothing to do for so long is refused wrongly."""

_LIMITS = Deadlines()
MOST_SENDS = 1 + _LIMITS.max_attempts + _LIMITS.max_moves + MAX_DEATHS
"""Attempts of a request without a token between them, bounces left out."""


class SendingChecks:
    """Implements FrontendChecks."""

    def __init__(self, world: World, monitor: Monitor) -> None:
        self._world = world
        self._violate = world.journal.violate
        self._monitor = monitor

    def sending(
        self, frontend: SimulatedFrontend, record: RequestRecord, instance_id: str, attempt: Attempt
    ) -> None:
        """Whether it may be sent: it was tokenized for this worker's model, its KV is or will be of use, it
        has not failed too often, and no request that goes before it waits."""
        worker = self._world.workers[instance_id]
        members = frontend.router.membership.members
        member = members.get(instance_id)
        decode = members.get(record.life.decode_id if attempt.prefill_only else instance_id)
        if attempt.prefill_only or attempt.handoff is not None:
            prefill = attempt.handoff.holder.instance_id if attempt.handoff is not None else instance_id
            made = attempt.handoff or (member.card.engine if member is not None and member.card else None)
            read = decode.card if decode is not None else None
            self._check_kv(attempt.attempt_id, prefill, made, read)
        life, request = record.life, record.life.request
        revision = request.model.revision
        same = member is not None and worker.epoch == member.registration.epoch
        if same and worker.revision and not serves(worker.revision, revision):
            what = f"{attempt.attempt_id} of {revision} goes to {instance_id} of {worker.revision}"
            self._violate("revisions", what)
        asked = frontend.asked[attempt.request_id]
        asked.sends += 1
        if asked.sends - life.bounces > MOST_SENDS:
            self._violate("retries end", f"{attempt.attempt_id} is the {asked.sends}th without a token")
        call_id, priority = request.call_id, request.priority
        if call_id in frontend.sent_calls or not attempt.attempt_id.endswith(".1"):
            return  # it goes with its call, or back to the head
        frontend.sent_calls.add(call_id)
        for other in [it for it in frontend.router.dispatcher.records.values() if it.queue is record.queue]:
            its = other.life.request
            first = its.priority < priority and its.call_id not in frontend.sent_calls
            if (first or other.life.attempts > 0) and its.request_id in other.queue:
                self._violate("the order of the queue", f"{attempt.attempt_id} passes {its.request_id}")

    def _check_kv(
        self, attempt_id: str, prefill: str, made: EngineCard | Handoff | None, read: Card | None
    ) -> None:
        """KV that one worker made, or is to make, is only for workers that read it."""
        if made is None or read is None:
            return
        if kv_format(made) != kv_format(read.engine):
            what = f"{attempt_id}: {read.instance_id} would refuse what {prefill} computes"
            self._violate("handoffs fit", what)

    def refused(self, frontend: SimulatedFrontend, request_id: str, why: str) -> None:
        """Whether it may be: no worker has had nothing to do for long."""
        if "reason=full" in why:
            return  # it came at the same moment as too many others
        idle_s = self._monitor.idle_s(frontend)
        if idle_s > REFUSED_S:
            what = f"some worker had nothing to do for {idle_s:.3f} s"
            self._violate("no worker idles", f"{frontend.name} refuses {request_id} while {what}")
