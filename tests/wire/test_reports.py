"""What a worker may report next. Each lie is told to a `Reports` that has heard only the truth so far."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from msgspec.structs import replace

from penstock.errors import ProtocolError
from penstock.shapes import (
    FinishReason,
    Handoff,
    Incarnation,
    Load,
    Output,
    PromptLogprob,
    Role,
    TokenLogprob,
)
from penstock.wire.messages import Bounce, Step
from penstock.wire.reports import MAX_OPEN, Reports
from tests import builders
from tests.cards import card

CARD = card("w0", Role.PREFILL, epoch=7, vocab_size=50)
LOAD = Load(running=1, used_blocks=3, total_blocks=100, steps=10, submitted=5)


attempt = partial(builders.attempt, prompt=2, generated=[3], max_tokens=4)


def handoff(attempt_id: str = "p.1", **fields: object) -> Handoff:
    return builders.handoff(attempt_id, "w0", epoch=7, **fields)


def reports() -> Reports:
    """Of a worker that has five attempts: plain, ended, with log-probabilities of its output or of
    its prompt, and only to prefill."""
    it = Reports(CARD, LOAD)
    it.sent(attempt("a.1"))
    it.sent(attempt("e.1"))
    it.sent(attempt("l.1", logprobs=2))
    it.sent(attempt("s.1", prompt=3, generated=[], prompt_logprobs=1))
    it.sent(attempt("p.1", prefill_only=True))
    it.step(step(Output("a.1", [5], cached_tokens=3), Output("e.1", [6], FinishReason.STOP), seen=2))
    return it


def step(*outputs: Output, seen: int = 5, load: Load = LOAD) -> Step:
    return Step(seen, load, list(outputs))


def prefilled(given: Handoff | None) -> Output:
    return Output("p.1", [5], FinishReason.PREFILLED, handoff=given)


TRUE: dict[str, Step] = {
    "nothing": step(),
    "tokens, up to the last that was asked for": step(Output("a.1", [7, 8])),
    "the end": step(Output("a.1", [7], FinishReason.LENGTH)),
    "an end without a token": step(Output("a.1", [], FinishReason.CANCELLED)),
    "an error": step(Output("a.1", [], FinishReason.ERROR, error="failed")),
    "log-probabilities of a prompt": step(
        Output("s.1", [7], prompt_logprobs=[PromptLogprob(7, -1.0, [(49, -1.0)])] * 2)
    ),
    "log-probabilities": step(Output("l.1", [7], logprobs=[TokenLogprob(7, -1.0, [(49, -1.0)])])),
    "a handoff": step(prefilled(handoff())),
    "a prompt that ends at once": step(Output("p.1", [5], FinishReason.STOP)),
    "another load": step(load=replace(LOAD, steps=11, submitted=6, used_blocks=100)),
}


@pytest.mark.parametrize("said", TRUE.values(), ids=TRUE)
def test_the_truth_is_taken(said: Step) -> None:
    reports().step(said)


LIES: dict[str, tuple[Step, str]] = {
    "of an attempt that was never sent": (step(Output("x.1", [5])), "outputs.attempt_id"),
    "of one that has ended": (step(Output("e.1", [5])), "outputs.attempt_id"),
    "ended twice at once": (
        step(Output("a.1", [5], FinishReason.STOP), Output("a.1", [5], FinishReason.STOP)),
        "outputs.attempt_id",
    ),
    "a token beyond the vocabulary": (step(Output("a.1", [50])), "outputs.token_ids"),
    "more tokens than were asked for": (step(Output("a.1", [1, 2, 3])), "outputs.token_ids"),
    "log-probabilities that nobody asked for": (
        step(Output("a.1", [5], logprobs=[TokenLogprob(5, -1.0)])),
        "outputs.logprobs",
    ),
    "fewer log-probabilities than tokens": (
        step(Output("l.1", [5, 6], logprobs=[TokenLogprob(5, -1.0)])),
        "outputs.logprobs",
    ),
    "more alternatives than were asked for": (
        step(Output("l.1", [5], logprobs=[TokenLogprob(5, -1.0, [(1, -1.0)] * 3)])),
        "outputs.logprobs",
    ),
    "alternatives beyond the vocabulary": (
        step(Output("l.1", [5], logprobs=[TokenLogprob(5, -1.0, [(50, -1.0)])])),
        "outputs.logprobs",
    ),
    "log-probabilities of a prompt that nobody asked for": (
        step(Output("a.1", [5], prompt_logprobs=[])),
        "outputs.prompt_logprobs",
    ),
    "too few log-probabilities of a prompt": (
        step(Output("s.1", [5], prompt_logprobs=[PromptLogprob(5, -1.0)])),
        "outputs.prompt_logprobs",
    ),
    "log-probabilities of a prompt twice": (
        step(
            Output("s.1", [5], prompt_logprobs=[PromptLogprob(5, -1.0)] * 2),
            Output("s.1", [5], prompt_logprobs=[PromptLogprob(5, -1.0)] * 2),
        ),
        "outputs.prompt_logprobs",
    ),
    "a prompt's alternatives beyond the vocabulary": (
        step(Output("s.1", [5], prompt_logprobs=[PromptLogprob(5, -1.0, [(50, -1.0)])] * 2)),
        "outputs.prompt_logprobs",
    ),
    "a rank in a prompt beyond the vocabulary": (
        step(Output("s.1", [5], prompt_logprobs=[PromptLogprob(5, -1.0, [], 51)] * 2)),
        "outputs.prompt_logprobs",
    ),
    "more cached than there is": (step(Output("a.1", [5], cached_tokens=4)), "outputs.cached_tokens"),
    "more pulled than there is": (
        step(Output("a.1", [5], cached_tokens=0, transferred_blocks=2)),
        "outputs.transferred_blocks",
    ),
    "prefilled without a handoff": (step(prefilled(None)), "outputs.handoff"),
    "a handoff of one that is to decode": (
        step(Output("a.1", [5], FinishReason.PREFILLED, handoff=handoff("a.1"))),
        "outputs.handoff",
    ),
    "another attempt's handoff": (step(prefilled(handoff("a.1"))), "outputs.handoff.handoff_id"),
    "another instance's handoff": (
        step(prefilled(handoff(holder=Incarnation("w1", 7)))),
        "outputs.handoff.holder",
    ),
    "an earlier incarnation's handoff": (
        step(prefilled(handoff(holder=Incarnation("w0", 6)))),
        "outputs.handoff.holder",
    ),
    "blocks of another size": (step(prefilled(handoff(block_size=32))), "outputs.handoff.block_size"),
    "KV of more than the prompt": (step(prefilled(handoff(num_tokens=4))), "outputs.handoff.num_tokens"),
    "KV of nothing": (step(prefilled(handoff(num_tokens=0))), "outputs.handoff.num_tokens"),
    "more seen than was sent": (step(seen=6), "seen"),
    "less seen than before": (step(seen=1), "seen"),
    "steps that shrink": (step(load=replace(LOAD, steps=9)), "load.steps"),
    "fewer submitted than before": (step(load=replace(LOAD, submitted=4)), "load.submitted"),
    "more blocks used than there are": (step(load=replace(LOAD, used_blocks=101)), "load.used_blocks"),
    "a pool larger than on the card": (step(load=replace(LOAD, total_blocks=101)), "load.used_blocks"),
}


@pytest.mark.parametrize(("said", "field"), LIES.values(), ids=LIES)
def test_a_lie_is_refused_and_its_field_named(said: Step, field: str) -> None:
    with pytest.raises(ProtocolError, match=f"^{field}: "):
        reports().step(said)


@pytest.mark.parametrize(
    ("tell", "field"),
    [
        (lambda it: it.bounce(Bounce("x.1", "full")), "bounce.attempt_id"),
        (lambda it: it.bounce(Bounce("e.1", "full")), "bounce.attempt_id"),
        (lambda it: it.load(3, replace(LOAD, steps=0)), "load.steps"),
    ],
)
def test_other_lies(tell: Callable[[Reports], None], field: str) -> None:
    with pytest.raises(ProtocolError, match=f"^{field}: "):
        tell(reports())


def test_a_snapshot_whose_load_cannot_be() -> None:
    with pytest.raises(ProtocolError, match=r"^load\.used_blocks"):
        Reports(CARD, Load(used_blocks=200, total_blocks=200))


def test_an_attempt_that_was_bounced_may_be_sent_again() -> None:
    it = reports()
    it.bounce(Bounce("a.1", "full"))
    it.sent(attempt("a.1"))
    it.step(step(Output("a.1", [1, 2, 3]), seen=6))


def test_a_name_that_nobody_knows_is_cut_for_the_log() -> None:
    with pytest.raises(ProtocolError) as refused:
        reports().step(step(Output("x" * 10_000, [5])))
    assert len(str(refused.value)) < 200


def test_a_worker_that_never_ends_anything_gets_no_more() -> None:
    it = Reports(CARD, LOAD)
    for number in range(MAX_OPEN):
        assert not it.full
        it.sent(attempt(f"a.{number}"))
    assert it.full
