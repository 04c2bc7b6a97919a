"""What the scheduler and a runner say to each other: one batch down, one sample per row up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from penstock.shapes import PromptLogprob, Sampling, TokenLogprob


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequence:
    """The tokens of one attempt and where their KV lives.

    `block_ids[i]` is the pool row that holds the KV of token_ids[i*block_size:(i+1)*block_size];
    `computed` tokens have KV. `prompt_len` as in `Attempt`: the tokens after it are output.
    """

    attempt_id: str
    token_ids: list[int]
    prompt_len: int
    sampling: Sampling
    block_ids: list[int] = field(default_factory=list)
    computed: int = 0
    # While the prompt is computed and its log-probabilities are wanted: those of token_ids[1:computed + 1].
    prompt_logprobs: list[PromptLogprob] | None = None


class BatchRow(msgspec.Struct):
    """One sequence's share of a batch: compute KV for token_ids[start:start+count], at the positions of
    the same numbers. When `sample` is set, draw the next token from the last one's logits (then
    start + count == len(token_ids))."""

    sequence: Sequence
    start: int
    count: int
    sample: bool


def scored_tokens(row: BatchRow) -> range:
    """The positions of the prompt's tokens whose log-probabilities this row is to give."""
    if row.sequence.prompt_logprobs is None:
        return range(0)
    return range(row.start + 1, min(row.start + row.count + 1, row.sequence.prompt_len))


class Sampled(msgspec.Struct):
    """The token drawn for a row with `sample` set."""

    token_id: int
    logprob: TokenLogprob | None = None


class Runner(Protocol):
    """Computes batches. Owns the weights and reads and writes the KV pool."""

    def run(self, batch: list[BatchRow]) -> list[Sampled | None]:
        """Compute all rows; one entry per row, None where `sample` is not set. Appends to the
        `prompt_logprobs` of sequences that have them."""
