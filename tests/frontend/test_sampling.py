"""From a request's fields to what an engine is told."""

import json
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import Rejection, RequestRejected
from penstock.frontend.chat import Chat
from penstock.frontend.completions import Completions
from penstock.frontend.sampling import bad_sequences, bad_word_texts, choice_seed, sampling_of, with_room
from penstock.shapes import Answering, Attempt, ModelCard, ModelView, SamplingDefaults
from penstock.wire.frames import decode_to_frontend, decode_to_worker, encode
from penstock.wire.messages import Generate, Welcome
from tests.cards import card, changed

DEFAULTS_OF_MODEL = SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20)
MODEL = ModelView(ModelCard("m", 100, 50, [0], answering=Answering(DEFAULTS_OF_MODEL)), "f", {})


def chat(**fields):
    messages = [{"role": "user", "content": "Hi"}]
    return Chat.decode(json.dumps({"model": "m", "messages": messages, **fields}).encode()).wanted


def first_seed(wanted, rng):
    return sampling_of(wanted, MODEL.card, rng).seed


def fitted(wanted, prompt_tokens=10, model=MODEL, most=1000):
    return with_room(
        sampling_of(wanted, model.card, random.Random(7)), wanted, model.card, prompt_tokens, most
    )


def test_the_model_fills_in_what_the_client_left_out():
    sampling = fitted(chat(top_p=0.5))
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.6, 0.5, 20)
    assert (sampling.min_p, sampling.repetition_penalty, sampling.logprobs) == (0.0, 1.0, None)


def test_what_the_client_says_counts_even_when_it_is_zero():
    sampling = fitted(chat(temperature=0, top_k=-1, logprobs=True))
    assert (sampling.temperature, sampling.top_k, sampling.logprobs) == (0, 0, 0)


def test_everything_is_passed_on():
    fields = {
        "min_tokens": 2,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.3,
        "repetition_penalty": 1.4,
        "logit_bias": {"3": 5},
        "stop_token_ids": [4, 5],
        "ignore_eos": True,
        "max_tokens": 9,
    }
    sampling = fitted(chat(**fields))
    assert sampling.logit_bias == {3: 5.0}
    assert sampling.stop_token_ids == (4, 5)
    for name in fields.keys() - {"logit_bias", "stop_token_ids"}:
        assert getattr(sampling, name) == fields[name]


def test_max_tokens_is_what_is_left_of_the_context():
    assert fitted(chat(), 30).max_tokens == 70
    assert fitted(chat(), 30, most=20).max_tokens == 20
    assert fitted(chat(max_tokens=70), 30).max_tokens == 70
    text = Completions.decode(b'{"model": "m", "prompt": "Hi"}')
    assert fitted(text.wanted).max_tokens == 16


@pytest.mark.parametrize("fields", [{}, {"max_tokens": 1}, {"max_tokens": 100}])
def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers(fields):
    with pytest.raises(RequestRejected, match=r"100 tokens.*101 tokens") as raised:
        fitted(chat(**fields), 101)
    assert (raised.value.kind, raised.value.code) == (Rejection.INVALID, "context_length_exceeded")
    assert fitted(chat(**fields), 99).max_tokens == 1


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_more_than_the_context_holds_is_refused_and_anything_less_is_cut(field):
    with pytest.raises(RequestRejected, match="101, more than the model's whole context of 100") as raised:
        fitted(chat(**{field: 101}), 1)
    assert (raised.value.code, raised.value.field) == ("invalid_value", field)
    assert fitted(chat(**{field: 100}), 30).max_tokens == 70


def test_min_tokens_above_what_is_left_is_refused():
    assert fitted(chat(min_tokens=70, max_tokens=90), 30).max_tokens == 70
    with pytest.raises(RequestRejected) as raised:
        fitted(chat(min_tokens=71, max_tokens=90), 30)
    assert raised.value.field == "min_tokens"


def test_min_tokens_above_max_tokens_is_refused():
    with pytest.raises(RequestRejected) as raised:
        fitted(chat(min_tokens=6, max_tokens=5))
    assert raised.value.field == "min_tokens"


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {"50": 1}},
        {"stop_token_ids": [1, 50]},
        {"logprob_token_ids": [1, 50], "logprobs": True},
    ],
)
def test_tokens_outside_of_the_vocabulary_are_refused(fields):
    with pytest.raises(RequestRejected) as raised:
        fitted(chat(**fields))
    assert raised.value.field in fields


def test_a_request_without_a_seed_gets_one():
    rng = random.Random(1)
    seeds = {first_seed(chat(), rng) for _ in range(100)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)


@given(seed=st.integers(-(2**63), 2**63 - 1))
def test_choices_draw_apart_and_the_first_with_the_seed_itself(seed):
    first = first_seed(chat(seed=seed), random.Random())
    assert first == (seed if seed >= 0 else seed + 2**63)
    seeds = [choice_seed(first, choice) for choice in range(8)]
    assert seeds[0] == first
    assert len(set(seeds)) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [choice_seed(first, choice) for choice in range(8)]


WIDE = changed(MODEL, vocab_size=2**32, max_model_len=2**31 - 1)
EDGES = {
    "max_tokens": (1, 2**31 - 100),
    "temperature": (0, 1e-300, 2),
    "top_p": (1e-300, 1),
    "top_k": (-1, 0, 2**31 - 1),
    "min_p": (0, 1),
    "seed": (-(2**63), 0, 2**63 - 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (1e-300, 10),
    "logit_bias": ({"0": -100, str(2**31 - 1): 100}, {str(number): 0 for number in range(1024)}),
    "stop_token_ids": ([0, 2**31 - 1], list(range(128))),
    "top_logprobs": (0, 20),
}
DEFAULTS = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-3, 100.0),
}


@pytest.mark.parametrize(
    ("fields", "defaults"),
    [({name: value}, {}) for name, values in EDGES.items() for value in values]
    + [({}, {name: value}) for name, values in DEFAULTS.items() for value in values],
    ids=str,
)
def test_whatever_clients_and_models_may_say_is_taken_by_workers(fields, defaults):
    """A worker cuts off a frontend that sends it anything else."""
    asked = chat(**fields, **({"logprobs": True} if "top_logprobs" in fields else {}))
    welcome = Welcome(card(**defaults), b"")
    assert decode_to_frontend(encode(welcome)[4:]) == welcome
    model = changed(WIDE, **defaults)
    sampling = fitted(asked, 10, model, 9)
    sent = Attempt("a.1", "a", [1], 1, sampling, cache_salt="s" * 256)
    body = encode(Generate(1, sent))[4:]
    assert decode_to_worker(body).attempt == sent


def test_a_bad_word_counts_with_and_without_a_space_before_it():
    assert bad_word_texts(["a", " b", "a"]) == ["a", " a", "b", " b"]
    encoded = [[1], [2], [3], [9, 3], [4, 5], [6, 5], [7], [7]]
    assert bad_sequences(encoded) == ((1,), (2,), (3,), (4, 5), (6, 5), (7,))
    with pytest.raises(RequestRejected) as raised:
        bad_sequences([[], [1]])
    assert raised.value.field == "bad_words"


def test_limit_of_reasoning_is_refused_for_a_model_without_any_unless_it_is_a_wish():
    limited, rng = chat(thinking_token_budget=5), random.Random(7)
    with pytest.raises(RequestRejected, match="thinking_token_budget"):
        sampling_of(limited, MODEL.card, rng)
    wished = msgspec.structs.replace(limited, needs_reasoning=False)
    assert sampling_of(wished, MODEL.card, rng).thinking_budget is None
    able = changed(MODEL.card, thinking_budget=True)
    assert sampling_of(limited, able, rng).thinking_budget == 5
    assert sampling_of(chat(thinking_token_budget=-1), able, rng).thinking_budget is None
    assert sampling_of(chat(nvext={"max_thinking_tokens": 3}), able, rng).thinking_budget == 3
