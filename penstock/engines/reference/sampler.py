"""Drawing the next token from logits, for all sampling rows of a batch at once.

The order is vLLM's: what the answer's grammar excludes is excluded (grammar.py); logprobs are taken from
the logits that are left; then `allowed_token_ids`, `bad_words`, `min_tokens` and `logit_bias`; then
penalties; then the end of reasoning that has become too long (thinking.py); then greedy rows take the
largest, and the others divide by temperature, filter by min_p, top_k and top_p, and draw.

The draw at output position i is the inverse of the cumulative distribution over token ids at a uniform
number that depends on (seed, i) alone. Going by ids, not by rank, keeps a draw where it is when two
nearly equal tokens swap ranks.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from penstock.engines.batch import Sampled, Sequence
from penstock.engines.reference.grammar import AnswerGrammar, Grammars
from penstock.engines.reference.thinking import ThinkingBudget, ThinkingMarks
from penstock.engines.reference.tiles import Floats
from penstock.shapes import PromptLogprob, Sampling, TokenLogprob

_MASK_64 = (1 << 64) - 1
_MIN_TEMPERATURE = 1e-5  # below it the division could overflow; such a row is as good as greedy


class Sampler:
    """Draws tokens.

    Args:
        eos_token_ids: what `min_tokens` holds back unless a request ignores EOS.
        grammars: compile what answers must look like; needed where any must.
        thinking: needed where reasoning is limited.
    """

    def __init__(
        self,
        eos_token_ids: Items[int],
        grammars: Grammars | None = None,
        thinking: ThinkingMarks | None = None,
    ) -> None:
        self._eos_token_ids = tuple(eos_token_ids)
        self._grammars = grammars
        self._thinking = thinking
        self._budgets: WeakKeyDictionary[Sequence, ThinkingBudget] = WeakKeyDictionary()
        self._begun: WeakKeyDictionary[Sequence, AnswerGrammar] = WeakKeyDictionary()

    def sample(self, logits: Floats, sequences: list[Sequence]) -> list[Sampled]:
        """One token for each row.

        Args:
            logits: shape (rows, vocab); overwritten.
            sequences: one per row; the drawn token will be number len(token_ids).
        """
        complete = [self._restrict(row, sequence) for row, sequence in zip(logits, sequences, strict=True)]
        logprobs = [
            _log_softmax(row) if sequence.sampling.logprobs is not None else None
            for row, sequence in zip(logits, sequences, strict=True)
        ]
        for row, sequence, ends in zip(logits, sequences, complete, strict=True):
            self._adjust(row, sequence, ends=ends)
        token_ids = logits.argmax(axis=-1)
        drawn = [
            row
            for row, sequence in enumerate(sequences)
            if sequence.sampling.temperature >= _MIN_TEMPERATURE
        ]
        if drawn:
            token_ids[drawn] = draw(logits[drawn], [sequences[row] for row in drawn])
        drawn_ids = token_ids.tolist()
        shown = [
            None
            if values is None
            else TokenLogprob(token_id, float(values[token_id]), _alternatives(values, sequence.sampling))
            for token_id, values, sequence in zip(drawn_ids, logprobs, sequences, strict=True)
        ]
        return [Sampled(*drawn) for drawn in zip(drawn_ids, shown, strict=True)]

    def _restrict(self, logits: Floats, sequence: Sequence) -> bool:
        """Exclude, in place, what the answer's grammar does not allow next. Returns whether it allows the
        end only."""
        wanted = sequence.sampling.structured
        if wanted is None:
            return False
        assert self._grammars is not None, "a runner refuses what it cannot compile"
        grammar = self._begun.get(sequence)
        if grammar is None:
            grammar = self._begun[sequence] = self._grammars.begin(wanted)
        return grammar.restrict(logits, sequence)

    def _adjust(self, logits: Floats, sequence: Sequence, *, ends: bool) -> None:
        """Apply what changes even a greedy choice, in place. Ids outside the vocabulary have no effect.
        With `ends` nothing but the end may come, also before there are `min_tokens`."""
        sampling = sequence.sampling
        if not ends and (sampling.allowed_token_ids or sampling.bad_words):
            _exclude(logits, sequence)
            if logits.max() == -np.inf:  # the grammar allows nothing else: the answer can only end
                logits[list(self._eos_token_ids)] = 0.0
                ends = True
        if not ends and len(sequence.token_ids) - sequence.prompt_len < sampling.min_tokens:
            eos = () if sampling.ignore_eos else self._eos_token_ids
            stops = [*eos, *sampling.stop_token_ids]
            logits[[token_id for token_id in stops if 0 <= token_id < len(logits)]] = -np.inf
        for token_id, bias in sampling.logit_bias.items():
            if 0 <= token_id < len(logits):
                logits[token_id] += np.float32(bias)
        if sampling.repetition_penalty != 1.0:
            _penalise_repetition(logits, sequence.token_ids, sampling.repetition_penalty)
        if sampling.frequency_penalty or sampling.presence_penalty:
            output = sequence.token_ids[sequence.prompt_len :]
            counts = np.bincount(output, minlength=len(logits)).astype(np.float32)
            logits -= np.float32(sampling.frequency_penalty) * counts
            logits -= np.float32(sampling.presence_penalty) * (counts > 0)
        if sampling.allowed_token_ids and logits.max() == -np.inf:
            logits[list(sampling.allowed_token_ids)] = 0.0  # all were excluded: these still may come
        if sampling.thinking_budget is not None:
            self._end_thinking(logits, sequence, sampling.thinking_budget)

    def _end_thinking(self, logits: Floats, sequence: Sequence, budget: int) -> None:
        """Leave nothing but the end of the reasoning, in place, where that has had its tokens."""
        assert self._thinking is not None, "a runner refuses it without marks"
        watched = self._budgets.get(sequence)
        if watched is None:
            watched = self._budgets[sequence] = ThinkingBudget(self._thinking)
        if watched.is_spent(sequence.token_ids, budget):
            logits[:] = -np.inf
            logits[self._thinking.end_id] = 0.0


def score_prompt(sequence: Sequence, positions: range, logits: Floats) -> None:
    """Append the log-probabilities of the prompt's tokens at these positions, of which these are the
    logits."""
    assert sequence.prompt_logprobs is not None, "nobody asked for them"
    count = sequence.sampling.prompt_logprobs or 0
    for position, row in zip(positions, logits, strict=True):
        token_id = sequence.token_ids[position]
        values = _log_softmax(row)
        rank = int(np.count_nonzero(values >= values[token_id]))
        sequence.prompt_logprobs.append(
            PromptLogprob(token_id, float(values[token_id]), _likeliest(values, count), rank)
        )


def draw(logits: Floats, sequences: list[Sequence]) -> NDArray[np.int64]:
    """Draw one token per row after temperature and filters.

    Args:
        logits: shape (rows, vocab); overwritten.
    """
    samplings = [sequence.sampling for sequence in sequences]
    logits /= _column([sampling.temperature for sampling in samplings])
    logits -= logits.max(axis=-1, keepdims=True)
    filter_logits(logits, samplings)
    weights = np.exp(logits).cumsum(axis=-1, dtype=np.float64)
    draws = np.array(
        [
            uniform(sequence.sampling.seed, len(sequence.token_ids) - sequence.prompt_len)
            for sequence in sequences
        ]
    )
    # The first token whose cumulative weight exceeds the draw: one of weight zero never does.
    token_ids: NDArray[np.int64] = (weights <= (draws * weights[:, -1])[:, None]).sum(axis=-1)
    return token_ids


def filter_logits(logits: Floats, samplings: list[Sampling]) -> None:
    """Set to -inf, in place, what min_p, top_k and top_p exclude; the most likely token always stays.

    Args:
        logits: shape (rows, vocab), each row's largest being 0.
    """
    rows = [row for row, sampling in enumerate(samplings) if sampling.min_p > 0]
    if rows:
        _drop_below(logits, rows, np.log(_column([samplings[row].min_p for row in rows])))
    for row, sampling in enumerate(samplings):
        if 0 < sampling.top_k < logits.shape[-1]:
            rank = logits.shape[-1] - sampling.top_k
            _drop_below(logits, [row], np.partition(logits[row], rank)[rank])
    rows = [row for row, sampling in enumerate(samplings) if sampling.top_p < 1]
    if rows:
        top_p = _column([samplings[row].top_p for row in rows])
        _drop_below(logits, rows, _least_within_mass(logits[rows], top_p))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) alone.

    SplitMix64's output function (Steele, Lea, Flood: Fast splittable pseudorandom number generators,
    OOPSLA 2014), applied to the seed and then to the position, so that neither neighbouring seeds nor
    neighbouring positions are correlated.
    """
    return (_mix(_mix(seed) + position) >> 11) * 2.0**-53


def _mix(state: int) -> int:
    mixed = (state + 0x9E3779B97F4A7C15) & _MASK_64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return mixed ^ (mixed >> 31)


def _drop_below(logits: Floats, rows: list[int], least: Floats | np.float32) -> None:
    """Exclude what is less likely than `least`, shape (rows, 1); tokens that tie with it stay."""
    chosen = logits[rows]
    logits[rows] = np.where(chosen < least, np.float32(-np.inf), chosen)


def _least_within_mass(logits: Floats, top_p: Floats) -> Floats:
    """The smallest logit of the smallest set of likeliest tokens that reaches `top_p`, shape (rows, 1)."""
    ranked = np.sort(logits, axis=-1)
    weights = np.exp(ranked).cumsum(axis=-1, dtype=np.float64)
    excluded = weights <= (1.0 - top_p.astype(np.float64)) * weights[:, -1:]
    first = np.minimum(excluded.sum(axis=-1, keepdims=True), logits.shape[-1] - 1)
    return np.take_along_axis(ranked, first, axis=-1)


def _exclude(logits: Floats, sequence: Sequence) -> None:
    """Set to -inf, in place, what `allowed_token_ids` does not name and what would complete a bad word."""
    sampling, output_start = sequence.sampling, sequence.prompt_len
    if sampling.allowed_token_ids:
        allowed = list(sampling.allowed_token_ids)
        kept = logits[allowed]
        logits[:] = -np.inf
        logits[allowed] = kept
    length = len(sequence.token_ids)
    for word in sampling.bad_words:
        before = length - len(word) + 1  # where the word would begin
        if before >= output_start and tuple(sequence.token_ids[before:]) == word[:-1]:
            logits[word[-1]] = -np.inf


def _penalise_repetition(logits: Floats, token_ids: list[int], penalty: float) -> None:
    """CTRL's rule (arXiv 1909.05858): scores of tokens seen so far move towards less likely."""
    seen = np.unique(token_ids)
    scores = logits[seen]
    logits[seen] = np.where(scores > 0, scores / np.float32(penalty), scores * np.float32(penalty))


def _alternatives(values: Floats, sampling: Sampling) -> list[tuple[int, float]]:
    """Those that the request names, else the most likely ones."""
    named = list(sampling.logprob_token_ids)
    if named:
        return list(zip(named, values[named].tolist(), strict=True))
    return _likeliest(values, sampling.logprobs or 0)


def _likeliest(values: Floats, most: int) -> list[tuple[int, float]]:
    """As many of the most likely tokens, with their log-probabilities."""
    count = min(most, len(values))
    if not count:
        return []
    least = len(values) - count
    best = np.argpartition(values, least)[least:]
    best = best[np.argsort(-values[best], kind="stable")]
    return list(zip(best.tolist(), values[best].tolist(), strict=True))


def _log_softmax(logits: Floats) -> Floats:
    logprobs: Floats = logits - logits.max()
    logprobs -= np.float32(np.log(np.exp(logprobs).sum(dtype=np.float64)))
    return logprobs


def _column(values: list[float]) -> Floats:
    return np.array(values, np.float32)[:, None]
