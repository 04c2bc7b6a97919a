"""An engine's load, from what vLLM's scheduler says and from what was sent to it since."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.engines.step_times import StepTimes
from penstock.shapes import EngineCard, Load

SIGN_S = 0.5
"""Seconds between two steps that count although they computed nothing. vLLM takes hundreds a second while
attempts wait for KV or for a grammar; that some are taken is how others know that it is not stuck."""

if TYPE_CHECKING:
    from vllm.v1.metrics.stats import SchedulerStats


class CoreLoad:
    """Counts attempts and tokens as they come and go, and measures what steps take.

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
        self._prefill_tokens = 0
        self._context_tokens = 0
        self.held_handoffs = 0

    def submitted(self) -> None:
        """One more attempt, whether or not it begins."""
        self._submitted += 1

    def began(self, uncached_tokens: int) -> None:
        """It went to vLLM, with so many tokens to compute before its first."""
        self._attempts += 1
        self._prefill_tokens += uncached_tokens

    def answered(self, uncached_tokens: int, context_tokens: int) -> None:
        """Its first token came."""
        self._prefill_tokens -= uncached_tokens
        self._context_tokens += context_tokens

    def grew(self, tokens: int) -> None:
        """More of its output came."""
        self._context_tokens += tokens

    def ended(self, uncached_tokens: int, context_tokens: int) -> None:
        """It is gone, with what was still counted for it."""
        self._attempts -= 1
        self._prefill_tokens -= uncached_tokens
        self._context_tokens -= context_tokens

    def observe(self, rank: int, stats: SchedulerStats, now: float) -> None:
        """A step's statistics, which came now (seconds)."""
        self._usage[rank] = stats.kv_cache_usage
        # Those whose KV is on its way hold blocks already; vLLM counts them among those it skipped.
        pulling = sum(stats.num_kv_fetch_reqs_by_stage.values())
        self._running[rank] = stats.num_running_reqs + pulling
        details = stats.iteration_details
        computed = details is not None and not details.is_dummy
        if computed or (self._attempts and now >= self._sign_at):
            self._steps += 1
            self._sign_at = now + SIGN_S
        if details is not None and not details.is_dummy:
            decodes = details.num_generation_requests
            self._times.observe(details.num_ctx_tokens, decodes, details.elapsed_ms)

    def responded(self) -> None:
        """It answered a question between two steps: it is not stuck."""
        self._steps += 1

    def observe_transfer(self, blocks: int, ms: float) -> None:
        """A pull took so long."""
        self._times.observe_transfer(blocks, ms)

    def observe_output(self, tokens: int) -> None:
        """An output ended after so many tokens."""
        self._times.observe_output(tokens)

    def load(self) -> Load:
        """The load as of now."""
        running = min(sum(self._running.values()), self._attempts)
        used = sum(self._usage.values()) / self._ranks * self._card.total_blocks
        return Load(
            running=running,
            waiting=self._attempts - running,
            prefill_tokens=self._prefill_tokens,
            used_blocks=round(used),
            total_blocks=self._card.total_blocks,
            context_tokens=self._context_tokens,
            held_handoffs=self.held_handoffs,
            steps=self._steps,
            rates=self._times.rates(),
            submitted=self._submitted,
            output_tokens=self._times.output_tokens,
        )
