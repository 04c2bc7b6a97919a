"""Rolling restarts: nothing is short meanwhile, and `scale` may come at any time."""

from __future__ import annotations

import asyncio
import sys

import msgspec
import pytest

from penstock.errors import ConfigError
from penstock.launcher.replica import ReplicaState
from tests.launcher.conftest import alive, ask
from tests.waiting import until

READY = ReplicaState.READY


async def test_a_rolling_restart_replaces_all_and_is_never_short(running) -> None:
    async with running(frontends=2, prefill=2, STUB_DRAIN_S="0.3", drain_s=60) as graph:
        await graph.prints("Ready: ")
        before = {label: graph.replicas(label) for label in ("frontend", "prefill", "decode")}
        names = (await ask(graph, op="restart")).restarting
        assert names == ["prefill-0", "prefill-1", "decode-0", "frontend-0", "frontend-1"]
        with pytest.raises(ConfigError, match=r"^a restart is under way: prefill-0, "):
            await ask(graph, op="restart", services=["prefill"])
        fewest = 9
        while (await ask(graph, op="status")).status.restarting:
            for label, wanted in (("prefill", 2), ("decode", 1)):
                ready = [one for one in graph.replicas(label) if one.state is ReplicaState.READY]
                fewest = min(fewest, len(ready) - wanted)
            await asyncio.sleep(0.01)
        assert fewest == 0, "a worker left before its successor was ready"
        assert graph.supervisor.is_ready
        for label, old in before.items():
            new = graph.replicas(label)
            assert len(new) == len(old)
            assert not {one.pid for one in new} & {one.pid for one in old}
        assert {one.address for one in graph.replicas("frontend")} == {
            one.address for one in before["frontend"]
        }
        assert not any(alive(one.pid) for old in before.values() for one in old)
        await graph.prints("rolling restart done")
        replaced = (await ask(graph, op="status")).status.replaced
        assert list(replaced) == names
        assert replaced["prefill-0"] == "prefill-2"  # the number was not free yet
        assert set(replaced.values()) == {one.name for label in before for one in graph.replicas(label)}


async def test_a_rolling_restart_ends_where_the_new_one_does_not_start(running) -> None:
    async with running(prefill=2) as graph:
        await graph.prints("Ready: ")
        before = {one.pid for one in graph.replicas("prefill")}
        around = graph.supervisor._around
        refuses = (sys.executable, "-c", "print('penstock: no such model'); raise SystemExit(2)")
        graph.supervisor._around = msgspec.structs.replace(around, program=refuses)
        await ask(graph, op="restart", services=["PrefillWorker"])
        await graph.prints("rolling restart ended: prefill-2 did not start: no such model")
        status = (await ask(graph, op="status")).status
        assert (status.restarting, status.restart_error) == ([], "prefill-2 did not start: no such model")
        await until(lambda: len(graph.replicas("prefill")) == 2)
        assert {one.pid for one in graph.replicas("prefill")} == before
        with pytest.raises(ConfigError, match=r"^Worker: no such service"):
            await ask(graph, op="restart", services=["Worker"])


def prefill(graph) -> list[tuple[str, ReplicaState, tuple[str, ...]]]:
    return [(one.name, one.state, one.gpus) for one in graph.replicas("prefill")]


async def test_a_worker_whose_gpu_its_successor_needs_keeps_its_place_from_scale(running) -> None:
    async with running(gpus=["0"], engine="vllm", STUB_DRAIN_S="2", drain_s=60) as graph:
        await graph.prints("Ready: ")
        await ask(graph, op="restart", services=["PrefillWorker"])
        await graph.prints("prefill-0  | draining")
        refusals = 0
        while "rolling restart done" not in graph.out.getvalue():
            with pytest.raises(ConfigError, match=r"^1 GPUs are needed, 0 of this machine's 1 are free$"):
                graph.supervisor.scale({"prefill": 2})
            refusals += 1
            assert graph.supervisor.scale({"prefill": 1}) == {"PrefillWorker": (1, 1)}
            await asyncio.sleep(0)
        assert refusals > 10
        assert [(state, gpus) for _, state, gpus in prefill(graph)] == [(READY, ("0",))]


async def test_a_place_that_scale_takes_away_is_not_filled(running) -> None:
    async with running(gpus=["0"], engine="vllm", STUB_DRAIN_S="2", drain_s=60) as graph:
        await graph.prints("Ready: ")
        await ask(graph, op="restart", services=["PrefillWorker", "DecodeWorker"])
        await graph.prints("prefill-0  | draining")
        assert (await ask(graph, op="scale", replicas={"prefill": 0})).scaled == {"PrefillWorker": (1, 0)}
        await graph.prints("rolling restart done")
        assert list((await ask(graph, op="status")).status.replaced) == ["decode-0"]
        assert prefill(graph) == []
        assert [one.state for one in graph.replicas("decode")] == [READY]
        await ask(graph, op="scale", replicas={"prefill": 1})
        await until(lambda: [state for _, state, _ in prefill(graph)] == [READY])


async def test_a_replica_under_replacement_counts_once(running) -> None:
    async with running(gpus=["0", "1", "2"], engine="vllm", STUB_START_S="2") as graph:
        await graph.prints("Ready: ")
        await ask(graph, op="restart", services=["PrefillWorker"])
        await until(lambda: len(prefill(graph)) == 2)
        assert graph.supervisor.scale({"prefill": 1}) == {"PrefillWorker": (1, 1)}
        assert graph.supervisor.scale({"prefill": 2}) == {"PrefillWorker": (1, 2)}
        await graph.prints("rolling restart done")
        await until(lambda: [state for _, state, _ in prefill(graph)] == [READY, READY])

        await ask(graph, op="restart", services=["PrefillWorker"])
        await until(lambda: len(prefill(graph)) == 3)
        assert graph.supervisor.scale({"prefill": 0}) == {"PrefillWorker": (2, 0)}
        await until(lambda: not prefill(graph) and graph.out.getvalue().count("rolling restart done") == 2)
        status = (await ask(graph, op="status")).status
        assert (status.restarting, status.restart_error) == ([], "")
        await ask(graph, op="scale", replicas={"prefill": 3})
        await until(lambda: sorted(gpus for *_, gpus in prefill(graph)) == [("0",), ("1",), ("2",)])
