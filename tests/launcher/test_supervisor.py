from __future__ import annotations

import asyncio
import os
import shutil
import signal
from pathlib import Path

import pytest
from msgspec.structs import replace

from penstock.errors import ConfigError
from penstock.launcher.replica import ReplicaState
from penstock.launcher.settings import LauncherSettings
from penstock.launcher.state import StateFolder
from tests.launcher.conftest import EVENTUALLY_S, QUICK, alive, ask
from tests.waiting import until


async def test_a_graph_starts_tells_and_stops_in_order(running) -> None:
    async with running(frontends=2, prefill=2) as graph:
        await graph.prints("Ready: http://localhost:")
        status = (await ask(graph, op="status")).status
        assert status.ready
        assert [(service.name, service.wanted) for service in status.services] == [
            ("Frontend", 2),
            ("PrefillWorker", 2),
            ("DecodeWorker", 1),
        ]
        replicas = [replica for service in status.services for replica in service.replicas]
        names = ["frontend-0", "frontend-1", "prefill-0", "prefill-1", "decode-0"]
        assert [replica.name for replica in replicas] == names
        assert {replica.state for replica in replicas} == {ReplicaState.READY}
        assert replicas[2].instance_id == "toy-prefill-0"
        assert replicas[2].address == "127.0.0.1:1"
        assert all(alive(replica.pid) for replica in replicas)
        assert len(status.health) == 2
        assert {str(health["expect"]) for health in status.health.values()} == {"prefill,decode"}
        await ask(graph, op="down")
        await asyncio.wait_for(graph.task, EVENTUALLY_S)
        assert not any(alive(replica.pid) for replica in replicas)
    out = graph.out.getvalue()
    assert "prefill-0  | draining" in out
    assert "penstock chat --url" in out
    assert (graph.folder.logs / "PrefillWorker" / "prefill-1.log").read_text().endswith("draining\n")
    assert "Ready" in (graph.folder.logs / "supervisor.log").read_text()


async def test_a_killed_process_is_started_again(running) -> None:
    async with running() as graph:
        await graph.prints("Ready: ")
        [before] = graph.replicas("decode")
        os.kill(before.pid, signal.SIGKILL)
        await graph.prints("decode-0 was ended by SIGKILL after")
        await until(lambda: graph.replicas("decode")[0].state is ReplicaState.READY)
        [after] = graph.replicas("decode")
        assert after.pid != before.pid
        assert (after.restarts, after.last_exit) == (1, "was ended by SIGKILL")


async def test_a_crash_loop_slows_down(running) -> None:
    async with running(STUB="crash") as graph:
        await until(lambda: graph.replicas("prefill")[0].restarts >= 4)
        [replica] = graph.replicas("prefill")
        assert replica.last_exit == "exited with code 1"
        assert not graph.supervisor.is_ready
    pauses = [
        line.rpartition("again in ")[2] for line in graph.out.getvalue().splitlines() if "again in" in line
    ]
    assert pauses[:4] == ["0.1 s", "0.2 s", "0.4 s", "0.4 s"]


async def test_a_refused_setting_ends_the_start_with_its_reason(running) -> None:
    async with running(STUB="refuse") as graph:
        with pytest.raises(ConfigError, match=r"^prefill-0 refused to start: --model: no such folder$"):
            await asyncio.wait_for(graph.task, EVENTUALLY_S)
    assert not graph.supervisor.replicas


async def test_one_that_ignores_sigterm_is_killed_after_its_grace(running) -> None:
    async with running(replace(QUICK, kill_margin_s=0.3), STUB="stubborn") as graph:
        await graph.prints("prefill-0  | deaf")
        [replica] = graph.replicas("prefill")
        graph.supervisor.interrupt()
        await asyncio.wait_for(graph.task, EVENTUALLY_S)
        assert not alive(replica.pid)
    assert "prefill-0 has not ended within 0.5 s of SIGTERM: killed" in graph.out.getvalue()


async def test_a_second_interrupt_does_not_wait(running) -> None:
    async with running(STUB_DRAIN_S="600", drain_s=600) as graph:
        await graph.prints("Ready: ")
        graph.supervisor.interrupt()
        await graph.prints("prefill-0  | draining")
        graph.supervisor.interrupt()
        await asyncio.wait_for(graph.task, EVENTUALLY_S)


async def test_what_a_process_left_behind_goes_with_it(running) -> None:
    async with running(STUB="grandchild") as graph:
        await graph.prints("grandchild ")
        pid = int(graph.out.getvalue().partition("| grandchild ")[2].split()[0])
        await until(lambda: not alive(pid))


async def test_scaling_up_and_down_newest_first(running) -> None:
    async with running(STUB_DRAIN_S="2", drain_s=60) as graph:
        await graph.prints("Ready: ")
        answer = await ask(graph, op="scale", replicas={"prefill": 3, "DecodeWorker": 2})
        assert answer.scaled == {"PrefillWorker": (1, 3), "DecodeWorker": (1, 2)}
        await until(lambda: graph.supervisor.is_ready)
        assert [replica.name for replica in graph.replicas("prefill")] == [
            "prefill-0",
            "prefill-1",
            "prefill-2",
        ]
        await ask(graph, op="scale", replicas={"PrefillWorker": 1})
        await graph.prints("prefill-2  | draining")
        states = {replica.name: replica.state for replica in graph.replicas("prefill")}
        assert states == {
            "prefill-0": ReplicaState.READY,
            "prefill-1": ReplicaState.STOPPING,
            "prefill-2": ReplicaState.STOPPING,
        }
        await ask(graph, op="scale", replicas={"PrefillWorker": 2})  # the leaving ones keep their names
        assert "prefill-3" in [replica.name for replica in graph.replicas("prefill")]
        await until(lambda: len(graph.replicas("prefill")) == 2)
        assert "SIGKILL" not in graph.out.getvalue()
        await ask(graph, op="scale", replicas={"Frontend": 2})
        await until(lambda: graph.supervisor.is_ready)
        assert len((await ask(graph, op="status")).status.health) == 2


async def test_bad_scaling_changes_nothing(running) -> None:
    async with running() as graph:
        await graph.prints("Ready: ")
        for replicas, error in (
            (
                {"PrefilWorker": 2},
                r"^PrefilWorker: no such service \(did you mean PrefillWorker\?\); there are",
            ),
            (
                {"DecodeWorker": 2, "PrefillWorker": -1},
                r"^PrefillWorker: expected 0 to 64 replicas, got -1$",
            ),
            ({"PrefillWorker": 65}, r"^PrefillWorker: expected 0 to 64 replicas, got 65$"),
        ):
            with pytest.raises(ConfigError, match=error):
                await ask(graph, op="scale", replicas=replicas)
        assert len(graph.replicas("prefill")) == len(graph.replicas("decode")) == 1
        assert (await ask(graph, op="scale", replicas={"decode": 1})).scaled == {"DecodeWorker": (1, 1)}


async def test_a_flood_of_output_is_bounded_and_holds_up_nobody(running) -> None:
    async with running(LauncherSettings(http_port=0, log_file_bytes=256 * 1024), STUB="flood") as graph:
        await graph.prints("Ready: ")
        await graph.prints("line 199999 of the flood")
    files = list((graph.folder.logs / "PrefillWorker").iterdir())
    assert {file.name for file in files} == {"prefill-0.log", "prefill-0.log.1"}
    assert all(file.stat().st_size < 512 * 1024 for file in files)


def delete(folder: Path) -> None:
    """At once: processes that write into it do not get in between."""
    shutil.rmtree(folder.rename(folder.with_name("deleted")))


async def test_a_graph_whose_folder_was_deleted_goes_on(running) -> None:
    async with running() as graph:
        await graph.prints("Ready: ")
        delete(graph.folder.path.parent)
        [before] = graph.replicas("decode")
        os.kill(before.pid, signal.SIGKILL)  # its successor needs the secret
        await graph.prints("was deleted, at least in part; it was made again")
        await graph.prints("decode-0 was ended by SIGKILL after")
        await until(lambda: graph.replicas("decode")[0].state is ReplicaState.READY)
        assert "decode-0" in {path.stem for path in graph.folder.logs.glob("*/*.log")}
        await ask(graph, op="down")
        await asyncio.wait_for(graph.task, EVENTUALLY_S)


async def test_a_deleted_socket_is_made_again(running) -> None:
    async with running() as graph:
        await graph.prints("Ready: ")
        os.unlink(graph.folder.socket)
        await graph.prints("was deleted, at least in part; it was made again")
        assert (await ask(graph, op="status")).status.ready


async def test_a_graph_whose_folder_is_anothers_stops_in_order(running) -> None:
    async with running() as graph:
        await graph.prints("Ready: ")
        delete(graph.folder.path)
        with (
            StateFolder(graph.folder.path.parent, "toy").locked(),
            pytest.raises(
                ConfigError, match="was deleted, and another launcher uses it now: toy is already running"
            ),
        ):
            await asyncio.wait_for(graph.task, EVENTUALLY_S)
        assert not graph.supervisor.replicas
