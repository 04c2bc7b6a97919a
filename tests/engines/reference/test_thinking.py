"""`thinking_budget`: reasoning that has become long enough is ended."""

import numpy as np
import pytest

from penstock.engines.batch import Sequence
from penstock.engines.reference.sampler import Sampler
from penstock.engines.reference.thinking import ThinkingMarks
from penstock.shapes import Sampling

BEGIN, END, EOS, WORD, VOCAB = 1, 2, 3, 7, 16
MARKS = ThinkingMarks(BEGIN, END)


def written(prompt, budget, *, count=6, first=()):
    """What a model writes that likes WORD best, after `first`, which an earlier attempt gave."""
    sampling = Sampling(max_tokens=count, temperature=0.0, logit_bias={WORD: 5.0}, thinking_budget=budget)
    sequence = Sequence("a", [*prompt, *first], len(prompt), sampling)
    sampler = Sampler([EOS], thinking=MARKS)
    while len(sequence.token_ids) < len(prompt) + count:
        (drawn,) = sampler.sample(np.zeros((1, VOCAB), np.float32), [sequence])
        sequence.token_ids.append(drawn.token_id)
    return sequence.token_ids[len(prompt) :]


@pytest.mark.parametrize("first", [(), (WORD,), (WORD, WORD, END, WORD)])
def test_reasoning_that_the_prompt_begins_ends_at_its_budget_also_when_continued(first):
    assert written([5, BEGIN], 2, first=first) == [WORD, WORD, END, WORD, WORD, WORD]


def test_reasoning_that_the_model_begins_is_counted_from_there():
    assert written([5], 1, first=[WORD, BEGIN]) == [WORD, BEGIN, WORD, END, WORD, WORD]


def test_tokens_of_reasoning_in_the_prompt_count():
    assert written([BEGIN, 5, 5, 5], 2)[:2] == [END, WORD]


def test_budget_of_nothing_ends_reasoning_at_once():
    assert written([BEGIN], 0)[:2] == [END, WORD]


@pytest.mark.parametrize("prompt", [[5], [BEGIN, 5, END]])
def test_answer_without_reasoning_is_not_limited(prompt):
    assert written(prompt, 0) == [WORD] * 6


def test_other_rows_of_the_batch_are_drawn_as_alone():
    free = Sequence("a", [BEGIN], 1, Sampling(max_tokens=1, temperature=0.0, logit_bias={WORD: 5.0}))
    held = Sequence("b", [BEGIN], 1, Sampling(max_tokens=1, temperature=0.0, thinking_budget=0))
    drawn = Sampler([EOS], thinking=MARKS).sample(np.zeros((2, VOCAB), np.float32), [free, held])
    assert [one.token_id for one in drawn] == [WORD, END]
