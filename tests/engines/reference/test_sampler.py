"""Sampling: each filter, their order, the distribution, and that a stream can be continued."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.engines.batch import Sampled, Sequence
from penstock.engines.reference.sampler import Sampler, filter_logits, uniform
from penstock.shapes import Sampling

VOCAB = 50
EOS = 7


def sequence(output: list[int] | None = None, prompt: list[int] | None = None, **sampling: Any) -> Sequence:
    prompt = prompt or [1, 2, 3]
    return Sequence("a", prompt + (output or []), len(prompt), Sampling(max_tokens=100, **sampling))


def sample(logits: np.ndarray, *sequences: Sequence) -> list[Sampled]:
    rows = np.tile(np.asarray(logits, np.float32), (len(sequences), 1))
    return Sampler([EOS]).sample(rows, list(sequences))


def token(logits: np.ndarray, one: Sequence) -> int:
    return sample(logits, one)[0].token_id


def random_logits(seed: int, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, vocab).astype(np.float32)


def frequencies(logits: np.ndarray, draws: int = 4000, **sampling: Any) -> np.ndarray:
    """How often each token is drawn over as many seeds."""
    sequences = [sequence(seed=seed, **sampling) for seed in range(draws)]
    drawn = [sampled.token_id for sampled in sample(logits, *sequences)]
    return np.bincount(drawn, minlength=len(logits)) / draws


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def assert_distributed(observed: np.ndarray, expected: np.ndarray, draws: int = 4000) -> None:
    """Pearson's chi-square against its mean plus five standard deviations."""
    kept = expected > 0
    assert not observed[~kept].any()
    statistic = draws * ((observed[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert statistic < freedom + 5 * np.sqrt(2 * freedom) + 1e-9


def test_greedy_takes_the_largest() -> None:
    logits = random_logits(0)
    assert token(logits, sequence(temperature=0.0)) == logits.argmax()
    assert token(logits, sequence(temperature=1e-9)) == logits.argmax()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = random_logits(1, 12)
    assert_distributed(frequencies(logits, temperature=temperature), softmax(logits / temperature))


def test_draws_at_successive_positions_follow_the_softmax_too() -> None:
    logits = random_logits(1, 12)
    sequences = [sequence([0] * position, seed=3) for position in range(4000)]
    drawn = [sampled.token_id for sampled in sample(logits, *sequences)]
    assert_distributed(np.bincount(drawn, minlength=12) / 4000, softmax(logits))


def test_top_k_keeps_the_k_likeliest() -> None:
    logits = random_logits(2)
    least = np.sort(logits)[-5]
    expected = softmax(np.where(logits < least, -np.inf, logits))
    assert_distributed(frequencies(logits, top_k=5), expected)
    assert frequencies(logits, top_k=1, draws=50)[logits.argmax()] == 1
    assert token(logits, sequence(top_k=1000, seed=4)) == token(logits, sequence(seed=4))


def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest() -> None:
    logits = random_logits(3)
    probabilities = softmax(logits)
    kept = probabilities >= 0.1 * probabilities.max()
    assert_distributed(frequencies(logits, min_p=0.1), softmax(np.where(kept, logits, -np.inf)))


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.75, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float) -> None:
    logits = random_logits(4)
    order = np.argsort(-logits)
    reached = np.cumsum(softmax(logits)[order]) - softmax(logits)[order] < top_p
    reached[0] = True
    expected = np.full(VOCAB, -np.inf)
    expected[order[reached]] = logits[order[reached]]
    assert_distributed(frequencies(logits, top_p=top_p), softmax(expected))


def test_filters_apply_after_temperature_and_in_order() -> None:
    """At high temperature more tokens reach top_p; and top_p counts what top_k and min_p left."""
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    hot = frequencies(logits, temperature=3.0, top_p=0.75)
    assert (hot > 0).tolist() == [True, True, True, False]
    assert (frequencies(logits, top_p=0.75) > 0).tolist() == [True, True, False, False]
    assert (frequencies(logits, top_k=3, top_p=0.84) > 0).tolist() == [True, True, False, False]
    assert (frequencies(logits, top_p=0.84) > 0).tolist() == [True, True, True, False]
    assert (frequencies(logits, min_p=0.5, top_p=0.7) > 0).tolist() == [True, True, False, False]


def test_the_likeliest_token_survives_every_filter() -> None:
    logits = np.zeros((1, 5), np.float32)
    logits[0, 1:] = -1.0
    filter_logits(logits, [Sampling(max_tokens=1, top_p=0.0, top_k=1, min_p=1.0)])
    assert logits[0].tolist() == [0.0, *[-np.inf] * 4]


def test_penalties_on_greedy() -> None:
    logits = np.array([1.0, 0.9, 0.5, -1.0], np.float32)
    assert token(logits, sequence([0], [2], temperature=0.0, presence_penalty=0.2)) == 1
    assert token(logits, sequence([0, 1, 1], [2], temperature=0.0, frequency_penalty=0.2)) == 0
    assert token(logits, sequence([0, 0, 1], [2], temperature=0.0, frequency_penalty=0.2)) == 1
    assert token(logits, sequence([], [0], temperature=0.0, presence_penalty=2.0)) == 0, "not the prompt's"
    assert token(logits, sequence([], [0], temperature=0.0, repetition_penalty=2.0)) == 1, (
        "the prompt's too"
    )
    negative = np.array([-1.0, -1.5, -3.0], np.float32)
    assert token(negative, sequence([0], [2], temperature=0.0, repetition_penalty=2.0)) == 1


def test_logit_bias() -> None:
    logits = random_logits(5)
    assert token(logits, sequence(temperature=0.0, logit_bias={9: 100.0})) == 9
    banned = int(logits.argmax())
    assert frequencies(logits, 500, logit_bias={banned: -100.0})[banned] == 0
    assert token(logits, sequence(temperature=0.0, logit_bias={VOCAB: 5.0, -1: 90.0})) == banned, (
        "no such ids"
    )


def test_min_tokens_holds_back_eos_and_stop_ids() -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[[EOS, 8, 9]] = [30.0, 20.0, 10.0]
    waiting: dict[str, Any] = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (8, VOCAB + 3, -5)}
    assert token(logits, sequence([1], **waiting)) == 9
    assert token(logits, sequence([1, 1], **waiting)) == EOS
    assert token(logits, sequence([1], ignore_eos=True, **waiting)) == EOS


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = random_logits(6)
    one = sequence(temperature=0.3, logit_bias={4: 100.0}, logprobs=3)
    logprob = sample(logits, one)[0].logprob
    assert logprob is not None
    expected = np.log(softmax(logits))
    assert logprob.token_id == 4
    assert logprob.logprob == pytest.approx(expected[4], abs=1e-5)
    best = np.argsort(-logits)[:3]
    assert [token_id for token_id, _ in logprob.top] == best.tolist()
    assert [value for _, value in logprob.top] == pytest.approx(expected[best].tolist(), abs=1e-5)


def test_logprobs_only_for_who_asked_and_as_many() -> None:
    none, chosen, every = sample(
        random_logits(7), sequence(), sequence(logprobs=0), sequence(logprobs=VOCAB + 10)
    )
    assert none.logprob is None
    assert chosen.logprob is not None
    assert chosen.logprob.top == []
    assert every.logprob is not None
    assert len(every.logprob.top) == VOCAB


SAMPLINGS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.4, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 3, 40]),
        "top_p": st.sampled_from([1.0, 0.9, 0.2]),
        "min_p": st.sampled_from([0.0, 0.05]),
        "seed": st.integers(0, 2**63 - 1),
        "presence_penalty": st.sampled_from([0.0, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "logprobs": st.sampled_from([None, 2]),
    }
)


@given(
    st.lists(st.tuples(SAMPLINGS, st.lists(st.integers(0, VOCAB - 1), max_size=6)), min_size=1, max_size=9)
)
def test_a_row_is_drawn_alike_alone_and_in_a_batch(rows: list[tuple[dict[str, Any], list[int]]]) -> None:
    sequences = [sequence(output, **sampling) for sampling, output in rows]
    logits = np.stack([random_logits(number) for number in range(len(rows))])
    together = Sampler([EOS]).sample(logits.copy(), sequences)
    alone = [
        Sampler([EOS]).sample(logits[at : at + 1].copy(), [one])[0] for at, one in enumerate(sequences)
    ]
    assert together == alone


@given(SAMPLINGS, st.integers(0, 11))
def test_another_attempt_continues_a_stream(sampling: dict[str, Any], taken_over_at: int) -> None:
    def continued(one: Sequence, until: int) -> Sequence:
        while len(one.token_ids) < one.prompt_len + until:
            logits = random_logits(sum(one.token_ids))
            one.token_ids.append(token(logits, one))
        return one

    whole = continued(sequence(**sampling), 12)
    first = continued(sequence(**sampling), taken_over_at)
    second = Sequence("b", list(first.token_ids), first.prompt_len, first.sampling)
    assert continued(second, 12).token_ids == whole.token_ids


def test_uniform_numbers_are_uniform_over_seeds_and_positions() -> None:
    for numbers in (
        [uniform(seed, 0) for seed in range(10_000)],
        [uniform(5, position) for position in range(10_000)],
        [uniform(position, position) for position in range(10_000)],
    ):
        counts = np.bincount((np.array(numbers) * 100).astype(int), minlength=100)
        assert len(counts) == 100
        assert ((counts - 100) ** 2 / 100).sum() < 99 + 5 * np.sqrt(2 * 99)
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.05


def test_only_allowed_tokens_are_drawn() -> None:
    logits = random_logits(3) / 4
    allowed = (4, 9, 31)
    assert token(logits, sequence(temperature=0.0, allowed_token_ids=allowed)) == max(
        allowed, key=lambda token_id: logits[token_id]
    )
    expected = np.zeros(VOCAB)
    expected[list(allowed)] = softmax(logits[list(allowed)])
    assert_distributed(frequencies(logits, allowed_token_ids=allowed), expected)


def test_allowed_tokens_that_are_all_excluded_still_come() -> None:
    """The other rows of a batch must not suffer from a request that excludes everything."""
    wish = {"allowed_token_ids": (EOS,), "min_tokens": 5, "bad_words": ((EOS,),)}
    one, other = sample(random_logits(3), sequence(**wish), sequence(temperature=0.0))
    assert one.token_id == EOS
    assert other.token_id == random_logits(3).argmax()


@given(
    output=st.lists(st.integers(0, 3), max_size=4),
    words=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple), max_size=4),
)
def test_what_would_complete_a_bad_word_in_the_output_is_excluded(
    output: list[int], words: list[tuple[int, ...]]
) -> None:
    prompt = [0, 1, 2, 3]
    completes = {
        word[-1]
        for word in words
        if len(output) >= len(word) - 1 and (*output, word[-1])[len(output) + 1 - len(word) :] == word
    }
    logits = random_logits(5, vocab=5)  # token 4 is in no word
    expected = max(set(range(5)) - completes, key=lambda token_id: logits[token_id])
    assert token(logits, sequence(output, prompt, temperature=0.0, bad_words=tuple(words))) == expected


def test_alternatives_are_those_that_the_request_names() -> None:
    logits = np.log(np.array([[0.5, 0.2, 0.2, 0.1]], dtype=np.float32))
    (sampled,) = Sampler([]).sample(
        logits, [sequence(temperature=0.0, logprobs=2, logprob_token_ids=(3, 0))]
    )
    assert sampled.logprob is not None
    assert [token_id for token_id, _ in sampled.logprob.top] == [3, 0]
    assert np.exp([value for _, value in sampled.logprob.top]) == pytest.approx([0.1, 0.5])
