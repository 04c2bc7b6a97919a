"""A frontend at a Unix socket, beside its port or alone."""

import asyncio
import json
import os
import socket
import stat

import httpx
import pytest

from penstock.bench.answers import StreamedAnswer
from penstock.bench.http_client import HttpClient, RequestFailed
from penstock.cli.chat import ChatClient
from penstock.errors import ConfigError, RemoteError
from tests.frontend.test_app import CHAT


async def ask(path, body=None):
    transport = httpx.AsyncHTTPTransport(uds=str(path))
    async with httpx.AsyncClient(base_url="http://x", transport=transport, timeout=10) as http:
        return await http.post("/v1/chat/completions", json=body or CHAT)


async def test_frontend_answers_at_its_unix_socket_and_its_port(serve_script, tmp_path):
    path = tmp_path / "frontend.sock"
    async with serve_script("Hello", uds=str(path)) as served:
        whole = await ask(path)
        stream = await ask(path, CHAT | {"stream": True})
        at_port = await served.http.post("/v1/chat/completions", json=CHAT)
        with socket.socket(socket.AF_UNIX) as raw:  # what has no address can be logged, too
            raw.connect(str(path))
            raw.sendall(b"nonsense\r\n\r\n")
        assert os.listdir(tmp_path) == ["frontend.sock"]
    assert whole.json()["choices"][0]["message"]["content"] == "Hello"
    assert stream.text.endswith("data: [DONE]\n\n")
    assert at_port.status_code == 200
    assert os.listdir(tmp_path) == []


async def test_frontend_without_a_port_answers_at_its_unix_socket(serve_script, tmp_path):
    path = tmp_path / "frontend.sock"
    async with serve_script("Hello", uds=str(path), port=-1):
        assert (await ask(path)).status_code == 200


async def test_umask_decides_who_may_connect(serve_script, tmp_path):
    path = tmp_path / "frontend.sock"
    before = os.umask(0o077)
    try:
        async with serve_script("x", uds=str(path)):
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
    finally:
        os.umask(before)


async def test_socket_file_that_a_killed_process_left_is_replaced(serve_script, tmp_path):
    path = tmp_path / "frontend.sock"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    async with serve_script("x", uds=str(path)):
        assert (await ask(path)).status_code == 200


async def test_socket_of_a_living_process_refuses_to_start(serve_script, tmp_path):
    path = tmp_path / "frontend.sock"
    async with serve_script("x", uds=str(path)):
        with pytest.raises(ConfigError, match="another process listens on it"):
            async with serve_script("x", uds=str(path)):
                pytest.fail("it started")
        assert (await ask(path)).status_code == 200


@pytest.mark.parametrize(
    ("name", "why"),
    [("file", "is no socket"), ("missing/a.sock", "No such file"), ("a" * 200, "too long")],
)
async def test_path_that_cannot_be_used_refuses_to_start(serve_script, tmp_path, name, why):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigError, match=why):
        async with serve_script("x", uds=str(tmp_path / name)):
            pytest.fail("it started")
    assert (tmp_path / "file").read_text() == "precious"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("form", ["unix:{}", "unix://{}"])
async def test_own_clients_reach_a_frontend_at_its_unix_socket(serve_script, tmp_path, form):
    url = form.format(tmp_path / "frontend.sock")
    async with serve_script("Hello", uds=str(tmp_path / "frontend.sock"), port=-1):
        chat = ChatClient(url)
        assert await asyncio.to_thread(chat.first_model) == "tiny"
        assert "".join(await asyncio.to_thread(lambda: list(chat.stream(CHAT)))) == "Hello"
        bench, answer = HttpClient(url), StreamedAnswer(keep_text=True)
        body = json.dumps(CHAT | {"stream": True}).encode()
        await bench.request("POST", "/v1/chat/completions", body, answer)
        await bench.close()
        assert (answer.complete, answer.text) == (True, "Hello")


async def test_own_clients_say_where_nobody_listens(tmp_path):
    url = f"unix:{tmp_path}/none.sock"
    with pytest.raises(RemoteError, match=r"none\.sock: .*No such file"):
        ChatClient(url).first_model()
    with pytest.raises(RequestFailed, match="No such file"):
        await HttpClient(url).request("GET", "/live", b"", StreamedAnswer())
    for client in (ChatClient, HttpClient):
        with pytest.raises(ConfigError, match="expected http://HOST:PORT or unix:/PATH"):
            client("unix://")
