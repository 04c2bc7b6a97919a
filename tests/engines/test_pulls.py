from __future__ import annotations

import logging

import msgspec
import pytest

from penstock.core.hashing import last_hash, root_hash
from penstock.engines.pulls import PULL_GRACE_S
from penstock.shapes import FinishReason
from tests.engines.rig import BLOCK_SIZE, CARD, PROMPT, Rig, continued, decode, prefilled


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
    assert all(not pull.block_ids for pull in rig.pulls)
    assert len(rig.pulls) == (reason != "transport")  # the holder may let go
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


def test_an_engine_without_a_transfer_recomputes():
    handoff = msgspec.structs.replace(prefilled(Rig()), transport="")
    rig = Rig(card=msgspec.structs.replace(CARD, transport=""))
    decode(rig, handoff)
    rig.run()
    assert rig.text("d") == continued(PROMPT, 8)[1:]
    assert not rig.pulls
