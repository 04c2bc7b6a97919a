"""A scheduler around a model small enough to check every token, and the KV behind it, at every step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from xxhash import xxh3_64_intdigest

from penstock.engines.batch import BatchRow, Sampled
from penstock.engines.effects import Export, Pull, Retract
from penstock.engines.scheduler import Scheduler
from penstock.engines.settings import SchedulerSettings
from penstock.ports import Pulled
from penstock.shapes import (
    Attempt,
    AttemptReport,
    EngineCard,
    FinishReason,
    Handoff,
    Incarnation,
    ModelCard,
    Output,
    Sampling,
)

BLOCK_SIZE = 4
EOS = 1
VOCAB = 50

CARD = EngineCard(
    name="test",
    model=ModelCard("m", max_model_len=64, vocab_size=VOCAB, eos_token_ids=[EOS]),
    block_size=BLOCK_SIZE,
    total_blocks=32,
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
            holder=Incarnation(name, 7),
            **{"max_running": 8, "max_batch_tokens": 16, **limits},  # type: ignore[arg-type]
        )
        self.scheduler = Scheduler(card, settings)
        self.kv: list[list[bytes]] = [[b""] * BLOCK_SIZE for _ in range(card.total_blocks)]
        self.now = 100.0
        self.forced: dict[str, int] = {}  # attempt -> token instead of the model's
        self.outputs: dict[str, list[Output]] = defaultdict(list)
        self.reports: dict[str, AttemptReport] = {}
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
        for report in step.ended:
            assert self.reason(report.attempt_id) is not None, "a report before the last output"
            assert report.attempt_id not in self.reports, "a second report"
            self.reports[report.attempt_id] = report
        assert step.load == self.scheduler.load()
        assert step.load.used_blocks == self.scheduler.pool.used_blocks
        self.scheduler.pool.check()
        self.scheduler.check_references()

    def run(self, limit: int = 500) -> None:
        """Turn until there is nothing to compute."""
        for _ in range(limit):
            if not self.step():
                return
        raise AssertionError("it does not end")

    def _compute(self, row: BatchRow) -> Sampled | None:
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
