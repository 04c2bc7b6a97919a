"""A defect of ours, met with one request, one link or one step, ends that and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from penstock.core import lifecycle
from penstock.core.dispatcher import Dispatcher
from penstock.core.events import InstanceLost
from penstock.core.lifecycle import Lifecycle
from penstock.core.placement import Placement
from penstock.core.prefix_index import PrefixIndex
from penstock.discovery.file import FileDiscovery
from penstock.errors import Rejection, RequestRejected
from penstock.link.client import LinkClient
from penstock.link.peer import Peer
from penstock.link.session import Session
from penstock.router.router import Router
from penstock.shapes import Registration, Role
from penstock.worker.worker import Worker
from tests.cluster import Answer, Cluster, cluster
from tests.waiting import until

PROMPT = list(range(1, 100))
AGGREGATED = {"a0": Role.AGGREGATED, "a1": Role.AGGREGATED}


class DefectError(Exception):
    """A mistake that was made on purpose."""


def defect(*args: Any, **options: Any) -> Any:
    raise DefectError


async def fails(ask: Callable[[], Answer]) -> None:
    """At once, or later."""
    with pytest.raises(RequestRejected) as refused:
        await ask().tokens()
    assert (refused.value.kind, refused.value.code) == (Rejection.INTERNAL, "internal_error")


def books_are_closed(it: Cluster) -> bool:
    dispatcher = it.router.dispatcher
    booked = any(load.booked for load in it.router.placement.loads.values())
    waiting = sum(map(len, dispatcher.queues.values()))
    return not (dispatcher.records or dispatcher.attempts or waiting or booked)


def only_for(patch: pytest.MonkeyPatch, owner: Any, name: str, request_id: str) -> list[int]:
    """This method of a lifecycle, or one that gets a record or a `Placed`, fails for one request."""
    real = getattr(owner, name)
    failed: list[int] = []

    def method(self: Any, *args: Any, **options: Any) -> Any:
        for it in (self, *args):
            request = getattr(it, "request", None) or getattr(getattr(it, "life", None), "request", None)
            if request is not None and request.request_id == request_id:
                failed.append(1)
                raise DefectError
        return real(self, *args, **options)

    patch.setattr(owner, name, method)
    return failed


PLACES = [
    (Lifecycle, "on_output"),
    (Lifecycle, "place"),
    (Lifecycle, "_send"),
    (Lifecycle, "_emit"),
    (Dispatcher, "place"),
    (Dispatcher, "output"),
    (Dispatcher, "sent"),
    (Router, "send"),
    (Placement, "choose"),
    (Placement, "sent"),
    (Placement, "cached"),
]


@pytest.mark.parametrize(("owner", "name"), PLACES, ids=lambda value: getattr(value, "__name__", value))
async def test_a_request_that_meets_a_defect_ends_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, owner: Any, name: str
) -> None:
    async with cluster(tmp_path, AGGREGATED) as it:
        others = [it.ask(PROMPT, max_tokens=50, seed=seed)[0] for seed in range(4)]
        number = next(it.ids) + 1
        failed = only_for(monkeypatch, owner, name, f"r{number}")
        await fails(lambda: it.ask(PROMPT)[0])
        assert failed
        for answer in others:
            assert len(await answer.tokens()) == 50
        assert "DefectError" in caplog.text
        assert f"request r{number} ends because of an error in this process" in caplog.text
        monkeypatch.undo()
        await it.wait_idle()
        assert books_are_closed(it)
        assert len(await it.complete(PROMPT)) == 8


async def test_a_defect_of_one_request_when_its_worker_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those after it in the loop over the requests of that worker are tried again."""
    async with cluster(tmp_path, {"a0": Role.AGGREGATED}) as it:
        with it.workers["a0"].stuck():
            asked = [it.ask(PROMPT, max_tokens=20, seed=seed)[0] for seed in range(5)]
            await asyncio.sleep(0.1)
            only_for(monkeypatch, Lifecycle, "_on_instance_lost", "r1")
            monkeypatch.setitem(lifecycle._HANDLERS, InstanceLost, Lifecycle._on_instance_lost)
            it.router.fleet.link("a0").cut("cut by the test")  # type: ignore[union-attr]
            await fails(lambda: asked[1])
        for answer in (asked[0], *asked[2:]):
            assert len(await answer.tokens()) == 20


async def test_a_tick_that_fails_is_followed_by_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with cluster(tmp_path, AGGREGATED) as it:
        monkeypatch.setattr(PrefixIndex, "sweep", defect)
        await until(lambda: caplog.text.count("a tick was not finished") >= 10)
        assert len(await it.complete(PROMPT)) == 8
        await asyncio.sleep(0.5)
        assert (
            caplog.text.count("a tick was not finished") <= 20
        )  # 10 a minute, of which one may end meanwhile


@pytest.mark.parametrize(
    ("owner", "name"),
    [(Session, "_tick"), (Session, "_pass_on"), (Session, "ended"), (Peer, "_tick"), (Peer, "_begin")],
    ids=lambda value: getattr(value, "__name__", value),
)
async def test_a_link_that_meets_a_defect_ends_and_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, owner: Any, name: str
) -> None:
    async with cluster(tmp_path, AGGREGATED) as it:
        (one, other) = (it.router.fleet.link(name) for name in AGGREGATED)
        assert one is not None
        assert other is not None
        mended = getattr(owner, name)
        monkeypatch.setattr(owner, name, defect)
        if name in ("ended", "_begin"):
            one.cut("cut by the test")
        await until(lambda: "DefectError" in caplog.text)
        monkeypatch.setattr(owner, name, mended)
        if name == "ended":  # nobody was told of its end
            it.router.fleet._links["a0"].on_down("told by the test", orderly=False)
        await it.wait_ready(*AGGREGATED)
        assert len(await it.complete(PROMPT)) == 8


async def test_a_link_whose_keeper_meets_a_defect_is_kept_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with cluster(tmp_path, AGGREGATED) as it:
        with monkeypatch.context() as patch:
            patch.setattr(LinkClient, "_connect", defect)
            for name in AGGREGATED:
                it.router.fleet.link(name).cut("cut by the test")  # type: ignore[union-attr]
            await until(lambda: caplog.text.count("DefectError") >= 2)
        await it.wait_ready(*AGGREGATED)


async def test_a_model_that_cannot_be_prepared_keeps_one_worker_out(tmp_path: Path, caplog: Any) -> None:
    prepared: list[str] = []

    async def prepare(model: Any) -> None:
        prepared.append(model.card.name)
        if len(prepared) == 1:
            raise DefectError

    async with cluster(tmp_path, AGGREGATED, prepare=prepare) as it:
        assert len(await it.complete(PROMPT)) == 8  # the one it was comes back, and tries again
    assert "the link ends because of an error in this process" in caplog.text


async def test_discovery_is_watched_again_after_a_defect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    watched: list[int] = []
    watch = FileDiscovery.watch

    async def broken(self: FileDiscovery) -> AsyncIterator[Mapping[str, Registration]]:
        watched.append(1)
        async for current in watch(self):
            if len(watched) == 1 and current:
                raise DefectError
            yield current

    monkeypatch.setattr(FileDiscovery, "watch", broken)
    async with cluster(tmp_path, AGGREGATED) as it:
        assert len(await it.complete(PROMPT)) == 8
    assert len(watched) == 2
    assert "DefectError" in caplog.text


async def test_a_step_that_cannot_be_passed_on_costs_the_links_and_not_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with cluster(tmp_path, AGGREGATED) as it:
        failed: list[int] = []
        remember = Worker._publish

        def publish(self: Worker, step: Any) -> None:
            if step.outputs and not failed:
                failed.append(1)
                raise DefectError
            remember(self, step)

        monkeypatch.setattr(Worker, "_publish", publish)
        assert len(await it.complete(PROMPT)) == 8  # by another attempt
        assert failed
        await it.wait_ready(*AGGREGATED)
        assert "closing all links" in caplog.text


async def test_what_cannot_be_encoded_costs_its_reader_alone(tmp_path: Path) -> None:
    async with cluster(tmp_path, AGGREGATED) as it:
        (peer,) = it.workers["a0"].worker._server.peers
        peer.send(object())  # type: ignore[arg-type]
        assert not peer.connection.usable
        await it.wait_ready(*AGGREGATED)


async def test_a_prompt_that_cannot_be_encoded_is_that_requests_end(tmp_path: Path) -> None:
    async with cluster(tmp_path, AGGREGATED) as it:
        with pytest.raises(RequestRejected) as refused:
            it.ask([2**70, *PROMPT])
        assert refused.value.code == "internal_error"
        with contextlib.suppress(RequestRejected):
            assert len(await it.complete(PROMPT)) == 8
