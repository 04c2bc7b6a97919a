"""Several names of a model: which ones count, for how long, and what happens where two models share one."""

import asyncio
from pathlib import Path

import pytest

from penstock.core.deadlines import Deadlines
from penstock.core.settings import RouterSettings
from penstock.errors import Rejection, RequestRejected
from penstock.shapes import Role
from tests.cluster import MODEL, Cluster, cluster
from tests.waiting import until

PROMPT = list(range(100, 140))
OTHER = "other"


def model_of(it: Cluster, name: str) -> str:
    return it.router.model(name).card.name


def kind_of_refusal(it: Cluster, name: str) -> Rejection:
    with pytest.raises(RequestRejected) as caught:
        it.router.model(name)
    return caught.value.kind


async def test_alias_is_the_model_under_another_name(tmp_path: Path) -> None:
    async with cluster(tmp_path, {}) as it:
        it.start("a0", Role.AGGREGATED, aliases=("chat", "gpt"))
        await it.wait_ready("a0")
        assert list(it.router.models()) == [MODEL, "chat", "gpt"]
        assert it.router.model("gpt") is it.router.model(MODEL)
        assert len(await it.complete(PROMPT)) == 8
        with pytest.raises(RequestRejected, match=f"served: `{MODEL}`, `chat`, `gpt`"):
            it.router.model("nobody")


async def test_workers_with_other_aliases_serve_one_model_under_all_of_them(tmp_path: Path) -> None:
    """So that aliases can be changed by replacing workers one by one, and no revision changes."""
    async with cluster(tmp_path, {}) as it:
        it.start("a0", Role.AGGREGATED, aliases=("old", "both"))
        await it.wait_ready("a0")
        before = it.revision
        it.start("b0", Role.AGGREGATED, aliases=("both", "new"))
        await it.wait_ready("a0", "b0")
        assert list(it.router.models()) == [MODEL, "old", "both", "new"]
        assert it.revision == before
        await it.workers.pop("a0").leave()
        await it.wait_ready("b0")
        assert list(it.router.models()) == [MODEL, "both", "new"]
        await until(lambda: kind_of_refusal(it, "old") is Rejection.NOT_FOUND, "the alias is unknown")


async def test_alias_of_a_prefill_worker_alone_is_not_served(tmp_path: Path) -> None:
    async with cluster(tmp_path, {"d0": Role.DECODE}) as it:
        it.start("p0", Role.PREFILL, aliases=("chat",))
        await it.wait_ready("d0", "p0")
        assert list(it.router.models()) == [MODEL]


async def test_alias_is_kept_as_long_as_its_model_when_all_workers_are_away(tmp_path: Path) -> None:
    settings = RouterSettings(tick_s=0.02, deadlines=Deadlines(queue_s=0.5))
    async with cluster(tmp_path, {}, settings) as it:
        worker = it.start("a0", Role.AGGREGATED, aliases=("chat",))
        await it.wait_ready("a0")
        del it.workers["a0"]
        worker.dies_of(5)
        _, poison = it.ask([5])
        await it.wait_ready()
        poison.cancel()
        assert model_of(it, "chat") == MODEL  # its requests wait for a worker, which may be back
        await until(lambda: not it.router.served_models.serves(MODEL), "the model is forgotten")
        assert kind_of_refusal(it, "chat") is Rejection.UNAVAILABLE
        it.start("a0", Role.AGGREGATED, aliases=("chat",))
        await it.wait_ready("a0")
        assert model_of(it, "chat") == MODEL


async def test_alias_of_a_registered_worker_is_unavailable_until_its_link_is_up(tmp_path: Path) -> None:
    async with cluster(tmp_path, {}) as it:
        it.start("a0", Role.AGGREGATED, aliases=("chat",))
        kinds = set()
        while "chat" not in it.router.models():
            kinds.add(kind_of_refusal(it, "chat"))
            if not it.router.membership.members:
                assert kind_of_refusal(it, "nobody") is Rejection.UNAVAILABLE
            else:  # it is listed
                assert kind_of_refusal(it, "chat") is Rejection.UNAVAILABLE
                assert kind_of_refusal(it, "nobody") is Rejection.NOT_FOUND
            await asyncio.sleep(0)
        assert kinds


async def test_name_of_a_model_counts_before_an_alias_and_aliases_go_by_the_models_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with cluster(tmp_path, {}) as it:
        it.start("o0", Role.AGGREGATED, model=OTHER, aliases=(MODEL, "chat"))
        it.start("a0", Role.AGGREGATED, aliases=("chat", OTHER))
        await it.wait_ready("a0", "o0")
        first = min(MODEL, OTHER)
        assert [model_of(it, name) for name in (MODEL, OTHER, "chat")] == [MODEL, OTHER, first]
        assert sorted(it.router.models()) == sorted([MODEL, OTHER, "chat"])
        said = f"several models have the name chat: requests for it go to {first}"
        assert caplog.text.count(said) == 1
        await it.workers.pop("a0" if first == MODEL else "o0").leave()
        rest = max(MODEL, OTHER)
        await until(lambda: model_of(it, "chat") == rest, "the alias is the other model's")
