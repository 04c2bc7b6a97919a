"""The client over real sockets on the loopback."""

import asyncio
from typing import Any

import pytest

from penstock.bench.answers import JsonAnswer, StreamedAnswer
from penstock.bench.http_client import HttpClient, RequestFailed
from penstock.errors import ConfigError

BODY = b'{"stream": true, "messages": []}'


async def test_connections_are_reused_and_headers_sent(completion_server: Any) -> None:
    async with completion_server() as server:
        client = HttpClient(server.url + "/prefix", {"Authorization": "Bearer secret"})
        for _ in range(3):
            answer = StreamedAnswer(keep_text=True)
            await client.request("POST", "/v1/chat/completions", BODY, answer)
            assert answer.complete
            assert answer.text == "t0 t1 t2 t3 t4 "
        assert server.connections == 1
        assert server.headers[0] == "POST /prefix/v1/chat/completions HTTP/1.1"
        assert "Authorization: Bearer secret" in server.headers
        await client.close()


async def test_an_idle_connection_that_the_server_closed_is_replaced(completion_server: Any) -> None:
    async with completion_server() as server:
        client = HttpClient(server.url)
        await client.request("POST", "/v1/chat/completions", BODY, StreamedAnswer())
        for writer in list(server._writers):
            writer.close()
        answer = StreamedAnswer()
        await client.request("POST", "/v1/chat/completions", BODY, answer)
        assert answer.complete
        assert server.connections == 2
        await client.close()


async def test_nobody_listens() -> None:
    listener = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    listener.close()
    await listener.wait_closed()
    client = HttpClient(f"http://127.0.0.1:{port}")
    with pytest.raises(RequestFailed) as caught:
        await client.request("GET", "/", b"", JsonAnswer())
    assert caught.value.kind == "connect"


async def test_a_cut_answer_is_disconnected_and_not_sent_twice(completion_server: Any) -> None:
    async with completion_server(trouble={2: "cut"}) as server:
        client = HttpClient(server.url)
        await client.request("POST", "/v1/chat/completions", BODY, StreamedAnswer())
        with pytest.raises(RequestFailed) as caught:
            await client.request("POST", "/v1/chat/completions", BODY, StreamedAnswer())
        assert caught.value.kind == "disconnected"
        assert len(server.requests) == 2
        await client.close()


async def test_an_answer_that_is_not_http() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-x\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        client = HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        with pytest.raises(RequestFailed) as caught:
            await client.request("GET", "/", b"", JsonAnswer())
        assert caught.value.kind == "protocol"
        await client.close()


async def test_a_cancelled_request_closes_its_connection(completion_server: Any) -> None:
    async with completion_server(trouble={1: "hang"}) as server:
        client = HttpClient(server.url)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await client.request("POST", "/v1/chat/completions", BODY, StreamedAnswer())
        answer = StreamedAnswer()
        await client.request("POST", "/v1/chat/completions", BODY, answer)
        assert answer.complete
        assert server.connections == 2
        await client.close()


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http:///path"])
def test_bad_addresses_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="url"):
        HttpClient(url)
