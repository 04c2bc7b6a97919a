"""Both ends together, over real sockets, on both event loops (conftest.py)."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
import pytest

from penstock.errors import RemoteError
from penstock.link.client import LinkClient
from penstock.link.secret import LinkSecret
from penstock.link.settings import ServerSettings
from penstock.shapes import Incarnation, Load, Output
from penstock.wire.messages import Bounce, Step
from tests.ports import free_port
from tests.proxy import Proxy, Weather


def send_step(server: Any, worker: Any, stored: int) -> None:
    worker.cached.add(stored)
    for peer in server.peers:
        peer.send(Step(seen=peer.seen, load=worker.load(), stored=[stored]))


async def test_up_with_the_cache_and_the_load(bench: Any) -> None:
    worker, listener = bench.worker(range(5)), bench.listener()
    worker.running = 4
    async with bench.server(worker) as server, bench.client(server.address, listener) as client:
        assert not client.up
        await bench.until(lambda: client.up)
        assert listener.calls == [("up", worker.card())]
        assert listener.cached == worker.cached
        assert listener.load == Load(running=4)
        assert [peer.frontend_id for peer in server.peers] == ["f1"]
    assert listener.downs == ["closed here"]
    assert len(worker.lost) == 1


async def test_orderly_ends_are_no_warnings(bench: Any, caplog: Any) -> None:
    """Whoever leaves says so; only what nobody announced is worth waking somebody."""
    caplog.set_level(logging.INFO)
    worker, listener = bench.worker(), bench.listener()
    async with bench.server(worker) as server:
        async with bench.client(server.address, listener) as client:
            await bench.until(lambda: client.up)
        await bench.until(lambda: worker.lost)
        async with bench.client(server.address, listener) as client:
            await bench.until(lambda: client.up)
            await server.close("scaled down")
            await bench.until(lambda: len(listener.downs) == 2)
    assert [call[1:] for call in listener.calls if call[0] == "down"] == [
        ("closed here", True),
        ("the worker left: scaled down", True),
    ]
    assert "frontend f1 disconnected: the frontend left" in caplog.text
    ends = [record for record in caplog.records if "cannot connect" not in record.message]
    assert not [record.message for record in ends if record.levelno >= logging.WARNING]


async def test_losses_are_warnings(bench: Any, caplog: Any) -> None:
    worker, listener = bench.worker(), bench.listener()
    async with bench.server(worker) as server, bench.client(server.address, listener) as client:
        await bench.until(lambda: client.up)
        (peer,) = server.peers
        peer.connection.cut("pulled")
        await bench.until(lambda: listener.downs)
        await bench.until(lambda: client.up)
        await server.close("engine died", failed=True)
        await bench.until(lambda: len(listener.downs) == 2)
    assert [call[2] for call in listener.calls if call[0] == "down"] == [False, False]
    assert "frontend f1 is lost: pulled" in caplog.text
    assert listener.downs[1] == "the worker left: engine died"


async def test_requests_reach_the_worker_in_order_and_answers_come_back(bench: Any) -> None:
    worker, listener = bench.worker(), bench.listener()
    async with bench.server(worker) as server, bench.client(server.address, listener) as client:
        await bench.until(lambda: client.up)
        seqs = [client.generate(bench.attempt(f"a{i}")) for i in range(100)]
        client.cancel("a3")
        client.release("h1", sent=False)
        await bench.until(lambda: worker.released)
        assert seqs == list(range(1, 101))
        assert worker.generated == [("f1", f"a{i}") for i in range(100)]
        assert (worker.cancelled, worker.released) == (["a3"], ["h1"])
        (peer,) = server.peers
        assert peer.seen == 100
        peer.send(Bounce(attempt_id="a1", reason="full"))
        peer.send(Step(seen=peer.seen, load=worker.load(), outputs=[Output("a2", [7])]))
        await bench.until(lambda: listener.steps)
        assert ("bounce", "a1") in listener.calls
        assert listener.steps[0].outputs == [Output("a2", [7])]
        await bench.until(lambda: ("heartbeat", 100) in listener.calls)


async def test_a_snapshot_and_the_steps_during_it_add_up(bench: Any) -> None:
    """Frontends connect while the cache changes at every turn of the loop."""
    worker = bench.worker(range(100_000))
    listeners = [bench.listener() for _ in range(3)]
    rng = random.Random(1)
    async with bench.server(worker) as server, asyncio.TaskGroup() as tasks:
        done = asyncio.Event()

        async def follow(listener: Any, number: int) -> None:
            async with bench.client(server.address, listener, f"f{number}"):
                await done.wait()
                await bench.until(lambda: listener.cached == worker.cached)

        for number, listener in enumerate(listeners):
            tasks.create_task(follow(listener, number))
        turns = 0
        while not all(len(listener.steps) > 50 for listener in listeners):
            turns += 1
            assert turns < 50_000
            removed, stored = rng.choice(range(100_000)), rng.randrange(2**64)
            worker.cached.discard(removed)
            worker.cached.add(stored)
            for peer in server.peers:
                peer.send(Step(seen=0, load=worker.load(), removed=[removed], stored=[stored]))
            await asyncio.sleep(0)
        done.set()
    assert [listener.ups for listener in listeners] == [1, 1, 1]


async def test_snapshot_of_many_blocks_does_not_hold_up_the_loop(bench: Any) -> None:
    blocks = 400_000  # as many as 6.4 million tokens have
    worker, listener = bench.worker(), bench.listener()
    worker.cached = {number * 0x9E3779B97F4A7C15 % 2**64 for number in range(blocks)}
    gaps = [0.0]
    async with bench.server(worker) as server, bench.client(server.address, listener) as client:
        last = time.thread_time()
        while not client.up:
            await asyncio.sleep(0)
            now = time.thread_time()
            gaps.append(now - last)
            last = now
        send_step(server, worker, 5)
        await bench.until(lambda: listener.steps)
        assert listener.cached == worker.cached
    # Shares of the CPU time, since neither other processes nor a slow machine must fail this test. One turn
    # makes the worker's copy of all hashes; the others have one part of the snapshot each.
    assert len(gaps) > blocks / ServerSettings().snapshot_part_blocks
    assert sorted(gaps)[-2] < sum(gaps) / 5


async def test_a_reconnect_is_a_fresh_snapshot(bench: Any) -> None:
    worker, listener = bench.worker({1}), bench.listener()
    async with bench.server(worker) as server, bench.client(server.address, listener) as client:
        await bench.until(lambda: client.up)
        client.generate(bench.attempt())
        await bench.until(lambda: worker.generated)
        worker.cached = {2, 3}
        (peer,) = server.peers
        peer.connection.cut("pulled")
        await bench.until(lambda: listener.downs)
        with pytest.raises(RemoteError, match="is down"):
            client.generate(bench.attempt())
        await bench.until(lambda: client.up)
        assert listener.cached == {2, 3}
        assert client.generate(bench.attempt()) == 1
        assert worker.lost == [peer]
    assert [call[0] for call in listener.calls if call[0] != "heartbeat"] == ["up", "down", "up", "down"]


async def test_a_client_waits_for_a_worker_to_appear_and_to_come_back(bench: Any, caplog: Any) -> None:
    caplog.set_level(logging.DEBUG)
    worker, listener = bench.worker(), bench.listener()
    port = free_port()
    async with bench.client(f"127.0.0.1:{port}", listener) as client:
        await asyncio.sleep(0.05)
        assert not client.up
        for life in (1, 2):
            async with bench.server(worker, port=port):
                await bench.until(lambda: client.up)
            await bench.until(lambda: len(listener.downs) == life)  # noqa: B023
    assert listener.downs == ["the worker left: the test is over"] * 2
    assert caplog.text.count("is down: the worker left") == 2  # once for each time it was up


async def test_draining_reaches_those_connected_and_those_to_come(bench: Any) -> None:
    first, second = bench.listener(), bench.listener()
    async with bench.server(bench.worker()) as server, bench.client(server.address, first, "f1") as client:
        await bench.until(lambda: client.up)
        server.drain("upgrade")
        await bench.until(lambda: ("draining", "upgrade") in first.calls)
        async with bench.client(server.address, second, "f2"):
            await bench.until(lambda: ("draining", "upgrade") in second.calls)
            assert second.calls[0][0] == "up"


@pytest.mark.parametrize("size", [0, 1, 1024 * 1024, 1024 * 1024 + 1, 5_000_000])
async def test_files(bench: Any, size: int) -> None:
    content = random.Random(size).randbytes(size)
    sha256 = hashlib.sha256(content).hexdigest()
    worker, listener = bench.worker(), bench.listener()
    worker.assets[sha256] = content
    # The limit of unsent bytes is below the file's length: files wait for the network instead.
    limits = {"max_unsent_bytes": 3_000_000, "max_frame_bytes": 2_000_000}
    async with bench.server(worker, **limits) as server, bench.client(server.address, listener) as client:
        await bench.until(lambda: client.up)
        both = await asyncio.gather(client.asset(sha256), client.asset(sha256))
        assert both == [content, content]
        assert listener.downs == []


async def test_many_files_one_after_the_other_and_at_once(bench: Any) -> None:
    worker, listener = bench.worker(), bench.listener()
    contents = [random.Random(i).randbytes(300_000) for i in range(8)]
    names = [hashlib.sha256(content).hexdigest() for content in contents]
    worker.assets = dict(zip(names, contents, strict=True))
    async with bench.server(worker) as server, bench.client(server.address, listener) as client:
        await bench.until(lambda: client.up)
        for _ in range(5):
            assert await asyncio.gather(*map(client.asset, names)) == contents
        for name, content in zip(names, contents, strict=True):
            assert await client.asset(name) == content
        waits = [asyncio.ensure_future(client.asset(name)) for name in names]
        await asyncio.sleep(0)
        with pytest.raises(RemoteError, match="8 files have been asked for already"):
            await client.asset("one more")
        assert await asyncio.gather(*waits) == contents


async def test_files_that_cannot_be_had(bench: Any) -> None:
    worker, listener = bench.worker(), bench.listener()
    worker.assets = {"0" * 64: b"tampered", "1" * 64: bytes(2_000_001)}
    async with (
        bench.server(worker) as server,
        bench.client(server.address, listener, max_asset_bytes=2_000_000) as client,
    ):
        with pytest.raises(RemoteError, match="is down"):
            await client.asset("0" * 64)
        await bench.until(lambda: client.up)
        with pytest.raises(RemoteError, match="another hash"):
            await client.asset("0" * 64)
        with pytest.raises(RemoteError, match="2000001 bytes"):
            await client.asset("1" * 64)
        with pytest.raises(RemoteError, match="does not have it"):
            await client.asset("2" * 64)
        assert client.up


async def test_a_slow_reader_is_cut_and_the_others_notice_nothing(bench: Any) -> None:
    worker, good, slow = bench.worker(), bench.listener(), bench.listener()
    limits = {"max_unsent_bytes": 400_000, "max_frame_bytes": 200_000}
    async with (
        bench.server(worker, **limits) as server,
        bench.client(server.address, good, "good") as client,
    ):
        await bench.until(lambda: client.up)
        async with bench.client(server.address, slow, "slow") as slow_client:
            await bench.until(lambda: slow_client.up)
            stopped = slow_client._session.connection._transport
            stopped.pause_reading()
            sent = 0
            while len(server.peers) == 2:
                assert sent < 2000
                for peer in server.peers:
                    peer.send(Step(seen=0, load=Load(context_tokens=sent), stored=list(range(5000))))
                sent += 1
                await bench.until(lambda: len(good.steps) == sent)  # noqa: B023
            assert [peer.frontend_id for peer in worker.lost] == ["slow"]
            stopped.resume_reading()
            await bench.until(lambda: slow.downs)
        assert [step.load.context_tokens for step in good.steps] == list(range(sent))
        assert good.downs == []


async def test_a_frozen_worker_is_noticed(bench: Any) -> None:
    worker, listener = bench.worker(), bench.listener()
    async with (
        bench.server(worker, heartbeat_s=0.02, peer_timeout_s=60) as server,
        bench.client(server.address, listener, silence_s=0.2) as client,
    ):
        await bench.until(lambda: client.up)
        await asyncio.sleep(0.4)
        assert client.up  # heartbeats keep it
        (peer,) = server.peers
        peer.tick = lambda seconds: None  # connected, but silent
        started = time.monotonic()
        await bench.until(lambda: listener.downs)
        assert time.monotonic() - started > 0.1
        (reason,) = listener.downs  # it tells neither its load nor what of the frontend's has arrived
        assert reason in ("nothing heard in 0.2 s", "nothing that was sent has arrived in 0.2 s")


async def test_a_frozen_frontend_is_noticed(bench: Any) -> None:
    worker, listener = bench.worker(), bench.listener()
    async with (
        bench.server(worker, heartbeat_s=0.02, peer_timeout_s=0.2) as server,
        bench.client(server.address, listener, ping_s=0.05) as client,
    ):
        await bench.until(lambda: client.up)
        await asyncio.sleep(0.4)
        assert client.up  # pings keep it
        client._session.tick = lambda seconds: None
        await bench.until(lambda: worker.lost)


async def test_a_process_that_was_held_up_blames_nobody(bench: Any) -> None:
    listener = bench.listener()
    async with (
        bench.server(bench.worker(), peer_timeout_s=0.2) as server,
        bench.client(server.address, listener, silence_s=0.2) as client,
    ):
        await bench.until(lambda: client.up)
        time.sleep(0.5)  # noqa: ASYNC251
        await asyncio.sleep(0.1)
        assert client.up
        assert listener.downs == []


async def test_the_same_frontend_again_replaces_its_old_connection(bench: Any) -> None:
    worker, first, second = bench.worker(), bench.listener(), bench.listener()
    async with (
        bench.server(worker) as server,
        bench.client(server.address, first, "f", retry_min_s=30, retry_max_s=30) as client,
    ):
        await bench.until(lambda: client.up)
        async with bench.client(server.address, second, "f") as again:
            await bench.until(lambda: again.up and first.downs, within_s=20)  # retries come after 30 s
            await bench.until(lambda: len(worker.lost) == 1)
            assert len(server.peers) == 1


async def test_a_frontend_without_the_secret_of_the_worker_is_refused(bench: Any) -> None:
    right, wrong, none = bench.listener(), bench.listener(), bench.listener()
    async with (
        bench.server(bench.worker(), secret=LinkSecret("s" * 16)) as server,
        bench.client(server.address, right, "right", secret=LinkSecret("s" * 16)) as client,
        bench.client(server.address, wrong, "wrong", secret=LinkSecret("t" * 16)),
        bench.client(server.address, none, "none"),
    ):
        await bench.until(lambda: client.up)
        await asyncio.sleep(0.05)
        assert [peer.frontend_id for peer in server.peers] == ["right"]
    assert wrong.calls == none.calls == []


async def test_another_instance_at_the_address_is_not_used(bench: Any, caplog: Any) -> None:
    listener, right = bench.listener(), bench.listener()
    async with (
        bench.server(bench.worker()) as server,
        bench.client(server.address, listener, "f1", expected=Incarnation("w1", 2)),
        bench.client(server.address, right, "f2", expected=Incarnation("w1", 1)) as client,
    ):
        await bench.until(lambda: client.up)
        await bench.until(lambda: "found instance w1@1" in caplog.text)
    assert listener.calls == []
    assert caplog.text.count("found instance") == 1


async def test_too_many_frontends(bench: Any, caplog: Any) -> None:
    first, second = bench.listener(), bench.listener()
    async with (
        bench.server(bench.worker(), max_peers=1) as server,
        bench.client(server.address, first, "f1") as client,
    ):
        await bench.until(lambda: client.up)
        async with bench.client(server.address, second, "f2"):
            await bench.until(lambda: "the worker has 1 frontends, its most" in caplog.text)
            assert client.up
    assert second.calls == []


async def test_a_listener_that_raises_ends_its_connection_only(bench: Any) -> None:
    """A bug above the link must not leave a connection that looks alive and is not listened to."""
    worker, listener = bench.worker(), bench.listener()
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    async with bench.server(worker) as server, bench.client(server.address, listener) as client:
        await bench.until(lambda: client.up)
        listener.on_bounce = lambda bounce: 1 / 0
        (peer,) = server.peers
        peer.send(Bounce(attempt_id="a", reason="r"))
        await bench.until(lambda: listener.ups == 2)
        assert len(listener.downs) == 1


async def test_whatever_is_cut_comes_back_and_agrees(bench: Any) -> None:
    """Random cuts on either side while the cache changes and attempts run."""
    rng = random.Random(11)
    worker = bench.worker(range(1000))
    listeners = [bench.listener() for _ in range(3)]
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(bench.server(worker))
        clients = [
            await stack.enter_async_context(bench.client(server.address, listener, f"f{number}"))
            for number, listener in enumerate(listeners)
        ]
        sent = 0
        while sum(listener.ups for listener in listeners) < 40:
            await asyncio.sleep(0.001)
            stored, removed = rng.randrange(2**64), rng.choice(list(worker.cached))
            worker.cached.remove(removed)
            worker.cached.add(stored)
            for peer in server.peers:
                peer.send(Step(seen=peer.seen, load=worker.load(), stored=[stored], removed=[removed]))
            client = rng.choice(clients)
            if client.up:
                client.generate(bench.attempt())
                sent += 1
            if rng.random() < 0.2 and server.peers:
                rng.choice(list(server.peers)).connection.cut("fault at the worker")
            elif rng.random() < 0.2 and client.up:
                client._session.connection.cut("fault at the frontend")
        await bench.until(lambda: all(client.up for client in clients) and len(server.peers) == 3)
        await bench.until(lambda: all(listener.cached == worker.cached for listener in listeners))
        assert 0 < len(worker.generated) <= sent
        assert len(worker.lost) == len(set(worker.lost)) >= sum(listener.ups for listener in listeners) - 3
    for listener in listeners:
        order = [call[0] for call in listener.calls if call[0] in ("up", "down")]
        assert order == ["up", "down"] * (len(order) // 2)


@asynccontextmanager
async def through_a_proxy(
    bench: Any, worker: Any, listener: Any
) -> AsyncIterator[tuple[Proxy, LinkClient]]:
    """A link, up, that notices a deaf worker within 0.6 s."""
    async with bench.server(worker, heartbeat_s=0.1, max_frame_bytes=4_000_000) as server:
        proxy = Proxy(("127.0.0.1", 0), ("127.0.0.1", server.port))
        await proxy.start()
        try:
            async with bench.client(
                f"127.0.0.1:{proxy.port}", listener, silence_s=0.5, ping_s=0.1
            ) as client:
                await bench.until(lambda: client.up)
                yield proxy, client
        finally:
            await proxy.stop()


async def test_a_slow_line_carries_what_takes_long_without_being_cut(bench: Any) -> None:
    worker, listener = bench.worker(), bench.listener()
    async with through_a_proxy(bench, worker, listener) as (proxy, client):
        proxy.set(Weather(bytes_per_s=400_000.0))
        long = msgspec.structs.replace(bench.attempt("long"), token_ids=[2**31] * 200_000)
        client.generate(long)  # which the line takes 2.5 s for
        client.generate(bench.attempt("next"))
        await bench.until(lambda: len(worker.generated) == 2)
    assert listener.ups == 1
    assert listener.downs == ["closed here"]


async def test_a_slow_line_back_does_not_make_a_worker_deaf(bench: Any) -> None:
    content = bytes(1_000_000)
    worker, listener = bench.worker(), bench.listener()
    worker.assets[sha256 := hashlib.sha256(content).hexdigest()] = content
    async with through_a_proxy(bench, worker, listener) as (proxy, client):
        proxy.set(Weather(bytes_per_s=400_000.0))
        asset = asyncio.ensure_future(client.asset(sha256))
        await asyncio.sleep(0.5)
        client.generate(bench.attempt())
        assert await asset == content
    assert listener.ups == 1
    assert listener.downs == ["closed here"]


@pytest.mark.parametrize("waiting", [0, 1_000_000], ids=["idle", "with a long prompt on its way"])
async def test_a_path_cut_towards_the_worker_is_noticed(bench: Any, waiting: int) -> None:
    worker, listener = bench.worker(), bench.listener()
    async with through_a_proxy(bench, worker, listener) as (proxy, client):
        await asyncio.sleep(0.3)
        proxy.set(Weather(hold_up=True))
        if waiting:
            client.generate(msgspec.structs.replace(bench.attempt(), cache_salt="x" * waiting))
        await bench.until(lambda: listener.downs)
    assert listener.downs == ["nothing that was sent has arrived in 0.5 s"]
