from __future__ import annotations

import msgspec
import pytest

from penstock.engines.batch import Sampled
from penstock.engines.settings import SchedulerSettings
from penstock.errors import ConfigError
from penstock.shapes import AttemptReport, FinishReason
from tests.engines.rig import CARD, EOS, PROMPT, VOCAB, Rig, continued, decode, prefilled


def test_generates_until_max_tokens():
    rig = Rig()
    rig.submit("a", PROMPT, max_tokens=5)
    rig.run()
    assert rig.text("a") == continued(PROMPT, 5)
    assert [output.finish_reason for output in rig.outputs["a"]] == [None] * 4 + [FinishReason.LENGTH]
    assert rig.first("a").cached_tokens == 0
    assert rig.first("a").transferred_blocks is None
    assert all(output.cached_tokens is None for output in rig.outputs["a"][1:])
    assert rig.scheduler.idle
    assert rig.scheduler.pool.used_blocks == 0


def test_prompts_are_computed_in_chunks_behind_the_decoding():
    rig = Rig()
    rig.submit("a", PROMPT, max_tokens=9)
    rig.step()
    rig.submit("b", list(range(2, 40)), max_tokens=2)
    rig.run()
    assert rig.batches[:4] == [
        [("a", 0, 10)],
        [("a", 10, 1), ("b", 8, 15)],
        [("a", 11, 1), ("b", 23, 15)],
        [("a", 12, 1), ("b", 38, 1)],
    ]
    assert rig.text("b") == continued(list(range(2, 40)), 2)


def test_first_come_first_served_within_a_priority():
    rig = Rig(max_running=1)
    rig.submit("low", PROMPT, priority=5, max_tokens=1)
    rig.submit("first", PROMPT, max_tokens=1)
    rig.submit("second", PROMPT, max_tokens=1)
    rig.submit("urgent", PROMPT, priority=-1, max_tokens=1)
    rig.run()
    assert [batch[0][0] for batch in rig.batches] == ["urgent", "first", "second", "low"]


def test_a_prompt_reuses_blocks_and_says_so():
    rig = Rig()
    rig.submit("a", PROMPT, max_tokens=8)
    rig.run()
    answer = rig.text("a")
    turn = PROMPT + answer + [9, 9]  # the next turn of the conversation
    rig.submit("b", turn, max_tokens=2)
    rig.run()
    assert rig.first("b").cached_tokens == 16  # of 18 tokens with KV (the last answer token has none)
    assert rig.text("b") == continued(turn, 2)


def test_at_least_the_last_token_is_computed():
    rig = Rig()
    prompt = PROMPT[:8]
    rig.submit("a", prompt, max_tokens=1)
    rig.run()
    rig.submit("b", prompt, max_tokens=1)
    rig.run()
    assert rig.first("b").cached_tokens == 4
    assert rig.text("a") == rig.text("b")


def test_equal_prompts_at_the_same_time_end_with_one_copy():
    rig = Rig(max_batch_tokens=32)
    rig.submit("a", PROMPT, max_tokens=6)
    rig.submit("b", PROMPT, max_tokens=6)
    rig.step()
    assert len(rig.batches[0]) == 2
    assert rig.scheduler.pool.used_blocks == 4  # two shared, and each its own tail
    rig.run()
    assert rig.text("a") == rig.text("b") == continued(PROMPT, 6)


@pytest.mark.parametrize(
    ("fields", "tokens", "reason"),
    [
        ({}, 1, FinishReason.STOP),
        ({"ignore_eos": True}, 8, FinishReason.LENGTH),
        ({"min_tokens": 3}, 3, FinishReason.STOP),
        ({"ignore_eos": True, "stop_token_ids": (EOS,)}, 1, FinishReason.STOP),
        ({"max_tokens": 1}, 1, FinishReason.STOP),
    ],
)
def test_stop_rules(fields: dict[str, object], tokens: int, reason: FinishReason):
    rig = Rig()
    rig.forced["a"] = EOS
    rig.submit("a", PROMPT, **fields)
    rig.run()
    assert len(rig.text("a")) == tokens
    assert rig.reason("a") is reason


def test_output_of_earlier_attempts_counts():
    rig = Rig()
    rig.submit("a", PROMPT, prompt_len=7, max_tokens=5)
    rig.submit("b", PROMPT, prompt_len=7, max_tokens=3)
    rig.submit("c", PROMPT, prompt_len=7, min_tokens=5)
    rig.forced["c"] = EOS
    rig.run()
    assert rig.text("a") == continued(PROMPT, 2)
    assert rig.text("b") == []
    assert rig.reason("b") is FinishReason.LENGTH
    assert len(rig.text("c")) == 2


def test_ends_at_the_models_length():
    rig = Rig()
    rig.submit("a", PROMPT, max_tokens=1000)
    rig.run()
    assert len(rig.text("a")) == 64 - len(PROMPT)
    assert rig.reason("a") is FinishReason.LENGTH


def test_ends_where_the_pool_ends():
    rig = Rig(card=msgspec.structs.replace(CARD, total_blocks=4))
    rig.submit("a", PROMPT, max_tokens=1000)
    rig.submit("b", list(range(2, 18)), max_tokens=1)
    rig.run()
    assert len(rig.text("a")) == 16 - len(PROMPT)
    assert rig.outputs["b"][0].error == "the prompt has 16 tokens; at most 15 fit"


@pytest.mark.parametrize(
    ("token_ids", "fields", "error"),
    [
        ([], {}, "empty"),
        ([2], {"prompt_len": 0}, "empty"),
        ([2], {"prompt_len": 2}, "prompt_len is 2"),
        ([2] * 64, {}, "at most 63"),
        ([2, VOCAB], {}, "token id 50"),
        ([2, -1], {}, "token id -1"),
        ([2], {"max_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_bad_attempts_end_with_an_error(token_ids: list[int], fields: dict[str, object], error: str):
    rig = Rig()
    rig.submit("a", token_ids, **fields)
    rig.run()
    assert rig.reason("a") is FinishReason.ERROR
    assert error in (rig.outputs["a"][0].error or "")
    assert rig.scheduler.load().submitted == 1


def test_a_duplicate_id_is_an_error_and_harms_nobody_else():
    rig = Rig()
    rig.submit("b", PROMPT)
    rig.submit("a", PROMPT)
    rig.submit("a", PROMPT)
    rig.step()
    assert "submitted before" in (rig.outputs["a"][0].error or "")


def test_preempts_the_latest_of_the_least_important_and_loses_nothing():
    rig = Rig(card=msgspec.structs.replace(CARD, total_blocks=8), max_batch_tokens=64)
    prompts = {name: [10 + i] * 6 for i, name in enumerate("abc")}
    rig.submit("a", prompts["a"], max_tokens=10, priority=1)
    rig.submit("b", prompts["b"], max_tokens=20)
    rig.submit("c", prompts["c"], max_tokens=20)
    rig.run()
    assert rig.scheduler.preemptions >= 1
    rows = [{name for name, _, _ in batch} for batch in rig.batches]
    first_gap = next(names for names in rows if names != {"a", "b", "c"})
    assert first_gap == {"b", "c"}
    for name, count in (("a", 10), ("b", 20), ("c", 20)):
        assert rig.text(name) == continued(prompts[name], count)
        assert rig.first(name).cached_tokens == 0


def test_a_blocked_prompt_goes_when_blocks_are_freed():
    rig = Rig(card=msgspec.structs.replace(CARD, total_blocks=8))
    rig.submit("a", [5] * 24, max_tokens=4)
    rig.step()
    rig.step()
    rig.submit("b", [6] * 24, max_tokens=4)
    rig.step()
    assert rig.scheduler.waiting == 1
    assert rig.scheduler.load().prefill_tokens == 24
    rig.run()
    assert rig.text("b") == continued([6] * 24, 4)


def test_cancels_waiting_and_running():
    rig = Rig(max_running=1)
    rig.submit("a", PROMPT)
    rig.submit("b", PROMPT)
    rig.step()
    rig.scheduler.cancel("a", rig.now)
    rig.scheduler.cancel("b", rig.now)
    rig.scheduler.cancel("nobody", rig.now)
    rig.run()
    assert rig.reason("a") is rig.reason("b") is FinishReason.CANCELLED
    assert rig.scheduler.idle
    assert rig.scheduler.load().prefill_tokens == 0


def test_a_failed_step_ends_its_attempts_and_keeps_the_rest_in_order():
    rig = Rig(max_running=1)
    rig.submit("a", PROMPT)
    rig.submit("b", PROMPT, max_tokens=2)
    assert rig.scheduler.plan(rig.now)
    rig.scheduler.fail_batch("out of luck", 0.0)
    rig.run()
    assert rig.outputs["a"][0].error == "out of luck"
    assert rig.text("b") == continued(PROMPT, 2)
    assert rig.first("b").cached_tokens == 0
    assert rig.scheduler.pool.used_blocks == 0


def test_a_report_tells_when_an_attempt_came_began_and_got_its_first_token():
    rig = Rig(max_running=1)
    rig.submit("a", PROMPT, max_tokens=3)
    rig.now += 1.0
    rig.submit("b", PROMPT, max_tokens=1)
    rig.run()
    first, second = rig.reports["a"], rig.reports["b"]
    assert first.output_tokens == 3
    assert first.submitted_at == 100.0
    assert first.began_at == 101.0
    assert first.began_at < first.first_token_at < first.ended_at
    assert second.submitted_at == 101.0
    assert second.began_at >= first.ended_at
    assert second.first_token_at == second.ended_at
    assert first.pulled_at is None


def test_a_report_of_an_attempt_that_never_began_says_so():
    rig = Rig()
    rig.submit("a", PROMPT)
    rig.scheduler.cancel("a", 105.0)
    rig.report()
    assert rig.reports["a"] == AttemptReport("a", 100.0, None, None, None, 105.0, 0)


def test_load_counts_what_is_there():
    rig = Rig(max_running=1)
    rig.submit("a", PROMPT, max_tokens=8)
    rig.submit("b", [7] * 20)
    load = rig.scheduler.load()
    assert (load.running, load.waiting, load.prefill_tokens, load.submitted) == (0, 2, 30, 2)
    rig.step()
    load = rig.scheduler.load()
    assert (load.running, load.waiting, load.prefill_tokens) == (1, 1, 20)
    assert (load.context_tokens, load.used_blocks, load.total_blocks, load.steps) == (10, 3, 32, 1)


def test_statistics_count_what_is_kept():
    rig = Rig(max_running=1)
    rig.submit("a", PROMPT, prefill_only=True)
    rig.submit("b", [7] * 20)
    assert (rig.scheduler.statistics().attempts, rig.scheduler.statistics().waiting) == (2, 2)
    rig.scheduler.plan(rig.now)
    planned = rig.scheduler.statistics()
    assert (planned.running, planned.waiting, planned.rows, planned.used_blocks) == (1, 1, 1, 3)
    rig.scheduler.commit([Sampled(5)], rig.now)
    ended = rig.scheduler.statistics()
    assert (ended.attempts, ended.rows, ended.outputs, ended.effects, ended.held_handoffs) == (
        1,
        0,
        1,
        1,
        1,
    )
    assert ended.pulls == 0


def test_a_leaked_reference_is_found():
    rig = Rig()
    rig.submit("a", PROMPT)
    rig.step()
    rig.scheduler.check_references()
    assert rig.scheduler.pool.allocate(1) is not None
    with pytest.raises(AssertionError, match="have more or fewer references than holders"):
        rig.scheduler.check_references()


def test_rates_are_learned_from_the_steps():
    rig = Rig()
    for i in range(40):
        rig.submit(f"{i}", [2 + i] * 9, max_tokens=4)
        rig.run()
    rates = rig.scheduler.load().rates
    assert rates.step_ms + rates.prefill_token_ms * 9 == pytest.approx(10, rel=0.3)


@pytest.mark.parametrize(
    "fields", [{"max_running": 0}, {"pull_timeout_s": -1.0}, {"max_running": 10, "max_batch_tokens": 9}]
)
def test_bad_settings_are_refused(fields: dict[str, int]):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        SchedulerSettings(**fields)


def test_cancel_all_ends_everything():
    prefill, rig = Rig(), Rig(max_running=2)
    handoff = prefilled(prefill)
    prefill.submit("x", PROMPT)
    prefill.scheduler.cancel_all(prefill.now)
    prefill.step()
    assert prefill.reason("x") is FinishReason.CANCELLED
    assert prefill.scheduler.idle
    decode(rig, handoff)
    rig.submit("y", PROMPT)
    rig.submit("z", PROMPT)
    rig.step()
    rig.scheduler.cancel_all(rig.now)
    rig.step()
    rig.finish_pull(prefill)
    assert {rig.reason(name) for name in "dyz"} == {FinishReason.CANCELLED}
    assert rig.scheduler.idle
