"""The scheduler: which tokens each engine step computes, and what becomes of every attempt.

Theory. Continuous batching: each step computes one batch of rows under a budget of tokens. Decoding
attempts come first, one token each, because their clients are watching; what is left of the budget goes
to prompts, in chunks, so that a long prompt slows a step by a bounded amount and stops nobody. Prompts go
first come, first served within a priority. An attempt gets the blocks for all its tokens when it is
admitted, so prompts never wait for each other half way; a decoding one gets a block whenever it has filled
its last. When there is none left, the attempt that came last among the least important goes back to
waiting. Its blocks stay cached while they can, so it usually finds most of them again.

    phase     event                                   next      what happens
    --------  --------------------------------------  --------  ----------------------------------------
    (new)     add, with a fault                       ENDED     ERROR (LENGTH if nothing is left to do)
    (new)     add                                     WAITING   a handoff that does not match is dropped
    WAITING   plan: blocks and room in the batch      RUNNING   cached prefix acquired, rest allocated
    WAITING   the same, with a handoff                PULLING   Pull of the blocks that are not cached
    PULLING   pull_done, arrived                      RUNNING   goes on behind the pulled tokens
    PULLING   pull_done, failed                       WAITING   blocks released, handoff dropped
    PULLING   plan: the pull is late                  WAITING   the same, but blocks stay until pull_done
    RUNNING   commit, not its last token              RUNNING   Output
    RUNNING   commit, EOS, stop id or a limit         ENDED     Output with STOP or LENGTH
    RUNNING   commit, first token of a prefill_only   ENDED     PREFILLED, Export; blocks go to `held`
    RUNNING   plan: no block left for a decoding one  WAITING   preempted
    RUNNING   fail_batch                              ENDED     ERROR
    any       cancel                                  ENDED     CANCELLED; a pull keeps its blocks

A step is: commands (`add`, `cancel`, `release`, `pulled`, `pull_done`), `plan`, `effects`, the runner,
`commit` or `fail_batch`, `effects`, `report`. No command may come between `plan` and `commit`. Nothing here
waits, knows the time, or touches KV: `now` is a parameter, in seconds of one monotonic clock, and blocks
are only numbers.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import chain

from penstock.core.hashing import TOKEN_BYTES, token_bytes
from penstock.core.prompt_work import prompt_work
from penstock.engines.active import ActiveAttempt, AttemptPhase, activate, fault
from penstock.engines.batch import BatchRow, Sampled
from penstock.engines.block_pool import BlockPool
from penstock.engines.effects import Effect, Export, Pull
from penstock.engines.handoffs import HeldHandoffs
from penstock.engines.pulls import OpenPulls
from penstock.engines.settings import SchedulerSettings
from penstock.engines.step_times import StepTimes, StepWork
from penstock.engines.waiting import WaitingAttempts, rank
from penstock.ports import EngineStep, Pulled
from penstock.shapes import Attempt, AttemptReport, EngineCard, FinishReason, Load, Output

log = logging.getLogger("penstock.engine")

RESERVED_SHARE = 1 / 32
"""Of the pool, kept free of new prompts while others run, at one block for each of these: their next
blocks. Without it an admission and a preemption can follow each other at every step."""


@dataclass(frozen=True, slots=True)
class SchedulerStatistics:
    """How much a scheduler keeps at the moment."""

    attempts: int  # attempts that have not ended
    waiting: int  # of these: attempts that hold no blocks yet
    running: int  # of these: attempts that the next step may compute; the others wait for a pull
    rows: int  # rows of a batch that was planned and neither committed nor failed
    outputs: int  # outputs that the next report will contain
    effects: int  # requests to the KV transfer that nobody has fetched yet
    pulls: int  # pulls that have not ended
    held_handoffs: int  # handoffs that nobody has pulled or released
    used_blocks: int  # blocks that an attempt, a pull or a handoff holds


class Scheduler:
    """The state machine of one engine.

    Args:
        card: what the engine is; its `transport` names the transfer, if there is one.
        times: learns what steps and pulls take, for `Load.rates`.
    """

    def __init__(
        self, card: EngineCard, settings: SchedulerSettings, times: StepTimes | None = None
    ) -> None:
        self.card = card
        self.settings = settings
        self.pool = BlockPool(card.total_blocks, card.block_size, card.model.name)
        self.held = HeldHandoffs(card, settings, self.pool)
        self.pulls = OpenPulls(card, self.pool, settings.pull_timeout_s)
        self.preemptions = 0
        self._times = times or StepTimes()
        self._active: dict[str, ActiveAttempt] = {}  # by attempt id: all that have not ended
        self._waiting = WaitingAttempts(self.pool)
        self._running: list[ActiveAttempt] = []
        self._batch: list[BatchRow] = []
        self._batched: list[ActiveAttempt] = []  # the attempts of _batch
        self._work = StepWork()  # what it computes
        self._planned_at = 0.0
        self._outputs: list[Output] = []
        self._ended: list[AttemptReport] = []
        self._effects: list[Effect] = []
        self._submitted = 0
        self._steps = 0

    # --- what others may ask ----------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Attempts that hold no blocks yet."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Some attempt has not ended."""
        return bool(self._active)

    @property
    def idle(self) -> bool:
        """Nothing runs, waits, or is held or pulled: stopping now would lose nothing."""
        return not (self._active or self.pulls or self.held)

    @property
    def next_deadline(self) -> float | None:
        """When `plan` must be called at the latest, even if nothing happens until then."""
        deadlines = (self.held.next_deadline, self.pulls.next_deadline)
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def statistics(self) -> SchedulerStatistics:
        """Counts as of now."""
        return SchedulerStatistics(
            attempts=len(self._active),
            waiting=len(self._waiting),
            running=len(self._running),
            rows=len(self._batch),
            outputs=len(self._outputs),
            effects=len(self._effects),
            pulls=len(self.pulls),
            held_handoffs=len(self.held),
            used_blocks=self.pool.used_blocks,
        )

    def check_references(self) -> None:
        """Raise AssertionError unless every reference to a block is that of a running attempt, a pull or a
        held handoff. Costs O(total_blocks); for tests."""
        running = (active.block_ids for active in self._running)
        self.pool.check_references(chain(running, self.pulls.block_ids(), self.held.block_ids()))

    def load(self) -> Load:
        """The load as of now."""
        context_tokens = 0
        works = [self._waiting.work]
        for active in self._running:
            context_tokens += active.computed
            if len(active.token_ids) - active.computed > 1:  # else it decodes
                works.append(prompt_work(active.computed, len(active.token_ids)))
        if self.pulls:
            works += self.pulls.works()
        return Load(
            running=len(self._active) - len(self._waiting),
            waiting=len(self._waiting),
            prefill_tokens=sum(work.tokens for work in works),
            used_blocks=self.pool.used_blocks,
            total_blocks=self.pool.total_blocks,
            context_tokens=context_tokens,
            held_handoffs=len(self.held),
            steps=self._steps,
            rates=self._times.rates(),
            submitted=self._submitted,
            output_tokens=self._times.output_tokens,
            prefill_context_tokens=sum(work.context_tokens for work in works),
        )

    # --- commands ---------------------------------------------------------------------------------

    def add(self, attempt: Attempt, now: float) -> None:
        """Take an attempt. One that cannot be served ends at once, with ERROR."""
        self._submitted += 1
        attempt_id = attempt.attempt_id
        reason = fault(attempt, self.card)
        if attempt_id in self._active or attempt_id in self.pulls or attempt_id in self.held:
            reason = f"attempt {attempt_id} was submitted before"
        if reason is not None:
            self._outputs.append(Output(attempt_id, finish_reason=FinishReason.ERROR, error=reason))
            return
        active = activate(attempt, self.card, self._submitted, now)
        if len(active.token_ids) >= active.max_len:
            self._outputs.append(Output(attempt_id, finish_reason=FinishReason.LENGTH))
            return
        if attempt.handoff is not None and active.prompt_logprobs is None:
            self._pull(self.pulls.accept(active, attempt, now))
        self._active[attempt_id] = active
        self._waiting.enter(active)

    def refuse(self, attempt_id: str, reason: str) -> None:
        """End an attempt that no engine of this kind could serve, with REJECTED."""
        self._submitted += 1
        self._outputs.append(Output(attempt_id, finish_reason=FinishReason.REJECTED, error=reason))

    def cancel(self, attempt_id: str, now: float) -> None:
        """End an attempt with CANCELLED. Unknown and ended ids are ignored."""
        active = self._active.get(attempt_id)
        if active is not None:
            self._end(active, Output(attempt_id, finish_reason=FinishReason.CANCELLED), now)

    def cancel_all(self, now: float) -> None:
        """End every attempt with CANCELLED, and withdraw every handoff."""
        for attempt_id in list(self._active):
            self.cancel(attempt_id, now)
        self._effects += self.held.release_all()

    def release(self, handoff_id: str, now: float) -> None:
        """Nobody will pull this handoff. Unknown ids are ignored."""
        self._effects += self.held.release(handoff_id)

    def pulled(self, handoff_id: str, now: float) -> None:
        """The reader of this handoff has everything. Unknown ids are ignored."""
        self.held.pulled(handoff_id, now)

    def pull_done(self, attempt_id: str, pulled: Pulled, now: float) -> None:
        """A pull has ended: from now on nothing writes to its blocks."""
        active = self.pulls.done(attempt_id, pulled)
        if pulled.error is None and pulled.blocks:
            self._times.observe_transfer(pulled.blocks, pulled.seconds * 1e3)
        if active is None:
            return
        active.pulled_at = now
        if pulled.error is None:
            self._join(active, pulled.blocks)
        else:
            self._restart(active)

    # --- effects, and the answers to them ---------------------------------------------------------

    def effects(self) -> list[Effect]:
        """What is to be done now, in order. Each is returned once."""
        effects, self._effects = self._effects, []
        return effects

    def exported(self, export: Export, address: str, params: bytes) -> None:
        """The transfer offers these blocks there."""
        export.handoff.address = address
        export.handoff.params = params

    def export_failed(self, export: Export, reason: str, now: float) -> None:
        """The transfer cannot offer them: the attempt's output, not yet reported, becomes an ERROR."""
        attempt_id = export.handoff.handoff_id
        self.held.retracted(attempt_id, True, now)
        self._outputs = [output for output in self._outputs if output.attempt_id != attempt_id]
        error = f"KV transfer cannot export: {reason}"
        self._outputs.append(Output(attempt_id, finish_reason=FinishReason.ERROR, error=error))

    def retracted(self, handoff_id: str, done: bool, now: float) -> None:
        """The transfer's answer to a Retract: `done` as KvTransfer.retract returns it."""
        self.held.retracted(handoff_id, done, now)

    # --- a step -----------------------------------------------------------------------------------

    def plan(self, now: float) -> list[BatchRow]:
        """The next batch, to be committed or failed; empty when there is nothing to compute."""
        assert not self._batch, "the last batch was neither committed nor failed"
        self._planned_at = now
        if self.pulls:
            for active in self.pulls.late(now):
                active.pulled_at = now
                self._restart(active)
        if self.held:
            self._effects += self.held.due(now)
        self._make_room()
        batch, batched, prompts = self._batch, self._batched, []
        decode_context_tokens = 0
        for active in self._running:
            start = active.computed
            if len(active.token_ids) - start == 1:
                batch.append(BatchRow(active, start, 1, True))
                batched.append(active)
                decode_context_tokens += start
            else:
                prompts.append(active)
        decodes = len(batch)
        budget = self.settings.max_batch_tokens - len(batch)
        for active in sorted(prompts, key=rank):
            budget -= self._add_chunk(active, budget)
        if self._waiting:
            budget = self._admit_waiting(budget, now)
        rows = batch[decodes:]
        self._work = StepWork(
            prefill_tokens=self.settings.max_batch_tokens - decodes - budget,
            prefill_context_tokens=sum(row.count * (row.start + row.count / 2) for row in rows),
            decode_requests=decodes,
            decode_context_tokens=decode_context_tokens,
        )
        return batch

    def idled(self) -> None:
        """The plan was empty: the turn ends here."""
        self._steps += 1

    def commit(self, samples: list[Sampled | None], now: float) -> None:
        """The planned batch was computed; `samples` as from Runner.run."""
        for active, row, sample in zip(self._batched, self._batch, samples, strict=True):
            active.computed = computed = row.start + row.count
            if computed >= active.cache_at:
                self._cache_blocks(active)
            if sample is not None:
                self._append(active, sample, now)
        self._times.observe(self._work, (now - self._planned_at) * 1e3)
        self._close_batch()

    def fail_batch(self, reason: str, now: float) -> None:
        """The planned batch was not computed: its attempts end with ERROR, and nothing of it is kept."""
        for active in self._batched:
            failed = Output(active.attempt_id, finish_reason=FinishReason.ERROR, error=reason)
            self._end(active, failed, now)
        self._close_batch()

    def report(self) -> EngineStep:
        """Everything that happened since the last report."""
        outputs, self._outputs = self._outputs, []
        ended, self._ended = self._ended, []
        stored, removed = self.pool.drain()
        self._waiting.look_again()
        return EngineStep(outputs, stored, removed, load=self.load(), ended=ended)

    # --- inside plan ------------------------------------------------------------------------------

    def _make_room(self) -> None:
        """A block for every running attempt whose last is full, the least important giving way."""
        short = [active for active in self._running if len(active.token_ids) > active.capacity]
        for active in sorted(short, key=rank):
            while active.phase is AttemptPhase.RUNNING:
                block_ids = self.pool.allocate(1)
                if block_ids is not None:
                    active.block_ids += block_ids
                    active.capacity += self.pool.block_size
                    break
                self._preempt(max(self._running, key=rank))

    def _preempt(self, active: ActiveAttempt) -> None:
        self.preemptions += 1
        log.info("preempted: attempt=%s tokens=%d", active.attempt_id, len(active.token_ids))
        self._running.remove(active)
        self.pool.release(active.block_ids)
        self._requeue(active)

    def _add_chunk(self, active: ActiveAttempt, budget: int) -> int:
        """Compute up to `budget` more of its tokens. Returns how many."""
        start, length = active.computed, len(active.token_ids)
        count = min(length - start, budget)
        if count:
            self._batch.append(BatchRow(active, start, count, start + count == length))
            self._batched.append(active)
        return count

    def _admit_waiting(self, budget: int, now: float) -> int:
        """Admit the first in the queue while tokens, places and blocks last. Returns the budget left."""
        while (
            budget and self._waiting and len(self._active) - len(self._waiting) < self.settings.max_running
        ):
            active = self._waiting.first
            if not self._admit(active, now):
                break
            if active.phase is AttemptPhase.RUNNING:
                budget -= self._add_chunk(active, budget)
        return budget

    def _admit(self, active: ActiveAttempt, now: float) -> bool:
        """Give the first in the queue its blocks. False when there are too few."""
        pool = self.pool
        length = len(active.token_ids)
        hits = self._waiting.hits(active)
        needed = self._blocks_for(length) - len(hits)
        reserved = min(len(self._running), int(pool.total_blocks * RESERVED_SHARE))
        if needed + reserved > pool.available_besides(hits):
            return False
        pool.acquire(hits)
        fresh = pool.allocate(needed)
        assert fresh is not None, "available_besides promised these blocks"
        self._waiting.leave(active)
        active.began_at = now if active.began_at is None else active.began_at
        active.block_ids = hits + fresh
        active.capacity = len(active.block_ids) * pool.block_size
        active.cached_blocks = len(hits)
        active.computed = len(hits) * pool.block_size
        active.cache_at = active.computed + pool.block_size
        if active.handoff is not None:
            self._pull(self.pulls.begin(active, now))
        if active.phase is not AttemptPhase.PULLING:
            self._run(active)
        return True

    def _run(self, active: ActiveAttempt) -> None:
        active.phase = AttemptPhase.RUNNING
        self._running.append(active)
        if active.reused_tokens is None:
            active.reused_tokens = active.computed

    def _pull(self, pull: Pull | None) -> None:
        if pull is not None:
            self._effects.append(pull)

    # --- inside commit ----------------------------------------------------------------------------

    def _append(self, active: ActiveAttempt, sample: Sampled, now: float) -> None:
        token_id = sample.token_id
        active.token_ids.append(token_id)
        output = Output(active.attempt_id, [token_id])
        if sample.logprob is not None:
            output.logprobs = [sample.logprob]
        if active.first_token_at is None:
            active.first_token_at = now
            output.cached_tokens = min(active.reused_tokens or 0, active.prompt_len)
            output.transferred_blocks = active.transferred_blocks
            output.prompt_logprobs, active.prompt_logprobs = active.prompt_logprobs, None
        reason = active.end_reason(token_id)
        if reason is None:
            self._outputs.append(output)
            return
        output.finish_reason = reason
        if reason is FinishReason.PREFILLED:
            export = self.held.hold(active, now)
            self._effects.append(export)
            output.handoff = export.handoff
        self._end(active, output, now)

    def _cache_blocks(self, active: ActiveAttempt) -> None:
        """Enter its blocks that are whole and computed into the prefix cache."""
        size, first = self.pool.block_size, active.cached_blocks
        whole = active.computed // size
        if whole * size * TOKEN_BYTES <= len(active.packed):
            tokens = active.packed[first * size * TOKEN_BYTES : whole * size * TOKEN_BYTES]
        else:
            tokens, active.packed = token_bytes(active.token_ids[first * size : whole * size]), b""
        self.pool.cache(active.block_ids, first, active.cache_salt, tokens)
        active.cached_blocks = whole
        active.cache_at = (whole + 1) * size

    def _close_batch(self) -> None:
        self._batch = []
        self._batched = []
        self._steps += 1

    # --- moving attempts --------------------------------------------------------------------------

    def _requeue(self, active: ActiveAttempt) -> None:
        """Back to waiting, without the blocks, which are somebody else's concern now."""
        active.phase = AttemptPhase.WAITING
        active.block_ids = []
        active.capacity = active.cached_blocks = active.cache_at = active.computed = 0
        if active.prompt_logprobs:
            active.prompt_logprobs = []
        self._waiting.enter(active)

    def _join(self, active: ActiveAttempt, pulled_blocks: int) -> None:
        """Its pulled blocks are there: run on behind them."""
        assert active.handoff is not None, "only an attempt with a handoff waits for a pull"
        # The last token is always computed here, for its logits.
        active.computed = min(active.handoff.num_tokens, len(active.token_ids) - 1)
        active.handoff = None
        active.transferred_blocks = pulled_blocks
        self._cache_blocks(active)
        self._run(active)

    def _restart(self, active: ActiveAttempt) -> None:
        """Its pull came to nothing, or takes too long: compute."""
        active.handoff = None
        self._requeue(active)

    def _end(self, active: ActiveAttempt, output: Output, now: float) -> None:
        self._outputs.append(output)
        self._ended.append(active.report(now))
        del self._active[active.attempt_id]
        match active.phase:
            case AttemptPhase.WAITING:
                self._waiting.leave(active)
            case AttemptPhase.PULLING:
                self.pulls.abandon(active.attempt_id)
            case AttemptPhase.RUNNING:
                self._running.remove(active)
                self.pool.release(active.block_ids)
                if not active.prefill_only:
                    self._times.observe_output(len(active.token_ids) - active.prompt_len)
        active.phase = AttemptPhase.ENDED

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.pool.block_size)
