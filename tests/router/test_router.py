"""The router with real workers over real links: requests end, whatever happens to the workers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from penstock.core.deadlines import Deadlines
from penstock.core.settings import RouterSettings
from penstock.discovery.file import FileDiscovery
from penstock.errors import ProtocolError, Rejection, RemoteError, RequestRejected
from penstock.link.client import LinkClient
from penstock.shapes import (
    Attempt,
    Delta,
    FinishReason,
    ModelKey,
    ModelView,
    Registration,
    Request,
    Role,
    Sampling,
)
from tests.cluster import MODEL, QUICK, Answer, Cluster, cluster

PREFILL, DECODE, AGGREGATED = Role.PREFILL, Role.DECODE, Role.AGGREGATED
PAIR = {"p0": PREFILL, "d0": DECODE}
FOUR = {"p0": PREFILL, "p1": PREFILL, "d0": DECODE, "d1": DECODE}
ALWAYS = RouterSettings(disagg="always", tick_s=0.02)
SLOW_TO_GIVE_UP = RouterSettings(tick_s=0.02, deadlines=Deadlines(queue_s=600.0))
PROMPT = list(range(100))
SLOW = {"cost_model": "qwen3-32b/h200/tp2", "speedup": 2.0}  # about 6 ms a step


async def test_aggregated_and_disaggregated_agree(tmp_path: Path) -> None:
    async with cluster(tmp_path / "a", {"a0": AGGREGATED}) as aggregated:
        expected = await aggregated.complete(PROMPT, max_tokens=20)
    assert len(expected) == 20
    async with cluster(tmp_path / "d", PAIR, ALWAYS) as disaggregated:
        answer, _ = disaggregated.ask(PROMPT, max_tokens=20)
        assert await answer.tokens() == expected
        assert answer.finish_reason is FinishReason.LENGTH
        assert answer.deltas[0].cached_tokens == 0
        await disaggregated.wait_idle()
        exposition = disaggregated.metrics.render().decode()
    assert 'penstock_decisions_total{path="remote",policy="kv"} 1.0' in exposition
    assert "penstock_transferred_blocks_total 7.0" in exposition


async def test_next_turn_stays_where_its_blocks_are(tmp_path: Path) -> None:
    async with cluster(tmp_path, FOUR) as it:
        reply = await it.complete(PROMPT, max_tokens=30)
        answer, _ = it.ask([*PROMPT, *reply, 7, 8, 9], max_tokens=2)
        await answer.tokens()
        assert answer.deltas[0].cached_tokens == 128  # 8 of 8 whole blocks: prompt and reply


async def test_many_at_once(tmp_path: Path) -> None:
    async with cluster(tmp_path, FOUR, ALWAYS) as it:
        answers = [it.ask([*range(n), n], max_tokens=10, seed=n)[0] for n in range(1, 100)]
        for answer in answers:
            assert len(await answer.tokens()) == 10
        await it.wait_idle()


async def test_a_model_is_served_once_all_is_prepared(tmp_path: Path) -> None:
    prepared: list[ModelView] = []
    may_go_on = asyncio.Event()

    async def prepare(model: ModelView) -> None:
        prepared.append(model)
        await may_go_on.wait()

    asyncio.get_running_loop().call_later(0.3, may_go_on.set)
    async with cluster(tmp_path, {"a0": AGGREGATED}, prepare=prepare) as it:
        assert may_go_on.is_set()  # the worker was not ready before
        assert [model.card.name for model in prepared] == [MODEL]
        assert it.router.model(MODEL) == prepared[0]


async def test_cancel_reaches_the_engine(tmp_path: Path) -> None:
    async with cluster(tmp_path, PAIR, sim=SLOW) as it:
        answer, ticket = it.ask(PROMPT, max_tokens=4000)
        await answer.wait_tokens(3)
        ticket.cancel()
        ticket.cancel()
        seen = len(answer.deltas)
        await it.wait_idle()
        assert len(answer.deltas) == seen


@pytest.mark.parametrize("victim", ["p0", "d0"])
async def test_dead_worker_loses_nothing(tmp_path: Path, victim: str) -> None:
    """Greedy or not, the continuation is what it would have been: tokens depend on (seed, position)."""
    async with cluster(tmp_path / "calm", {"a0": AGGREGATED}) as calm:
        expected = {seed: await calm.complete(PROMPT, max_tokens=60, seed=seed) for seed in range(12)}
    async with cluster(tmp_path / "hurt", FOUR, ALWAYS, sim=SLOW) as it:
        answers = {seed: it.ask(PROMPT, max_tokens=60, seed=seed)[0] for seed in range(12)}
        await answers[0].wait_tokens(5)
        await it.workers[victim].die()
        for seed, answer in answers.items():
            assert await answer.tokens() == expected[seed]
        await it.wait_ready(*(FOUR.keys() - {victim}))
        await it.wait_idle()
    metrics = it.metrics.render().decode()
    if victim == "d0":
        assert 'penstock_attempts_total{outcome="lost",role="decode"}' in metrics
        assert "penstock_retries_total 0.0" not in metrics


async def test_leaving_worker_finishes_what_it_has(tmp_path: Path) -> None:
    async with cluster(tmp_path, FOUR, ALWAYS, sim=SLOW) as it:
        answers = [it.ask(PROMPT, max_tokens=40, seed=seed)[0] for seed in range(8)]
        await answers[0].wait_tokens(2)
        await asyncio.gather(it.workers["d0"].leave(), it.workers["p0"].leave())
        late = await it.complete(PROMPT, max_tokens=3)
        assert len(late) == 3
        for answer in answers:
            assert len(await answer.tokens()) == 40
    exposition = it.metrics.render().decode()
    assert 'outcome="cancelled"' not in exposition


async def test_drain_deadline_hands_requests_to_another_worker(tmp_path: Path) -> None:
    roles = {"a0": AGGREGATED, "a1": AGGREGATED}
    async with cluster(tmp_path, roles, sim=SLOW, drain_s=0.1) as it:
        answers = [it.ask(PROMPT, max_tokens=200, seed=seed)[0] for seed in range(4)]
        await answers[0].wait_tokens(2)
        await it.workers["a0"].leave()
        for answer in answers:
            assert len(await answer.tokens()) == 200


async def test_full_workers_bounce_and_the_request_waits_its_turn(tmp_path: Path) -> None:
    async with cluster(
        tmp_path, {"a0": AGGREGATED}, sim={**SLOW, "scheduler": {"max_running": 2}}, max_waiting=2
    ) as it:
        answers = [it.ask(PROMPT, max_tokens=10, seed=seed)[0] for seed in range(12)]
        for answer in answers:
            assert len(await answer.tokens()) == 10


async def test_models_and_health(tmp_path: Path) -> None:
    settings = RouterSettings(expect=(PREFILL, DECODE), deadlines=Deadlines(queue_s=1.0))
    async with cluster(tmp_path, PAIR, settings) as it:
        assert it.router.missing() == []
        assert list(it.router.models()) == [MODEL]
        with pytest.raises(RequestRejected) as unknown:
            it.router.model("nobody")
        assert unknown.value.kind is Rejection.NOT_FOUND
        assert unknown.value.message == f"The model `nobody` does not exist; served: `{MODEL}`."
        await it.workers["d0"].leave()
        await it.wait_ready("p0")
        assert it.router.missing() == [DECODE]
        await it.workers["p0"].leave()
        await it.wait_ready()
        with pytest.raises(RequestRejected) as known:
            it.router.model(MODEL)
        assert known.value.kind is Rejection.UNAVAILABLE


async def refusal(it: Cluster) -> str:
    """What clients that ask for the model read, once they are refused."""
    async with asyncio.timeout(20):
        while True:
            try:
                it.router.model(MODEL)
            except RequestRejected as error:
                return str(error)
            await asyncio.sleep(0.01)


async def test_a_model_whose_worker_was_lost_takes_requests_for_as_long_as_it_may_come_back(
    tmp_path: Path,
) -> None:
    settings = RouterSettings(tick_s=0.02, deadlines=Deadlines(queue_s=3.0))
    async with cluster(tmp_path, {"a0": AGGREGATED}, settings) as it:
        it.workers["a0"].dies_of(5)
        answer, _ = it.ask([5])
        async with asyncio.timeout(20):
            while it.router.instances() and it.router.instances()[0].state == "ready":
                await asyncio.sleep(0.01)
        assert it.router.models() == {}
        assert it.router.model(MODEL).card.name == MODEL
        with pytest.raises(RequestRejected, match="no worker"):
            await answer.tokens()
        assert await refusal(it) == f"No worker serves `{MODEL}` right now."


@pytest.mark.parametrize("others", [{}, {"p0": PREFILL}], ids=["nobody is left", "no decoder is left"])
async def test_a_model_whose_workers_all_left_in_order_is_refused_at_once(
    tmp_path: Path, others: dict[str, Role]
) -> None:
    async with cluster(tmp_path, {"d0": DECODE, "d1": DECODE, **others}, SLOW_TO_GIVE_UP) as it:
        await it.workers["d0"].leave()
        await it.wait_ready("d1", *others)
        assert it.router.model(MODEL).card.name == MODEL
        running, _ = it.ask(PROMPT, max_tokens=2000)
        await running.wait_tokens(1)
        leaving = asyncio.create_task(it.workers["d1"].leave())
        await it.wait_ready(*others)
        with pytest.raises(RequestRejected) as draining:
            it.router.model(MODEL)
        await leaving
        with pytest.raises(RequestRejected) as left:
            it.router.model(MODEL)
        assert {error.value.kind for error in (draining, left)} == {Rejection.UNAVAILABLE}
        it.start("d2", DECODE)
        await it.wait_ready("d2", *others)
        assert it.router.model(MODEL).card.name == MODEL


async def test_a_model_whose_workers_are_still_connecting_is_no_unknown_one(tmp_path: Path) -> None:
    may_go_on = asyncio.Event()

    async def prepare(model: ModelView) -> None:
        await may_go_on.wait()

    refusals: list[RequestRejected] = []
    it = Cluster(tmp_path, QUICK)
    with pytest.raises(RequestRejected) as unheard:  # nobody has said who exists
        it.router.model(MODEL)
    routing = asyncio.create_task(it.router.run(prepare))
    worker = it.start("a0", AGGREGATED)
    async with asyncio.timeout(20):
        while not any(view.state == "loading" for view in it.router.instances()):
            await asyncio.sleep(0.01)
    for name in (MODEL, "other"):
        with pytest.raises(RequestRejected) as caught:
            it.router.model(name)
        refusals.append(caught.value)
    unavailable, unknown = Rejection.UNAVAILABLE, Rejection.NOT_FOUND
    assert [error.kind for error in (unheard.value, *refusals)] == [unavailable, unavailable, unknown]
    assert unheard.value.retry_after_s
    may_go_on.set()
    await it.wait_ready("a0")
    assert it.router.model(MODEL).card.name == MODEL
    await worker.leave()
    routing.cancel()
    await asyncio.gather(routing, return_exceptions=True)


async def test_a_senseless_registration_harms_nobody(tmp_path: Path) -> None:
    async with cluster(tmp_path, {"a0": AGGREGATED}) as it:
        lease = await FileDiscovery(tmp_path).register(Registration("odd", 1, DECODE, MODEL, "no address"))
        async with asyncio.timeout(10):
            while "odd" not in {view.instance_id for view in it.router.instances()}:
                await asyncio.sleep(0.02)
        assert len(await it.complete(PROMPT)) == 8
        await lease.close()
        await it.wait_ready("a0")


async def test_restarted_instance_replaces_its_old_self(tmp_path: Path) -> None:
    async with cluster(tmp_path, {"a0": AGGREGATED}) as it:
        await it.complete(PROMPT)
        revision = it.revision
        await it.workers["a0"].die()
        it.start("a0", AGGREGATED)
        async with asyncio.timeout(20):
            while True:
                answer, _ = it.ask(PROMPT, revision=revision)
                await answer.tokens()
                if answer.deltas[0].cached_tokens == 0:
                    break  # the new one, and the index knows that it has nothing
                await asyncio.sleep(0.05)
        await it.wait_ready("a0")


@pytest.mark.parametrize("policy", ["kv", "round-robin", "random", "least-loaded", "power-of-two"])
async def test_every_policy_serves(tmp_path: Path, policy: str) -> None:
    async with cluster(tmp_path, FOUR, RouterSettings(policy=policy)) as it:
        for seed in range(6):
            assert len(await it.complete([*PROMPT, seed], seed=seed)) == 8
        await it.wait_idle()


async def test_a_callback_that_fails_ends_its_request_alone_and_says_so(tmp_path: Path) -> None:
    async with cluster(tmp_path, {"a0": AGGREGATED}, sim=SLOW) as it:
        other, _ = it.ask(PROMPT, max_tokens=40)
        answer = Answer()

        def on_delta(delta: Delta) -> None:
            raise ValueError("a mistake")

        it.router.submit(
            Request("mistaken", ModelKey(MODEL, it.revision), PROMPT, Sampling(max_tokens=40)),
            on_delta,
            answer.on_error,
        )
        with pytest.raises(RequestRejected, match="Internal error") as caught:
            await answer.tokens()
        assert caught.value.kind is Rejection.INTERNAL
        assert len(await other.tokens()) == 40
        await it.wait_idle()


async def test_no_output_comes_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill worker gives a first token, and the attempt for the decode worker is too long."""
    generate = LinkClient.generate

    def fails(self: LinkClient, attempt: Attempt) -> int:
        if attempt.prefill_only:
            return generate(self, attempt)
        raise ProtocolError("too much of it")

    monkeypatch.setattr(LinkClient, "generate", fails)
    async with cluster(tmp_path, PAIR, ALWAYS, sim=SLOW) as it:
        answer, _ = it.ask(PROMPT)
        with pytest.raises(
            RequestRejected, match="too long to be sent to a worker: too much of it"
        ) as caught:
            await answer.tokens()
        assert (caught.value.kind, caught.value.code) == (Rejection.INVALID, "request_too_long")
        await asyncio.sleep(0)
        assert answer.deltas == []
        await it.wait_idle()
        exposition = it.metrics.render().decode()
    assert "penstock_retries_total 0.0" in exposition
    assert 'outcome="lost"' not in exposition


async def test_a_request_that_fails_while_it_is_submitted_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: LinkClient, attempt: Attempt) -> int:
        raise ProtocolError("too much of it")

    async with cluster(tmp_path, {"a0": AGGREGATED}) as it:
        answer = Answer()
        request = Request("r", ModelKey(MODEL, it.revision), PROMPT, Sampling(max_tokens=8))
        with monkeypatch.context() as patch:
            patch.setattr(LinkClient, "generate", fails)
            with pytest.raises(RequestRejected, match="too long to be sent"):
                it.router.submit(request, answer.on_delta, answer.on_error)
        assert not answer.done.is_set()
        assert len(await it.complete(PROMPT)) == 8


async def test_a_full_link_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[Attempt] = []

    def fails(self: LinkClient, attempt: Attempt) -> int:
        tries.append(attempt)
        raise RemoteError("too much waits")

    async with cluster(tmp_path, {"a0": AGGREGATED}) as it:
        with monkeypatch.context() as patch:
            patch.setattr(LinkClient, "generate", fails)
            answer, _ = it.ask(PROMPT)
            async with asyncio.timeout(20):
                while len(tries) < 3:
                    await asyncio.sleep(0.01)
        assert len(await answer.tokens()) == 8
