"""What must be true at every moment, looked at again and again while everything goes on.

Much of it may be otherwise for a while, as news travel. So a look gives complaints, and only one that has
been there for long without a break is a violation. What a fault excuses is not complained of: a process
that stands still, or a way between two that is closed or slow.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterator

from penstock.core.deadlines import Phase
from penstock.core.lifecycle import Lifecycle
from penstock.core.membership import State
from penstock.core.pairing import KvFormat, kv_format
from penstock.shapes import ModelKey
from simulator.processes import SimulatedFrontend, SimulatedWorker
from simulator.world import World

LOOK_S = 0.5

INDEX_EVERY = 2
"""Looks between two at an index."""

ORPHANS_S = 3.0
"""Within which a worker ends attempts whose frontend is gone."""

KNOWN_S = 5.0
"""Within which both ends of a link agree about who has an attempt: silence is noticed, delays pass."""

IDLE_S = 1.5
"""For how long a worker may have nothing to do while requests wait that it could begin."""

REST_S = 15.0
"""For how long a request may wait outside of the queue: after deaths, or for a place of its own."""

OUTDATED_S = 5.0
"""For how long a request without tokens may wait for workers of a revision that has been replaced: it rests
after deaths under it."""

LATE_S = 1.0
"""By how much a phase's deadline may be missed."""

STATES_S = {State.CONNECTING: 45.0, State.LOADING: 20.0, State.QUARANTINED: KNOWN_S}
"""For how long a worker that is well may be so at a frontend. A connection that was refused rests for 30 s;
files that could not be fetched are asked for again after 5 s."""

LEAVE_S = 15.0
"""How much longer than its attempts and handoffs get a worker may take to leave."""

ELECTED_S = 2.0
"""For how long a frontend may serve another revision of a model than most of its decode workers have."""

STALE_S = 5.0
"""How far an index may lag behind its worker."""

Complaint = tuple[str, float, str]
"""The invariant, how long it may be broken, and how it is."""


class Monitor:
    """Looks at everything every `LOOK_S`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._since: dict[str, float] = {}  # by what is complained of
        self._looks = 0
        self._stale: list[Complaint] = []  # as of the latest look at indexes

    async def look_forever(self) -> None:
        """Violations end it with the simulation."""
        while True:
            await asyncio.sleep(LOOK_S)
            self._looks += 1
            now = self._world.loop.time()
            since, self._since = self._since, {}
            for invariant, most_s, what in self._complaints():
                self._since[what] = first = since.get(what, now)
                if now - first > most_s:
                    self._world.journal.violate(invariant, f"{what}, since {first:.3f}")

    def idle_s(self, frontend: SimulatedFrontend) -> float:
        """For how long some worker could have begun a request, going by what this frontend knows."""
        now = self._world.loop.time()
        served = [ModelKey(*it) for it in frontend.router.membership.served.items()]
        idle = [
            what
            for key in served
            if key in frontend.router.dispatcher.queues
            for what in self._idle(frontend, key).values()
        ]
        return max((now - self._since.get(what, now) for what in idle), default=0.0)

    def _complaints(self) -> Iterator[Complaint]:
        workers = [it for it in self._world.live_workers() if it.serving and not it.stands_still]
        frontends = [it for it in self._world.live_frontends() if not it.process.held]
        for worker in self._world.live_workers():
            if worker.leaving and not worker.stands_still:
                most_s = self._world.scenario.drain_s + LEAVE_S
                yield (
                    "workers leave",
                    most_s,
                    f"{worker.instance_id}/{worker.epoch} has not left after SIGTERM",
                )
        by_name = {it.name: it for it in frontends}
        for worker in workers:
            yield from self._attempts(worker, by_name)
        for frontend in frontends:
            yield from self._requests(frontend)
            yield from self._waiting(frontend)
            yield from self._served(frontend)
            for worker in workers:
                if self._world.calm(frontend, worker):
                    yield from self._state(frontend, worker)
        if self._looks % INDEX_EVERY == 0:
            self._stale = [complaint for frontend in frontends for complaint in self._index(frontend)]
        yield from self._stale

    # --- attempts and requests ----------------------------------------------------------------------------

    def _attempts(
        self, worker: SimulatedWorker, frontends: dict[str, SimulatedFrontend]
    ) -> Iterator[Complaint]:
        """Every attempt on a worker belongs to a frontend that waits for it."""
        shell = worker.worker
        peers = set(shell.peers)
        for attempt_id, peer in shell.attempts.items():
            if peer not in peers:
                yield "orphans end", ORPHANS_S, f"{worker.instance_id} runs {attempt_id} for nobody"
                continue
            frontend = frontends.get(peer.frontend_id)
            if frontend is None or not self._world.calm(frontend, worker):
                continue
            record = frontend.router.dispatcher.attempts.get(attempt_id)
            if record is None or record.life.attempt_id != attempt_id:
                what = f"{worker.instance_id} runs {attempt_id}, of which {frontend.name} knows nothing"
                yield "attempts are wanted", KNOWN_S, what

    def _requests(self, frontend: SimulatedFrontend) -> Iterator[Complaint]:
        """Every request of a frontend is somewhere, and not for longer than it may be."""
        now, router, world = frontend.process.clock.now(), frontend.router, self._world
        limits = world.scenario.deadlines
        for request_id, record in router.dispatcher.records.items():
            life = record.life
            if life.waited_s(now) > limits.of(life.phase):
                what = f"{frontend.name}: {request_id} waits for more than {life.phase.value} allows"
                yield "deadlines are kept", LATE_S, what
            if life.phase is Phase.QUEUED:
                if request_id not in record.queue and self._could_run(frontend, life):
                    yield "an end", REST_S, f"{frontend.name}: {request_id} is not in the queue"
                if self._outdated(frontend, life):
                    what = f"{frontend.name}: {request_id} waits for a revision that nobody has"
                    yield "replaced models", OUTDATED_S, what
                continue
            instance_id = life.instance_id
            worker = world.workers.get(instance_id)
            if (
                worker is None
                or not worker.serving
                or worker.stands_still
                or not world.calm(frontend, worker)
            ):
                continue
            attempt_id = life.attempt_id
            if attempt_id not in worker.worker.attempts:
                what = f"{frontend.name} waits for {attempt_id}, of which {instance_id} knows nothing"
                yield "attempts are somewhere", KNOWN_S, what

    def _outdated(self, frontend: SimulatedFrontend, life: Lifecycle) -> bool:
        """Whether only another revision of its model is served, for which it could be tokenized anew."""
        membership, request = frontend.router.membership, life.request
        begun = len(life.token_ids) > len(request.token_ids)
        model = request.model
        other = membership.served.get(model.name, model.revision) != model.revision
        return not begun and other and not membership.ready(model)

    def _could_run(self, frontend: SimulatedFrontend, life: Lifecycle) -> bool:
        """Whether there is a worker for it."""
        request = life.request
        cards = frontend.router.membership.ready(request.model)
        return any(card.role.decodes and card.instance_id not in life.avoided for card in cards)

    def _waiting(self, frontend: SimulatedFrontend) -> Iterator[Complaint]:
        """Nobody waits while workers that could begin at once have nothing to do."""
        for model, queue in list(frontend.router.dispatcher.queues.items()):
            for what in self._idle(frontend, model).values():
                yield "", math.inf, what
                request_id = queue.next()
                if request_id is not None:
                    yield "no worker idles", IDLE_S, f"{request_id} waits, and {what}"

    def _idle(self, frontend: SimulatedFrontend, model: ModelKey) -> dict[str, str]:
        """Those who could end a request of this revision and have nothing to do, going by what a frontend
        knows; with words for it. None of those for whom prompts are computed where there is a queue, and
        none that the first in the queue avoids after an attempt that was lost there."""
        router, now = frontend.router, frontend.process.clock.now()
        ready = router.membership.ready(model)
        idle = []
        for card in ready:
            load = router.placement.loads[card.instance_id].assumed()
            full = router.dispatcher.full_until.get(card.instance_id, now) > now
            if not (load.running or load.waiting or full):
                idle.append(card)
        read = {kv_format(card.engine) for card in ready if card.role.decodes}
        ahead: dict[KvFormat, bool] = {}  # whether a prefill worker for those who read this is idle
        for card in ready:
            kind = kv_format(card.engine)
            if not card.role.decodes and kind in read:
                ahead[kind] = ahead.get(kind, False) or card in idle
        if ahead and not any(ahead.values()):
            return {}
        heads = [router.dispatcher.records.get(router.dispatcher.queues[model].next() or "")]
        avoided = {name for record in heads if record is not None for name in record.life.avoided}
        names = [
            card.instance_id
            for card in idle
            if card.role.decodes
            and ahead.get(kv_format(card.engine), True)
            and card.instance_id not in avoided
        ]
        loads = router.placement.loads
        return {
            name: f"{frontend.name} has had nothing for {name} since no. {loads[name].sent}"
            for name in names
        }

    # --- workers and what is known of them ----------------------------------------------------------------

    def _state(self, frontend: SimulatedFrontend, worker: SimulatedWorker) -> Iterator[Complaint]:
        """Who is well is used."""
        member = frontend.router.membership.members.get(worker.instance_id)
        name = f"{worker.instance_id}/{worker.epoch}"
        if member is None or member.registration.epoch != worker.epoch:
            if worker.instance_id in self._world.directory.entries() and not self._world.directory.away:
                yield "workers are found", STATES_S[State.CONNECTING], f"{frontend.name} knows no {name}"
        elif member.state in STATES_S:
            what = f"{frontend.name} has {name} as {member.state}"
            yield "workers are used", STATES_S[member.state], what

    def _served(self, frontend: SimulatedFrontend) -> Iterator[Complaint]:
        """New requests get the revision that more than half of a model's decode workers have."""
        membership = frontend.router.membership
        revisions: dict[str, Counter[str]] = {}
        for member in membership.members.values():
            if member.loaded and member.registration.role.decodes:
                revisions.setdefault(member.model, Counter())[member.revision] += 1
        for model, counts in revisions.items():
            ((most, count),) = counts.most_common(1)
            if 2 * count > counts.total() and membership.served.get(model) != most:
                what = f"{frontend.name} serves another revision of {model} than {most}, which most have"
                yield "what most have is served", ELECTED_S, what

    def _index(self, frontend: SimulatedFrontend) -> Iterator[Complaint]:
        """What a frontend's index has of a worker is what the worker had after one of its latest steps."""
        members = frontend.router.membership.members
        digests = frontend.router.placement.index.digests()
        for instance_id, member in members.items():
            worker = self._world.workers.get(instance_id)
            if (
                not member.up
                or worker is None
                or worker.exited
                or worker.epoch != member.registration.epoch
                or worker.false_events is not None
            ):
                continue
            if instance_id not in digests:
                self._world.journal.violate(
                    "index", f"{frontend.name} does not index {instance_id}, which is up"
                )
                return
            until = worker.engine.cached_until(digests[instance_id])
            if until is None:
                self._world.journal.violate(
                    "index", f"{frontend.name} indexes what {instance_id} never had: not after any step"
                )
                return
            calm = not worker.process.held and self._world.calm(frontend, worker)
            if until < self._world.loop.time() - STALE_S and calm:
                yield "index", STALE_S, f"{frontend.name} indexes what {instance_id} had long ago"
