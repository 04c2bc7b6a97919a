"""Responses in a real Redis: the contract of stores, and a Redis that is away, slow or full."""

import asyncio
import logging
import random
import re
import ssl
import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trustme
from redis.asyncio import Redis

from penstock.errors import ConfigError, StoreUnavailable
from penstock.frontend.responses_api.redis_store import (
    RedisResponseStore,
    RedisSettings,
    parse_redis_url,
)
from penstock.ports import StoredResponse
from tests.frontend.store_contract import StoreContract, kept, stored
from tests.proxy import Proxy, Weather
from tests.redis_server import RedisServer, running_redis

CALL_S = 1.0  # for a call of which the store answers nothing
SOON_S = 5 * CALL_S  # when such a call has long ended


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running_redis(tmp_path_factory.mktemp("redis")) as redis:
        yield redis


@pytest.fixture
async def redis(server):
    """The module's server, empty."""
    async with Redis(port=server.port) as client:
        await client.flushall()
    return server


@pytest.fixture
async def open_store_at():
    """Open stores, with `failures` counted, that the test's end closes."""
    async with AsyncExitStack() as stack:

        def start(url, *, max_bytes=10**6, **settings):
            failures = []
            settings = {"call_s": 30.0, "pause_s": 0.05, "value_bytes_max": max_bytes} | settings
            store = RedisResponseStore(
                RedisSettings(address=parse_redis_url(url), **settings), lambda: failures.append(1)
            )
            store.failures = failures
            stack.push_async_callback(store.close)
            return store

        yield start


async def proxy_to(server, listen=0):
    proxy = Proxy(("127.0.0.1", listen), ("127.0.0.1", server.port))
    await proxy.start()
    return proxy


async def unavailable(call):
    """Wait until the call has failed, and soon."""
    began = time.monotonic()
    with pytest.raises(StoreUnavailable) as raised:
        await call
    assert time.monotonic() - began < SOON_S
    assert raised.value.code == "response_store_unavailable"


async def available_again(store):
    """Wait until it answers."""
    async with asyncio.timeout(10):
        while True:
            try:
                return await store.get("t", "a")
            except StoreUnavailable:
                await asyncio.sleep(0.05)


class TestContract(StoreContract):
    @pytest.fixture
    def open_store(self, redis, open_store_at):
        return lambda **settings: open_store_at(redis.url, **settings)


# --- several frontends ----------------------------------------------------------------------------


async def test_two_stores_of_a_namespace_share_and_others_do_not(redis, open_store_at):
    one, two = open_store_at(redis.url), open_store_at(redis.url)
    other = open_store_at(redis.url, namespace="other")
    database = open_store_at(f"{redis.url}/1")
    await one.put("t", stored("a"))
    assert await two.get("t", "a") == stored("a")
    assert await kept(other, "t", "a") == await kept(database, "t", "a") == []
    assert await two.delete("t", "a")
    assert await kept(one, "t", "a") == []


async def test_keys_are_named_after_their_owner_and_have_an_end(redis, open_store_at):
    await open_store_at(redis.url, namespace="n", age_s=100.0).put("team-a", stored("resp_1"))
    async with Redis(port=redis.port) as client:
        assert await client.keys("*") == [b"penstock:n:response:team-a:resp_1"]
        assert 99 <= await client.ttl("penstock:n:response:team-a:resp_1") <= 100


@pytest.mark.parametrize("value", [b"", b"nonsense", b"\xc1", b"\x82"])
async def test_value_that_others_wrote_is_no_response(redis, open_store_at, value):
    store = open_store_at(redis.url)
    async with Redis(port=redis.port) as client:
        await client.set("penstock:default:response:t:a", value)
    assert await store.get("t", "a") is None


async def test_value_of_another_owner_is_never_shown(redis, open_store_at):
    store = open_store_at(redis.url)
    await store.put("t", stored("a"))
    async with Redis(port=redis.port) as client:
        await client.rename("penstock:default:response:t:a", "penstock:default:response:u:a")
    await unavailable(store.get("u", "a"))


async def test_answers_of_cancelled_calls_reach_nobody_else(redis, open_store_at):
    store = open_store_at(redis.url, connections_max=2)
    names = [str(number) for number in range(20)]
    for name in names:
        await store.put("t", stored(name, 20_000))
    rng = random.Random(1)
    for _ in range(60):
        calls = [asyncio.create_task(store.get("t", rng.choice(names))) for _ in range(4)]
        await asyncio.sleep(rng.random() * 0.002)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        name = rng.choice(names)
        found = await store.get("t", name)
        assert found is not None
        assert found.response_id == name
    assert store.failures == []


# --- a store that fails ---------------------------------------------------------------------------


async def test_store_that_is_away_fails_at_once_and_is_used_again(tmp_path, open_store_at, caplog):
    with running_redis(tmp_path) as server:
        store = open_store_at(f"redis://:s3cret-word@127.0.0.1:{server.port}")
        server.kill()
        await store.check()
        await unavailable(store.get("t", "a"))
        await unavailable(store.delete("t", "a"))
        assert not await store.put("t", stored("a"))
        assert len(store.failures) == 4
        server.start()
        await store_with_password_set(server)
        assert await available_again(store) is None
        assert await store.put("t", stored("a"))
        server.kill()  # and its connections with it
        server.start()
        await store_with_password_set(server)
        assert await available_again(store) is None
    assert "store of responses failed" in caplog.text
    assert "s3cret-word" not in caplog.text


async def store_with_password_set(server: RedisServer) -> None:
    async with Redis(port=server.port) as client:
        await client.config_set("requirepass", "s3cret-word")


async def test_wrong_password_is_logged_and_not_shown(tmp_path, open_store_at, caplog):
    caplog.set_level(logging.INFO)
    with running_redis(tmp_path, "--requirepass", "right-word") as server:
        right = open_store_at(f"redis://:right-word@127.0.0.1:{server.port}")
        wrong = open_store_at(f"redis://:wrong-word@127.0.0.1:{server.port}")
        await right.check()
        assert f"responses are stored in redis://127.0.0.1:{server.port}/0" in caplog.text
        assert await right.put("t", stored("a"))
        await unavailable(wrong.get("t", "a"))
    assert "WRONGPASS" in caplog.text or "invalid username-password" in caplog.text
    assert "right-word" not in caplog.text
    assert "wrong-word" not in caplog.text


@pytest.mark.parametrize(
    "weather", [Weather(hold_up=True), Weather(hold_down=True), Weather(delay_s=2 * CALL_S)]
)
async def test_silent_store_costs_a_call_its_limit_and_later_ones_nothing(redis, open_store_at, weather):
    proxy = await proxy_to(redis)
    store = open_store_at(f"redis://127.0.0.1:{proxy.port}", call_s=CALL_S, pause_s=30.0)
    try:
        assert await store.put("t", stored("a"))
        proxy.set(weather)
        calls = [unavailable(store.get("t", "a")) for _ in range(40)]
        await asyncio.gather(*calls)
        began = time.monotonic()
        for _ in range(100):
            await unavailable(store.get("t", "a"))
        assert time.monotonic() - began < CALL_S
    finally:
        await proxy.stop()


async def test_cut_connection_is_made_again_within_the_call(redis, open_store_at):
    proxy = await proxy_to(redis)
    store = open_store_at(f"redis://127.0.0.1:{proxy.port}")
    try:
        assert await store.put("t", stored("a"))
        proxy.cut()
        assert await store.get("t", "a") == stored("a")
        assert store.failures == []
    finally:
        await proxy.stop()


async def test_frozen_store_answers_again_once_it_goes_on(tmp_path, open_store_at):
    with running_redis(tmp_path) as server:
        store = open_store_at(server.url, call_s=CALL_S)
        assert await store.put("t", stored("a"))
        server.freeze()
        try:
            await unavailable(store.get("t", "a"))
        finally:
            server.thaw()
        assert await available_again(store) == stored("a")


async def test_full_store_refuses_new_responses_and_gives_those_it_has(tmp_path, open_store_at):
    with running_redis(tmp_path, "--maxmemory-policy", "noeviction") as server:
        store = open_store_at(server.url)
        assert await store.put("t", stored("a"))
        async with Redis(port=server.port) as client:
            await client.config_set("maxmemory", "100kb")
        assert not await store.put("t", stored("b", 10_000))
        assert await store.get("t", "a") == stored("a")


# --- where it is ----------------------------------------------------------------------------------


async def test_certificate_is_checked_with_tls(redis, open_store_at, tmp_path, monkeypatch):
    authority, stranger = trustme.CA(), trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    proxy = Proxy(("127.0.0.1", 0), ("127.0.0.1", redis.port), tls=tls)
    await proxy.start()
    try:
        for trusted, name in ((authority, "own"), (stranger, "other")):
            trusted.cert_pem.write_to_path(str(tmp_path / name))
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / name))
            store = open_store_at(f"rediss://127.0.0.1:{proxy.port}")
            if trusted is authority:
                assert await store.put("t", stored("a"))
            else:
                await unavailable(store.get("t", "a"))
    finally:
        await proxy.stop()


async def test_rights_that_the_documentation_names_are_enough(redis, open_store_at):
    documented = (Path(__file__).parents[2] / "docs" / "operation.md").read_text()
    line = re.search(r"^ACL SETUSER penstock .*$", documented, re.MULTILINE)[0]
    async with Redis(port=redis.port) as client:
        await client.execute_command(*line.split())
    store = open_store_at(f"redis://penstock:PASSWORD@127.0.0.1:{redis.port}/2")
    await store.check()
    assert await store.put("t", stored("a"))
    assert await store.get("t", "a") == stored("a")
    assert await store.delete("t", "a")
    assert store.failures == []


def test_url_is_an_address_with_its_credentials():
    address = parse_redis_url("rediss://me:p%40ss@redis.example.com:7000/3")
    assert (address.host, address.port, address.database, address.tls) == (
        "redis.example.com",
        7000,
        3,
        True,
    )
    assert (address.user, address.password) == ("me", "p@ss")
    assert address.shown == "rediss://redis.example.com:7000/3"
    assert parse_redis_url("redis://[::1]").shown == "redis://[::1]:6379/0"


@pytest.mark.parametrize(
    "url",
    [
        "redis",
        "redis://",
        "redis:///0",
        "http://s3cret@host",
        "redis://:s3cret@host:port",
        "redis://:s3cret@host:99999",
        "redis://:s3cret@host/x",
        "redis://:s3cret@host/-1",
        "redis://:s3cret@host?ssl_cert_reqs=none",
        "redis://[::1",
    ],
)
def test_wrong_url_is_refused_without_being_shown(url):
    with pytest.raises(ConfigError, match="--response-store: expected memory, none, or redis://") as raised:
        parse_redis_url(url)
    assert "s3cret" not in str(raised.value)


# --- frontends over it ----------------------------------------------------------------------------


async def test_two_frontends_serve_what_either_of_them_stored(
    redis, open_store_at, serve_script, byte_level
):
    async with (
        serve_script("One.", store=open_store_at(redis.url)) as one,
        serve_script("Two.", store=open_store_at(redis.url)) as two,
    ):
        first = await one.client.responses.create(model="tiny", input="My name is Ann.")
        second = await two.client.responses.create(
            model="tiny", input="And now?", previous_response_id=first.id
        )
        assert (first.store, second.store, second.output_text) == (True, True, "Two.")
        prompt = byte_level.decode(two.completer.requests[-1].token_ids)
        assert prompt.index("My name is Ann.") < prompt.index("One.") < prompt.index("And now?")
        assert (await two.client.responses.retrieve(first.id)).output_text == "One."
        listed = await one.client.responses.input_items.list(second.id)
        assert [item.content[0].text for item in listed.data] == ["And now?"]
        path = f"/v1/responses/{second.id}"
        assert (await one.http.post(f"{path}/cancel")).status_code == 400  # it has ended
        assert (await one.http.delete(path)).json()["deleted"]
        assert (await two.http.get(path)).status_code == 404
        assert (await two.http.post(f"{path}/cancel")).status_code == 404
        gone = await two.http.post(
            "/v1/responses", json={"model": "tiny", "input": "x", "previous_response_id": second.id}
        )
        assert (gone.status_code, gone.json()["error"]["code"]) == (400, "previous_response_not_found")


async def test_frontend_without_its_store_answers_and_says_that_nothing_is_kept(
    tmp_path, open_store_at, serve_script
):
    with running_redis(tmp_path) as server:
        async with serve_script("Yes.", store=open_store_at(server.url)) as served:
            first = await served.client.responses.create(model="tiny", input="x")
            server.kill()
            second = await served.client.responses.create(model="tiny", input="x")
            assert (first.store, second.store, second.output_text) == (True, False, "Yes.")
            events = [
                event
                async for event in await served.client.responses.create(
                    model="tiny", input="x", stream=True
                )
            ]
            assert (events[-1].type, events[-1].response.store) == ("response.incomplete", False)
            refused = [
                await served.http.post(
                    "/v1/responses", json={"model": "tiny", "input": "x", "previous_response_id": first.id}
                ),
                await served.http.get(f"/v1/responses/{first.id}"),
                await served.http.delete(f"/v1/responses/{first.id}"),
                await served.http.post(f"/v1/responses/{first.id}/cancel"),
                await served.http.get(f"/v1/responses/{first.id}/input_items"),
            ]
            for answer in refused:
                assert answer.status_code == 503
                assert answer.json()["error"]["code"] == "response_store_unavailable"
                assert answer.headers["retry-after"] == "2"
            assert len(served.completer.requests) == 3


async def test_response_of_another_form_is_not_continued(redis, open_store_at, serve_script):
    store = open_store_at(redis.url)
    for number, (response, items) in enumerate([(b"{", b"[]"), (b'{"output": []}', b"5"), (b"[]", b"[]")]):
        await store.put("", StoredResponse(f"resp_{number}", response, items, ""))
    async with serve_script("Yes.", store=store) as served:
        for number in range(3):
            body = {"model": "tiny", "input": "x", "previous_response_id": f"resp_{number}"}
            answer = await served.http.post("/v1/responses", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (
                400,
                "previous_response_not_found",
            )


async def test_conversation_in_a_store_that_is_slow_is_refused_in_time(
    redis, open_store_at, serve_script, monkeypatch
):
    monkeypatch.setattr("penstock.frontend.responses_api.create.MAX_LOOKUP_S", 0.5)
    proxy = await proxy_to(redis)
    try:
        store = open_store_at(f"redis://127.0.0.1:{proxy.port}")
        async with serve_script("Yes.", store=store) as served:
            response = await served.client.responses.create(model="tiny", input="x")
            for _ in range(3):
                response = await served.client.responses.create(
                    model="tiny", input="x", previous_response_id=response.id
                )
            proxy.set(Weather(delay_s=0.1))
            body = {"model": "tiny", "input": "x", "previous_response_id": response.id}
            answer = await served.http.post("/v1/responses", json=body)
            assert answer.status_code == 503
            assert store.failures == []  # each of the commands was answered
    finally:
        await proxy.stop()
