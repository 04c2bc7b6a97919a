from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock.kubernetes import client
from penstock.kubernetes.api import ApiError, LogLine
from penstock.kubernetes.client import HttpsApi, connect, own_namespace
from penstock.kubernetes.kinds import CONFIG_MAPS, PODS
from tests.discovery.pods import pod
from tests.kubernetes_api.test_double import UNSERVED
from tests.kubernetes_contract import ApiContract
from tests.kubernetes_double import KubernetesDouble
from tests.kubernetes_http import kubeconfig, served

NAMELESS = b'{"items":[{}],"metadata":{"resourceVersion":"1"}}'
EVENT = b'{"type":"ADDED","object":{"metadata":{"name":"a","resourceVersion":"7"}}}\n'


class TestOverHttp(ApiContract):
    @pytest.fixture
    async def api(self, tmp_path: Path) -> AsyncIterator[HttpsApi]:
        double = KubernetesDouble(unserved=UNSERVED)
        double.missing_namespaces.add("there-is-none")
        async with served(double, tmp_path) as file:
            api = await asyncio.to_thread(connect, str(file))
            yield api
            await api.close()

    @pytest.fixture
    def namespace(self) -> str:
        return "test"


class Scripted:
    """A server that answers each connection with the same bytes, and then says nothing more."""

    def __init__(self, answer: bytes, *, hang_up: bool = False) -> None:
        self.answer, self.hang_up = answer, hang_up
        self.connections: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await asyncio.gather(*self.connections)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.append(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(self.answer)
        await writer.drain()
        if not self.hang_up:
            await reader.read()  # until the client leaves
        writer.close()
        await writer.wait_closed()


def chunked(*parts: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


async def read_watch(folder: Path, answer: bytes, *, hang_up: bool = False) -> list[str]:
    async with Scripted(answer, hang_up=hang_up) as server:
        api = await asyncio.to_thread(connect, str(kubeconfig(folder, server)))
        seen = []
        try:
            async for change in api.watch(CONFIG_MAPS, "5", "test", timeout_s=0):
                seen.append(change.object["metadata"]["name"])  # noqa: PERF401 - up to the error
        except ApiError as error:
            seen.append(f"! {error.status} {error}")
        await api.close()
        return seen


async def test_a_watch_over_a_dead_connection_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SILENCE_S", 0.3)
    began = time.monotonic()
    seen = await read_watch(tmp_path, chunked(EVENT))
    assert seen[0] == "a"
    assert seen[1].startswith("! 0 watching configmaps: ")
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        (chunked(EVENT[:20]), "! 0 "),
        (chunked(b"<html>\n"), "! 0 watching configmaps: the answer is not a Kubernetes API server's"),
        (chunked(b'{"type":"ADDED"}\n'), "! 0 watching configmaps: the answer is not a Kubernetes"),
        (chunked(b"[]\n"), "! 0 watching configmaps: the answer is not a Kubernetes API server's"),
        (
            chunked(b'{"type":"ERROR","object":{"message":"too old","code":410}}\n'),
            "! 410 too old",
        ),
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 7\r\n\r\n<html>\n", "! 502 "),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "! 0 watching configmaps: "),
    ],
)
async def test_what_is_no_watch(tmp_path: Path, answer: bytes, wrong: str) -> None:
    seen = await read_watch(tmp_path, answer, hang_up=True)
    assert len(seen) == 1
    assert seen[0].startswith(wrong)


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b"[]",
        b'"x"',
        b"null",
        b"7",
        b"<html>",
        b"\xff",
        b'{"items":[{}],"metadata":{"resourceVersion":"1"}}',
    ],
)
async def test_an_answer_that_is_none_is_an_error_of_the_api(tmp_path: Path, body: bytes) -> None:
    """A proxy that answers for the server, with 200."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body)
    async with Scripted(answer, hang_up=True) as server:
        api = await asyncio.to_thread(connect, str(kubeconfig(tmp_path, server)))
        with pytest.raises(ApiError, match="not a Kubernetes API server's"):
            await api.list(CONFIG_MAPS, "test")
        if body not in (b"{}", NAMELESS):
            with pytest.raises(ApiError, match="not a Kubernetes API server's"):
                await api.serves(CONFIG_MAPS)
        await api.close()


@pytest.mark.parametrize("body", [b'{"message":"x","code":"y"}', b"[1]", b'{"message":"x","details":7}'])
async def test_an_error_in_another_shape_keeps_its_status(tmp_path: Path, body: bytes) -> None:
    answer = b"HTTP/1.1 503 Away\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body)
    async with Scripted(answer, hang_up=True) as server:
        api = await asyncio.to_thread(connect, str(kubeconfig(tmp_path, server)))
        with pytest.raises(ApiError) as raised:
            await api.get(CONFIG_MAPS, "a", "test")
        assert raised.value.status == 503
        await api.close()


async def test_messages_may_come_in_any_pieces(tmp_path: Path) -> None:
    pieces = [EVENT[:10], EVENT[10:] + EVENT[:1], EVENT[1:] + b"\n" + EVENT]
    assert (await read_watch(tmp_path, chunked(*pieces, b""), hang_up=True))[:3] == ["a"] * 3


async def test_a_call_that_nobody_answers_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "CALL_S", 0.3)
    async with Scripted(b"") as server:
        api = await asyncio.to_thread(connect, str(kubeconfig(tmp_path, server)))
        with pytest.raises(ApiError, match=r"GET /api/v1/namespaces/test/pods/x: ") as raised:
            await api.get(PODS, "x", "test")
        assert raised.value.status == 0
        await api.close()


async def test_a_call_that_is_answered_drop_by_drop_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "WHOLE_CALL_S", 0.3)
    async with Scripted(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{") as server:
        api = await asyncio.to_thread(connect, str(kubeconfig(tmp_path, server)))
        with pytest.raises(ApiError) as raised:
            await api.get(PODS, "x", "test")
        assert raised.value.status == 0
        await api.close()


@pytest.mark.parametrize(
    "content",
    ["", "[]", "clusters: 5", "current-context: x", "apiVersion: v1\nkind: Config\n", "a: [", "\0"],
)
def test_what_is_no_kubeconfig(tmp_path: Path, content: str) -> None:
    file = tmp_path / "kubeconfig"
    file.write_text(content)
    with pytest.raises(ConfigError, match="Kubernetes: ") as raised:
        connect(str(file))
    assert "\n" not in str(raised.value)


def test_a_kubeconfig_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        connect(str(tmp_path / "nowhere"))


def test_the_namespace_of_a_kubeconfig(tmp_path: Path) -> None:
    assert own_namespace(str(kubeconfig(tmp_path, "http://127.0.0.1:1"))) == "test"


async def test_logs(tmp_path: Path) -> None:
    double = KubernetesDouble()
    async with served(double, tmp_path) as file:
        api = await asyncio.to_thread(connect, str(file))
        with pytest.raises(ApiError) as raised:
            await anext(api.logs("w", "test"))
        assert raised.value.is_not_found
        await double.create(PODS, pod("test", "w", "decode", 7000))
        for second in range(4):
            double.log("test", "w", f"line {second}", time=f"2026-01-01T00:00:0{second}.5Z")
        lines = api.logs("w", "test", "main", since="2026-01-01T00:00:01.7Z", tail_lines=2)
        assert [(await anext(lines)).text for _ in range(2)] == ["line 2", "line 3"]
        double.log("test", "w", "", time="2026-01-01T00:00:04.5Z")
        assert await anext(lines) == LogLine("2026-01-01T00:00:04.5Z", "")
        double.end_log("test", "w")
        assert [line async for line in lines] == []
        await api.close()


async def test_a_line_of_a_log_may_be_of_any_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "LOG_LINE_BYTES_MAX", 10)
    answer = chunked(b"T abcdefgh\nT ab", b"cdefghijklmnopqrs", b"tuvw\nT \xff\nT end", b"")
    async with Scripted(answer, hang_up=True) as server:
        api = await asyncio.to_thread(connect, str(kubeconfig(tmp_path, server)))
        lines = []
        with contextlib.suppress(ApiError):
            async for line in api.logs("w", "test"):
                lines.append(line)  # noqa: PERF401 - up to the error
        await api.close()
    texts = ["abcdefgh", "", "abcdefgh", "ijklmnopqr", "stuvw", "\N{REPLACEMENT CHARACTER}", "end"]
    assert [line.text for line in lines] == texts
    assert {line.time for line in lines} == {"T"}
