"""Frontends' ports: connections wait between two processes, and are refused once no frontend is wanted."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import urllib.request
from urllib.parse import urlsplit

import msgspec

from penstock.launcher.replica import ReplicaState
from tests.launcher.conftest import EVENTUALLY_S, QUICK, ask
from tests.waiting import until

READY = ReplicaState.READY


def port_of(graph) -> int:
    [replica] = graph.replicas("frontend")
    return urlsplit(replica.address).port


async def health(port: int) -> bytes:
    def fetch() -> bytes:
        with urllib.request.urlopen(f"http://localhost:{port}/health", timeout=EVENTUALLY_S) as answer:
            return answer.read()

    return await asyncio.to_thread(fetch)


def refused(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) != 0


async def test_connection_while_the_frontend_is_dead_waits_for_the_next_one(running) -> None:
    async with running(msgspec.structs.replace(QUICK, restart_min_s=2.0, restart_max_s=2.0)) as graph:
        await graph.prints("Ready: ")
        port = port_of(graph)
        os.kill(graph.replicas("frontend")[0].pid, signal.SIGKILL)
        await graph.prints("frontend-0 was ended by SIGKILL")
        assert graph.replicas("frontend")[0].state is not READY
        assert b"healthy" in await health(port)
        await until(lambda: port_of(graph) == port)  # the launcher sees it a look later


async def test_connection_to_a_frontend_that_keeps_dying_is_refused(running) -> None:
    settings = msgspec.structs.replace(QUICK, restart_max_s=60.0, refuse_after_s=0.3)
    async with running(settings, frontend="crash") as graph:
        await graph.prints("frontend-0 exited with code 1")
        [replica] = [each for each in graph.supervisor.replicas if each.launch.name == "frontend-0"]
        await until(
            lambda: (
                refused(replica.place.port.port)
                and graph.replicas("frontend")[0].state is ReplicaState.WAITING
            )
        )


async def test_connection_to_a_graph_scaled_to_no_frontend_is_refused(running) -> None:
    async with running() as graph:
        await graph.prints("Ready: ")
        port = port_of(graph)
        await ask(graph, op="scale", replicas={"Frontend": 0})
        await until(lambda: not graph.replicas("frontend"))
        assert refused(port)
        await ask(graph, op="scale", replicas={"Frontend": 1})
        await until(lambda: graph.supervisor.is_ready)
        assert port_of(graph) == port
        await ask(graph, op="down")
        await asyncio.wait_for(graph.task, EVENTUALLY_S)
        assert refused(port)
