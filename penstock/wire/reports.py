"""What a worker may report next on one connection, going by what it was sent and what it reported before.

A connection begins with a snapshot and keeps its order, so a frontend knows which attempts a worker has,
and that its counters only grow. A report that does not fit to that comes from a defect or from a lie.
Either way nothing of it is used, and the connection ends: the next one begins with a fresh snapshot.

Limits of single values are in their types (structs.py), what one message must be in itself in checks.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.errors import ProtocolError
from penstock.shapes import Attempt, Card, FinishReason, Handoff, Load, Output, PromptLogprob, TokenLogprob
from penstock.wire.messages import Bounce, Step

MAX_OPEN = 64 * 1024
"""Attempts that one worker may have without having ended them. A worker that never ends what was cancelled
gets no more than these."""

_SHOWN_CHARS = 80  # of a name that nobody knows


@dataclass(slots=True)
class _Open:
    """An attempt that was sent, and whose last output has not come."""

    tokens: int  # that it was sent with
    left: int  # tokens that it may still give
    logprobs: int | None
    prompt_logprobs: int | None  # None also once they have come
    prefill_only: bool


class Reports:
    """Checks the reports of the worker with this card. Each method raises ProtocolError, which names the
    field, for what the worker cannot say.

    Args:
        load: as of the snapshot.
    """

    def __init__(self, card: Card, load: Load) -> None:
        self._card = card
        self._load = Load()
        self._open: dict[str, _Open] = {}  # by attempt id
        self._sent = 0  # attempts, and the `seq` of the latest
        self._seen = 0
        self.load(0, load)

    @property
    def full(self) -> bool:
        """Whether it has as many attempts as it may have."""
        return len(self._open) >= MAX_OPEN

    def sent(self, attempt: Attempt) -> None:
        """The next Generate left."""
        self._sent += 1
        tokens, sampling = len(attempt.token_ids), attempt.sampling
        left = max(0, attempt.prompt_len + sampling.max_tokens - tokens)
        prompt_logprobs = sampling.prompt_logprobs if tokens == attempt.prompt_len else None
        self._open[attempt.attempt_id] = _Open(
            tokens, left, sampling.logprobs, prompt_logprobs, attempt.prefill_only
        )

    def bounce(self, bounce: Bounce) -> None:
        """It does not take an attempt."""
        if self._open.pop(bounce.attempt_id, None) is None:
            raise _unknown("bounce.attempt_id", bounce.attempt_id)

    def load(self, seen: int, load: Load) -> None:
        """Its load, which includes every Generate up to `seen`."""
        before = self._load
        if not self._seen <= seen <= self._sent:
            raise ProtocolError(f"seen: {seen}, expected {self._seen} to {self._sent}")
        if load.steps < before.steps:
            raise ProtocolError(f"load.steps: {load.steps} after {before.steps}")
        if load.submitted < before.submitted:
            raise ProtocolError(f"load.submitted: {load.submitted} after {before.submitted}")
        if not load.used_blocks <= load.total_blocks <= self._card.engine.total_blocks:
            raise ProtocolError(
                f"load.used_blocks: {load.used_blocks} of {load.total_blocks}, in a pool of "
                f"{self._card.engine.total_blocks}"
            )
        self._seen, self._load = seen, load

    def step(self, step: Step) -> None:
        """One engine step."""
        self.load(step.seen, step.load)
        attempts, vocab_size = self._open, self._card.model.vocab_size
        for output in step.outputs:  # once per token: what seldom is there is looked at elsewhere
            attempt = attempts.get(output.attempt_id)
            if attempt is None:
                raise _unknown("outputs.attempt_id", output.attempt_id)
            token_ids = output.token_ids
            attempt.left = left = attempt.left - len(token_ids)
            for token_id in token_ids:
                if token_id >= vocab_size:
                    raise _wrong(output, "token_ids", f"{token_id}, in a vocabulary of {vocab_size}")
            if left < 0:
                raise _wrong(output, "token_ids", f"{-left} more than were asked for")
            if output.logprobs is not None:
                self._check_logprobs(output, attempt)
            if output.prompt_logprobs is not None:
                self._check_prompt_logprobs(output, output.prompt_logprobs, attempt)
            if output.cached_tokens is not None:
                self._check_reuse(output, attempt)
            if output.finish_reason is not None:
                self._check_end(output, attempt)
                del attempts[output.attempt_id]

    def _check_logprobs(self, output: Output, attempt: _Open) -> None:
        logprobs = output.logprobs or []
        if attempt.logprobs is None or len(logprobs) != len(output.token_ids):
            raise _wrong(output, "logprobs", f"{len(logprobs)}, for {len(output.token_ids)} token_ids")
        self._check_alternatives(output, "logprobs", logprobs, attempt.logprobs)

    def _check_prompt_logprobs(self, output: Output, logprobs: list[PromptLogprob], attempt: _Open) -> None:
        asked, attempt.prompt_logprobs = attempt.prompt_logprobs, None
        if asked is None or len(logprobs) != attempt.tokens - 1:
            problem = f"{len(logprobs)}, for a prompt of {attempt.tokens} tokens"
            raise _wrong(output, "prompt_logprobs", problem)
        self._check_alternatives(output, "prompt_logprobs", logprobs, asked)
        last = max((it.rank for it in logprobs), default=1)
        if last > self._card.model.vocab_size:
            raise _wrong(output, "prompt_logprobs", f"rank {last} of {self._card.model.vocab_size}")

    def _check_alternatives(
        self, output: Output, field: str, logprobs: Sequence[TokenLogprob], most: int
    ) -> None:
        for it in logprobs:
            if len(it.top) > most:
                raise _wrong(output, field, f"{len(it.top)} alternatives of {most}")
            largest = max((token_id for token_id, _ in it.top), default=0)
            if max(it.token_id, largest) >= self._card.model.vocab_size:
                raise _wrong(output, field, f"a token beyond the {self._card.model.vocab_size} there are")

    def _check_reuse(self, output: Output, attempt: _Open) -> None:
        if (output.cached_tokens or 0) > attempt.tokens:
            raise _wrong(output, "cached_tokens", f"{output.cached_tokens} of {attempt.tokens}")
        blocks = -(-attempt.tokens // self._card.engine.block_size)
        if (output.transferred_blocks or 0) > blocks:
            raise _wrong(output, "transferred_blocks", f"{output.transferred_blocks} of {blocks}")

    def _check_end(self, output: Output, attempt: _Open) -> None:
        handoff, prefilled = output.handoff, output.finish_reason is FinishReason.PREFILLED
        if prefilled != (handoff is not None) or (prefilled and not attempt.prefill_only):
            raise _wrong(output, "handoff", f"it ends as {output.finish_reason}")
        if handoff is not None:
            self._check_handoff(output, handoff, attempt)

    def _check_handoff(self, output: Output, handoff: Handoff, attempt: _Open) -> None:
        card = self._card
        if handoff.handoff_id != output.attempt_id:
            raise _wrong(output, "handoff.handoff_id", "it is of another attempt")
        if handoff.holder != card.incarnation:
            raise _wrong(output, "handoff.holder", f"{handoff.holder}, not {card.incarnation}")
        if handoff.block_size != card.engine.block_size:
            raise _wrong(
                output, "handoff.block_size", f"{handoff.block_size}, not {card.engine.block_size}"
            )
        if not 1 <= handoff.num_tokens <= attempt.tokens:
            raise _wrong(output, "handoff.num_tokens", f"{handoff.num_tokens} of {attempt.tokens}")


def _wrong(output: Output, field: str, problem: str) -> ProtocolError:
    return ProtocolError(f"outputs.{field}: {problem} (attempt {output.attempt_id})")


def _unknown(field: str, attempt_id: str) -> ProtocolError:
    return ProtocolError(
        f"{field}: {attempt_id[:_SHOWN_CHARS]!r} was not sent to this worker, or has ended there"
    )
