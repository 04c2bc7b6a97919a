"""The scheduler with a model small enough to check every token and every block of KV by hand."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from xxhash import xxh3_64_intdigest

from penstock.core.hashing import last_hash, root_hash
from penstock.engines.batch import Row, Sampled
from penstock.engines.effects import Export, Pull, Retract
from penstock.engines.handoffs import RETRACT_RETRY_S
from penstock.engines.pulls import PULL_GRACE_S
from penstock.engines.scheduler import Scheduler
from penstock.engines.settings import SchedulerSettings
from penstock.errors import ConfigError
from penstock.ports import Pulled
from penstock.structs import Attempt, EngineCard, FinishReason, Handoff, Output, Sampling

BLOCK_SIZE = 4
EOS = 1
VOCAB = 50

CARD = EngineCard(
    engine="test",
    model="m",
    block_size=BLOCK_SIZE,
    total_blocks=32,
    max_model_len=64,
    vocab_size=VOCAB,
    eos_token_ids=[EOS],
    layout="layout",
    transport="test",
)


def next_token(token_ids: Sequence[int]) -> int:
    """The model: the token after these, never EOS."""
    return 2 + xxh3_64_intdigest(bytes(token_ids)) % (VOCAB - 2)


def continued(token_ids: list[int], count: int) -> list[int]:
    """What the model says after these."""
    tokens = list(token_ids)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(token_ids) :]


class Rig:
    """A scheduler, a model and a pool whose KV for a position is all the tokens up to it."""

    def __init__(self, name: str = "rig", card: EngineCard = CARD, **limits: float) -> None:
        settings = SchedulerSettings(
            instance_id=name,
            epoch=7,
            **{"max_running": 8, "max_batch_tokens": 16, **limits},  # type: ignore[arg-type]
        )
        self.scheduler = Scheduler(msgspec.structs.replace(card), settings)
        self.kv: list[list[bytes]] = [[b""] * BLOCK_SIZE for _ in range(card.total_blocks)]
        self.now = 100.0
        self.forced: dict[str, int] = {}  # attempt -> token instead of the model's
        self.outputs: dict[str, list[Output]] = defaultdict(list)
        self.batches: list[list[tuple[str, int, int]]] = []  # (attempt, start, count)
        self.cached: set[int] = set()
        self.pulls: list[Pull] = []
        self.offers: dict[str, Export] = {}
        self.reading: set[str] = set()  # handoffs whose reader is at work
        self.retracts: list[str] = []

    def submit(self, attempt_id: str, token_ids: list[int], **fields: object) -> None:
        prompt_len = fields.pop("prompt_len", len(token_ids))
        priority = fields.pop("priority", 0)
        handoff = fields.pop("handoff", None)
        prefill_only = fields.pop("prefill_only", False)
        salt = fields.pop("cache_salt", "")
        sampling = Sampling(**{"max_tokens": 8, **fields})  # type: ignore[arg-type]
        attempt = Attempt(
            attempt_id,
            attempt_id,
            token_ids,
            prompt_len,  # type: ignore[arg-type]
            sampling,
            prefill_only=prefill_only,  # type: ignore[arg-type]
            handoff=handoff,  # type: ignore[arg-type]
            cache_salt=salt,  # type: ignore[arg-type]
            priority=priority,  # type: ignore[arg-type]
        )
        self.scheduler.add(attempt, self.now)

    def step(self) -> int:
        """One turn. Returns the number of rows computed."""
        batch = self.scheduler.plan(self.now)
        self._act()
        if batch:
            self.batches.append([(row.sequence.attempt_id, row.start, row.count) for row in batch])
            assert sum(row.count for row in batch) <= self.scheduler.settings.max_batch_tokens
            assert len({row.sequence.attempt_id for row in batch}) == len(batch)
            samples = [self._compute(row) for row in batch]
            self.now += 0.01
            self.scheduler.commit(samples, self.now)
        self._act()
        self.report()
        return len(batch)

    def report(self) -> None:
        step = self.scheduler.report()
        assert not set(step.removed) & set(step.stored)
        assert self.cached.issuperset(step.removed)
        assert not self.cached.intersection(step.stored)
        self.cached = (self.cached - set(step.removed)) | set(step.stored)
        for output in step.outputs:
            earlier = self.outputs[output.attempt_id]
            assert not earlier or earlier[-1].finish_reason is None, "an output after the last"
            earlier.append(output)
        assert step.load == self.scheduler.load()
        assert step.load.used_blocks == self.scheduler.pool.used_blocks
        self.scheduler.pool.check()

    def run(self, limit: int = 500) -> None:
        """Turn until there is nothing to compute."""
        for _ in range(limit):
            if not self.step():
                return
        raise AssertionError("it does not end")

    def _compute(self, row: Row) -> Sampled | None:
        """Check the KV that this row attends to, write its own, and draw."""
        sequence = row.sequence
        for position in range(row.start):
            kv = self.kv[sequence.block_ids[position // BLOCK_SIZE]][position % BLOCK_SIZE]
            assert kv == bytes(sequence.token_ids[: position + 1]), "wrong KV"
        for position in range(row.start, row.start + row.count):
            block = self.kv[sequence.block_ids[position // BLOCK_SIZE]]
            block[position % BLOCK_SIZE] = bytes(sequence.token_ids[: position + 1])
        if not row.sample:
            return None
        assert row.start + row.count == len(sequence.token_ids)
        return Sampled(self.forced.get(sequence.attempt_id, next_token(sequence.token_ids)))

    def _act(self) -> None:
        for effect in self.scheduler.effects():
            match effect:
                case Export():
                    self.offers[effect.handoff.handoff_id] = effect
                    self.scheduler.exported(effect, "address", b"params")
                case Pull():
                    self.pulls.append(effect)
                case Retract(handoff_id):
                    self.retracts.append(handoff_id)
                    done = handoff_id not in self.reading
                    if done:
                        self.offers.pop(handoff_id, None)
                    self.scheduler.retracted(handoff_id, done, self.now)

    def finish_pull(self, source: Rig | None, error: str | None = None) -> None:
        """End the oldest pull: with the holder's KV, or with half of it and an error."""
        pull = self.pulls.pop(0)
        offer = source.offers.pop(pull.handoff.handoff_id, None) if source else None
        if error is None and (offer is None or source is None):
            error = "not offered"
        for i, target in zip(pull.source_indices, pull.block_ids, strict=True):
            if offer is None or source is None:
                self.kv[target] = [b"garbage"] * BLOCK_SIZE
            elif error is None or i % 2:
                self.kv[target] = list(source.kv[offer.block_ids[i]])
        if error is None and source is not None:
            source.scheduler.pulled(pull.handoff.handoff_id, source.now)
        blocks = 0 if error else len(pull.block_ids)
        self.scheduler.pull_done(pull.attempt_id, Pulled(blocks, 64 * blocks, 0.002, error), self.now)

    def text(self, attempt_id: str) -> list[int]:
        return [token for output in self.outputs[attempt_id] for token in output.token_ids]

    def reason(self, attempt_id: str) -> FinishReason | None:
        return self.outputs[attempt_id][-1].finish_reason if self.outputs[attempt_id] else None

    def first(self, attempt_id: str) -> Output:
        return self.outputs[attempt_id][0]


PROMPT = list(range(2, 12))  # two whole blocks and a half


# --- one engine -------------------------------------------------------------------------------------


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
        [("a", 12, 1), ("b", 38, 2)],
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
    rig.scheduler.fail_batch("out of luck")
    rig.run()
    assert rig.outputs["a"][0].error == "out of luck"
    assert rig.text("b") == continued(PROMPT, 2)
    assert rig.first("b").cached_tokens == 0
    assert rig.scheduler.pool.used_blocks == 0


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


# --- two engines ------------------------------------------------------------------------------------


def prefilled(prefill: Rig, attempt_id: str = "p", prompt: list[int] = PROMPT) -> Handoff:
    prefill.submit(attempt_id, prompt, prefill_only=True)
    prefill.run()
    output = prefill.outputs[attempt_id][-1]
    assert output.finish_reason is FinishReason.PREFILLED
    assert output.token_ids == continued(prompt, 1)
    assert output.handoff is not None
    return output.handoff


def decode(rig: Rig, handoff: Handoff, attempt_id: str = "d", prompt: list[int] = PROMPT) -> None:
    rig.submit(attempt_id, prompt + continued(prompt, 1), prompt_len=len(prompt), handoff=handoff)


def test_a_handoff_says_what_is_held():
    prefill = Rig("p0")
    handoff = prefilled(prefill)
    assert (handoff.handoff_id, handoff.instance_id, handoff.epoch) == ("p", "p0", 7)
    assert (handoff.num_tokens, handoff.block_size, handoff.ttl_s) == (10, BLOCK_SIZE, 30.0)
    assert (handoff.transport, handoff.address, handoff.params) == ("test", "address", b"params")
    assert handoff.last_hash == last_hash(PROMPT, BLOCK_SIZE, root_hash("m"))
    assert prefill.scheduler.load().held_handoffs == 1
    assert prefill.scheduler.load().used_blocks == 3
    assert not prefill.scheduler.idle


@pytest.mark.parametrize("length", [3, 4, 8, 9])
def test_decodes_behind_pulled_blocks(length: int, caplog: pytest.LogCaptureFixture):
    prompt = PROMPT[:length]
    prefill, rig = Rig("p0"), Rig()
    handoff = prefilled(prefill, prompt=prompt)
    assert handoff.last_hash == last_hash(prompt, BLOCK_SIZE, root_hash("m"))
    with caplog.at_level(logging.INFO):
        decode(rig, handoff, prompt=prompt)
        rig.run()
        assert rig.text("d") == []
        rig.finish_pull(prefill)
    rig.run()
    assert rig.text("d") == continued(prompt, 8)[1:]
    assert rig.batches[0] == [("d", length, 1)]
    assert rig.first("d").cached_tokens == length
    blocks = -(-length // BLOCK_SIZE)
    assert rig.first("d").transferred_blocks == blocks
    assert f"transport=test blocks={blocks}/{blocks} bytes={64 * blocks} ms=2.0 from=p0" in caplog.text
    assert prefill.scheduler.idle
    assert prefill.scheduler.pool.used_blocks == 0


def test_pulls_only_what_is_not_cached():
    prefill, rig = Rig(), Rig()
    rig.submit("earlier", PROMPT[:4], max_tokens=2)
    rig.run()
    decode(rig, prefilled(prefill))
    rig.step()
    assert rig.pulls[0].source_indices == [1, 2]
    rig.finish_pull(prefill)
    rig.run()
    assert rig.text("d") == continued(PROMPT, 8)[1:]
    assert rig.first("d").cached_tokens == 10
    assert rig.first("d").transferred_blocks == 2


def test_lets_the_holder_go_when_everything_is_cached():
    prefill, rig = Rig(), Rig()
    rig.submit("earlier", PROMPT[:8], max_tokens=2)
    rig.run()
    handoff = prefilled(prefill, prompt=PROMPT[:8])
    decode(rig, handoff, prompt=PROMPT[:8])
    rig.run()
    assert rig.text("d") == continued(PROMPT[:8], 8)[1:]
    assert rig.pulls[0].source_indices == rig.pulls[0].block_ids == []
    rig.finish_pull(prefill)
    assert prefill.scheduler.idle


def test_a_handoff_for_all_tokens_leaves_the_last_to_compute():
    prefill, rig = Rig(), Rig()
    handoff = prefilled(prefill, prompt=PROMPT[:8])
    rig.submit("d", PROMPT[:8], handoff=handoff)
    rig.step()
    rig.finish_pull(prefill)
    rig.run()
    assert rig.batches[0] == [("d", 7, 1)]
    assert rig.text("d") == continued(PROMPT[:8], 8)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"transport": "other"}, "transport"),
        ({"layout": "other"}, "layout"),
        ({"block_size": 8}, "block_size"),
        ({"num_tokens": 12}, "num_tokens"),
        ({"num_tokens": 0}, "num_tokens"),
        ({"num_tokens": 9}, "last_hash"),
        ({"last_hash": 1}, "last_hash"),
        ({"ttl_s": 0.0}, "expired"),
    ],
)
def test_any_mismatch_means_recompute(
    change: dict[str, object], reason: str, caplog: pytest.LogCaptureFixture
):
    rig = Rig()
    decode(rig, msgspec.structs.replace(prefilled(Rig()), **change))
    rig.run()
    assert rig.text("d") == continued(PROMPT, 8)[1:]
    assert rig.first("d").transferred_blocks == 0
    assert not rig.pulls
    assert reason in caplog.text


def test_a_handoff_is_used_once():
    prefill, rig = Rig(), Rig()
    handoff = prefilled(prefill)
    decode(rig, handoff, "d")
    decode(rig, handoff, "e")
    rig.step()
    assert len(rig.pulls) == 1
    rig.finish_pull(prefill)
    rig.run()
    assert rig.text("d") == rig.text("e") == continued(PROMPT, 8)[1:]


def test_a_handoff_can_expire_in_the_queue():
    prefill, rig = Rig(), Rig(max_running=1)
    rig.submit("a", [9] * 5, max_tokens=3)
    rig.step()
    decode(rig, msgspec.structs.replace(prefilled(prefill), ttl_s=5.0))
    assert rig.scheduler.load().prefill_tokens == 1
    rig.now += 5.0
    rig.run()
    assert rig.text("d") == continued(PROMPT, 8)[1:]
    assert not rig.pulls


def test_a_failed_pull_is_recomputed():
    prefill, rig = Rig(), Rig()
    decode(rig, prefilled(prefill))
    rig.step()
    rig.finish_pull(prefill, error="cut off")
    rig.run()
    assert rig.text("d") == continued(PROMPT, 8)[1:]
    assert rig.first("d").cached_tokens == 0
    assert rig.first("d").transferred_blocks == 0


def test_a_late_pull_keeps_its_blocks_until_it_is_over():
    prefill, rig = Rig(), Rig(pull_timeout_s=2.0)
    decode(rig, prefilled(prefill))
    rig.step()
    assert rig.pulls[0].timeout_s == 2.0
    assert rig.scheduler.next_deadline == pytest.approx(rig.now + 2.0 + PULL_GRACE_S)
    rig.now += 2.0 + PULL_GRACE_S
    rig.run()
    assert rig.text("d") == continued(PROMPT, 8)[1:]
    assert rig.scheduler.next_deadline is None
    assert rig.scheduler.load().used_blocks == 3
    assert not rig.scheduler.idle
    rig.finish_pull(prefill)
    assert rig.scheduler.load().used_blocks == 0
    assert rig.scheduler.idle


def test_a_cancelled_pull_keeps_its_blocks_until_it_is_over():
    prefill, rig = Rig(), Rig()
    decode(rig, prefilled(prefill))
    rig.step()
    rig.scheduler.cancel("d", rig.now)
    rig.step()
    assert rig.reason("d") is FinishReason.CANCELLED
    assert rig.scheduler.load().used_blocks == 3
    rig.finish_pull(prefill)
    assert rig.scheduler.idle
    assert rig.scheduler.load().used_blocks == 0


def test_an_expired_handoff_is_freed_when_its_reader_is_done(caplog: pytest.LogCaptureFixture):
    prefill = Rig(handoff_ttl_s=10.0)
    prefilled(prefill)
    assert prefill.scheduler.next_deadline == pytest.approx(prefill.now + 10.0)
    prefill.reading.add("p")
    prefill.now += 10.0
    prefill.step()
    assert prefill.retracts == ["p"]
    assert prefill.scheduler.held.expired == 1
    assert "expired: handoff=p" in caplog.text
    assert prefill.scheduler.load().used_blocks == 3
    prefill.step()
    assert prefill.retracts == ["p"]  # asked again only after a while
    prefill.now += RETRACT_RETRY_S
    prefill.reading.clear()
    prefill.step()
    assert prefill.retracts == ["p", "p"]
    assert prefill.scheduler.held.expired == 1
    assert prefill.scheduler.idle
    assert prefill.scheduler.load().used_blocks == 0


def test_a_released_handoff_is_freed():
    prefill = Rig()
    prefilled(prefill)
    prefill.scheduler.release("p", prefill.now)
    prefill.scheduler.release("p", prefill.now)
    prefill.scheduler.release("nobody", prefill.now)
    prefill.step()
    assert prefill.retracts == ["p"]
    assert prefill.scheduler.idle


def test_a_prefill_that_is_the_whole_answer_holds_nothing():
    prefill = Rig()
    prefill.submit("a", PROMPT, prefill_only=True, max_tokens=1)
    prefill.forced["b"] = EOS
    prefill.submit("b", PROMPT, prefill_only=True)
    prefill.submit("c", PROMPT + [9], prompt_len=10, prefill_only=True, max_tokens=2)
    prefill.run()
    assert prefill.reason("a") is FinishReason.LENGTH
    assert prefill.reason("b") is FinishReason.STOP
    assert prefill.reason("c") is FinishReason.LENGTH
    assert not prefill.offers
    assert prefill.scheduler.idle


def test_no_prefill_only_without_a_transfer():
    rig = Rig(card=msgspec.structs.replace(CARD, transport=""))
    rig.submit("a", PROMPT, prefill_only=True)
    rig.run()
    assert "no KV transfer" in (rig.outputs["a"][0].error or "")


def test_an_export_that_fails_is_an_error_and_holds_nothing():
    prefill = Rig()
    prefill.submit("a", PROMPT, prefill_only=True)
    batch = prefill.scheduler.plan(prefill.now)
    prefill.scheduler.commit([Sampled(5) for _ in batch], prefill.now)
    [export] = prefill.scheduler.effects()
    assert isinstance(export, Export)
    prefill.scheduler.export_failed(export, "no memory", prefill.now)
    prefill.report()
    [output] = prefill.outputs["a"]
    assert output.finish_reason is FinishReason.ERROR
    assert output.token_ids == []
    assert output.handoff is None
    assert prefill.scheduler.idle


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


# --- anything, in any order -------------------------------------------------------------------------


class TwoEngines(RuleBasedStateMachine):
    """A prefill and a decode engine with small pools, random work and random faults. The rigs check
    every token's KV as it is attended to; here, that every attempt ends once and with the right text."""

    def __init__(self) -> None:
        super().__init__()
        small = msgspec.structs.replace(CARD, total_blocks=10, max_model_len=34)
        self.prefill = Rig("p", card=small, max_running=3, handoff_ttl_s=5.0)
        self.decode = Rig("d", card=small, max_running=4, pull_timeout_s=2.0)
        self.prompts: dict[str, list[int]] = {}
        self.cancelled: set[str] = set()
        self.count = 0

    def name(self) -> str:
        self.count += 1
        return f"a{self.count}"

    @rule(
        prompt=st.lists(st.integers(2, 3), min_size=1, max_size=20),
        max_tokens=st.integers(1, 12),
        priority=st.integers(0, 1),
        where=st.sampled_from(["prefill", "decode"]),
        prefill_only=st.booleans(),
    )
    def submit(
        self, prompt: list[int], max_tokens: int, priority: int, where: str, prefill_only: bool
    ) -> None:
        name = self.name()
        self.prompts[name] = prompt
        rig = self.prefill if where == "prefill" else self.decode
        rig.submit(
            name,
            prompt,
            max_tokens=max_tokens,
            priority=priority,
            prefill_only=prefill_only and rig is self.prefill,
        )

    @rule()
    def hand_over(self) -> None:
        """Every handoff that was given goes to the decode engine."""
        for name, outputs in list(self.prefill.outputs.items()):
            last = outputs[-1]
            if last.handoff is not None and name + "+" not in self.prompts:
                tokens = self.prompts[name] + self.prefill.text(name)
                self.prompts[name + "+"] = tokens
                self.decode.submit(name + "+", tokens, prompt_len=len(tokens) - 1, handoff=last.handoff)

    @rule(steps=st.integers(1, 4))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.prefill.step()
            self.decode.step()

    @precondition(lambda self: self.decode.pulls)
    @rule(error=st.sampled_from([None, None, "cut off"]))
    def finish_pull(self, error: str | None) -> None:
        self.decode.finish_pull(self.prefill, error)

    @rule(seconds=st.sampled_from([0.5, 3.5, 6.0]))
    def wait(self, seconds: float) -> None:
        self.prefill.now += seconds
        self.decode.now += seconds

    @precondition(lambda self: self.prompts)
    @rule(choice=st.data())
    def cancel(self, choice: st.DataObject) -> None:
        name = choice.draw(st.sampled_from(sorted(self.prompts)))
        self.cancelled.add(name)
        self.prefill.scheduler.cancel(name, self.prefill.now)
        self.decode.scheduler.cancel(name, self.decode.now)

    @precondition(lambda self: self.prompts)
    @rule(choice=st.data())
    def release(self, choice: st.DataObject) -> None:
        name = choice.draw(st.sampled_from(sorted(self.prompts)))
        self.prefill.scheduler.release(name, self.prefill.now)

    @invariant()
    def right_text(self) -> None:
        for rig in (self.prefill, self.decode):
            for name in rig.outputs:
                text = rig.text(name)
                assert text == continued(self.prompts[name], len(text))

    def teardown(self) -> None:
        for _ in range(1000):
            if self.prefill.scheduler.idle and self.decode.scheduler.idle:
                break
            self.step(1)
            if self.decode.pulls:
                self.decode.finish_pull(self.prefill)
            self.wait(0.1)
        for name in self.prompts:
            ends = [
                output
                for rig in (self.prefill, self.decode)
                for output in rig.outputs[name]
                if output.finish_reason
            ]
            assert len(ends) == 1, name
            if name not in self.cancelled:
                assert ends[0].finish_reason in (FinishReason.LENGTH, FinishReason.PREFILLED)
        for rig in (self.prefill, self.decode):
            assert rig.scheduler.idle
            load = rig.scheduler.load()
            assert (load.used_blocks, load.prefill_tokens, load.held_handoffs) == (0, 0, 0)
            assert rig.cached == {rig.scheduler.pool.sequence_hash(b) for b in cached_blocks(rig)}


def cached_blocks(rig: Rig) -> list[int]:
    return list(rig.scheduler.pool._cached.values())


TestTwoEngines = TwoEngines.TestCase
TestTwoEngines.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
