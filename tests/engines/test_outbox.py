from __future__ import annotations

import asyncio
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.engines.outbox import MAX_STEPS, Outbox, merge
from penstock.errors import RemoteError
from penstock.ports import EngineStep
from penstock.shapes import AttemptReport, FinishReason, Load, Output, TokenLogprob


async def test_hands_out_what_a_thread_pushes():
    outbox = Outbox()
    outbox.open()

    def push() -> None:
        for i in range(50):
            outbox.push(EngineStep(stored=[i], load=Load(steps=i)))
        outbox.close()

    thread = Thread(target=push)
    thread.start()
    async with asyncio.timeout(60):
        steps = [step async for step in outbox.read()]
    thread.join()
    assert sorted(h for step in steps for h in step.stored) == list(range(50))


async def test_the_mirror_follows_what_was_read_not_what_was_pushed():
    outbox = Outbox()
    outbox.open()
    outbox.push(EngineStep(stored=[1, 2]))
    outbox.push(EngineStep(removed=[1], stored=[3]))
    outbox.push(EngineStep(cleared=True, stored=[4]))
    outbox.close()
    assert list(outbox.cached_hashes()) == []
    seen = [sorted(outbox.cached_hashes()) async for _ in outbox.read()]
    assert seen == [[1, 2], [2, 3], [4]]


async def test_a_lagging_reader_gets_everything_in_fewer_steps():
    outbox = Outbox()
    outbox.open()
    for i in range(3 * MAX_STEPS):
        outbox.push(EngineStep([Output("a", [i])], stored=[i], load=Load(steps=i)))
    outbox.close()
    steps = [step async for step in outbox.read()]
    assert len(steps) == MAX_STEPS
    assert [t for step in steps for output in step.outputs for t in output.token_ids] == list(
        range(3 * MAX_STEPS)
    )
    assert sorted(outbox.cached_hashes()) == list(range(3 * MAX_STEPS))
    assert steps[-1].load.steps == 3 * MAX_STEPS - 1


async def test_an_error_comes_after_the_last_step():
    outbox = Outbox()
    outbox.open()
    outbox.push(EngineStep(stored=[1]))
    outbox.close(RemoteError("broke"))
    reader = aiter(outbox.read())
    assert (await anext(reader)).stored == [1]
    with pytest.raises(RemoteError, match="broke"):
        await anext(reader)


async def test_a_waiting_reader_is_woken():
    outbox = Outbox()
    outbox.open()
    reader = aiter(outbox.read())
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        first = tasks.create_task(anext(reader))
        await asyncio.sleep(0)
        outbox.push(EngineStep(stored=[1]))
    assert first.result().stored == [1]


def test_merged_outputs_are_one_per_attempt():
    first = Output("a", [1], cached_tokens=5, transferred_blocks=2, logprobs=[TokenLogprob(1, -0.5)])
    last = Output("a", [2], FinishReason.STOP, logprobs=[TokenLogprob(2, -0.1)])
    other = Output("b", [], FinishReason.ERROR, error="why")
    merged = merge(EngineStep([first], load=Load(steps=1)), EngineStep([other, last], load=Load(steps=2)))
    assert merged.load.steps == 2
    assert merged.outputs == [
        Output(
            "a",
            [1, 2],
            FinishReason.STOP,
            cached_tokens=5,
            transferred_blocks=2,
            logprobs=[TokenLogprob(1, -0.5), TokenLogprob(2, -0.1)],
        ),
        other,
    ]


def test_merged_steps_keep_prompt_logprobs_and_reports():
    scores = [TokenLogprob(1, -0.5)]
    reports = [AttemptReport(name, 1.0, None, None, None, 2.0, 0) for name in "ab"]
    older = EngineStep([Output("a", [1], prompt_logprobs=scores)], ended=reports[:1])
    merged = merge(older, EngineStep([Output("a", [2])], ended=reports[1:]))
    assert merged.outputs[0].prompt_logprobs == scores
    assert merged.ended == reports


def apply(cached: set[int], step: EngineStep) -> set[int]:
    return ((set() if step.cleared else cached) - set(step.removed)) | set(step.stored)


@st.composite
def caches(draw: st.DrawFn) -> tuple[set[int], EngineStep, EngineStep]:
    """A cache and two steps that fit it, as a block pool reports them."""
    before = draw(st.sets(st.integers(0, 8)))
    steps = []
    cached = before
    for _ in range(2):
        after = draw(st.sets(st.integers(0, 8)))
        cleared = draw(st.booleans())
        start = set() if cleared else cached
        steps.append(EngineStep(stored=list(after - start), removed=list(start - after), cleared=cleared))
        cached = after
    return before, steps[0], steps[1]


@given(caches())
def test_a_merged_step_does_the_same_to_a_cache(case: tuple[set[int], EngineStep, EngineStep]):
    before, first, second = case
    merged = merge(first, second)
    assert apply(before, merged) == apply(apply(before, first), second)
    assert not set(merged.stored) & set(merged.removed)
    if not merged.cleared:
        assert before.issuperset(merged.removed)
        assert not before.intersection(merged.stored)
