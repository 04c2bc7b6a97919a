"""The fault lab itself: what it must notice, and that the page has what it tries."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from checks.faults import report
from checks.faults.clients import Client, Question, drawn, sim_question
from checks.faults.episode import SIM_PHASES, Row
from checks.faults.faults import FAULTS
from tests.proxy import Proxy, Weather


def test_every_fault_is_in_the_page() -> None:
    page = report.DOCUMENT.read_text(encoding="utf-8")
    table = page.split(report.BEGIN)[1].split(report.END)[0]
    for fault in FAULTS:
        assert f"| {fault.name} | {fault.promise} |" in table, "run `make faults ARGS=--write-docs`"


def test_faults_have_names_of_their_own_and_phases_that_exist() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(names) == len(set(names))
    for fault in FAULTS:
        assert fault.phases
        assert set(fault.phases) <= set(SIM_PHASES)
        assert set(fault.quick) <= set(fault.phases)


def test_the_page_keeps_what_is_around_its_table() -> None:
    rows = [
        Row(FAULTS[0].name, "decode", "sim", requests=3, in_flight=2, ok=3, errors={"503 no_worker": 1})
    ]
    page = report.document(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", rows, "today")
    assert page.startswith("before\n")
    assert page.endswith("\nafter\n")
    assert "old" not in page
    assert f"| {FAULTS[0].name} |" in page
    assert "1 x 503 no_worker" in page


# --- clients ----------------------------------------------------------------------------------------


@asynccontextmanager
async def answering(*answers: bytes) -> AsyncIterator[list[str]]:
    """Servers that give one answer each, and end the connection."""
    servers = []
    for answer in answers:

        async def serve(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: bytes = answer
        ) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
            writer.close()

        servers.append(await asyncio.start_server(serve, "127.0.0.1", 0))
    try:
        yield [f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in servers]
    finally:
        for server in servers:
            server.close()


def stream(*parts: object, whole: bool = True) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    events = [json.dumps(part) for part in parts] + (["[DONE]"] if whole else [])
    chunks = [f"data: {event}\n\n".encode() for event in events]
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return head + body + (b"0\r\n\r\n" if whole else b"")


def part(text: str, finish: str | None = None) -> object:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}]}


USAGE = {"choices": [], "usage": {"completion_tokens": 4}}
QUESTION = Question("?", 4, expected=("abcd",))


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        ([part("ab"), part("cd", "length"), USAGE], "ok"),
        ([part("ab"), part("ce", "length"), USAGE], "wrong"),
        ([part("ab"), part("", "length"), USAGE], "wrong"),
        ([part("ab"), part("bcd", "length"), USAGE], "wrong"),
        ([part("ab"), part("cd", "stop"), USAGE], "wrong"),
        ([part("ab"), part("cd"), USAGE], "wrong"),
        ([part("ab"), part("cd", "length"), {"choices": [], "usage": {"completion_tokens": 5}}], "wrong"),
        ([part("ab"), part("cd", "length")], "wrong"),
        ([part("ab"), {"error": {"code": "no_worker"}}], "in the stream: no_worker"),
    ],
)
async def test_clients_check_streams(parts: list[object], kind: str) -> None:
    async with answering(stream(*parts)) as urls:
        outcome = await Client(QUESTION, urls, 0).run()
    assert outcome.kind == kind


async def test_a_cut_stream_is_counted_and_asked_again_elsewhere() -> None:
    half = stream(part("ab"), whole=False)
    async with answering(half, stream(part("abcd", "length"), USAGE)) as urls:
        outcome = await Client(QUESTION, urls, 0).run()
    assert (outcome.kind, outcome.cuts) == ("ok", 1)


async def test_a_frontend_that_leaves_is_passed_over() -> None:
    body = json.dumps({"error": {"code": "shutting_down"}}).encode()
    leaving = b"HTTP/1.1 503 x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    async with answering(leaving, stream(part("abcd", "length"), USAGE)) as urls:
        outcome = await Client(QUESTION, urls, 0).run()
    assert (outcome.kind, outcome.cuts, outcome.refusals) == ("ok", 0, 1)


async def test_errors_have_their_code() -> None:
    body = json.dumps({"error": {"code": "no_worker"}}).encode()
    async with answering(b"HTTP/1.1 503 x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)) as urls:
        outcome = await Client(QUESTION, urls, 0).run()
    assert outcome.kind == "503 no_worker"


def test_what_the_sim_engine_draws() -> None:
    assert len(drawn(7, 50)) == 50
    assert drawn(7, 50).startswith(drawn(7, 20))
    assert drawn(7, 50) != drawn(8, 50)
    shapes = [sim_question(number, 100, 5) for number in range(70)]
    assert {(shape.chat, shape.stream, shape.n) for shape in shapes} >= {
        (chat, stream, n) for chat in (True, False) for stream in (True, False) for n in (1, 2)
    }


# --- the proxy --------------------------------------------------------------------------------------


@asynccontextmanager
async def echo_behind_proxy() -> AsyncIterator[tuple[Proxy, int]]:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(100):
            writer.write(chunk)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    proxy = Proxy(("127.0.0.1", 0), server.sockets[0].getsockname())
    await proxy.start()
    try:
        yield proxy, proxy.port
    finally:
        await proxy.stop()
        server.close()


async def says(reader: asyncio.StreamReader, timeout_s: float) -> bytes | None:
    try:
        return await asyncio.wait_for(reader.read(100), timeout_s)
    except TimeoutError:
        return None


@pytest.mark.parametrize("weather", [Weather(hold_up=True), Weather(hold_down=True)])
async def test_a_silent_proxy_holds_what_comes_and_gives_it_later(weather: Weather) -> None:
    async with echo_behind_proxy() as (proxy, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"one")
        assert await says(reader, 10) == b"one"
        proxy.set(weather)
        writer.write(b"two")
        assert await says(reader, 0.2) is None
        proxy.set(Weather())
        assert await says(reader, 10) == b"two"
        writer.close()


async def test_a_refusing_proxy_resets() -> None:
    async with echo_behind_proxy() as (proxy, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"one")
        assert await says(reader, 10) == b"one"
        proxy.set(Weather(refused=True))
        try:
            assert await says(reader, 10) == b""
        except ConnectionResetError:
            pass  # the same, told more plainly
        writer.close()
