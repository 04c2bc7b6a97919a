from __future__ import annotations

import msgspec
import pytest

from penstock.core.hashing import last_hash, root_hash
from penstock.engines.batch import Sampled
from penstock.engines.effects import Export
from penstock.engines.handoffs import RETRACT_RETRY_S
from penstock.shapes import FinishReason, Incarnation
from tests.engines.rig import BLOCK_SIZE, CARD, EOS, PROMPT, Rig, prefilled


def test_a_handoff_says_what_is_held():
    prefill = Rig("p0")
    handoff = prefilled(prefill)
    assert (handoff.handoff_id, handoff.holder) == ("p", Incarnation("p0", 7))
    assert (handoff.num_tokens, handoff.block_size, handoff.ttl_s) == (10, BLOCK_SIZE, 30.0)
    assert (handoff.transport, handoff.address, handoff.params) == ("test", "address", b"params")
    assert handoff.last_hash == last_hash(PROMPT, BLOCK_SIZE, root_hash("m"))
    assert prefill.scheduler.load().held_handoffs == 1
    assert prefill.scheduler.load().used_blocks == 3
    assert not prefill.scheduler.idle


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
    prefill.submit("c", [*PROMPT, 9], prompt_len=10, prefill_only=True, max_tokens=2)
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


def test_a_prompt_that_waits_for_blocks_goes_once_it_can_share_those_that_are_held():
    prefill = Rig(card=msgspec.structs.replace(CARD, total_blocks=6))
    prompt = list(range(2, 18))
    prefill.submit("a", prompt, prefill_only=True)
    prefill.submit("b", prompt, prefill_only=True)
    prefill.run()
    assert prefill.reason("a") is prefill.reason("b") is FinishReason.PREFILLED
    assert prefill.scheduler.load().used_blocks == 4
