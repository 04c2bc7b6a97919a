"""Which instances there are: follows discovery, keeps a link to each, and loads what its model needs.

The router's other half, and a shell as well: `core/membership.py` says which instances take part. What
concerns requests goes to a `Listener`. All of it runs on one event loop; every callback finishes without
awaiting.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from penstock.clock import Clock
from penstock.core.catalog import Catalog
from penstock.core.membership import Connect, Disconnect, Member, Membership, State
from penstock.core.pairing import without_pairs
from penstock.core.placement import Placement
from penstock.core.progress import PatientTime, Progress
from penstock.core.settings import RouterSettings
from penstock.errors import ConfigError, ProtocolError, RemoteError
from penstock.link.client import LinkClient
from penstock.link.settings import ClientSettings
from penstock.metrics import RouterMetrics
from penstock.ports import Discovery
from penstock.router.served_models import ServedModels
from penstock.shapes import (
    Card,
    Incarnation,
    InstanceView,
    Load,
    ModelView,
    Output,
    Registration,
    Role,
)
from penstock.wire.messages import Bounce, Step

log = logging.getLogger("penstock.instances")

WATCH_AGAIN_S = 1.0
"""Seconds before discovery is watched again after an error of ours ended the watch."""

Prepare = Callable[[ModelView], Awaitable[None]]
"""Gets ready to serve a model; must not raise."""


class Listener(Protocol):
    """Who has requests on these instances."""

    def on_ready(self, instance_id: str) -> None:
        """An instance takes attempts from now on."""

    def on_outputs(self, instance_id: str, role: Role, outputs: list[Output]) -> None:
        """An engine step of this instance gave these; its load and its cache are known already."""

    def on_bounce(self, instance_id: str, role: Role, bounce: Bounce) -> None:
        """An instance refused an attempt."""

    def on_lost(
        self, instance_id: str, role: Role, reason: str, requests: int, died: Incarnation | None
    ) -> None:
        """An instance is gone, with all handoffs and attempts it had. `requests`: how many attempts those
        were, whoever sent them. `died`: its incarnation, if it neither meant to leave nor fell silent."""

    def on_stuck(self, instance_id: str, reason: str) -> None:
        """An instance's engine does not advance. Said again and again while that lasts."""


class Instances:
    """The instances that discovery shows, with what the placement needs to know of them kept up to date.

    `run()` must be running; everything else is called on its event loop.
    """

    def __init__(
        self,
        discovery: Discovery,
        placement: Placement,
        settings: RouterSettings,
        link_settings: ClientSettings,
        metrics: RouterMetrics,
        clock: Clock,
        rng: random.Random,
        listener: Listener,
        *,
        frontend_id: str,
    ) -> None:
        self.membership = Membership()
        self._discovery = discovery
        self._placement = placement
        self._settings = settings
        self._link_settings = link_settings
        self._metrics = metrics
        self._clock = clock
        self._rng = rng
        self._listener = listener
        self._frontend_id = frontend_id
        self._time = PatientTime(clock.now(), settings.tick_s)
        self._links: dict[str, _Link] = {}
        self._catalog = Catalog()
        self.served_models = ServedModels(
            self.membership, self._catalog, settings.deadlines.queue_s, self._has_left
        )
        self._shown: dict[str, tuple[Role, State]] = {}  # as metrics and log have it, by instance id
        self._unpaired: dict[str, str] = {}  # why, by instance id (core/pairing.py)
        self._without_pairs: dict[str, str] = {}  # the same, by model
        self._tasks: asyncio.TaskGroup  # of `run`, as is
        self._prepare: Prepare

    # --- who is there -----------------------------------------------------------------------------

    def views(self) -> list[InstanceView]:
        """All known instances, for /health."""
        return [
            InstanceView(
                instance_id=instance_id,
                role=member.registration.role,
                model=member.model,
                state=member.state.value,
                address=member.registration.address,
                load=self._placement.load(instance_id),
                reason=member.stuck
                or self._unpaired.get(instance_id)
                or self._why_idle(instance_id, member),
                distrusted=self._placement.overlap_check.causes.get(instance_id, ""),
                cache_tokens=member.card.engine.cache_tokens if member.card is not None else 0,
            )
            for instance_id, member in sorted(self.membership.members.items())
        ]

    def _why_idle(self, instance_id: str, member: Member) -> str:
        link = self._links.get(instance_id)
        if member.state is State.STANDBY and member.card is not None:
            return self.served_models.other_revision(member.card)
        if member.up:
            return ""
        return link.client.reason if link is not None else "its registration is senseless"

    def _has_left(self, instance_id: str) -> bool:
        link = self._links.get(instance_id)
        return link is None or link.left

    def link(self, instance_id: str) -> LinkClient | None:
        """The instance's link, up or not; None when the instance is not known."""
        link = self._links.get(instance_id)
        return link.client if link is not None else None

    def tick(self) -> None:
        """See who is there, and whose engines advance."""
        now = self._clock.now()
        self._time.look(now)
        self.served_models.tick(now)
        for link in self._links.values():
            if link.up and link.progress is not None:
                with link.guard():
                    self._judge(link, link.progress)

    def _judge(self, link: _Link, progress: Progress) -> None:
        member = self.membership.members[link.instance_id]
        if progress.stuck_s(self._time.seconds):
            reason = progress.describe(self._time.seconds)
            if not member.stuck:
                log.warning("instance quarantined: %s: %s", link.instance_id, reason)
                link.stuck_at = self._clock.now()
            self.membership.stuck(link.instance_id, reason)
            self._changed()
            self._listener.on_stuck(link.instance_id, reason)
        elif member.stuck:
            self.membership.advancing(link.instance_id)
            self._changed()
            log.info("instance back: %s after_s=%.1f", link.instance_id, self._clock.now() - link.stuck_at)
            self._listener.on_ready(link.instance_id)

    def _changed(self) -> None:
        """After any change of a member: see which revision of each model new requests get, and tell
        metrics and log what is new."""
        replaced = self.served_models.elect(self._clock.now())
        for instance_id in self._shown.keys() - self.membership.members.keys():
            del self._shown[instance_id]
            self._metrics.instance_gone(instance_id)
        for instance_id, member in self.membership.members.items():
            shown = member.registration.role, member.state
            if shown == self._shown.get(instance_id):
                continue
            self._shown[instance_id] = shown
            self._metrics.state(instance_id, *shown)
            if member.state is State.READY:
                log.info("instance ready: %s", instance_id)
            elif member.state is State.STANDBY and member.card is not None:
                # When most workers have become other ones, the rest are there on purpose.
                level = logging.INFO if member.card.model.name in replaced else logging.WARNING
                why = self.served_models.other_revision(member.card)
                log.log(level, "instance on standby: %s: %s", instance_id, why)
        self._pair()

    def _pair(self) -> None:
        """See who has no partner to hand prompts to, or to take them from; say where nobody has one."""
        cards = self.membership.ready_cards()
        self._unpaired = self._placement.unpaired(cards)
        self._metrics.unpaired(self._unpaired)
        before, self._without_pairs = self._without_pairs, without_pairs(cards, self._unpaired)
        for model, why in self._without_pairs.items():
            if model not in before:
                log.warning("prefill workers of %s are not used: %s", model, why)
        for model in before.keys() - self._without_pairs.keys():
            left = any(card.model.name == model and card.role is Role.PREFILL for card in cards)
            log.info("prefill workers of %s are %s", model, "used again" if left else "gone")

    # --- discovery --------------------------------------------------------------------------------

    async def run(self, prepare: Prepare) -> None:
        """Follow discovery until cancelled. No instance of a model takes part before `prepare` is done
        with the model."""
        self._prepare = prepare
        async with asyncio.TaskGroup() as self._tasks:
            try:
                while not await self._follow_discovery():
                    await self._clock.sleep(WATCH_AGAIN_S)
            finally:
                for link in self._links.values():
                    link.close()

    async def _follow_discovery(self) -> bool:
        """Until discovery is closed; False when an error of ours ended it before. A new watch begins with
        the whole set, so nothing is missed."""
        try:
            async for current in self._discovery.watch():
                self.served_models.listed = True
                effects = self.membership.discovered(current)
                self._changed()
                self._apply(effects)
        except Exception:  # a defect in reading or applying one set must not end what is connected
            log.exception("discovery is watched again, after an error in this process")
            return False
        return True

    def _apply(self, effects: list[Connect | Disconnect]) -> None:
        for effect in effects:
            match effect:
                case Connect(registration):
                    self._connect(registration)
                case Disconnect(instance_id):
                    link = self._links.pop(instance_id, None)
                    if link is not None:
                        link.close()
                        # Now: the next incarnation may be up before this connection has ended.
                        link.on_down("another process bears its name", orderly=True)
                    self._placement.down(instance_id)  # what a snapshot that never ended has left

    def _connect(self, registration: Registration) -> None:
        try:
            self._links[registration.instance_id] = _Link(self, registration, self._tasks)
        except ConfigError as error:  # what somebody else registered must not end this process
            log.error("instance %s cannot be connected: %s", registration.instance_id, error)

    # --- what instances say ---------------------------------------------------------------------------

    def _up(self, link: _Link, card: Card, load: Load) -> None:
        self.membership.up(link.instance_id, card)
        self._changed()
        self._placement.up(card, load)
        self.served_models.found(link.instance_id)
        log.info(
            "instance up: %s role=%s model=%s engine=%r block_size=%d cached_blocks=%s",
            link.instance_id,
            card.role,
            card.model.name,
            card.engine.name,
            card.engine.block_size,
            self._placement.index.held(link.instance_id) if card.engine.kv_events else "not told",
        )
        self._compare_block_sizes(card)
        # Of before as well, if this incarnation was up before: its engine stands still with a new link too.
        if link.incarnation != card.incarnation:
            link.incarnation, link.progress = card.incarnation, None
        link.progress = link.progress or Progress(self._settings.progress, card.engine.max_batch_tokens)
        link.progress.observe(load, self._time.seconds)
        self._judge(link, link.progress)

    def _compare_block_sizes(self, card: Card) -> None:
        """Say so where an instance's blocks differ from others' of its model: rarely is that meant."""
        members = self.membership.members.values()
        cards = [member.card for member in members if member.up and member.card is not None]
        sizes = {it.engine.block_size for it in cards if it.model.name == card.model.name}
        others = sorted(sizes - {card.engine.block_size})
        if others:
            log.warning(
                "instance %s has blocks of %d tokens, others of model %s have %s: each is routed to by its"
                " own, and no KV moves between them",
                card.instance_id,
                card.engine.block_size,
                card.model.name,
                ", ".join(map(str, others)),
            )

    async def _fetch_and_admit(self, link: _Link, card: Card) -> None:
        """Fetch what the model needs, then let the instance take part."""
        with link.guard():
            if card.role.decodes:  # the others' answers are read with the files of those who decode
                while not await self._fetch(link, card):
                    await self._clock.sleep(self._settings.load_retry_s)
                await self._prepare(self._catalog.publish(card))
            self.membership.loaded(link.instance_id)
            self._changed()
            self._listener.on_ready(link.instance_id)

    async def _fetch(self, link: _Link, card: Card) -> bool:
        try:
            while wanted := self._catalog.wanted(card):
                self._catalog.put(wanted[0], await link.client.asset(wanted[0]))
        except RemoteError as error:
            log.warning("%s: cannot fetch its model's files: %s", link.instance_id, error)
            return False
        return True

    def _draining(self, link: _Link, reason: str) -> None:
        log.info("instance draining: %s (%s)", link.instance_id, reason)
        self.membership.draining(link.instance_id)
        self._changed()

    def _down(self, link: _Link, reason: str, orderly: bool) -> None:
        instance_id = link.instance_id
        effects: list[Connect | Disconnect] = []
        if self._links.get(instance_id) is link:  # else what bears its name now is not this incarnation
            effects = self.membership.down(instance_id)
            self._changed()
        requests = self._placement.requests(instance_id)
        self._placement.down(instance_id)
        if orderly:
            log.info("instance disconnected: %s: %s", instance_id, reason)
        else:
            if link.role.decodes:
                self.served_models.lost(instance_id, link.model, self._clock.now())
            log.warning("instance lost: %s: %s", instance_id, reason)
        died = None if orderly or link.client.fell_silent or link.client.misled else link.incarnation
        self._listener.on_lost(instance_id, link.role, reason, requests, died)
        self._apply(effects)

    def _step(self, link: _Link, step: Step) -> None:
        self._placement.cache_changed(link.instance_id, step.stored, step.removed, step.cleared)
        self._reported(link, step.seen, step.load)
        self._listener.on_outputs(link.instance_id, link.role, step.outputs)

    def _reported(self, link: _Link, seen: int, load: Load) -> None:
        self._placement.reported(link.instance_id, seen, load, self._clock.now())
        assert link.progress is not None, "only a live link reports"
        link.progress.observe(load, self._time.seconds)
        self._metrics.load(link.instance_id, load)


class _Link:
    """One instance's link, with the task that keeps it up. Implements LinkListener."""

    def __init__(self, instances: Instances, registration: Registration, tasks: asyncio.TaskGroup) -> None:
        self.instance_id = registration.instance_id
        self.role = registration.role
        self.model = registration.model
        self.incarnation: Incarnation | None = None  # of the process that answered last
        self._instances = instances
        self._tasks = tasks
        self.up = False  # between `on_up` and `on_down`
        self.left = False  # it said goodbye: this process will not be back
        self.progress: Progress | None = None  # of its engine, once it has been up
        self.stuck_at = 0.0  # when its engine was last found stuck
        self._fetching: asyncio.Task[None] | None = None
        self._closed = False  # no longer wanted; its task hears of it in the next turn only
        self.client = LinkClient(
            registration.address,
            self,
            instances._link_settings,
            frontend_id=instances._frontend_id,
            expected=registration.incarnation,
            starting=registration.epoch == 0,  # it did not register by itself, once it was ready
            rng=instances._rng,
            clock=instances._clock,
        )
        self._running = tasks.create_task(self.client.run(), name=f"link {self.instance_id}")

    def close(self) -> None:
        """Hang up, in the next turn."""
        self._closed = True
        self._running.cancel()
        if self._fetching is not None:
            self._fetching.cancel()

    def on_cached(self, hashes: list[int], *, first: bool) -> None:
        self._check_open()
        self._instances._placement.snapshot(self.instance_id, hashes, first=first)

    def on_up(self, card: Card, load: Load) -> None:
        self._check_open()
        self.up, self.left = True, False
        self.model = card.model.name
        self._instances._up(self, card, load)
        self._fetching = self._tasks.create_task(
            self._instances._fetch_and_admit(self, card), name=f"model of {self.instance_id}"
        )

    @contextmanager
    def guard(self) -> Iterator[None]:
        """An error of ours, met with this instance, ends this link and no other."""
        try:
            yield
        except Exception as error:
            log.exception("%s: the link ends because of an error in this process", self.instance_id)
            self.client.cut(f"an error in this process: {error!r}")

    def _check_open(self) -> None:
        if self._closed:
            raise ProtocolError("discovery no longer lists this instance")

    # What comes after `on_down`, until the connection has ended, is nobody's any more.

    def on_step(self, step: Step) -> None:
        if self.up:
            self._instances._step(self, step)

    def on_heartbeat(self, seen: int, load: Load) -> None:
        if self.up:
            self._instances._reported(self, seen, load)

    def on_bounce(self, bounce: Bounce) -> None:
        if self.up:
            self._instances._listener.on_bounce(self.instance_id, self.role, bounce)

    def on_draining(self, reason: str) -> None:
        if self.up:
            self._instances._draining(self, reason)

    def on_down(self, reason: str, orderly: bool) -> None:
        """Idempotent: when discovery replaces an instance, this comes before the connection's end."""
        if not self.up:
            return
        self.up = False
        self.left = orderly
        if self._fetching is not None:
            self._fetching.cancel()
            self._fetching = None
        self._instances._down(self, reason, orderly)
