"""Connections that misbehave, and the end of the server."""

import asyncio
import contextlib
import json
import re
import signal
import socket
import ssl
import subprocess
import time
from contextlib import asynccontextmanager

import httpx
import pytest

from penstock.errors import ConfigError
from penstock.frontend.http.connection import MAX_HEAD_BYTES, MAX_PIPELINED
from penstock.frontend.http.server import _connections
from penstock.frontend.settings import FrontendSettings
from penstock.logs.quiet_log import BURST_LINES
from penstock.net.listening import InheritedListener, listen
from penstock.shapes import Delta, FinishReason, Role
from tests.frontend.conftest import ScriptedCompleter, serving
from tests.waiting import until

JSON = "host: x\r\ncontent-type: application/json\r\n"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


def post(body, *, path="/v1/chat/completions", length=None):
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\n{JSON}content-length: {length or len(content)}\r\n\r\n"
    return head.encode() + content


@asynccontextmanager
async def connection(served, receive_bytes=None):
    """A raw connection; `receive_bytes` makes its receive buffer small."""
    raw = socket.socket()
    if receive_bytes is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    raw.setblocking(False)
    await asyncio.get_running_loop().sock_connect(raw, (served.host, served.port))
    reader, writer = await asyncio.open_connection(sock=raw, limit=2**16)
    try:
        yield reader, writer
    finally:
        writer.close()


async def everything(reader, within_s=60.0):
    async with asyncio.timeout(within_s):
        return await reader.read()


# --- other versions of HTTP -----------------------------------------------------------------------


@pytest.mark.parametrize("step_s", [0.0, 0.3])
async def test_a_stream_over_http_1_0_is_plain_and_ends_with_its_connection(serve_script, deltas, step_s):
    def script(request):
        return deltas(request.token_ids[:6])

    settings = {"step_s": step_s, "sse_keep_alive_s": 0.2} if step_s else {}
    async with serve_script(script, **settings) as served, connection(served) as (reader, writer):
        request = post({**CHAT, "stream": True}).replace(b"HTTP/1.1", b"HTTP/1.0")
        writer.write(request)
        head, _, body = (await everything(reader)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert b"connection: close" in head
    assert b"transfer-encoding" not in head
    assert b"content-length" not in head
    events = body.decode().split("\n\n")
    assert all(event.startswith("data: ") or event == ": keep-alive" for event in events[:-1])
    assert (": keep-alive" in events) == (step_s > 0)
    assert events[-2:] == ["data: [DONE]", ""]


async def test_an_answer_over_http_1_0_has_its_length(serve_script):
    async with serve_script("x") as served, connection(served) as (reader, writer):
        writer.write(post(CHAT).replace(b"HTTP/1.1", b"HTTP/1.0"))
        head, _, body = (await everything(reader)).partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head
    assert json.loads(body)["object"] == "chat.completion"


# --- slow and broken connections ------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat/comp", b"GET /live HTTP/1.1\r\nx: y\r\n"])
async def test_a_slow_head_is_not_waited_for(serve_script, sent):
    async with serve_script("x", header_timeout_s=0.2) as served, connection(served) as (reader, writer):
        writer.write(sent)
        assert await everything(reader) == b""


async def test_the_head_of_a_second_request_has_a_deadline_too(serve_script):
    async with serve_script("x", header_timeout_s=0.2) as served, connection(served) as (reader, writer):
        writer.write(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200 OK" in await reader.readuntil(b"}")
        await asyncio.sleep(0.3)  # idle connections have another, longer one
        writer.write(b"GET /live HTTP/1.1\r\n")
        assert await everything(reader) == b""


async def test_an_idle_connection_is_closed(serve_script):
    async with serve_script("x", keep_alive_s=1) as served, connection(served) as (reader, writer):
        writer.write(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await everything(reader)).endswith(b'{"status":"live"}')


@pytest.mark.parametrize("more", [b"", b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n"])
async def test_a_connection_whose_answer_came_before_the_body_is_closed_too(serve_script, more):
    async with serve_script("x", keep_alive_s=1) as served, connection(served) as (reader, writer):
        content = json.dumps(CHAT).encode()
        writer.write(post(CHAT, path="/nowhere")[: -len(content)])
        assert b"404 Not Found" in await reader.readuntil(b"}}")
        writer.write(content + more)
        assert (b"200 OK" in await everything(reader)) is bool(more)


async def test_a_long_answer_after_a_body_that_came_late(serve_script):
    """The connection counted as idle between the two, for no time at all."""
    async with (
        serve_script("word " * 2, step_s=0.25, keep_alive_s=1) as served,
        connection(served) as (reader, writer),
    ):
        content = json.dumps(CHAT).encode()
        writer.write(post(CHAT, path="/nowhere")[: -len(content)])
        assert b"404 Not Found" in await reader.readuntil(b"}}")
        writer.write(content + post(CHAT))
        assert b'"finish_reason":"length"' in await everything(reader, 15)


async def test_a_slow_body_is_answered_and_closed(serve_script):
    async with serve_script("x", body_timeout_s=0.2) as served, connection(served) as (reader, writer):
        writer.write(post(CHAT, length=1000))
        answer = await everything(reader)
        assert answer.startswith(b"HTTP/1.1 408 ")


async def test_a_client_that_leaves_in_its_body(served):
    async with connection(served) as (_, writer):
        writer.write(post(CHAT, length=1000))
        await asyncio.sleep(0.05)
    await until(lambda: b'status="499"} 1.0' in served.metrics.render())
    assert served.completer.requests == []


async def test_what_is_no_http(served):
    async with connection(served) as (reader, writer):
        writer.write(b"\x16\x03\x01 hello\r\n\r\n")
        answer = await everything(reader)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b'"code":"invalid_http"' in answer


@pytest.mark.parametrize("pieces", [1, 2, 1000])
@pytest.mark.parametrize("chunked", [False, True])
async def test_request_that_asks_for_an_upgrade_is_served_as_http_1(serve_script, caplog, pieces, chunked):
    """Java's client asks for h2c with its first request, and goes on with HTTP/1.1 when refused."""
    content = json.dumps(CHAT).encode()
    framing = b"transfer-encoding: chunked" if chunked else b"content-length: %d" % len(content)
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content) if chunked else content
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\n"
        + JSON.encode()
        + b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\n"
        + b"http2-settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
        + framing
        + b"\r\n\r\n"
    )
    last = b"GET /live HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade, close\r\n\r\n"
    sent = head + body + post(CHAT) + last
    size = -(-len(sent) // pieces)
    async with serve_script("x") as served, connection(served) as (reader, writer):
        for start in range(0, len(sent), size):
            writer.write(sent[start : start + size])
            await asyncio.sleep(0)
        answer = await everything(reader)
        assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200", b"200", b"200"]
        assert answer.count(b'"object":"chat.completion"') == 2
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


async def test_connect_request_is_refused_and_ends_nothing_else(served):
    async with connection(served) as (reader, writer):
        writer.write(b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n")
        assert (await everything(reader)).startswith(b"HTTP/1.1 400 ")
    assert (await served.http.get("/live")).status_code == 200


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"HTTP/1.1\r\n", 400),
        (b"HTTP/1.1\r\nhost: a\r\nhost: b\r\n", 400),
        (b"HTTP/1.1\r\nhost: a\r\nHost: a\r\n", 400),
        (b"HTTP/1.1\r\nhost: a b\r\n", 400),
        (b"HTTP/1.1\r\nhost: a/b\r\n", 400),
        (b"HTTP/1.1\r\nhost: a@b\r\n", 400),
        (b"HTTP/1.1\r\nhost: a, b\r\n", 400),
        (b"HTTP/1.1\r\nhost: http://a\r\n", 400),
        (b"HTTP/1.1\r\nhost: a:b\r\n", 400),
        (b"HTTP/1.1\r\nhost: [::1\r\n", 400),
        (b"HTTP/1.1\r\nhost: \xff\r\n", 400),
        (b"HTTP/1.0\r\nhost: a\r\nhost: b\r\n", 400),
        (b"HTTP/1.0\r\n", 200),
        (b"HTTP/1.1\r\nhost:\r\n", 200),
        (b"HTTP/1.1\r\nhost: localhost:8000\r\n", 200),
        (b"HTTP/1.1\r\nhost: my_service.team-a.svc:80\r\n", 200),
        (b"HTTP/1.1\r\nhost: [::1]:8000\r\n", 200),
        (b"HTTP/1.1\r\nhost: [fe80::1%25eth0]\r\n", 200),
    ],
)
async def test_a_request_names_one_host(served, head, status):
    """RFC 9112, 3.2: proxies differ in which of two hosts counts."""
    async with connection(served) as (reader, writer):
        writer.write(b"GET /live " + head + b"connection: close\r\n\r\n")
        answer = await everything(reader)
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        assert (b'"code":"invalid_http"' in answer) == (status == 400)


async def test_a_refused_host_leaves_the_connection_to_the_next_request(served):
    async with connection(served) as (reader, writer):
        writer.write(
            b"GET /live HTTP/1.1\r\n\r\nGET /live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        )
        answer = await everything(reader)
        assert re.findall(rb"HTTP/1.1 (\d+) ", answer) == [b"400", b"200"]
    refused = b'penstock_requests_total{endpoint="other",model="",outcome="rejected",status="400"} 1.0'
    assert refused in served.metrics.render()


@pytest.mark.parametrize("length", [MAX_HEAD_BYTES - 100, MAX_HEAD_BYTES + 100, 3 * MAX_HEAD_BYTES])
async def test_too_long_a_url(served, length):
    async with connection(served) as (reader, writer):
        writer.write(b"GET /" + b"x" * length + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        answer = await everything(reader)
        too_long = length > MAX_HEAD_BYTES
        assert answer.startswith(b"HTTP/1.1 414 " if too_long else b"HTTP/1.1 404 ")
        if too_long:
            assert b'"code":"url_too_long"' in answer
            counted = b'endpoint="other",model="",outcome="rejected",status="414"} 1.0'
            assert counted in served.metrics.render()


@pytest.mark.parametrize(
    "headers",
    [
        b"x: " + b"y" * (MAX_HEAD_BYTES + 70_000),
        b"x: " + b"y" * MAX_HEAD_BYTES + b"\r\n\r\n",
        b"x: y\r\n" * (MAX_HEAD_BYTES // 5) + b"\r\n",
    ],
    ids=["without an end", "one header", "many headers"],
)
async def test_head_above_its_limit_is_refused_with_431(served, headers):
    async with connection(served) as (reader, writer):
        writer.write(b"GET /live HTTP/1.1\r\nhost: x\r\n" + headers)
        answer = await everything(reader)
        assert answer.startswith(b"HTTP/1.1 431 ")
        assert b'"code":"headers_too_large"' in answer
        assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    "part",
    [b"a: b\r\n" * 1000, b"x" * 8192],
    ids=["many", "one"],
)
async def test_too_long_trailers(serve_script, part):
    """What comes after the last chunk of a body is no body, and counted nowhere else."""
    head = b"POST /v1/completions HTTP/1.1\r\n" + JSON.encode() + b"transfer-encoding: chunked\r\n\r\n"
    async with serve_script("x") as served, connection(served) as (reader, writer):
        writer.write(head + b"1\r\n{\r\n0\r\na: ")
        for _ in range(100):
            writer.write(part)
            await asyncio.sleep(0)
        answer = await everything(reader)
        assert answer.startswith(b"HTTP/1.1 431 ")


async def test_a_body_of_many_chunks_is_no_head(served):
    content = json.dumps({**CHAT, "x": "y" * 3 * MAX_HEAD_BYTES}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\n" + JSON.encode() + b"connection: close\r\n"
    async with connection(served) as (reader, writer):
        writer.write(head + b"transfer-encoding: chunked\r\n\r\n")
        for start in range(0, len(content), 5):
            writer.write(b"%x;some=extension\r\n%s\r\n" % (len(content[start:][:5]), content[start:][:5]))
        writer.write(b"0\r\na: trailer\r\n\r\n")
        assert (await everything(reader)).startswith(b"HTTP/1.1 200 ")


async def test_too_many_pipelined_requests(served):
    """Each waits with all that belongs to it: a thousand fit into one read."""
    async with connection(served) as (reader, writer):
        writer.write(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n" * 1000)
        answer = b""
        with contextlib.suppress(ConnectionError):
            answer = await everything(reader)
        assert answer.count(b"HTTP/1.1") <= MAX_PIPELINED + 1
    assert (await served.http.get("/live")).status_code == 200


async def test_too_many_bytes_before_the_first_request_are_refused_with_431(served):
    async with connection(served) as (reader, writer):
        writer.write(b"\r\n" * MAX_HEAD_BYTES)
        assert (await everything(reader)).startswith(b"HTTP/1.1 431 ")


async def test_blank_lines_do_not_keep_a_connection(serve_script):
    async with serve_script("x", header_timeout_s=0.3) as served, connection(served) as (reader, writer):
        writer.write(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200 OK" in await reader.readuntil(b"}")
        async with asyncio.timeout(60):
            while not reader.at_eof():
                writer.write(b"\r\n")
                with contextlib.suppress(TimeoutError, ConnectionError):
                    await asyncio.wait_for(reader.read(1), 0.05)


async def test_too_many_connections(serve_script, caplog):
    async with serve_script("x", max_connections=2) as served, contextlib.AsyncExitStack() as stack:
        first = [await stack.enter_async_context(connection(served)) for _ in range(2)]
        await asyncio.sleep(0.05)
        async with connection(served) as (reader, writer):
            answer = await everything(reader)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b'"code":"overloaded"' in answer
        assert caplog.text.count("too many connections: 127.0.0.1:") == 1
        for reader, writer in first:
            writer.write(b"GET /live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            assert (await everything(reader)).startswith(b"HTTP/1.1 200 ")
        await asyncio.sleep(0.05)
        assert (await served.http.get("/live")).status_code == 200  # one that left makes room


async def test_too_much_of_bodies_at_a_time(serve_script):
    async with serve_script("x", max_reading_bytes=20_000) as served, connection(served) as (_, writer):
        writer.write(post({**CHAT, "user": "x" * 16_000}, length=30_000))
        await asyncio.sleep(0.1)
        long = {**CHAT, "user": "x" * 8000}
        refused = await served.http.post("/v1/chat/completions", json=long)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "overloaded"
        writer.transport.abort()
        await asyncio.sleep(0.1)
        assert (await served.http.post("/v1/chat/completions", json=long)).status_code == 200


async def test_too_much_of_bodies_of_calls_under_way(serve_script):
    async with (
        serve_script("x y", step_s=30.0, max_bodies_bytes=20_000) as served,
        connection(served) as (_, writer),
    ):
        long = {**CHAT, "user": "x" * 16_000}
        writer.write(post(long))
        await asyncio.sleep(0.2)  # its body was read, and its answer does not come
        refused = await served.http.post("/v1/chat/completions", json=long)
        assert refused.status_code == 429
        assert (
            "those of calls under way have more than 20000 bytes together"
            in refused.json()["error"]["message"]
        )
        writer.transport.abort()
        await asyncio.sleep(0.2)
        first, second = (
            asyncio.create_task(served.http.post("/v1/chat/completions", json=long)) for _ in range(2)
        )
        done, waiting = await asyncio.wait({first, second}, return_when=asyncio.FIRST_COMPLETED)
        assert [task.result().status_code for task in done] == [429]  # there was room for one
        for task in waiting:
            task.cancel()


async def test_pipelined_requests_are_answered_in_order(served):
    async with connection(served) as (reader, writer):
        writer.write(
            b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n" * 2
            + b"GET /v HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        )
        answer = await everything(reader)
        assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200", b"200", b"404"]


# --- slow readers ---------------------------------------------------------------------------------

PIECE = "word " * 200


def flood(byte_level, steps):
    ids = byte_level.encode(PIECE).ids
    found = [Delta(ids) for _ in range(steps)]
    found[-1].finish_reason = FinishReason.LENGTH
    return found


@pytest.fixture
def small_send_buffers(monkeypatch):
    """Loopback sockets buffer megabytes by default."""
    create = socket.create_server

    def small(*args, **kwargs):
        listener = create(*args, **kwargs)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return listener

    monkeypatch.setattr(socket, "create_server", small)


@pytest.mark.usefixtures("small_send_buffers")
async def test_a_slow_reader_gets_everything_in_fewer_chunks(serve_script, byte_level):
    steps = 600
    async with (
        serve_script(lambda request: flood(byte_level, steps)) as served,
        connection(served, receive_bytes=4096) as (reader, writer),
    ):
        writer.write(post({**CHAT, "stream": True}))
        await asyncio.sleep(0.5)
        answer = b""
        async with asyncio.timeout(20):
            while b"[DONE]" not in answer[-200:]:
                answer += await reader.read(65536)
        events = [line[6:] for line in answer.split(b"\n") if line.startswith(b"data: {")]
        text = "".join(json.loads(event)["choices"][0]["delta"]["content"] for event in events)
        assert text == PIECE * steps
        assert len(events) < steps


@pytest.mark.usefixtures("small_send_buffers")
async def test_a_reader_that_stalls_is_dropped(serve_script, byte_level):
    async with (
        serve_script(lambda request: flood(byte_level, 500), client_stall_s=0.4) as served,
        connection(served, receive_bytes=4096) as (_, writer),
    ):
        writer.write(post({**CHAT, "stream": True}))
        await until(lambda: b"penstock_requests_total{" in served.metrics.render())
        assert b'penstock_inflight_requests{model="tiny"} 0.0' in served.metrics.render()


@pytest.mark.usefixtures("small_send_buffers")
async def test_a_reader_too_far_behind_is_dropped_and_cancelled(serve_script, byte_level):
    async with (
        serve_script(
            lambda request: flood(byte_level, 5000), step_s=0.001, max_unsent_chars=50_000
        ) as served,
        connection(served, receive_bytes=4096) as (_, writer),
    ):
        writer.write(post({**CHAT, "stream": True}))
        await until(lambda: served.completer.cancelled)
        await until(lambda: b'status="499"} 1.0' in served.metrics.render())


@pytest.mark.usefixtures("small_send_buffers")
async def test_a_whole_answer_nobody_takes_does_not_keep_its_connection(serve_script, byte_level):
    async with (
        serve_script(lambda request: flood(byte_level, 800), keep_alive_s=1) as served,
        connection(served, receive_bytes=4096) as (reader, writer),
    ):
        writer.write(post(CHAT))
        await asyncio.sleep(2.5)
        with pytest.raises((ConnectionResetError, AssertionError)):  # noqa: PT012 a reset, or a cut answer
            answer = await everything(reader)
            assert len(answer) >= 800 * len(PIECE)


# --- starting and stopping ------------------------------------------------------------------------


async def test_an_address_in_use_refuses_to_start(serve_script, served):
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{served.port}: .*in use"):
        async with serve_script("x", port=served.port):
            pass


def make_certificate(folder):
    key, cert = folder / "key.pem", folder / "cert.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ]
    options = ["-subj", "/CN=127.0.0.1", "-days", "2", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*command, *options], check=True, capture_output=True)
    return {"tls_cert": str(cert), "tls_key": str(key)}


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    return make_certificate(tmp_path_factory.mktemp("tls"))


async def test_https(serve_script, certificate):
    async with serve_script("Hello!", **certificate) as served:
        url = f"https://{served.host}:{served.port}"
        async with httpx.AsyncClient(base_url=url, verify=False) as http:
            response = await http.post("/v1/chat/completions", json={**CHAT, "stream": True})
            assert response.text.endswith("data: [DONE]\n\n")


async def test_a_renewed_certificate_is_used_for_new_connections(serve_script, tmp_path, monkeypatch):
    monkeypatch.setattr("penstock.net.renewed.RECHECK_S", 0.0)

    async def shown():
        def connect():
            return ssl.get_server_certificate((served.host, served.port), timeout=5).strip()

        return await asyncio.to_thread(connect)

    files = make_certificate(tmp_path)
    cert = tmp_path / "cert.pem"
    first = cert.read_text().strip()
    async with serve_script("x", **files) as served:
        assert await shown() == first
        make_certificate(tmp_path)
        second = cert.read_text().strip()
        assert await shown() == second != first
        cert.write_text("")
        assert await shown() == second


async def test_weak_ciphers_are_not_spoken(serve_script, certificate):
    def connect(ciphers):
        context = ssl.create_default_context(cafile=certificate["tls_cert"])
        context.check_hostname = False
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(ciphers)
        return asyncio.open_connection(served.host, served.port, ssl=context)

    async with serve_script("x", **certificate) as served:
        for weak in ("AES128-SHA", "ECDHE-ECDSA-AES128-SHA"):  # no forward secrecy; SHA-1
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await connect(weak)
        _, writer = await connect("ECDHE-ECDSA-AES128-GCM-SHA256")
        writer.close()


async def test_what_is_no_http_inside_tls(serve_script, certificate):
    async with serve_script("x", **certificate) as served:
        trusting = ssl.create_default_context(cafile=certificate["tls_cert"])
        trusting.check_hostname = False
        reader, writer = await asyncio.open_connection(served.host, served.port, ssl=trusting)
        writer.write(b"nonsense\r\n\r\n")
        assert (await reader.readuntil(b"}}")).startswith(b"HTTP/1.1 400 ")
        writer.close()


async def test_a_tls_handshake_that_does_not_end(serve_script, certificate):
    async with serve_script("x", tls_timeout_s=0.2, **certificate) as served:
        for sent in (b"", b"\x16\x03\x01\x02\x00\x01\x00"):
            async with connection(served) as (reader, writer):
                writer.write(sent)
                with contextlib.suppress(ConnectionError):
                    assert await everything(reader) == b""


@pytest.mark.parametrize("limit", [{"max_connections": 4}, {"max_tls_handshakes": 4}])
async def test_silent_tls_connections_count_and_keep_nobody_out(
    serve_script, certificate, monkeypatch, caplog, limit
):
    monkeypatch.setattr("penstock.frontend.http.server.MAX_LINGERING", 0)
    caplog.set_level("INFO")
    async with (
        serve_script("Hello!", **limit, **certificate) as served,
        contextlib.AsyncExitStack() as stack,
    ):
        silent = [await stack.enter_async_context(connection(served)) for _ in range(30)]
        for reader, _ in silent[:26]:
            with contextlib.suppress(ConnectionError):
                assert await everything(reader) == b""
        url = f"https://{served.host}:{served.port}"
        async with httpx.AsyncClient(base_url=url, verify=False) as http:
            assert (await http.get("/live")).status_code == 200
            assert not silent[29][0].at_eof()
    failed = [line for line in caplog.messages if line.startswith("TLS handshake with 127.0.0.1:")]
    assert len(failed) == BURST_LINES
    assert failed[0].endswith("failed: too many other handshakes are under way")


async def test_no_room_even_for_a_handshake(serve_script, certificate, monkeypatch, caplog):
    monkeypatch.setattr("penstock.frontend.http.server.MAX_LINGERING", 0)
    trusting = ssl.create_default_context(cafile=certificate["tls_cert"])
    trusting.check_hostname = False
    async with serve_script("x", max_connections=1, **certificate) as served:
        answers, first = await asyncio.open_connection(served.host, served.port, ssl=trusting)
        first.write(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200 OK" in await answers.readuntil(b"}")
        async with connection(served) as (reader, _):
            with contextlib.suppress(ConnectionError):
                assert await everything(reader) == b""
        await until(lambda: "is dropped before its TLS handshake" in caplog.text)
        first.close()


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", "failed: http request"),
        (b"\x00" * 5000, "failed: "),
    ],
)
async def test_what_is_no_tls(serve_script, certificate, caplog, sent, said):
    caplog.set_level("INFO")
    async with serve_script("x", **certificate) as served:
        async with connection(served) as (reader, writer):
            writer.write(sent)
            with contextlib.suppress(ConnectionError):
                await everything(reader)
        await until(lambda: said in caplog.text)
        assert caplog.text.count("TLS handshake with") == 1


async def test_the_server_ends_with_handshakes_under_way(serve_script, certificate):
    async with serve_script("x", **certificate) as served, connection(served) as (reader, _):
        await asyncio.sleep(0.05)
        served.stop.set()
        await asyncio.wait_for(served.task, 60)
        with contextlib.suppress(ConnectionError):
            assert await everything(reader) == b""


async def test_garbage_does_not_fill_the_log(served, caplog):
    caplog.set_level("INFO")
    for _ in range(30):
        async with connection(served) as (reader, writer):
            writer.write(b"nonsense\r\n\r\n")
            await everything(reader)
    assert caplog.text.count("sent invalid HTTP") == BURST_LINES


@pytest.mark.parametrize(("soft", "room"), [(20_000, 16_384), (4096, 4096 - 512 - 256), (100, 1)])
def test_room_for_connections(monkeypatch, caplog, soft, room):
    monkeypatch.setattr("resource.getrlimit", lambda _: (soft, soft))
    assert _connections(FrontendSettings()) == room
    assert ("connections are possible" in caplog.text) == (room < 16_384)


async def test_a_certificate_that_cannot_be_used(serve_script, certificate, tmp_path):
    for wrong in (str(tmp_path / "none.pem"), certificate["tls_key"]):
        with pytest.raises(ConfigError, match="HTTPS certificate"):
            async with serve_script("x", tls_cert=wrong, tls_key=certificate["tls_key"]):
                pass


async def test_signals_are_left_alone(served):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert all("uvicorn" not in repr(handler) for handler in handlers)
    assert (await served.http.get("/live")).status_code == 200


async def test_streams_finish_while_new_calls_are_refused(serve_script):
    async with serve_script("word " * 30, step_s=0.02) as served:
        stream = await served.client.chat.completions.create(**CHAT, stream=True)
        await anext(aiter(stream))
        served.stop.set()
        await asyncio.sleep(0.02)
        health = await served.http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "unhealthy")
        refused = await served.http.post("/v1/chat/completions", json=CHAT)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert (await served.http.get("/live")).status_code == 200
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].choices[0].finish_reason == "length"
        await asyncio.wait_for(served.task, 60)
        with pytest.raises(httpx.ConnectError):
            await httpx.AsyncClient().get(served.url + "/live")


async def test_what_outlasts_the_grace_is_told_so(serve_script):
    async with serve_script("word " * 4000, step_s=0.02, grace_s=0.2) as served:
        body = {**CHAT, "stream": True}
        streamed = asyncio.ensure_future(served.http.post("/v1/chat/completions", json=body))
        whole = asyncio.ensure_future(served.http.post("/v1/chat/completions", json=CHAT))
        await until(lambda: len(served.completer.requests) == 2)
        await asyncio.sleep(0.1)
        began = time.monotonic()
        served.stop.set()
        assert "shutting down" in (await streamed).text
        assert (await whole).status_code == 503
        await asyncio.wait_for(served.task, 60)
        assert time.monotonic() - began < 30  # it would go on for 80 s
        assert len(served.completer.cancelled) == 2


async def test_cancelling_drops_everything(serve_script):
    async with serve_script("word " * 4000, step_s=0.02) as served:
        call = asyncio.ensure_future(served.http.post("/v1/chat/completions", json=CHAT))
        await until(lambda: served.completer.requests)
        served.task.cancel()
        with pytest.raises(httpx.HTTPError):
            await asyncio.wait_for(call, 60)
        await until(lambda: served.completer.cancelled)
        await asyncio.wait([served.task])
        assert served.task.cancelled()


# --- an inherited port -----------------------------------------------------------------------------


class Launcher:
    """Has several servers serve one port, as the launcher has processes do."""

    def __init__(self):
        self.listener = listen("127.0.0.1", 0)
        self.channels = []

    def inherited(self, patience_s=10.0):
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.channels.append(ours)
        return InheritedListener(self.listener.dup(), theirs, patience_s)

    def was_told_ready(self, number):
        try:
            return self.channels[number].recv(1) == b"1"
        except BlockingIOError:
            return False

    def close(self):
        self.listener.close()
        for channel in self.channels:
            channel.close()


@pytest.fixture
def launcher():
    with contextlib.closing(Launcher()) as found:
        yield found


async def test_old_server_of_an_inherited_port_ends_its_connections_while_the_new_one_accepts(
    serve_script, launcher, monkeypatch
):
    monkeypatch.setattr("penstock.frontend.http.connection.LEAVING_IDLE_S", 3.0)
    ask = CHAT | {"stream": True}
    async with (
        serve_script("old " * 6, step_s=0.05, inherited=launcher.inherited()) as old,
        connection(old) as (idle_reader, _),
        connection(old) as (reader, writer),
        connection(old) as (late_reader, late_writer),
    ):
        await until(lambda: launcher.was_told_ready(0))
        writer.write(post(ask))
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
        async with serve_script("new", inherited=launcher.inherited()) as new:
            await until(lambda: launcher.was_told_ready(1))
            old.stop.set()
            await asyncio.sleep(0.1)
            late_writer.write(post(CHAT))
            for _ in range(10):
                async with httpx.AsyncClient(base_url=old.url, trust_env=False) as http:
                    assert "new" in (await http.post("/v1/chat/completions", json=CHAT)).text
            assert b"[DONE]" in await reader.readuntil(b"[DONE]\n\n\r\n0\r\n\r\n")
            writer.write(post(CHAT))  # it was not told that its connection would end
            for stream in (reader, late_reader):
                answer = await everything(stream)
                assert answer.startswith(b"HTTP/1.1 200 ")
                assert b"connection: close" in answer
                assert b"old old" in answer
            assert await everything(idle_reader, 15) == b""
            await asyncio.wait_for(old.task, 60)
            assert new.completer.requests
            assert not new.task.done()


async def test_handshake_under_way_is_not_cut_when_the_server_leaves_its_port(
    serve_script, launcher, certificate
):
    trusting = ssl.create_default_context(cafile=certificate["tls_cert"])
    trusting.check_hostname = False
    async with serve_script("old", inherited=launcher.inherited(), **certificate) as old:
        await until(lambda: launcher.was_told_ready(0))
        raw = socket.create_connection((old.host, old.port))
        _, later = await asyncio.open_connection(
            old.host, old.port, ssl=trusting
        )  # so that one is accepted
        later.close()
        await later.wait_closed()
        old.stop.set()
        await asyncio.sleep(1.6)
        reader, writer = await asyncio.open_connection(sock=raw, ssl=trusting, server_hostname=old.host)
        writer.write(post(CHAT))
        assert (await everything(reader)).startswith(b"HTTP/1.1 200 ")
        writer.close()
        await asyncio.wait_for(old.task, 60)


async def test_inherited_port_is_served_once_healthy_or_when_patience_ends(
    view, byte_level, saying, launcher
):
    completer = ScriptedCompleter([view], saying("late"))
    completer.absent = [Role.DECODE]
    app_soon = asyncio.create_task(_first_answer(completer, launcher.inherited(patience_s=60)))
    await asyncio.sleep(0.3)
    assert not app_soon.done()
    completer.absent = []
    assert (await asyncio.wait_for(app_soon, 60)).status_code == 200
    assert launcher.was_told_ready(0)

    completer.absent = [Role.DECODE]
    answer = await asyncio.wait_for(_first_answer(completer, launcher.inherited(patience_s=0.2)), 5)
    assert (answer.status_code, answer.json()["missing"]) == (503, ["decode"])
    assert not launcher.was_told_ready(1)


async def _first_answer(completer, inherited):
    async with serving(completer, inherited=inherited) as served:
        return await served.http.get("/health")
