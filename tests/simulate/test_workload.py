"""What clients send: traces, made-up loads, and when sessions begin."""

from __future__ import annotations

from itertools import islice
from random import Random
from statistics import mean, median

import pytest

from penstock.bench.traces import TraceRow
from penstock.errors import ConfigError
from penstock.simulate.arrivals import PATTERNS, RateRange, begin
from penstock.simulate.generators import (
    AGENT_CONTEXT_TOKENS,
    AGENT_OUTPUT_TOKENS,
    GENERATORS,
    agents,
    drawn,
    prompts,
    shared_prefix,
)
from penstock.simulate.workload import from_trace, tokens_of


def test_rows_with_equal_hash_ids_share_their_first_tokens() -> None:
    rows = [TraceRow(0.0, 1100, 10, [5, 6, 7]), TraceRow(2.0, 1024, 0, [5, 6]), TraceRow(3.0, 600, 5)]
    sessions = list(from_trace(rows))
    first, second, third = (tokens_of(session.turns[0].new) for session in sessions)
    assert (len(first), len(second), len(third)) == (1100, 1024, 600)
    assert first[:1024] == second
    assert not set(third) & set(first)
    assert [(session.at_s, session.turns[0].output_tokens) for session in sessions] == [
        (0, 10),
        (2, 1),
        (3, 5),
    ]


def test_drawn_lengths_have_their_quantiles() -> None:
    rng = Random(0)
    values = sorted(drawn(AGENT_OUTPUT_TOKENS, rng) for _ in range(20_000))
    for share, quantile in AGENT_OUTPUT_TOKENS[1:-1]:
        assert values[int(share * len(values))] == pytest.approx(quantile, rel=0.1)


def test_agents_sessions_stay_within_their_context_and_mostly_repeat_themselves() -> None:
    new, whole = 0, 0
    for session in islice(agents(0), 100):
        context = 0
        for turn in session.turns:
            context = context if turn.kept_tokens is None else min(context, turn.kept_tokens)
            added = sum(tokens for _, tokens in turn.new)
            context += added
            new, whole = new + added, whole + context
            assert context + turn.output_tokens <= AGENT_CONTEXT_TOKENS
            context += turn.output_tokens
    assert new / whole < 0.1, "96 % of the recorded sessions' tokens were in them before"


def test_groups_share_their_system_prompt() -> None:
    sessions = list(islice(shared_prefix(0), 600))
    groups = {session.turns[0].new[0] for session in sessions}
    assert len(groups) == pytest.approx(150, abs=10)
    assert {tokens for _, tokens in groups} == {6_000}


@pytest.mark.parametrize("name", GENERATORS)
def test_equal_seeds_give_equal_loads(name: str) -> None:
    first, second = (list(islice(GENERATORS[name](4), 20)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("10", (10, 10)),
        ("10/s", (10, 10)),
        ("600/m", (10, 10)),
        ("5..20/s", (5, 20)),
        ("36..72/h", (0.01, 0.02)),
    ],
)
def test_rates(text: str, rate: tuple[float, float]) -> None:
    parsed = RateRange.parse(text)
    assert (parsed.first_per_s, parsed.last_per_s) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["", "fast", "10/d", "0", "..5", "5..", "1.2.3", "5..0"])
def test_a_wrong_rate_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="rate: "):
        RateRange.parse(text)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_rate_holds_over_all(pattern: str) -> None:
    sessions = prompts(0, prompt_tokens=1, output_tokens=1)
    times = [it.at_s for it in begin(sessions, RateRange(5.0, 5.0), pattern, 1200.0, seed=0)]
    assert len(times) == pytest.approx(6000, rel=0.08)
    assert times == sorted(times)
    assert times[-1] < 1200.0


def test_a_ramp_sends_more_towards_its_end() -> None:
    sessions = prompts(0, prompt_tokens=1, output_tokens=1)
    times = [it.at_s for it in begin(sessions, RateRange(1.0, 9.0), "constant", 600.0, seed=0)]
    assert median(times) > 1.2 * 300
    assert mean(times) > 300


def test_bursts_are_four_times_as_dense() -> None:
    sessions = prompts(0, prompt_tokens=1, output_tokens=1)
    times = [it.at_s for it in begin(sessions, RateRange(10.0, 10.0), "bursts", 600.0, seed=0)]
    inside = sum(at_s % 60 < 10 for at_s in times) / 10
    outside = sum(at_s % 60 >= 10 for at_s in times) / 50
    assert inside / outside == pytest.approx(4, rel=0.15)
