"""Index, load book and overlap check behind one door."""

from __future__ import annotations

import random

import pytest

from penstock.core.hashing import root_hash, sequence_hashes
from penstock.core.overlap_check import MIN_OBSERVATIONS, Cause
from penstock.core.placement import Placed, Placement, explain
from penstock.core.policy import Decision, Path
from penstock.core.prefix_index import most_blocks
from penstock.errors import ProtocolError
from penstock.shapes import Attempt, Card, Handoff, Load, ModelKey, Request, Role, Sampling
from tests import builders, cards

TOKENS = list(range(160))
HASHES = sequence_hashes(TOKENS, 16, root_hash("m"))


def card(instance_id: str, role: Role = Role.DECODE, block_size: int = 16) -> Card:
    return cards.card(instance_id, role, block_size=block_size, total_blocks=1000)


def placement(*cards: Card, policy: str = "kv", disagg: str = "auto") -> Placement:
    it = Placement(policy, disagg, random.Random(0))
    for each in cards:
        it.up(each, Load(total_blocks=1000))
    return it


def placed(request_id: str = "r", salt: str = "") -> Placed:
    return Placed(Request(request_id, ModelKey("m", "r"), TOKENS, Sampling(max_tokens=10), cache_salt=salt))


def attempt(handoff: Handoff | None = None) -> Attempt:
    return Attempt("r.1", "r", TOKENS, len(TOKENS), Sampling(max_tokens=10), handoff=handoff)


def choose(it: Placement, request: Placed, *cards: Card, handoff: Handoff | None = None) -> Decision:
    decision = it.choose(request, TOKENS, list(cards), handoff, 0.0)
    assert decision is not None
    it.book(request, decision, TOKENS)
    return decision


def test_goes_where_the_blocks_are() -> None:
    cards = [card("d0"), card("d1"), card("d2")]
    it = placement(*cards)
    it.cache_changed("d1", HASHES, [], False)
    assert choose(it, placed(), *cards).decode == "d1"
    it.cache_changed("d1", [], HASHES[:1], False)  # without its first block the rest is of no use
    it.cache_changed("d2", HASHES[:3], [], False)
    assert choose(it, placed(), *cards).decode == "d2"


def test_a_cache_salt_keeps_prompts_apart() -> None:
    cards = [card("d0"), card("d1")]
    it = placement(*cards)
    it.cache_changed("d1", HASHES, [], False)
    assert {plan.here.candidate.overlap_blocks for plan in choose(it, placed(salt="s"), *cards).plans} == {
        0
    }


def test_block_sizes_may_differ_between_instances() -> None:
    cards = [card("d0"), card("d1", block_size=32)]
    it = placement(*cards)
    it.cache_changed("d1", sequence_hashes(TOKENS, 32, root_hash("m")), [], False)
    decision = choose(it, placed(), *cards)
    assert decision.decode == "d1"
    assert {plan.instance_id: plan.here.candidate.overlap_blocks for plan in decision.plans} == {
        "d0": 0,
        "d1": 5,
    }


def test_an_instance_that_went_down_is_forgotten() -> None:
    cards = [card("d0"), card("d1")]
    it = placement(*cards)
    it.cache_changed("d1", HASHES, [], False)
    it.down("d1")
    it.up(cards[1], Load(total_blocks=1000))
    assert {plan.here.candidate.overlap_blocks for plan in choose(it, placed(), *cards).plans} == {0}


def test_what_was_sent_counts_until_the_worker_has_seen_it() -> None:
    cards = [card("d0"), card("d1")]
    it = placement(*cards)
    first = placed("r0")
    instance = choose(it, first, *cards).decode
    it.sent(first, instance, 1, attempt(), 0.0)
    assert choose(it, placed("r1"), *cards).decode != instance
    assert it.load(instance).waiting == 0  # what it reported itself stays apart


def test_a_decode_worker_is_booked_while_its_prompt_is_prefilled() -> None:
    cards = [card("p0", Role.PREFILL), card("d0"), card("d1")]
    it = placement(*cards, disagg="always")
    first = placed("r0")
    booked = choose(it, first, *cards)
    assert booked.prefill == "p0"
    assert choose(it, placed("r1"), *cards).decode != booked.decode
    it.ended(first, 0)
    loads = {plan.instance_id: plan.here.decode_ms for plan in choose(it, placed("r2"), *cards).plans}
    assert loads[booked.decode] < max(loads.values())


def held(block_size: int = 16, layout: str = "", transport: str = "") -> Handoff:
    """The KV of TOKENS, as the cards' engines can read it."""
    return builders.handoff(
        num_tokens=len(TOKENS), block_size=block_size, layout=layout, transport=transport
    )


def test_a_held_prompt_goes_to_a_decode_worker_that_reads_its_kv() -> None:
    cards = [card("p1", Role.PREFILL), card("d0", block_size=32), card("d1")]
    it = placement(*cards)
    it.cache_changed("d0", sequence_hashes(TOKENS, 32, root_hash("m")), [], False)  # otherwise the best
    decision = choose(it, placed(), *cards, handoff=held())
    assert (decision.path, decision.prefill, decision.decode) == (Path.REMOTE, None, "d1")


@pytest.mark.parametrize("handoff", [held(block_size=8), held(layout="other"), held(transport="other")])
def test_where_nobody_reads_the_held_kv_the_prompt_is_placed_anew(handoff: Handoff) -> None:
    cards = [card("p1", Role.PREFILL), card("d0"), card("d1", block_size=32)]
    it = placement(*cards, disagg="always")
    decision = choose(it, placed(), *cards, handoff=handoff)
    assert (decision.path, decision.prefill) == (Path.REMOTE, "p1") or decision.decode == "d1"
    decision = choose(it, placed(), cards[1], handoff=handoff)
    assert (decision.path, decision.prefill, decision.decode) == (Path.LOCAL, None, "d0")


def test_lasting_differences_lose_the_trust_and_agreement_wins_it_back() -> None:
    only = card("d0")
    it = placement(only)
    verdicts = []
    for number in range(200):
        request = placed(f"r{number}")
        choose(it, request, only)
        it.sent(request, "d0", number + 1, attempt(), 0.0)
        it.cached(request, "d0", 128)  # the engine had it cached; no event ever said so
        verdicts.append(it.verdicts())
    ((instance_id, verdict),) = (each for told in verdicts for each in told)
    assert (instance_id, verdict.cause) == ("d0", Cause.EVENTS_OFF)
    assert verdicts.index([(instance_id, verdict)]) == MIN_OBSERVATIONS - 1


def test_pulled_blocks_are_not_held_against_the_index() -> None:
    only = card("d0")
    it = placement(only)
    request = placed()
    choose(it, request, only)
    it.sent(request, "d0", 1, attempt(builders.handoff(num_tokens=160)), 0.0)
    assert it.cached(request, "d0", 160) is None


def test_an_answer_is_compared_once_and_only_from_where_it_runs() -> None:
    cards = [card("d0"), card("d1")]
    it = placement(*cards)
    request = placed()
    choose(it, request, *cards)
    it.sent(request, "d0", 1, attempt(), 0.0)
    assert it.cached(request, "d1", 0) is None
    assert it.cached(request, "d0", 0) == 0
    assert it.cached(request, "d0", 0) is None


def test_a_prompts_last_block_is_never_foreseen_as_cached() -> None:
    only = card("d0")
    it = placement(only)
    it.cache_changed("d0", HASHES, [], False)  # all of the prompt, to the last token
    request = placed()
    choose(it, request, only)
    it.sent(request, "d0", 1, attempt(), 0.0)
    assert it.cached(request, "d0", 144) == 144


def test_the_log_line_has_every_candidate_and_the_reason() -> None:
    cards = [card("p0", Role.PREFILL), card("d0"), card("d1")]
    line = explain("r", choose(placement(*cards), placed(), *cards), {"d9"})
    for part in ("routing decision", "[d0 ", "[d1 ", "overlap=", "queue_ms=", "transfer_ms=", "avoided=d9"):
        assert part in line


def test_a_burst_with_one_prefix_to_an_empty_worker_is_no_reason_for_distrust() -> None:
    """All but the first find what nobody could foresee; the events tell of it by then."""
    cards = [card("d0")]
    it = placement(*cards)
    burst = [placed(f"r{number}") for number in range(2 * MIN_OBSERVATIONS)]
    for seq, each in enumerate(burst):
        choose(it, each, *cards)
        it.sent(each, "d0", seq, attempt(), 0.0)
    it.cache_changed("d0", HASHES, [], False)
    for each in burst:
        assert it.cached(each, "d0", 144) == 0
    assert not it.verdicts()


def test_blocks_that_were_not_there_cannot_go() -> None:
    it = placement(card("d0"))
    it.cache_changed("d0", HASHES, [], False)
    it.cache_changed("d0", [], HASHES[:2], False)
    with pytest.raises(ProtocolError, match=r"step\.removed: 2 blocks"):
        it.cache_changed("d0", [], HASHES[:3], False)


def test_an_instance_has_no_more_blocks_than_its_pool_could_hold() -> None:
    it = placement(card("d0"), card("d1"))
    most = most_blocks(1000)
    it.cache_changed("d0", range(most), [], False)
    it.cache_changed("d0", [most], [0], False)  # one for another
    it.cache_changed("d1", range(most), [], False)
    with pytest.raises(ProtocolError, match=rf"step\.stored: {most + 1} blocks .* {most}"):
        it.cache_changed("d0", [most + 1], [], False)


def test_an_instance_that_says_on_connecting_that_it_has_more_than_its_pool_is_distrusted() -> None:
    it = placement()
    most = most_blocks(1000)
    it.snapshot("d0", range(most + 1), first=True)
    it.up(card("d0"), Load(total_blocks=1000))
    assert it.overlap_check.cause("d0") is Cause.UNSEEN_EVICTIONS
    assert it.index.held("d0") == 0
    it.cache_changed("d0", range(most), [most + 5], False)  # it goes on, as often as that happens
    it.cache_changed("d0", [most], [], False)
    assert it.index.held("d0") == 0
    assert [verdict.cause for _, verdict in it.verdicts()] == [Cause.UNSEEN_EVICTIONS]


def test_a_distrusted_instance_counts_by_what_was_sent_there() -> None:
    only = card("d0")
    it = placement(only)
    for number in range(MIN_OBSERVATIONS):
        request = placed(f"r{number}")
        choose(it, request, only)
        it.sent(request, "d0", number + 1, attempt(), 0.0)
        it.cached(request, "d0", 128)
    assert it.overlap_check.cause("d0") is Cause.EVENTS_OFF
    it.ended(request, 10, range(1000, 1021))
    longer = Placed(Request("r", ModelKey("m", "r"), [*TOKENS, *range(1000, 1100)], Sampling(max_tokens=1)))
    decision = it.choose(longer, longer.request.token_ids, [only], None, 0.0)
    assert decision is not None
    assert decision.plans[0].here.candidate.overlap_blocks == 180 // 16, "what ended there since"
    it.sent(longer, "d0", 50, attempt(), 0.0)
    it.cached(longer, "d0", 0)
    output = range(2000, 2013)
    text = [*longer.request.token_ids, *output]  # 273 tokens, the last of them without KV
    it.ended(longer, 13, output)
    decision = it.choose(placed(), [*text, 1, 2, 3], [only], None, 0.0)
    assert decision is not None
    assert decision.plans[0].here.candidate.overlap_blocks == 272 // 16


def test_an_engine_without_events_counts_by_what_was_sent_there_from_the_beginning() -> None:
    only = cards.card("d0", Role.DECODE, block_size=16, total_blocks=1000, kv_events=False)
    it = placement(only)
    request = placed()
    choose(it, request, only)
    it.sent(request, "d0", 1, attempt(), 0.0)
    assert it.cached(request, "d0", 0) == 0
    (plan,) = choose(it, placed("r1"), only).plans
    assert plan.here.candidate.overlap_blocks == 10
    it.down("d0")
    it.up(only, Load(total_blocks=1000))
    assert choose(it, placed("r2"), only).plans[0].here.candidate.overlap_blocks == 0


def test_a_snapshot_in_parts_begins_anew_with_its_first() -> None:
    it = placement()
    it.snapshot("a0", [1, 2], first=True)
    it.snapshot("a0", [3], first=False)
    assert it.index.held("a0") == 3
    it.snapshot("a0", [], first=True)  # its link broke in between
    assert it.index.held("a0") == 0
    it.down("a0")
    with pytest.raises(KeyError):
        it.index.held("a0")
