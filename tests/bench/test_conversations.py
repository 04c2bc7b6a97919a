"""The load is what was asked for, and the same for the same seed."""

from itertools import islice, pairwise
from statistics import mean

import pytest

from penstock.bench.conversations import Rate, Shape, arrivals, synthetic
from penstock.bench.text import WORDS, filler
from penstock.errors import ConfigError


def test_filler_is_fixed_by_its_seed() -> None:
    assert filler("a", 20) == filler.__wrapped__("a", 20)
    assert filler("a", 20) != filler("b", 20)
    assert len(filler("a", 20).split(" ")) == 20
    assert len(set(WORDS)) > 150


def test_synthetic_conversations() -> None:
    shape = Shape(turns=3, prompt_tokens=40, output_tokens=7, shared_prefix_tokens=10, words_per_token=0.5)
    first = list(islice(synthetic(shape, seed=1), 5))
    assert first == list(islice(synthetic(shape, seed=1), 5))
    assert first != list(islice(synthetic(shape, seed=2), 5))
    assert {len(conversation.turns) for conversation in first} == {3}
    texts = [turn.text for conversation in first for turn in conversation.turns]
    assert len(set(texts)) == 15, "no two alike"
    assert {len(text.split()) for text in texts} == {20}
    assert {len(conversation.system.split()) for conversation in first} == {5}
    assert len({conversation.system for conversation in first}) == 1


def test_built_in_questions() -> None:
    conversation = next(synthetic(Shape(turns=2), seed=0))
    assert conversation.system == ""
    assert conversation.turns[0].text.endswith("?")


@pytest.mark.parametrize(
    ("text", "per_s"), [("10", 10.0), ("10/s", 10.0), ("0.5/s", 0.5), ("600/m", 10.0), ("36/h", 0.01)]
)
def test_a_rate_is_read_as_requests_per_second(text: str, per_s: float) -> None:
    assert Rate.parse(text).per_s == pytest.approx(per_s)


@pytest.mark.parametrize("text", ["", "fast", "10/d", "-1/s", "0", "inf", "nan", "1/s/s"])
def test_bad_rates_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="rate"):
        Rate.parse(text)


def test_arrivals() -> None:
    constant = list(islice(arrivals(synthetic(Shape(), 0), Rate(4.0, poisson=False), 0), 5))
    assert [arrival.at_s for arrival in constant] == [0.0, 0.25, 0.5, 0.75, 1.0]
    poisson = [arrival.at_s for arrival in islice(arrivals(synthetic(Shape(), 0), Rate(4.0), 0), 2000)]
    assert poisson == sorted(poisson)
    gaps = [after - before for before, after in pairwise(poisson)]
    assert mean(gaps) == pytest.approx(0.25, rel=0.1)
    assert max(gaps) > 1.0
