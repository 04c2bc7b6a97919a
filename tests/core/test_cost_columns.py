"""A choice among the few workers that the columns find against a choice among all of them."""

from __future__ import annotations

import subprocess
import sys
from itertools import count
from random import Random

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from penstock.core import cost_columns
from penstock.core.costs import OUTPUT_SHARE, Query, costs
from penstock.core.disagg import Disagg, Path
from penstock.core.hashing import root_hash, sequence_hashes
from penstock.core.overlap_check import MIN_OBSERVATIONS
from penstock.core.placement import Placed, Placement
from penstock.core.policy import Decision
from penstock.core.prompt_work import PromptWork
from penstock.shapes import Attempt, Card, Load, ModelKey, Rates, Request, Role, Sampling
from tests import builders, cards

TOKENS = list(range(600))
ROLES = ([Role.AGGREGATED], [Role.PREFILL, Role.DECODE], list(Role))
FORMATS = ([(16, "l")], [(16, "l"), (32, "l")], [(16, "l"), (16, "other"), (32, "l")])

NOW = 100.0


class Pair:
    """Two placements that are told the same: one looks at all workers, the other at few."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        disagg = rng.choice(("auto", "auto", "always", "never"))
        slo_itl_ms = rng.choice((0.0, 0.0, 20.0, 60.0))
        self.all = Placement("kv", disagg, Random(1), slo_itl_ms)
        self.few = Placement("kv", disagg, Random(1), slo_itl_ms, many_workers=1)
        self.alike = rng.random() < 0.3  # many cost the same
        self.seqs = count(1)
        roles, formats = rng.choice(ROLES), rng.choice(FORMATS)
        self.cards = [self.card(number, roles, formats) for number in range(rng.randrange(12, 60))]
        for card in self.cards:
            load = self.load()
            for it in (self.all, self.few):
                it.up(card, load)
        for card in rng.sample(self.cards, rng.randrange(12)):
            size = card.engine.block_size
            hashes = sequence_hashes(TOKENS, size, root_hash("m"))[: rng.randrange(600 // size + 1)]
            distrusted = rng.random() < 0.1
            for it in (self.all, self.few):
                it.cache_changed(card.instance_id, hashes, [], False)
                for _ in range(MIN_OBSERVATIONS if distrusted else 0):
                    verdict = it.overlap_check.observe(card.instance_id, 1000, 0, 16)
                    it._judged(card.instance_id, verdict)
                if distrusted:
                    it.approximate.used(card.instance_id, hashes[:10])
        for card in rng.sample(self.cards, rng.randrange(12)):
            self.change(card)

    def card(self, number: int, roles: list[Role], formats: list[tuple[int, str]]) -> Card:
        block_size, layout = self.rng.choice(formats)
        return cards.card(
            f"w{number}",
            self.rng.choice(roles),
            block_size=block_size,
            layout=layout,
            transport="tcp",
            total_blocks=1000,
            max_running=self.rng.choice((0, 8, 256)),
        )

    def load(self) -> Load:
        rng = self.rng
        if self.alike:
            return Load(total_blocks=1000, prefill_tokens=rng.choice((0, 0, 0, 500)))
        queued = rng.choice((0, 0, rng.randrange(20_000)))
        return Load(
            running=rng.randrange(40),
            waiting=rng.choice((0, 0, rng.randrange(10))),
            prefill_tokens=queued,
            used_blocks=rng.choice((rng.randrange(1000), 1000, 980)),
            total_blocks=1000,
            context_tokens=rng.randrange(100_000),
            held_handoffs=rng.choice((0, 3)),
            rates=Rates(
                *(rng.uniform(0.5, 2.0) * value for value in (8.0, 0.05, 0.03, 0.5, 0.01, 1e-6, 2e-5))
            ),
            steps=rng.randrange(3),
            output_tokens=rng.choice((0.0, rng.uniform(1.0, 500.0))),
            prefill_context_tokens=queued * rng.randrange(1000),
        )

    def change(self, card: Card) -> None:
        """Its load, in one of the ways in which a frontend comes to know of it."""
        kind, load, name, seq = self.rng.randrange(5), self.load(), card.instance_id, next(self.seqs)
        now = NOW - self.rng.choice((0.0, 0.01, 0.1, 5.0))
        for it in (self.all, self.few):
            other = placed(f"other-{seq}")
            attempt = Attempt(f"{seq}", f"{seq}", TOKENS, len(TOKENS), Sampling(max_tokens=10))
            match kind:
                case 0:
                    it.reported(name, 0, load, now)
                case 1 | 2:
                    it.sent(other, name, seq, attempt, now)
                    if kind == 2:
                        it.reported(name, seq, load, now)
                case 3:
                    it.down(name)
                    it.up(card, load)
                case _:
                    it.book(other, Decision(name, "p", Path.REMOTE, [], 0.0, 0), TOKENS)

    def decisions(self) -> tuple[Decision | None, Decision | None, Placed]:
        """For one request, the choice among all and that among few, and what the second one noted."""
        rng = self.rng
        sampling = Sampling(max_tokens=300, prompt_logprobs=0 if rng.random() < 0.1 else None)
        tokens = TOKENS[: rng.randrange(1, 600)] + [0] * rng.choice((0, 0, 20_000))
        handoff = None
        if rng.random() < 0.3:
            handoff = builders.handoff(num_tokens=len(tokens), layout="l", block_size=16)
        requests = [placed("r", sampling) for _ in range(2)]
        waiting = rng.choice((0, 0, 1, 100))
        for request in requests:
            request.others_waiting = waiting
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cost_columns, "KEPT", rng.choice((1, cost_columns.KEPT)))
            chosen = [
                it.choose(request, tokens, self.cards, handoff, NOW)
                for it, request in zip((self.all, self.few), requests, strict=True)
            ]
        assert requests[0].overlap_tokens == requests[1].overlap_tokens
        assert requests[0].holder == requests[1].holder
        return chosen[0], chosen[1], requests[1]


def placed(request_id: str, sampling: Sampling = Sampling(max_tokens=10)) -> Placed:  # noqa: B008
    return Placed(Request(request_id, ModelKey("m", "r"), TOKENS, sampling))


def equally_cheap(decision: Decision) -> set[str]:
    """Who might have been drawn to decode."""
    least = pytest.approx(decision.plans[0].total_ms, rel=1e-12)
    return {plan.instance_id for plan in decision.plans if plan.total_ms == least}


def equally_soon(decision: Decision) -> set[str]:
    """Who might have been drawn to compute the prompt."""
    formats = {it.candidate.instance_id: it.candidate.kv_format for it in decision.prefills}
    first = decision.chosen.first
    assert first is not None
    return {
        it.candidate.instance_id
        for it in decision.prefills
        if it.ready_ms == pytest.approx(first.ready_ms, rel=1e-12)
        and formats[it.candidate.instance_id] == first.candidate.kv_format
    }


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 50_000), st.floats(1, 1000), st.floats(1, 100))
def test_columns_have_the_terms_that_costs_gives_for_each_worker(
    seed: int, tokens: int, output_tokens: float, slo_itl_ms: float
) -> None:
    pair = Pair(Random(seed))
    usual = PromptWork(tokens // 2, tokens * tokens // 4)
    query = Query(tokens, expected_output_tokens=output_tokens, slo_itl_ms=slo_itl_ms, usual_prompt=usual)
    overlaps = [pair.rng.randrange(2 + tokens // it.engine.block_size) for it in pair.cards]
    columns = pair.few._columns
    assert columns is not None
    for _ in range(2):  # what has changed since a choice is in the next one
        columns.few(query, pair.cards, {}, "", Disagg.AUTO, Random(0), NOW)
        for card in pair.rng.sample(pair.cards, pair.rng.choice((0, 1, 5))):
            pair.change(card)
    columns._look_up(pair.cards)
    groups = columns._members(np.array(overlaps, float)[columns._order])
    assert sorted(place for members in groups for place in members.places) == list(range(len(pair.cards)))
    for members in groups:
        terms = cost_columns._costs(query, members, NOW)._asdict()
        if not members.group.role.decodes:
            assert (terms.pop("later_ms"), terms.pop("inflicted_ms")) == (0.0, 0.0)
        for number, place in enumerate(members.places):
            card = pair.cards[place]
            candidate = pair.few._candidate(card, {card.instance_id: overlaps[place]}, NOW)
            assert (candidate.kv_format, candidate.role) == members.group[:2]
            expected = costs(query, candidate)
            wanted = {name: getattr(expected, name) for name in terms if name != "later_ms"}
            if candidate.role.decodes:
                wanted["later_ms"] = OUTPUT_SHARE * expected.decode_ms + expected.missed_ms
            for name, column in terms.items():
                rel = 1e-9 if name == "later_ms" else 1e-12
                assert column[number] == pytest.approx(wanted[name], rel=rel), name


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_choice_among_few_is_one_that_a_choice_among_all_could_be(seed: int) -> None:
    pair = Pair(Random(seed))
    for _ in range(3):
        everybody, few, noted = pair.decisions()
        if everybody is None:
            assert few is None
            return
        assert few is not None
        assert few.decode in equally_cheap(everybody)
        if few.decode == everybody.decode:
            assert few.path is everybody.path
            assert (few.wait_ms, few.ahead) == (everybody.wait_ms, everybody.ahead)
            if few.prefill != everybody.prefill:
                assert few.prefill in equally_soon(everybody)
        assert few.query == everybody.query
        assert len(few.plans) + few.plans_left_out == len(everybody.plans)
        assert few.compared(noted.holder) == everybody.compared(noted.holder)
        figures = {plan.instance_id: plan.total_ms for plan in everybody.plans}
        assert {plan.instance_id: plan.total_ms for plan in few.plans}.items() <= figures.items()
        pair.change(pair.rng.choice(pair.cards))


def test_workers_that_cost_the_same_are_drawn_alike() -> None:
    fleet = [cards.card(f"w{number}", Role.AGGREGATED) for number in range(100)]
    it = Placement("kv", "auto", Random(0), many_workers=64)
    for card in fleet:
        it.up(card, Load(total_blocks=100))
    drawn = set()
    for _ in range(300):
        decision = it.choose(placed("r"), TOKENS, fleet, None, NOW)
        assert decision is not None
        drawn.add(decision.decode)
    assert len(drawn) > 80


def test_worker_whose_snapshot_has_only_begun_is_not_chosen() -> None:
    fleet = [cards.card(f"w{number}", Role.AGGREGATED) for number in range(70)]
    it = Placement("kv", "auto", Random(0), many_workers=64)
    for card in fleet:
        it.up(card, Load(total_blocks=100))
    hashes = sequence_hashes(TOKENS, 16, root_hash("m"))
    it.snapshot("comes", hashes, first=True)
    it.cache_changed("w33", hashes[:30], [], False)
    request = placed("r")
    decision = it.choose(request, TOKENS, fleet, None, NOW)
    assert decision is not None
    assert decision.decode == "w33"
    assert request.holder == "comes"


def test_dry_run_in_a_large_pool_tells_the_next_decision() -> None:
    fleet = [cards.card(f"w{number}", Role.AGGREGATED) for number in range(100)]
    it = Placement("kv", "auto", Random(0), many_workers=64)
    for card in fleet:
        it.up(card, Load(total_blocks=100))
    for _ in range(20):
        foreseen = it.foresee(placed("r"), TOKENS, fleet, NOW)
        assert it.choose(placed("r"), TOKENS, fleet, None, NOW) == foreseen


def test_frontend_with_few_workers_does_not_import_numpy() -> None:
    script = (
        "import sys, random; from penstock.core.placement import Placement, Load;"
        "from tests.cards import card; it = Placement('kv', 'auto', random.Random(0));"
        "[it.up(card(f'w{n}'), Load()) for n in range(63)]; assert 'numpy' not in sys.modules;"
        "it.up(card('w63'), Load()); assert 'numpy' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
