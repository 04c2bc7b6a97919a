"""An attempt inside an engine: its tokens, its blocks, when it ends, and whether it may begin at all."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from enum import Enum
from itertools import chain

import numpy as np

from penstock.core.hashing import last_hash, root_hash
from penstock.core.pairing import KvFormat, kv_format
from penstock.core.prompt_work import NO_WORK, PromptWork
from penstock.engines.batch import Sequence
from penstock.engines.block_pool import CachedPrefix
from penstock.shapes import Attempt, AttemptReport, EngineCard, FinishReason, Handoff


class AttemptPhase(Enum):
    """Where an attempt is; scheduler.py has the transitions."""

    WAITING = "waiting"  # holds no blocks
    PULLING = "pulling"  # a transfer is writing into its blocks
    RUNNING = "running"  # takes part in batches
    ENDED = "ended"


@dataclass(slots=True, eq=False, kw_only=True)
class ActiveAttempt(Sequence):
    """A sequence, and what the scheduler knows of it."""

    rank: tuple[int, int]  # (priority, order of arrival): lower goes first
    prefill_only: bool
    cache_salt: str
    stops: frozenset[int]  # token ids that end it
    stop_from: int  # a stop token ends it only from this length on, in tokens
    max_len: int  # prompt and output together, in tokens

    phase: AttemptPhase = AttemptPhase.WAITING
    capacity: int = 0  # tokens that block_ids have room for
    cached_blocks: int = 0  # the first so many of block_ids are in the prefix cache
    packed: bytes = b""  # the tokens that it waited with last, by token_bytes; empty once they are cached
    cache_at: int = 0  # the value of `computed` from which there is another block to cache

    handoff: Handoff | None = None  # until it is pulled or refused
    handoff_deadline: float = 0.0
    prefix: CachedPrefix | None = None  # while waiting: what it would begin with
    work: PromptWork = NO_WORK  # while waiting: what is left to compute of it, going by `prefix`
    reused_tokens: int | None = None  # tokens whose KV was found or pulled when it began
    transferred_blocks: int | None = None  # None: it came without a handoff

    # For its report, as there.
    submitted_len: int
    submitted_at: float
    began_at: float | None = None
    pulled_at: float | None = None
    first_token_at: float | None = None

    def end_reason(self, token_id: int) -> FinishReason | None:
        """Why it ends with this token, its latest; None when it goes on."""
        length = len(self.token_ids)
        if token_id in self.stops and length >= self.stop_from:
            return FinishReason.STOP
        if length >= self.max_len:
            return FinishReason.LENGTH
        return FinishReason.PREFILLED if self.prefill_only else None

    def report(self, now: float) -> AttemptReport:
        """It ends now."""
        return AttemptReport(
            attempt_id=self.attempt_id,
            submitted_at=self.submitted_at,
            began_at=self.began_at,
            pulled_at=self.pulled_at,
            first_token_at=self.first_token_at,
            ended_at=now,
            output_tokens=len(self.token_ids) - self.submitted_len,
        )


def activate(attempt: Attempt, card: EngineCard, order: int, now: float) -> ActiveAttempt:
    """The attempt, which came now, as the scheduler keeps it, with a copy of its tokens. `fault` must have
    found nothing."""
    sampling = attempt.sampling
    stops = frozenset(sampling.stop_token_ids)
    if not sampling.ignore_eos:
        stops = stops.union(card.model.eos_token_ids)
    return ActiveAttempt(
        attempt_id=attempt.attempt_id,
        token_ids=list(attempt.token_ids),
        prompt_len=attempt.prompt_len,
        prompt_logprobs=[] if scores_prompt(attempt) else None,
        sampling=sampling,
        rank=(attempt.priority, order),
        prefill_only=attempt.prefill_only,
        cache_salt=attempt.cache_salt,
        stops=stops,
        stop_from=attempt.prompt_len + sampling.min_tokens,
        max_len=min(attempt.prompt_len + sampling.max_tokens, _longest(card)),
        submitted_len=len(attempt.token_ids),
        submitted_at=now,
    )


def scores_prompt(attempt: Attempt) -> bool:
    """Whether the log-probabilities of its prompt are wanted, so that all of it is computed, whatever is
    cached. With output there is no need: they came with its first token."""
    return attempt.sampling.prompt_logprobs is not None and len(attempt.token_ids) == attempt.prompt_len


def fault(attempt: Attempt, card: EngineCard) -> str | None:
    """Why this attempt cannot be served, in words; None when it can."""
    length = len(attempt.token_ids)
    if not length or attempt.prompt_len < 1:
        return "the prompt is empty"
    if attempt.prompt_len > length:
        return f"prompt_len is {attempt.prompt_len}, but there are only {length} tokens"
    if attempt.prompt_len >= _longest(card):
        return f"the prompt has {attempt.prompt_len} tokens; at most {_longest(card) - 1} fit"
    outside = _outside(attempt.token_ids, card.model.vocab_size)
    if outside is not None:
        return f"token id {outside} is not in the vocabulary of {card.model.vocab_size}"
    sampling = attempt.sampling
    for field, named in (
        ("stop_token_ids", sampling.stop_token_ids),
        ("logit_bias", tuple(sampling.logit_bias)),
        ("allowed_token_ids", sampling.allowed_token_ids),
        ("logprob_token_ids", sampling.logprob_token_ids),
        ("bad_words", tuple(chain.from_iterable(sampling.bad_words))),
    ):
        if named and not 0 <= min(named) <= max(named) < card.model.vocab_size:
            return f"{field}: not in the vocabulary of {card.model.vocab_size}"
    if sampling.max_tokens < 1:
        return f"max_tokens is {sampling.max_tokens}; at least 1 is needed"
    if attempt.prefill_only and not card.transport:
        return "this engine has no KV transfer to hand a prompt over with"
    return None


def mismatch(handoff: Handoff, attempt: Attempt, card: EngineCard) -> str | None:
    """Why this handoff's KV must not be used for this attempt here, in words; None when it may be."""
    if handoff.ttl_s <= 0:
        return "expired"
    if not card.transport:
        return "this engine has no KV transfer"
    theirs, ours = kv_format(handoff), kv_format(card)
    for name, its, own in zip(KvFormat._fields, theirs, ours, strict=True):
        if its != own:
            return f"{name} is {its!r}, here {own!r}"
    if not 0 < handoff.num_tokens <= len(attempt.token_ids):
        return f"num_tokens is {handoff.num_tokens}, of {len(attempt.token_ids)}"
    root = root_hash(card.model.name, attempt.cache_salt)
    expected = last_hash(attempt.token_ids[: handoff.num_tokens], card.block_size, root)
    if handoff.last_hash != expected:
        return f"last_hash is {handoff.last_hash:016x}, here {expected:016x}"
    return None


def _outside(token_ids: list[int], vocab_size: int) -> int | None:
    """The first of these that the vocabulary does not have."""
    try:
        # Several times as fast as min() and max(), for prompts of a hundred thousand tokens.
        if np.frombuffer(array("I", token_ids), np.uint32).max() < vocab_size:
            return None
    except OverflowError:  # one of them is no uint32
        pass
    return next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)


def _longest(card: EngineCard) -> int:
    """The most tokens, prompt and output, that the model takes and the pool holds."""
    return min(card.model.max_model_len, card.total_blocks * card.block_size)
