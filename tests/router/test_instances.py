"""What is known of an instance belongs to one incarnation: not to its link, nor to whoever comes next."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from penstock.core.progress import ProgressLimits
from penstock.core.settings import RouterSettings
from penstock.errors import ProtocolError
from penstock.shapes import Load, Role
from tests.cluster import WAIT_S, Cluster, cluster

AGGREGATED = Role.AGGREGATED
PROMPT = list(range(100))
SLOW = {"cost_model": "qwen3-32b/h200/tp2", "speedup": 2.0}  # about 6 ms a step
SETTINGS = RouterSettings(tick_s=0.02, progress=ProgressLimits(stuck_s=0.3, first_s=0.0))


def link_of(it: Cluster, instance_id: str) -> Any:
    return it.router.fleet._links[instance_id]


def avoids(it: Cluster, instance_id: str) -> bool:
    """Whether any request avoids this instance."""
    return any(instance_id in record.life.avoided for record in it.router.dispatcher.records.values())


def state(it: Cluster, instance_id: str) -> str:
    """Empty for one that is not known."""
    return next((view.state for view in it.router.instances() if view.instance_id == instance_id), "")


async def until_state(it: Cluster, instance_id: str, *wanted: str) -> None:
    async with asyncio.timeout(WAIT_S):
        while state(it, instance_id) not in wanted:
            await asyncio.sleep(0.001)


async def test_the_end_of_an_old_link_does_not_touch_the_new_incarnation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(tmp_path, {"a0": AGGREGATED}, SETTINGS, SLOW) as it:
        worker, old = it.workers["a0"], link_of(it, "a0")
        before, _ = it.ask(PROMPT, max_tokens=100, seed=1)
        await before.wait_tokens(3)
        may_end, leave = asyncio.Event(), old.client._leave

        async def slowly(session: Any) -> None:  # as over a line that takes nothing
            await may_end.wait()
            await leave(session)

        monkeypatch.setattr(old.client, "_leave", slowly)
        it.start("a0", AGGREGATED, **SLOW)  # another process, while the first one still runs
        async with asyncio.timeout(WAIT_S):
            while link_of(it, "a0") is old:
                await asyncio.sleep(0.001)
        await until_state(it, "a0", "ready")
        assert len(await before.tokens()) == 100  # it went on at the new one
        after, _ = it.ask(PROMPT, max_tokens=100, seed=2)
        await after.wait_tokens(3)
        assert "penstock_retries_total 1.0" in it.metrics.render().decode()
        may_end.set()
        await asyncio.wait_for(asyncio.gather(old._running, return_exceptions=True), WAIT_S)
        assert state(it, "a0") == "ready"
        assert len(await after.tokens()) == 100
        assert "penstock_retries_total 1.0" in it.metrics.render().decode()
        await worker.die()


async def test_an_instance_is_forgotten_in_the_turn_in_which_its_link_comes_up(tmp_path: Path) -> None:
    """Discovery's word comes first, and the link's task hears of it in its next turn only."""
    async with cluster(tmp_path, {"a0": AGGREGATED}, SETTINGS, SLOW) as it:
        link, worker = link_of(it, "a0"), it.workers.pop("a0")
        card = it.router.membership.members["a0"].card
        await worker.die()
        await until_state(it, "a0", "connecting")
        link.close()
        with pytest.raises(ProtocolError, match="no longer lists"):
            link.on_up(card, Load())
        assert state(it, "a0") == "connecting"


async def test_requests_go_back_to_an_instance_that_is_ready_again(tmp_path: Path) -> None:
    """Also those that left it, and have not got on since."""
    async with cluster(tmp_path, {"a0": AGGREGATED, "a1": AGGREGATED}, SETTINGS, SLOW) as it:
        answers = [it.ask(PROMPT, max_tokens=100, seed=seed)[0] for seed in range(4)]
        for answer in answers:
            await answer.wait_tokens(3)
        with it.workers["a1"].stuck():
            await it.workers.pop("a0").die()
            async with asyncio.timeout(WAIT_S):
                while not any(
                    "a0" in record.life.avoided for record in it.router.dispatcher.records.values()
                ):
                    await asyncio.sleep(0.001)
            it.start("a0", AGGREGATED, **SLOW)
            await until_state(it, "a0", "ready")
            assert not avoids(it, "a0")
            for answer in answers:
                assert len(await answer.tokens()) == 100
        await until_state(it, "a1", "ready")


async def test_an_engine_that_stands_still_does_so_after_a_reset_of_its_link(tmp_path: Path) -> None:
    async with cluster(tmp_path, {"a0": AGGREGATED, "a1": AGGREGATED}, SETTINGS, SLOW) as it:
        answers = [it.ask(PROMPT, max_tokens=60, seed=seed)[0] for seed in range(8)]
        for answer in answers:
            await answer.wait_tokens(2)
        with it.workers["a0"].stuck():
            await until_state(it, "a0", "quarantined")
            link_of(it, "a0").client.cut("cut by the test")
            await until_state(it, "a0", "connecting")
            await until_state(it, "a0", "ready", "quarantined")
            assert state(it, "a0") == "quarantined"
            for answer in answers:
                assert len(await answer.tokens()) == 60
        await until_state(it, "a0", "ready")
        await it.wait_idle()


async def test_a_reset_link_does_not_put_a_healthy_engine_under_suspicion(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with cluster(tmp_path, {"a0": AGGREGATED}, SETTINGS, SLOW) as it:
        answer, _ = it.ask(PROMPT, max_tokens=100)
        await answer.wait_tokens(3)
        link_of(it, "a0").client.cut("cut by the test")
        assert len(await answer.tokens()) == 100
        assert not [record for record in caplog.records if "quarantined" in record.getMessage()]
