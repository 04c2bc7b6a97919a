"""vLLM behind the Engine port: its core process, without the API server and the detokenizer around it.

    event loop                                        core process
    submit, cancel, release  --requests, by ZMQ-->    vLLM's scheduler and model
    steps()                  <--one message a step--
                             <--KV events, by ZMQ--

A step of vLLM's is a step here: what its core says of all requests after one step becomes one EngineStep.
The core client beneath vLLM's AsyncLLM is used, since it speaks in just these terms; AsyncLLM above it
spends a queue, a task and an output object on each request and token.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from penstock.engines.active import fault
from penstock.engines.outbox import Outbox, merge
from penstock.engines.vllm.active_request import ActiveRequest
from penstock.engines.vllm.continuation import Continuation, continuation, folded
from penstock.engines.vllm.differences import ask_all_ranks, core_error
from penstock.engines.vllm.event_feed import EventFeed
from penstock.engines.vllm.handoff_params import PREFILL_ONLY, UsedHandoffs, handoff_of
from penstock.engines.vllm.held_handoffs import VllmHeldHandoffs
from penstock.engines.vllm.installed import check_installed
from penstock.engines.vllm.kv_events import CacheEvents, Changes
from penstock.engines.vllm.load import CoreLoad
from penstock.engines.vllm.logs import one_line
from penstock.engines.vllm.metrics import CoreMetrics, CoreTimes
from penstock.engines.vllm.open_prompts import OpenPrompts
from penstock.engines.vllm.outputs import (
    NO_GRAMMAR,
    check_tokens,
    finish_reason,
    is_grammar_error,
    prompt_logprobs,
    token_logprobs,
)
from penstock.engines.vllm.self_test import tried_out
from penstock.engines.vllm.settings import VllmSettings
from penstock.engines.vllm.startup import Core, start_core
from penstock.errors import RemoteError
from penstock.ports import EngineStep
from penstock.shapes import (
    Attempt,
    AttemptReport,
    EngineCard,
    FinishReason,
    Handoff,
    JsonObject,
    Load,
    Output,
)

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

log = logging.getLogger("penstock.engine")


class VllmEngine:
    """An Engine around one vLLM. Raises ConfigError unless vLLM is installed."""

    def __init__(self, settings: VllmSettings) -> None:
        check_installed()
        self._settings = settings
        self._outbox = Outbox()
        self._core: Core | None = None
        self._feed: EventFeed | None = None
        self._active: dict[str, ActiveRequest] = {}  # by core id
        self._core_ids: dict[str, str] = {}  # attempt id -> core id
        self._cancelled = asyncio.Event()  # since vLLM was last asked whether it is there
        self._fewer = asyncio.Event()  # an attempt ended, or a handoff is not held any more
        self._failed = False
        self._used = UsedHandoffs()
        self._commands: asyncio.Queue[Callable[[], Awaitable[Any]]] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._step_at = 0.0  # when the core made the message that is being taken, by the monotonic clock
        self._pending: EngineStep | None = None  # KV events that wait for a step
        self._pushed = Load()
        self._ended: list[AttemptReport] = []  # since the latest push
        self._metrics: CoreMetrics | None = None
        self._due: asyncio.TimerHandle | None = None  # the next push, if nothing happens before

    # --- the port -----------------------------------------------------------------------------------

    async def start(self) -> EngineCard:
        """As Engine.start: starts vLLM, in seconds to minutes, and tries out an unknown version of it."""
        card = await tried_out(self, self._start)
        assert self._core is not None
        self._metrics = CoreMetrics(self._core.config, self._core.ranks)
        self._load = CoreLoad(card, self._core.ranks)  # without the requests by which it was tried out
        log.info("engine ready: %s", card)
        return card

    async def _start(self) -> EngineCard:
        self._outbox.open()
        starting = asyncio.ensure_future(asyncio.to_thread(start_core, self._settings))
        try:
            self._core = core = await asyncio.shield(starting)
        except asyncio.CancelledError:
            await (await starting).close()  # its processes must not be left behind half started
            raise
        await core.complete_layout()
        self._load = CoreLoad(core.card, core.ranks)
        self._held = VllmHeldHandoffs(core.client, self._settings.held_interval_s, self._on_fewer_held)
        events = CacheEvents(core.card.model.name, core.card.block_size, core.card.total_blocks)
        self._prompts = OpenPrompts(core.card, events)
        self._feed = EventFeed(events, core.events, self._on_changes)
        await self._feed.start()
        self._tasks = [
            asyncio.create_task(self._while_it_lives(work), name=f"vllm {name}")
            for name, work in (
                ("outputs", self._receive),
                ("requests", self._send),
                ("handoffs", self._held.look_after),
                ("signs of life", self._ask_after_cancelling),
            )
        ]
        return core.card

    def submit(self, attempt: Attempt) -> int:
        """As Engine.submit."""
        self._load.submitted()
        reason = fault(attempt, self._card)
        if reason is None and attempt.attempt_id in self._core_ids:
            reason = f"attempt {attempt.attempt_id} was submitted before"
        if reason is not None:
            self._push([Output(attempt.attempt_id, finish_reason=FinishReason.ERROR, error=reason)])
        elif len(attempt.token_ids) >= min(
            attempt.prompt_len + attempt.sampling.max_tokens, self._card.model.max_model_len
        ):
            self._push([Output(attempt.attempt_id, finish_reason=FinishReason.LENGTH)])
        else:
            return self._begin(attempt)
        return 0

    def cancel(self, attempt_id: str) -> None:
        """As Engine.cancel."""
        core_id = self._core_ids.get(attempt_id)
        if core_id is None:
            return
        self._end(self._active[core_id])
        self._abort(core_id)
        self._cancelled.set()
        self._push([Output(attempt_id, finish_reason=FinishReason.CANCELLED)])

    def release(self, handoff_id: str, *, sent: bool) -> None:
        """As Engine.release. KV that a decode worker may be reading is left to that reader, or to the
        lease's end: vLLM's readers cannot be told that it was withdrawn. But nobody waits for that."""
        self._held.release(handoff_id, sent=sent)

    def cached_hashes(self) -> Sequence[int]:
        """As Engine.cached_hashes."""
        return self._outbox.cached_hashes()

    def asset(self, sha256: str) -> bytes | None:
        """As Engine.asset."""
        return self._core.assets.get(sha256) if self._core is not None else None

    def exposition(self) -> bytes:
        """As Engine.exposition."""
        return self._metrics.exposition() if self._metrics is not None else b""

    def steps(self) -> AsyncIterator[EngineStep]:
        """As Engine.steps, for one reader. RemoteError when vLLM died."""
        return self._outbox.read()

    async def stop(self, grace_s: float) -> None:
        """As Engine.stop. Handoffs that wait for their readers count as running."""
        if self._core is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while (self._active or self._held) and not self._failed:
                    self._fewer.clear()
                    await self._fewer.wait()
        for attempt_id in list(self._core_ids):
            self.cancel(attempt_id)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._feed is not None:
            await self._feed.close()
        core, self._core = self._core, None
        await core.close()
        if not self._failed:
            self._outbox.close()

    # --- attempts on their way in -------------------------------------------------------------------

    @property
    def _card(self) -> EngineCard:
        assert self._core is not None, "the engine was not started"
        return self._core.card

    def _begin(self, attempt: Attempt) -> int:
        transfer: JsonObject | None = None
        if attempt.handoff is not None:
            transfer = self._accept(attempt, attempt.handoff)
        plan = continuation(attempt, pulls=transfer is not None)
        if attempt.prefill_only:
            transfer = dict(PREFILL_ONLY)
        return self._request(attempt, attempt.attempt_id, plan, transfer)

    def _accept(self, attempt: Attempt, handoff: Handoff) -> JsonObject | None:
        """What vLLM needs to pull the handoff's KV; None when it must not, so that it computes instead."""
        prompt_len = len(continuation(attempt, pulls=True).prompt)
        params, reason = self._used.accept(handoff, attempt, self._card, prompt_len)
        if params is None:
            log.warning(
                "KV transfer refused, computing instead: attempt=%s handoff=%s from=%s: %s",
                attempt.attempt_id,
                handoff.handoff_id,
                handoff.holder.instance_id,
                reason,
            )
        return params

    def _request(
        self, attempt: Attempt, core_id: str, plan: Continuation, transfer: JsonObject | None
    ) -> int:
        """Hand a request to vLLM, or end the attempt with why it cannot be. Returns as `submit`."""
        from vllm.exceptions import VLLMClientError

        from penstock.engines.vllm.sampling import sampling_params

        assert self._core is not None
        prompt: JsonObject = {"type": "token", "prompt_token_ids": plan.prompt}
        if attempt.cache_salt:
            prompt["cache_salt"] = attempt.cache_salt
        try:
            request = self._core.inputs.process_inputs(
                core_id,
                prompt,
                sampling_params(plan.sampling, plan.replay, transfer, seeded=self._seeded(attempt)),
                ("generate",),
                priority=attempt.priority,
            )
        except (VLLMClientError, ValueError) as error:
            reason = one_line(error)
            rejected = Output(attempt.attempt_id, finish_reason=FinishReason.REJECTED, error=reason)
            self._push([rejected])
            return 0
        except Exception as error:  # whatever else vLLM's checks raise is this attempt's, not everybody's
            log.exception("attempt %s could not be given to vLLM", attempt.attempt_id)
            failed = Output(attempt.attempt_id, finish_reason=FinishReason.ERROR, error=repr(error))
            self._push([failed])
            return 0
        structured = plan.sampling.structured
        if structured is not None:
            request.reasoning_ended = structured.reasoning_ended
            request.reasoning_parser_kwargs = {"chat_template_kwargs": structured.template_variables}
        self._active[core_id] = ActiveRequest(attempt, core_id, plan, CoreTimes(monotonic()))
        self._core_ids[attempt.attempt_id] = core_id
        self._load.began()
        self._commands.put_nowait(partial(self._core.client.add_request_async, request))
        if transfer is not None and not attempt.prefill_only:  # it pulls all but the last token
            return 0
        scored = plan.sampling.prompt_logprobs is not None
        tokens = self._prompts.begin(core_id, plan.prompt, attempt.cache_salt, scored=scored)
        self._load.left(self._prompts.work())
        return tokens

    def _seeded(self, attempt: Attempt) -> bool:
        """Whether it must draw the same tokens as others do for this request: because the client asked for
        that, or because it cannot be held to those that the client has read already."""
        assert self._core is not None
        return attempt.sampling.reproducible or not self._core.config.model_config.logits_processors

    def _abort(self, core_id: str) -> None:
        assert self._core is not None
        self._commands.put_nowait(partial(self._core.client.abort_requests_async, [core_id]))

    async def _while_it_lives(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do this as long as vLLM lives; its end is the engine's, with a reason."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await work()
        except EngineDeadError:
            self._fail("vLLM's core process died; its last words are in the log")
        except Exception as bug:
            log.exception("the engine failed")
            self._fail(f"the engine failed: {bug!r}")

    def _fail(self, reason: str) -> None:
        if not self._failed:
            self._failed = True
            self._outbox.close(RemoteError(reason))
            self._fewer.set()

    async def _send(self) -> None:
        """Commands to vLLM, in order."""
        while True:
            command = await self._commands.get()
            await command()

    async def _ask_after_cancelling(self) -> None:
        """Have vLLM's core answer once it has come to what was cancelled: for that it may take no step, and
        one that was stuck would never be seen to be back."""
        assert self._core is not None
        while True:
            await self._cancelled.wait()
            self._cancelled.clear()
            await ask_all_ranks(self._core.client, "is_scheduler_paused")
            self._load.responded()
            self._push([])

    # --- steps on their way out ---------------------------------------------------------------------

    async def _receive(self) -> None:
        assert self._core is not None
        client = self._core.client
        while True:
            self._take(await client.get_output_async())

    def _take(self, step: EngineCoreOutputs) -> None:
        """One message from the core."""
        self._step_at = step.timestamp
        outputs = []
        for core_output in step.outputs:
            active = self._active.get(core_output.request_id)
            if active is None:
                self._forget_late(core_output)
            elif (output := self._advance_guarded(active, core_output)) is not None:
                outputs.append(output)
        if self._metrics is not None:
            self._metrics.observe(step, self._ended)
        if step.scheduler_stats is not None:
            self._load.observe(step.engine_index, step.scheduler_stats, step.timestamp)
        if outputs:
            self._push(outputs)
        else:
            self._push_within(self._settings.load_interval_s)

    def _forget_late(self, core_output: EngineCoreOutput) -> None:
        """What nobody asks for any more may have been kept for a decode worker meanwhile."""
        if core_output.kv_transfer_params is not None:
            self._held.let_go(core_output.request_id)

    def _advance_guarded(self, active: ActiveRequest, core_output: EngineCoreOutput) -> Output | None:
        """As `_advance`. What cannot be made sense of ends its attempt, and not the engine."""
        try:
            return self._advance(active, core_output)
        except Exception as error:
            attempt_id = active.attempt.attempt_id
            log.exception("attempt %s ended: vLLM reported something impossible about it", attempt_id)
            if active.core_id in self._active:
                self._end(active)
                self._abort(active.core_id)
            self._forget_late(core_output)
            return Output(attempt_id, finish_reason=FinishReason.ERROR, error=f"vLLM's output: {error!r}")

    def _advance(self, active: ActiveRequest, core_output: EngineCoreOutput) -> Output | None:
        """What one step gave to one attempt; None when its replay went astray and it begins again."""
        attempt, replay = active.attempt, active.continuation.replay
        token_ids, logprobs = core_output.new_token_ids, None
        check_tokens(token_ids, self._card.model.vocab_size)
        if attempt.sampling.logprobs is not None and core_output.new_logprobs is not None:
            logprobs = token_logprobs(core_output.new_logprobs, attempt.sampling.logprobs)
        left = len(replay) - active.replayed
        if left and token_ids:
            again = token_ids[:left]
            if again != replay[active.replayed : active.replayed + len(again)]:
                self._begin_again(active)
                self._forget_late(core_output)
                return None
            active.replayed += len(again)
            token_ids = token_ids[len(again) :]
            logprobs = logprobs[len(again) :] if logprobs else logprobs
        active.given += len(token_ids)
        output = Output(attempt.attempt_id, token_ids, finish_reason(core_output), logprobs=logprobs)
        output.prompt_logprobs = prompt_logprobs(core_output, attempt.sampling.prompt_logprobs)
        if active.times.first_token_at is None:
            self._answer(active, core_output, output)
        else:
            self._load.grew(len(token_ids))
            active.context_tokens += len(token_ids)
        if output.finish_reason is not None:
            self._finish(active, core_output, output)
        return output

    def _answer(self, active: ActiveRequest, core_output: EngineCoreOutput, output: Output) -> None:
        """The first output of an attempt: what was cached, and the load's books."""
        attempt, stats = active.attempt, core_output.prefill_stats
        active.times.answered(core_output, monotonic())
        self._load.answered(active.times.scheduled_at)
        active.context_tokens = len(active.continuation.prompt) + len(core_output.new_token_ids)
        self._load.grew(active.context_tokens)
        self._prompts.end(active.core_id)
        if stats is None or active.told:
            return
        active.told = True
        output.cached_tokens = min(stats.num_cached_tokens, attempt.prompt_len)
        if attempt.handoff is not None:
            blocks = -(-stats.num_external_cached_tokens // self._card.block_size)
            output.transferred_blocks = blocks
            if blocks:
                ms = (monotonic() - active.times.submitted_at) * 1e3
                self._load.observe_transfer(blocks, ms)
                log.info(
                    "KV transfer done: attempt=%s transport=%s blocks=%d from=%s first_token_ms=%.1f",
                    attempt.attempt_id,
                    self._card.transport,
                    blocks,
                    attempt.handoff.holder.instance_id,
                    ms,
                )

    def _finish(self, active: ActiveRequest, core_output: EngineCoreOutput, output: Output) -> None:
        """The attempt's last output: fill in how it ended."""
        attempt = active.attempt
        self._end(active)
        if not attempt.prefill_only:
            self._load.observe_output(len(attempt.token_ids) - attempt.prompt_len + active.given)
        if output.finish_reason in (FinishReason.ERROR, FinishReason.REJECTED):
            output.error = core_error(core_output)[1] or f"vLLM ended it: {core_output.finish_reason}"
            if output.finish_reason is FinishReason.ERROR and is_grammar_error(active, core_output):
                output.finish_reason, output.error = FinishReason.REJECTED, NO_GRAMMAR
            return
        params = core_output.kv_transfer_params
        if not attempt.prefill_only:
            return
        length = len(attempt.token_ids) + active.given
        limit = min(attempt.prompt_len + attempt.sampling.max_tokens, self._card.model.max_model_len)
        if output.finish_reason is FinishReason.STOP or length >= limit:
            self._forget_late(core_output)  # it ended here: nobody will read its KV
            return
        if params is None:
            output.finish_reason, output.error = FinishReason.ERROR, "vLLM kept no KV to hand over"
            return
        output.finish_reason = FinishReason.PREFILLED
        lease_end = self._step_at + self._settings.handoff_ttl_s
        output.handoff = handoff_of(attempt, self._card, self._settings.incarnation, params, lease_end)
        self._held.add(attempt.attempt_id, active.core_id)
        self._load.held_handoffs = len(self._held)

    def _begin_again(self, active: ActiveRequest) -> None:
        """vLLM generated another token than the one that the client has read already, which can happen
        where it cannot be held to it (forced.py). What the client has read becomes part of the prompt."""
        attempt = active.attempt
        log.warning("attempt %s: vLLM drew another token; starting it again", attempt.attempt_id)
        self._end(active)
        self._ended.pop()  # it goes on
        self._abort(active.core_id)
        transfer = dict(PREFILL_ONLY) if attempt.prefill_only else None
        self._request(attempt, f"{active.core_id}+", folded(attempt), transfer)
        if (again := self._active.get(f"{active.core_id}+")) is not None:
            again.told = active.told

    def _end(self, active: ActiveRequest) -> None:
        del self._active[active.core_id]
        del self._core_ids[active.attempt.attempt_id]
        self._ended.append(active.times.report(active.attempt.attempt_id, active.given, monotonic()))
        self._load.ended(active.context_tokens)
        self._prompts.end(active.core_id)
        self._fewer.set()

    # --- handing out --------------------------------------------------------------------------------

    def _on_fewer_held(self) -> None:
        self._load.held_handoffs = len(self._held)
        self._fewer.set()
        self._push([])

    def _on_changes(self, changes: Changes) -> None:
        """KV events travel with the next step, or soon by themselves."""
        step = EngineStep(stored=changes.stored, removed=changes.removed)
        self._pending = step if self._pending is None else merge(self._pending, step)
        self._push_within(self._settings.events_delay_s)

    def _push_within(self, delay_s: float) -> None:
        """Hand out what is new even if no step with outputs follows."""
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(delay_s, self._push, [])

    def _push(self, outputs: list[Output]) -> None:
        due, self._due = self._due, None
        if due is not None:
            due.cancel()
        load, pending = self._load.load(self._prompts.work()), self._pending
        if not outputs and pending is None and load == self._pushed:
            return
        step, self._pending = EngineStep(outputs=outputs, load=load, ended=self._ended), None
        self._ended = []
        self._pushed = load
        self._outbox.push(merge(pending, step) if pending is not None else step)
