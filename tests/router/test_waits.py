"""How long requests are predicted to wait, against how long they do: whole graphs on virtual time.

Each load is served twice: once without a bound, to see how long its requests really wait, and once with the
bound of a frontend as it comes.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from random import Random

import pytest

from penstock.core.admission import AdmissionSettings
from penstock.core.wait_prediction import ACCEPT_SHARE
from tests.virtual_cluster import Asked, Frontend, VirtualCluster, refused, served

BOUND_S = AdmissionSettings().max_wait_ms / 1e3
UNBOUNDED_MS = 1e9
EVERYBODY = 1e6  # places
PAUSE_S = 2.0


@dataclass(frozen=True)
class Burst:
    """Requests that all come at the same moment, to one worker."""

    count: int
    prompt_tokens: int
    max_tokens: int
    stop_after: int = 0  # tokens; 0: at max_tokens
    max_running: int = 256
    cost_model: str = "qwen3-8b/h200/tp1"
    first: list[int] = field(
        default_factory=lambda: [1]
    )  # sizes of bursts before it, for all to be measured

    def serve(self, max_wait_ms: float) -> list[Asked]:
        """What became of it."""
        cluster = VirtualCluster(1, max_running=self.max_running, cost_model=self.cost_model)
        frontend = cluster.frontend(max_wait_ms=max_wait_ms, max_queued=EVERYBODY)
        asked: list[Asked] = []

        async def story() -> None:
            for count in self.first:
                self._ask(frontend, count)
                await frontend.idle()
                await asyncio.sleep(PAUSE_S)
            asked.extend(self._ask(frontend, self.count))
            await frontend.idle()

        cluster.run(story)
        return asked

    def _ask(self, frontend: Frontend, count: int) -> list[Asked]:
        ask = frontend.ask
        return [ask(self.prompt_tokens, self.max_tokens, stop_after=self.stop_after) for _ in range(count)]


BURSTS = {
    "short answers": Burst(1100, 160, 4),
    "short answers of a worker that has measured itself": Burst(1100, 160, 4, first=[20]),
    "short answers, again": Burst(1100, 160, 4, first=[1100]),
    "very short": Burst(3000, 20, 1),
    "all end at once": Burst(1500, 8, 64),
    "all end at once, again": Burst(1500, 8, 64, first=[600]),
    "long answers": Burst(700, 160, 200),
    "they could be long but are not": Burst(900, 160, 4096, stop_after=30, first=[1, 200, 200]),
    "long prompts": Burst(80, 4000, 4),
    "few places": Burst(350, 500, 64, max_running=32),
    "a larger model": Burst(900, 160, 4, cost_model="qwen3-32b/h200/tp2"),
}


@pytest.mark.parametrize("name", BURSTS)
def test_burst_that_ends_within_the_bound_is_served(name: str) -> None:
    burst = BURSTS[name]
    assert max(it.ttft_s for it in burst.serve(UNBOUNDED_MS)) < ACCEPT_SHARE * BOUND_S
    assert not refused(burst.serve(BOUND_S * 1e3))


# Half as many again as can be served in time: who lets in too many is seen.
LONGER_BURSTS = {
    "short answers": Burst(3600, 160, 4, first=[20, 20]),
    "short answers, again": Burst(3600, 160, 4, first=[3000]),
    "long answers": Burst(1200, 160, 200, first=[600]),
    "all end at once": Burst(5800, 8, 64, first=[600]),
    "long prompts": Burst(140, 4000, 4, first=[80]),
    "few places": Burst(600, 500, 64, max_running=32, first=[350]),
}


@pytest.mark.parametrize("name", LONGER_BURSTS)
def test_longer_burst_is_cut_about_where_waits_exceed_the_bound(name: str) -> None:
    burst = LONGER_BURSTS[name]
    waits = [it.ttft_s for it in served(burst.serve(UNBOUNDED_MS))]
    in_time = sum(wait < ACCEPT_SHARE * BOUND_S for wait in waits)
    let_in = served(burst.serve(BOUND_S * 1e3))
    assert 1.25 * in_time < burst.count
    assert 0.75 * in_time < len(let_in) < 1.25 * in_time
    assert max(it.ttft_s for it in let_in) < 1.2 * BOUND_S


def test_no_request_is_refused_before_a_worker_has_measured_anything() -> None:
    """Not a step was ever taken here: how long a wait would be is anybody's guess."""
    burst = Burst(2000, 160, 4, first=[])
    assert not refused(burst.serve(BOUND_S * 1e3))


def test_fresh_frontend_predicts_from_what_workers_measured() -> None:
    """It has seen no answer yet; how long they are, and what steps take, workers tell it."""
    cluster = VirtualCluster(1)
    old = cluster.frontend("old", max_wait_ms=UNBOUNDED_MS, max_queued=EVERYBODY)
    let_in: list[Asked] = []

    async def story() -> None:
        for _ in range(300):
            old.ask(160, 4096, stop_after=6)
        await old.idle()
        fresh = cluster.frontend("fresh", max_queued=EVERYBODY)
        await asyncio.sleep(PAUSE_S)
        let_in.extend(fresh.ask(160, 4096, stop_after=6) for _ in range(1500))
        await fresh.idle()

    cluster.run(story)
    assert not refused(let_in)
    assert max(it.ttft_s for it in let_in) < BOUND_S


@pytest.mark.parametrize("times", [1.0, 3.0])
@pytest.mark.parametrize("frontends", [1, 2])
def test_overloaded_graph_serves_accepted_requests_in_time_and_no_worker_idles(
    times: float, frontends: int
) -> None:
    """As in benchmarks/overload.py, whose 42 requests a second are the capacity."""
    capacity, seconds, max_wait_s = 42.0, 30.0, 1.5
    cluster = VirtualCluster(2, max_running=32, cost_model="qwen3-32b/h200/tp2")
    doors = [cluster.frontend(f"f{n}", max_wait_ms=max_wait_s * 1e3) for n in range(frontends)]
    asked: list[Asked] = []

    def draw(rng: Random) -> tuple[int, int]:
        return rng.randint(200, 1000), rng.randint(16, 96)

    async def story() -> None:
        for some in await asyncio.gather(
            *(door.open_loop(times * capacity / frontends, seconds, draw) for door in doors)
        ):
            asked.extend(some)

    cluster.run(story)
    began = asked[0].at
    settled = [it for it in asked if seconds / 4 < it.at - began < 0.9 * seconds]
    done = served(settled)
    assert len(done) / (0.65 * seconds) > 0.93 * capacity
    assert max(it.ttft_s for it in done) < 1.5 * max_wait_s
    assert all(it.itl_s < 0.05 for it in done)
    if times > 1.0:
        assert sum(it.ttft_s < max_wait_s for it in done) > 0.97 * len(done)
