"""One answer's text, from deltas."""

import json

import pytest

from penstock.frontend.choice import Choice
from penstock.frontend.text.detokenize import TableDetokenizer, TokenTable
from penstock.frontend.text.repetition import RepetitionDetection, RepetitionDetector
from penstock.frontend.text.stop_strings import StopMatcher
from penstock.shapes import Delta, FinishReason, ModelKey, Request, Sampling, TokenLogprob

REQUEST = Request("r", ModelKey("m", "v"), [1], Sampling(max_tokens=9))


@pytest.fixture(scope="module")
def answer_of(byte_level):
    table = TokenTable.of(byte_level, json.loads(byte_level.to_str()))
    return lambda **options: Choice(0, REQUEST, TableDetokenizer(table), **options)


@pytest.fixture(scope="module")
def ids_of(byte_level):
    return lambda text: byte_level.encode(text).ids


def test_taking_gives_what_is_new(answer_of, ids_of):
    answer = answer_of()
    assert answer.take() == ("", [])
    answer.feed(Delta(ids_of("One "), cached_tokens=7))
    answer.feed(Delta(ids_of("two")))
    assert answer.unsent_chars == 7
    assert answer.take() == ("One two", [])
    assert (answer.unsent_chars, answer.cached_tokens) == (0, 7)
    assert answer.output_tokens == len(ids_of("One ")) + len(ids_of("two"))
    assert answer.finish_reason is None


def test_the_end_brings_out_what_was_held_back(answer_of, ids_of):
    answer = answer_of(stops=StopMatcher(["END"], include=False))
    answer.feed(Delta([*ids_of("text EN"), ids_of("😺")[0]]))
    answer.feed(Delta([], finish_reason=FinishReason.LENGTH))
    assert answer.take()[0] == "text EN\ufffd"
    assert answer.finish_reason is FinishReason.LENGTH


def test_a_stop_string_in_the_last_delta_is_why_it_ended(answer_of, ids_of):
    answer = answer_of(stops=StopMatcher(["END"], include=False))
    answer.feed(Delta(ids_of("text END more"), finish_reason=FinishReason.LENGTH))
    assert (answer.take()[0], answer.finish_reason) == ("text ", FinishReason.STOP)


def test_held_back_text_survives_an_end_before_min_tokens(answer_of, ids_of):
    answer = answer_of(stops=StopMatcher(["END"], include=False), min_tokens=1000)
    answer.feed(Delta(ids_of("END")))
    answer.feed(Delta(ids_of("!"), finish_reason=FinishReason.LENGTH))
    assert (answer.take()[0], answer.finish_reason) == ("END!", FinishReason.LENGTH)


def test_only_what_stopped_the_answer_is_left_out(answer_of, ids_of):
    stop_token = ids_of("!")[0]
    answer = answer_of(stop_tokens={stop_token})
    answer.feed(Delta([stop_token]))  # ignore_eos, say: it did not end anything
    answer.feed(Delta([stop_token], finish_reason=FinishReason.STOP))
    assert answer.take()[0] == "!"


def test_the_stop_token_is_part_of_the_text_where_stops_are(answer_of, ids_of):
    stop_token = ids_of("!")[0]
    answer = answer_of(stop_tokens={stop_token}, includes_stop=True)
    answer.feed(Delta([*ids_of("Hi"), stop_token], finish_reason=FinishReason.STOP))
    assert (answer.take()[0], answer.stop_reason) == ("Hi!", stop_token)


def test_a_repetition_ends_the_answer_with_its_last_token(answer_of, ids_of):
    a, b = ids_of("ab")
    for least, finish, shown in (
        (0, None, "abababab"),
        (0, FinishReason.LENGTH, "abababab"),
        (9, FinishReason.LENGTH, "ababababa"),
        (9, None, "ababababa"),
        (0, FinishReason.STOP, "abababab"),
    ):
        answer = answer_of(repetition=RepetitionDetector(RepetitionDetection(2, 2, 4)), min_tokens=least)
        answer.feed(Delta([a, b], [TokenLogprob(a, -1.0), TokenLogprob(b, -1.0)]))
        assert answer.finish_reason is None
        step = [a, b] * 3 + [a]
        answer.feed(Delta(step, [TokenLogprob(token_id, -1.0) for token_id in step], finish))
        text, logprobs = answer.take()
        assert (text, len(logprobs), answer.output_tokens) == (shown, len(shown), len(shown))
        repeats = least == 0 or finish is None
        assert answer.finish_reason is (FinishReason.STOP if repeats else finish)
        assert answer.stop_reason == ("repetition_detected" if repeats else None)


def test_logprobs_are_kept_with_their_tokens(answer_of, ids_of):
    answer = answer_of()
    tokens = [TokenLogprob(token_id, -1.0) for token_id in ids_of("Hi")]
    answer.feed(Delta(ids_of("Hi"), tokens))
    assert answer.unsent_chars > 2
    assert answer.take() == ("Hi", tokens)
    assert answer.take() == ("", [])
