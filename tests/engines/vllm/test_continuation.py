"""What vLLM is asked for when an output was begun elsewhere."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.engines.vllm.continuation import continuation, folded
from penstock.shapes import Attempt, Sampling, StructuredOutput
from tests import builders

GREEDY = Sampling(max_tokens=10, temperature=0.0)
SAMPLED = Sampling(max_tokens=10, seed=7)
HISTORY = [
    msgspec.structs.replace(SAMPLED, reproducible=True),
    msgspec.structs.replace(GREEDY, presence_penalty=0.5),
    msgspec.structs.replace(GREEDY, bad_words=((1, 2),)),
    msgspec.structs.replace(GREEDY, frequency_penalty=-0.5),
    msgspec.structs.replace(GREEDY, structured=StructuredOutput("regex", "a+")),
]


def attempt(
    prompt: int, done: int, sampling: Sampling = GREEDY, handed: int | None = None, *, prefill: bool = False
) -> Attempt:
    """`prompt` tokens of the client's, `done` of output; KV of `handed` tokens can be pulled."""
    handoff = None
    if handed is not None:
        handoff = builders.handoff(num_tokens=handed, transport="vllm-nixl")
    token_ids = list(range(prompt + done))
    return Attempt("a", "r", token_ids, prompt, sampling, prefill_only=prefill, handoff=handoff)


def test_a_new_request_is_its_prompt() -> None:
    plan = continuation(attempt(5, 0), pulls=False)
    assert (plan.prompt, plan.replay, plan.sampling) == ([0, 1, 2, 3, 4], [], GREEDY)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, *HISTORY])
def test_the_token_that_a_prefill_worker_gave_is_replayed(sampling: Sampling) -> None:
    plan = continuation(attempt(5, 1, sampling, handed=5), pulls=True)
    assert (plan.prompt, plan.replay, plan.sampling) == ([0, 1, 2, 3, 4], [5], sampling)


@pytest.mark.parametrize("sampling", HISTORY)
def test_what_depends_on_its_history_is_replayed_whole(sampling: Sampling) -> None:
    plan = continuation(attempt(5, 4, sampling), pulls=False)
    assert (plan.prompt, plan.replay, plan.sampling) == ([0, 1, 2, 3, 4], [5, 6, 7, 8], sampling)
    pulled = continuation(attempt(5, 4, sampling, handed=8), pulls=True)
    assert (pulled.prompt, pulled.replay) == (plan.prompt, plan.replay)


def test_everything_else_becomes_prompt() -> None:
    plan = continuation(attempt(5, 4), pulls=False)
    assert (plan.prompt, plan.replay) == (list(range(9)), [])
    assert plan.sampling.max_tokens == 6


def test_a_handoff_that_may_not_be_used_does_not_shorten_the_prompt() -> None:
    plan = continuation(attempt(5, 4, handed=8), pulls=False)
    assert (plan.prompt, plan.replay) == (list(range(9)), [])


def test_min_tokens_are_counted_from_where_it_goes_on() -> None:
    sampling = msgspec.structs.replace(GREEDY, min_tokens=6)
    assert continuation(attempt(5, 4, sampling), pulls=False).sampling.min_tokens == 2
    assert continuation(attempt(5, 8, sampling), pulls=False).sampling.min_tokens == 0


def test_a_sample_goes_on_with_other_draws_than_it_began_with() -> None:
    prefill = continuation(attempt(5, 3, SAMPLED, prefill=True), pulls=False)
    decode = continuation(attempt(5, 4, SAMPLED, handed=8), pulls=True)
    seeds = {continuation(attempt(5, done, SAMPLED), pulls=False).sampling.seed for done in range(4)}
    assert len(seeds) == 4
    assert decode.sampling.seed == prefill.sampling.seed  # so that it draws the replayed token itself
    assert decode.replay == [8]


@pytest.mark.parametrize("sampling", [GREEDY, *HISTORY])
def test_a_prefill_gives_one_token_more_than_is_known(sampling: Sampling) -> None:
    plan = continuation(attempt(5, 3, sampling, prefill=True), pulls=False)
    assert plan.sampling.max_tokens == len(plan.replay) + 1


@given(
    prompt=st.integers(1, 40),
    done=st.integers(0, 9),
    sampling=st.sampled_from([GREEDY, SAMPLED, *HISTORY]),
    handed=st.one_of(st.none(), st.integers(-5, 60)),
    pulls=st.booleans(),
)
def test_nothing_is_lost_or_doubled(
    prompt: int, done: int, sampling: Sampling, handed: int | None, pulls: bool
) -> None:
    whole = attempt(prompt, done, sampling, handed)
    for plan in (continuation(whole, pulls=pulls), folded(whole)):
        assert plan.prompt + plan.replay == whole.token_ids
        assert len(plan.prompt) >= prompt
        assert len(plan.prompt) + plan.sampling.max_tokens == prompt + sampling.max_tokens
        assert 0 <= plan.sampling.min_tokens <= plan.sampling.max_tokens
