"""A scheduler that takes many steps at once while nothing but decoding happens.

Where every row of a batch decodes and nobody waits, the steps until the first of them ends are all alike:
each attempt gets a token, and a block now and then. Taking them together costs about as much as taking one,
and gives the same outputs, blocks and KV events, later by a part of their time (`SimulatedEngine.catch_up`
says when).
"""

from __future__ import annotations

from penstock.engines.active import ActiveAttempt
from penstock.engines.scheduler import Scheduler
from penstock.shapes import Output
from penstock.simulate.answers import OwnTokens

MAX_STRIDE = 256
"""Most steps that are taken as one."""


class StridingScheduler(Scheduler):
    """A Scheduler; between `plan` and `commit`, `stride` says how many steps may be taken together."""

    tokens: OwnTokens  # as drawn by the engine's runner

    def stride(self) -> int:
        """How many steps like the planned one follow each other in which no attempt ends, if no command
        comes; at least 1, in which some may."""
        if self._waiting or self._work.prefill_tokens or not self._batched:
            return 1
        if any(active.first_token_at is None for active in self._batched):  # its first output says more
            return 1
        left = min(active.max_len - len(active.token_ids) for active in self._batched) - 1
        blocks_each = self.pool.available_blocks // len(self._batched) - 1
        return max(1, min(left, blocks_each * self.pool.block_size, MAX_STRIDE))

    def began(self, at_s: float) -> None:
        """The planned batch has been computed since then."""
        self._planned_at = at_s

    def commit_stride(self, steps: int, until_s: float) -> None:
        """The planned batch was computed, and `steps` - 1 more like it, the last one until then."""
        for active in self._batched:
            self._advance(active, steps)
        # Observed as one step with the mean context: what is known of it is the same, and costs less.
        work, longer = self._work, self._work.decode_requests * (steps - 1) // 2
        work = work._replace(decode_context_tokens=work.decode_context_tokens + longer)
        self._times.observe(work, (until_s - self._planned_at) * 1e3 / steps)
        self._close_batch()
        self._steps += steps - 1

    def _advance(self, active: ActiveAttempt, steps: int) -> None:
        token_ids = self.tokens.following(active, steps)
        active.token_ids += token_ids
        active.computed += steps
        missing = active.computed - active.capacity
        if missing > 0:
            blocks = self.pool.allocate(-(-missing // self.pool.block_size))
            assert blocks is not None, "stride() counted them"
            active.block_ids += blocks
            active.capacity += len(blocks) * self.pool.block_size
        if active.computed >= active.cache_at:
            self._cache_blocks(active)
        self._outputs.append(Output(active.attempt_id, token_ids))
