"""The worker: one engine, its registration, and a link to every frontend.

A shell around an `Engine`: attempts come down the links and go into the engine; each engine step goes up
as one message per frontend, with that frontend's outputs and everybody's KV events and load. The worker
is the one place where choosing and reserving meet: it admits or bounces.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from penstock.clock import Clock, MonotonicClock
from penstock.core.attempt_phases import engine_times
from penstock.core.catalog import revision_of
from penstock.core.costs import EXPECTED_OUTPUT_TOKENS, Candidate, Query, costs
from penstock.core.progress import PatientTime, Progress, ProgressLimits
from penstock.core.prompt_work import PromptWork, prompt_work
from penstock.errors import ConfigError, PenstockError, ProtocolError, RemoteError
from penstock.link.server import LinkServer, LinkServerStatistics, Peer
from penstock.link.settings import ServerSettings
from penstock.net.address import join_address
from penstock.ports import Discovery, Engine, EngineStep, Lease, Tracing
from penstock.shapes import (
    Aliases,
    Attempt,
    Card,
    EngineCard,
    Handoff,
    Incarnation,
    Load,
    Output,
    Registration,
    Role,
    shortened,
)
from penstock.wire import frames
from penstock.wire.messages import Bounce, Step, Welcome
from penstock.worker.attempt_records import AttemptRecords
from penstock.worker.metrics import WorkerMetrics

log = logging.getLogger("penstock.worker")

_PROGRESS_LOOK_S = 0.5  # between looks at whether the engine advances
_TELL_OTHERS_S = 0.002  # from an attempt's arrival until other frontends are told of it
_DRAIN_LOOK_S = 0.5  # between looks at the drain's deadline
_LAST_STEPS_S = 10.0  # for the stopped engine's last outputs


class WorkerSettings(msgspec.Struct, frozen=True):
    """What a worker is, and how much it admits."""

    incarnation: Incarnation
    role: Role

    advertise_host: str = ""
    """The host under which frontends reach the link; the one it listens on when empty."""

    advertise_port: int = 0
    """The port under which frontends reach the link; the one it listens on when 0."""

    max_wait_ms: float = 10_000.0
    """An attempt that is predicted to wait longer in the engine is bounced: work for another worker, or for
    later. Frontends send much less than that ahead; this is for what they cannot know of each other."""

    max_waiting: int = 256
    """Attempts that may wait in the engine, whatever the prediction: a bound on memory."""

    bounce_retry_s: float = 0.25
    """Seconds after which a bounced attempt may be offered again."""

    drain_s: float = 30.0
    """Seconds that a leaving worker gives its attempts and handoffs to end."""

    aliases: Aliases = ()
    """Further names of its model, for clients."""

    kv_events: bool = True
    """Whether frontends are told what is cached here."""

    progress: ProgressLimits = ProgressLimits()
    """When its engine counts as stuck, for /health and the log. Frontends judge for themselves."""


@dataclass(frozen=True, slots=True)
class WorkerStatistics:
    """How much a worker keeps at the moment."""

    attempts: int  # attempts that were admitted and have not ended
    not_in_load: int  # of these: attempts that the engine's latest load does not include yet
    handoffs: int  # handoffs that were given to a frontend and have not expired, used or not
    link: LinkServerStatistics


class Worker:
    """Runs until told to stop, or until its engine dies. Implements the link's LinkHandler."""

    def __init__(
        self,
        engine: Engine,
        discovery: Discovery,
        settings: WorkerSettings,
        link_settings: ServerSettings,
        clock: Clock | None = None,
        metrics: WorkerMetrics | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._engine = engine
        self._discovery = discovery
        self._settings = settings
        self._clock = clock or MonotonicClock()
        self._host = settings.advertise_host or link_settings.host
        self._tls = link_settings.tls is not None
        self._server = LinkServer(link_settings, self, self._clock)
        self._card: Card | None = None
        self._lease: Lease | None = None  # once the engine is ready
        self._load = Load()  # as of the engine's latest step
        self._progress = Progress(settings.progress)
        self._time = PatientTime(self._clock.now(), _PROGRESS_LOOK_S)
        self._stuck = ""  # how it stands still, as of the last look
        self._dead = False
        self._records = AttemptRecords(settings.incarnation.instance_id, metrics, tracing)
        self._owners: dict[str, Peer] = {}  # attempt id -> who sent it
        self._handed: dict[str, tuple[Peer, float]] = {}  # handoff id -> frontend, end; oldest first
        self._on_the_way: deque[PromptWork] = deque()  # of submitted attempts that are not in `_load` yet
        self._untold: set[Peer] = set()  # frontends that are about to be told of others' attempts
        self._draining = False
        self._changed = asyncio.Event()
        if metrics is not None:
            metrics.load_from(self.load)

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then drain. Raises RemoteError when the engine dies."""
        engine_card = await self._start_engine(stop)
        if engine_card is None:
            return
        settings = self._settings
        if not settings.kv_events:
            engine_card = msgspec.structs.replace(engine_card, kv_events=False)
        self._card = Card(settings.incarnation, settings.role, engine_card, settings.aliases)
        _check_card(self._card)
        self._progress = Progress(self._settings.progress, engine_card.max_batch_tokens)
        await self._server.start()
        address = join_address(self._host, self._settings.advertise_port or self._server.port)
        self._lease = lease = await self._discovery.register(self._registration(address))
        log.info("worker ready: %s", self._summary(address))
        reason, failed = "stopped", False
        try:
            await self._serve(stop, lease)
        except PenstockError as error:
            self._dead = True
            reason, failed = f"engine died: {error}", True
            log.error("%s", reason)
            raise
        finally:
            await lease.close()
            await self._server.close(reason, failed=failed)

    async def _start_engine(self, stop: asyncio.Event) -> EngineCard | None:
        """What the engine is, once it has started; None when `stop` was set before."""
        starting = asyncio.create_task(self._engine.start(), name="engine start")
        stopping = asyncio.create_task(stop.wait(), name="stop signal")
        try:
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                return starting.result()
            log.info("stopped before the engine was ready")
            return None
        finally:
            for task in (starting, stopping):
                task.cancel()
            await asyncio.gather(starting, stopping, return_exceptions=True)

    def health(self) -> dict[str, Any]:
        """For /health: `status` is starting (until it is first listed by discovery), healthy, stuck,
        draining or dead; `engine` says how it is stuck, and `discovery` why it may not be listed now, which
        takes nothing from those who know it. How busy it is: `attempts` were admitted and have not ended,
        of these the engine has some `running` and some `waiting`; `held_handoffs` are prompts that it
        computed and that nobody has pulled yet."""
        self._look_at_progress()
        load = self.load()
        return {
            "status": self.status,
            "instance_id": self._settings.incarnation.instance_id,
            "role": self._settings.role,
            "engine": self._stuck or ("ok" if self._card is not None else "starting"),
            "attempts": len(self._owners),
            "running": load.running,
            "waiting": load.waiting,
            "held_handoffs": load.held_handoffs,
            "frontends": len(self._server.peers),
            "tasks": len(asyncio.all_tasks()),
            "discovery": (self._lease.trouble or "ok")
            if self._lease is not None
            else "waiting for the engine",
        }

    @property
    def status(self) -> str:
        """As in `health`, as of the latest look at the engine's progress."""
        if self._dead:
            return "dead"
        if self._draining:
            return "draining"
        if self._lease is None or not self._lease.registered:
            return "starting"
        return "stuck" if self._stuck else "healthy"

    @property
    def revision(self) -> str:
        """Of the model that it serves; empty until the engine has started."""
        return revision_of(self._card) if self._card is not None else ""

    @property
    def attempts(self) -> Mapping[str, Peer]:
        """The attempts that were admitted and have not ended, by id, with the frontend that sent each."""
        return self._owners

    @property
    def peers(self) -> Collection[Peer]:
        """The frontends that are connected."""
        return self._server.peers

    def statistics(self) -> WorkerStatistics:
        """Counts as of now."""
        return WorkerStatistics(
            attempts=len(self._owners),
            not_in_load=len(self._on_the_way),
            handoffs=len(self._handed),
            link=self._server.statistics(),
        )

    async def _serve(self, stop: asyncio.Event, lease: Lease) -> None:
        pump = asyncio.create_task(self._pump(), name="engine steps")
        beat = asyncio.create_task(self._server.run(), name="heartbeats")
        watch = asyncio.create_task(self._watch(), name="progress")
        stopping = asyncio.create_task(stop.wait(), name="stop signal")
        try:
            done, _ = await asyncio.wait({pump, beat, watch, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if done == {stopping}:
                await self._drain(lease, pump)
                await self._engine.stop(grace_s=0.0)
                await asyncio.wait_for(pump, timeout=_LAST_STEPS_S)
            for task in done - {stopping}:
                task.result()
                raise RemoteError(f"{task.get_name()} ended unexpectedly")
        finally:
            for task in (pump, beat, watch, stopping):
                task.cancel()
            await asyncio.gather(pump, beat, watch, stopping, return_exceptions=True)

    async def _drain(self, lease: Lease, pump: asyncio.Task[None]) -> None:
        """Leave without losing anything: no new work, let attempts end and handoffs be pulled."""
        self._draining = True
        log.info("draining: attempts=%d handoffs=%d", len(self._owners), self._load.held_handoffs)
        deadline = self._clock.now() + self._settings.drain_s
        self._server.drain("stopping")
        await lease.close()
        while (self._owners or self._load.held_handoffs) and not pump.done():
            left_s = deadline - self._clock.now()
            if left_s <= 0:
                log.warning(
                    "drain deadline passed: attempts=%d handoffs=%d are given up",
                    len(self._owners),
                    self._load.held_handoffs,
                )
                return
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min(left_s, _DRAIN_LOOK_S))

    async def _watch(self) -> None:
        while True:
            await self._clock.sleep(_PROGRESS_LOOK_S)
            self._look_at_progress()

    def _look_at_progress(self) -> None:
        """Say in the log when the engine begins to stand still, and when it goes on."""
        now, before = self._time.look(self._clock.now()), self._stuck
        self._stuck = self._progress.describe(now) if self._progress.stuck_s(now) else ""
        if self._stuck and not before:
            log.error("engine stuck: %s", self._stuck)
        elif before and not self._stuck:
            log.info("engine continues: steps=%d", self._load.steps)

    async def _pump(self) -> None:
        async for step in self._engine.steps():
            try:
                self._publish(step)
            except Exception:
                # A defect of ours must not end the engine for everybody. Who missed something of this step
                # could not make sense of the next one: all links begin anew, each with a snapshot.
                log.exception("a step could not be sent to frontends: closing all links")
                for peer in list(self._server.peers):
                    peer.connection.cut("an error at the worker, see its log")

    def _publish(self, step: EngineStep) -> None:
        """One message per frontend: its outputs, everybody's events and load."""
        arrived = step.load.submitted - self._load.submitted
        for _ in range(min(arrived, len(self._on_the_way))):
            self._on_the_way.popleft()
        self._load = step.load
        self._progress.observe(self.load(), self._time.look(self._clock.now()))
        reports = {report.attempt_id: report for report in step.ended}
        outputs: dict[Peer, list[Output]] = {peer: [] for peer in self._server.peers}
        for output in step.outputs:
            owner = self._owners.get(output.attempt_id)
            if output.finish_reason is not None:
                self._owners.pop(output.attempt_id, None)
                if output.error is not None:
                    output.error = shortened(output.error)
                report = reports.get(output.attempt_id)
                output.took = engine_times(report) if report is not None else None
                self._records.ended(output, report)
            if owner in outputs:
                outputs[owner].append(output)
                if output.handoff is not None:
                    self._remember(owner, output.handoff)
            elif output.handoff is not None:  # its frontend is gone
                self._engine.release(output.handoff.handoff_id, sent=False)
        load = self.load()
        if not self.card().engine.kv_events:
            step = msgspec.structs.replace(step, stored=[], removed=[], cleared=False)
        for peer, mine in outputs.items():
            peer.send(
                Step(
                    seen=peer.seen,
                    load=load,
                    outputs=mine,
                    stored=step.stored,
                    removed=step.removed,
                    cleared=step.cleared,
                )
            )
        self._changed.set()

    def _remember(self, peer: Peer, handoff: Handoff) -> None:
        """Who got this handoff, for as long as it lives."""
        now = self._clock.now()
        while self._handed and next(iter(self._handed.values()))[1] <= now:
            del self._handed[next(iter(self._handed))]
        self._handed[handoff.handoff_id] = (peer, now + handoff.ttl_s)

    # --- LinkHandler --------------------------------------------------------------------------------

    def card(self) -> Card:
        assert self._card is not None  # the server starts after the engine
        return self._card

    def snapshot(self) -> tuple[Sequence[int], Load]:
        return self._engine.cached_hashes() if self.card().engine.kv_events else [], self.load()

    def load(self) -> Load:
        """The engine's load, and what was submitted since."""
        if not self._on_the_way:
            return self._load
        return msgspec.structs.replace(
            self._load,
            waiting=self._load.waiting + len(self._on_the_way),
            prefill_tokens=self._load.prefill_tokens + sum(it.tokens for it in self._on_the_way),
            prefill_context_tokens=self._load.prefill_context_tokens
            + sum(it.context_tokens for it in self._on_the_way),
        )

    def asset(self, sha256: str) -> bytes | None:
        return self._engine.asset(sha256)

    def on_generate(self, peer: Peer, attempt: Attempt) -> None:
        refusal = self._refusal(attempt)
        if refusal:
            self._records.bounced(attempt, refusal)
            retry_after_s = self._settings.bounce_retry_s
            peer.send(Bounce(attempt_id=attempt.attempt_id, reason=refusal, retry_after_s=retry_after_s))
            return
        self._records.received(attempt, peer.frontend_id)
        self._owners[attempt.attempt_id] = peer
        length = len(attempt.token_ids)
        uncached_tokens = self._engine.submit(attempt)
        self._on_the_way.append(prompt_work(length - uncached_tokens, length))
        self._progress.observe(self.load(), self._time.look(self._clock.now()))
        self._tell_others(peer)

    def _tell_others(self, sender: Peer) -> None:
        """Let the other frontends know of an attempt before the step ends in which it came: until then,
        they would think this worker idler than it is. All that come shortly after one another are told
        together."""
        others = [peer for peer in self._server.peers if peer is not sender]
        if others and not self._untold:
            asyncio.get_running_loop().call_later(_TELL_OTHERS_S, self._tell)
        self._untold.update(others)

    def _tell(self) -> None:
        untold, self._untold = self._untold, set()
        for peer in self._server.peers:
            if peer in untold:
                peer.tell_load()

    def _refusal(self, attempt: Attempt) -> str:
        """Why this attempt is not admitted; empty when it is."""
        if self._draining:
            return "draining"
        waiting = self._load.waiting + len(self._on_the_way)
        if waiting >= self._settings.max_waiting:
            return f"full: {waiting} attempts are waiting"
        wait_ms = self._wait_ms(attempt)
        if wait_ms > self._settings.max_wait_ms:
            return f"full: wait_ms={wait_ms:.0f} bound_ms={self._settings.max_wait_ms:.0f}"
        if attempt.attempt_id in self._owners:
            return "this attempt is here already"
        return ""

    def _wait_ms(self, attempt: Attempt) -> float:
        """How long until the engine could begin it, as a frontend would predict it."""
        card = self.card()
        query = Query(
            len(attempt.token_ids),
            expected_output_tokens=min(EXPECTED_OUTPUT_TOKENS, attempt.sampling.max_tokens),
        )
        load = self.load()
        here = Candidate(
            card.instance_id,
            card.role,
            load,
            card.engine.block_size,
            max_running=card.engine.max_running,
            output_tokens=load.output_tokens,
        )
        return costs(query, here).queue_ms

    def on_cancel(self, peer: Peer, attempt_id: str) -> None:
        if self._owners.get(attempt_id) is peer:
            self._engine.cancel(attempt_id)

    def on_release(self, peer: Peer, handoff_id: str, sent: bool) -> None:
        owner, _ = self._handed.get(handoff_id, (None, 0.0))
        if owner is peer:  # nobody else may say that it is of no use
            del self._handed[handoff_id]
            self._engine.release(handoff_id, sent=sent)

    def on_peer_lost(self, peer: Peer) -> None:
        orphans = [attempt_id for attempt_id, owner in self._owners.items() if owner is peer]
        if orphans:
            log.warning("frontend %s is gone: cancelling its %d attempts", peer.frontend_id, len(orphans))
        for attempt_id in orphans:
            self._engine.cancel(attempt_id)
        # Its requests ended with it; whoever it may have sent these to is told the same.
        for handoff_id in [handoff_id for handoff_id, (owner, _) in self._handed.items() if owner is peer]:
            self.on_release(peer, handoff_id, sent=True)

    # --- what this worker is --------------------------------------------------------------------------

    def _registration(self, address: str) -> Registration:
        card = self.card()
        return Registration(
            instance_id=card.instance_id,
            epoch=card.incarnation.epoch,
            role=card.role,
            model=card.model.name,
            address=address,
            pid=os.getpid(),
            host=socket.gethostname(),
            tls=self._tls,
            aliases=card.aliases,
        )

    def _summary(self, address: str) -> str:
        card = self.card()
        engine = card.engine
        return (
            f"instance={card.instance_id} role={card.role} model={card.model.name} "
            f"engine={engine.name!r} address={address} blocks={engine.total_blocks}x{engine.block_size} "
            f"transport={engine.transport or 'none'}"
        )


def _check_card(card: Card) -> None:
    """Raises ConfigError for a card that no frontend would take."""
    try:
        frames.decode_to_frontend(frames.encode(Welcome(card=card, proof=b""))[frames.LENGTH_BYTES :])
    except ProtocolError as error:
        raise ConfigError(f"the engine's card is not valid: {error}") from error
