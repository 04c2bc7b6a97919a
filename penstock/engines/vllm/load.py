"""An engine's load, from what vLLM's scheduler says and from what was sent to it since.

How long a step took is measured here: from the end of the one before, or from when vLLM scheduled a prompt
that begins in it, if that was later. vLLM's own `elapsed_ms` is only how long its core waited for the
result. Where the model runs in the core's process, the result is there before that begins; on a GPU it
lacks what vLLM prepared meanwhile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.core.prompt_work import NO_WORK, PromptWork
from penstock.engines.step_times import StepTimes, StepWork
from penstock.engines.vllm.differences import pulling
from penstock.shapes import EngineCard, Load

SIGN_S = 0.5
"""Seconds between two steps that count although they computed nothing. vLLM takes hundreds a second while
attempts wait for KV or for a grammar; that some are taken is how others know that it is not stuck."""

if TYPE_CHECKING:
    from vllm.v1.metrics.stats import SchedulerIterationDetails, SchedulerStats


class CoreLoad:
    """Counts attempts and their context as they come and go, and measures what steps take.

    Args:
        ranks: data parallel ones, each with an equal part of the blocks.
    """

    def __init__(self, card: EngineCard, ranks: int = 1) -> None:
        self._card = card
        self._ranks = ranks
        self._times = StepTimes()
        self._submitted = 0
        self._attempts = 0
        self._running: dict[int, int] = {}  # by rank
        self._usage: dict[int, float] = {}  # by rank: share of its blocks
        self._steps = 0
        self._sign_at = 0.0  # when the next empty step counts
        self._context_tokens = 0
        self._prompts = NO_WORK  # what was last known to be left to compute
        self._scheduled_at: float | None = None  # the first of those whose first output came with this step
        self._busy_since: dict[int, float] = {}  # by rank: the end of its last step, if that left work
        self.held_handoffs = 0

    def submitted(self) -> None:
        """One more attempt, whether or not it begins."""
        self._submitted += 1

    def began(self) -> None:
        """It went to vLLM."""
        self._attempts += 1

    def left(self, prompts: PromptWork) -> None:
        """So much is left to compute of prompts."""
        self._prompts = prompts

    def answered(self, scheduled_at: float | None) -> None:
        """The step that is observed next has the first output of one that vLLM scheduled then."""
        if scheduled_at is not None:
            self._scheduled_at = min(scheduled_at, self._scheduled_at or scheduled_at)

    def grew(self, tokens: int) -> None:
        """So many more of its tokens have KV: those of its prompt once its first token came, and its output
        since then."""
        self._context_tokens += tokens

    def ended(self, context_tokens: int) -> None:
        """It is gone, with what was still counted for it."""
        self._attempts -= 1
        self._context_tokens -= context_tokens

    def observe(self, rank: int, stats: SchedulerStats, now: float) -> None:
        """A step's statistics. `now`: when vLLM made them, by the monotonic clock, which it shares."""
        self._usage[rank] = stats.kv_cache_usage
        # Those whose KV is on its way hold blocks already; vLLM counts them among those it skipped.
        self._running[rank] = stats.num_running_reqs + pulling(stats)
        details = stats.iteration_details
        computed = details is not None and not details.is_dummy
        if computed or (self._attempts and now >= self._sign_at):
            self._steps += 1
            self._sign_at = now + SIGN_S
        began_at = max(self._busy_since.pop(rank, 0.0), self._scheduled_at or 0.0)
        self._scheduled_at = None
        if stats.num_running_reqs + stats.num_waiting_reqs + stats.num_skipped_waiting_reqs:
            self._busy_since[rank] = now
        if details is not None and computed and began_at:
            self._times.observe(self._work(details), (now - began_at) * 1e3)

    def _work(self, details: SchedulerIterationDetails) -> StepWork:
        """What a step computed."""
        prompts, tokens, decoding = self._prompts, details.num_ctx_tokens, details.num_generation_requests
        if tokens == details.num_ctx_requests:  # the last one of each: its KV was pulled or cached
            tokens, decoding = 0, decoding + tokens  # which takes as long as a token of an output
        return StepWork(
            prefill_tokens=tokens,
            # vLLM does not say of which prompts these are: an average one of those that were left.
            prefill_context_tokens=tokens * prompts.context_tokens / max(1, prompts.tokens),
            decode_requests=decoding,
            decode_context_tokens=self._context_tokens // self._ranks,
        )

    def responded(self) -> None:
        """It answered a question between two steps: it is not stuck."""
        self._steps += 1

    def observe_transfer(self, blocks: int, ms: float) -> None:
        """A pull took so long."""
        self._times.observe_transfer(blocks, ms)

    def observe_output(self, tokens: int) -> None:
        """An output ended after so many tokens."""
        self._times.observe_output(tokens)

    def load(self, prompts: PromptWork) -> Load:
        """The load as of now, with what is left to compute of prompts."""
        self.left(prompts)
        running = min(sum(self._running.values()), self._attempts)
        used = sum(self._usage.values()) / self._ranks * self._card.total_blocks
        return Load(
            running=running,
            waiting=self._attempts - running,
            prefill_tokens=prompts.tokens,
            used_blocks=round(used),
            total_blocks=self._card.total_blocks,
            context_tokens=self._context_tokens,
            held_handoffs=self.held_handoffs,
            steps=self._steps,
            rates=self._times.rates(),
            submitted=self._submitted,
            output_tokens=self._times.output_tokens,
            prefill_context_tokens=prompts.context_tokens,
        )
