from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from penstock.cli import run
from penstock.cli.chat import ChatClient, Conversation, converse
from penstock.errors import RemoteError


class Server(ThreadingHTTPServer):
    """Answers with `script`, one list of SSE payloads per call, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.script: list[list[str]] = []
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        self.models = ["tiny"]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self._answer(200, json.dumps({"data": [{"id": name} for name in self.server.models]}).encode())

    def do_POST(self) -> None:
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.server.keys.append(self.headers["Authorization"])
        if not self.server.script:
            self._answer(429, b'{"error": {"message": "Too many requests."}}')
            return
        self._answer(
            200, "".join(f": ping\n\ndata: {line}\n\n" for line in self.server.script.pop(0)).encode()
        )

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *ignored: object) -> None:
        pass


def delta(text: str) -> str:
    return json.dumps({"choices": [{"delta": {"content": text}}]})


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def conversation(server: Server, system: str = "") -> Conversation:
    return Conversation(ChatClient(server.url + "/v1/"), "tiny", system, {"max_tokens": 5})


def test_a_conversation_remembers(server: Server) -> None:
    empty = json.dumps({"choices": [{"delta": {"role": "assistant"}}]})
    server.script = [
        [empty, delta("Hello "), delta("Alice!"), '{"choices": []}', "[DONE]"],
        [delta("Alice."), "[DONE]"],
    ]
    talk, out = conversation(server, "Be brief."), io.StringIO()
    lines = iter(["I am Alice.", "", "/what", "My name?", "/reset", "/exit", "unread"])
    converse(talk, lambda: next(lines), out, io.StringIO())
    assert out.getvalue() == "Hello Alice!\ncommands: /reset, /exit\nAlice.\nforgotten\n"
    assert server.asked[1] == {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "I am Alice."},
            {"role": "assistant", "content": "Hello Alice!"},
            {"role": "user", "content": "My name?"},
        ],
        "max_tokens": 5,
        "stream": True,
    }
    assert talk.messages == [{"role": "system", "content": "Be brief."}]


def test_errors_leave_the_conversation_as_it_was(server: Server) -> None:
    talk, errors = conversation(server), io.StringIO()
    server.script = [[delta("Hel")], ['{"error": {"message": "No worker is left."}}'], ["{"]]
    lines = iter(["a", "b", "c", "d"])

    def read() -> str:
        for line in lines:
            return line
        raise EOFError

    converse(talk, read, io.StringIO(), errors)
    assert errors.getvalue().splitlines() == [
        "penstock: the connection ended before the answer did",
        "penstock: No worker is left.",
        "penstock: not an event of a chat stream: b'{'",
        "penstock: 429: Too many requests.",
    ]
    assert talk.messages == []


def test_an_interrupted_answer_is_kept(server: Server) -> None:
    class Interrupting(io.StringIO):
        def flush(self) -> None:
            if self.getvalue() == "Hello":
                raise KeyboardInterrupt

    server.script = [[delta("Hello"), delta(" there"), "[DONE]"]]
    talk, out = conversation(server), Interrupting()
    talk.say("hi", out)
    assert out.getvalue() == "Hello [stopped]\n"
    assert talk.messages[-1] == {"role": "assistant", "content": "Hello"}


def test_a_question_on_the_command_line_is_answered_with_its_options(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script = [[delta("Hi."), "[DONE]"]]
    words = ["--url", server.url.removeprefix("http://"), "--api-key", "k", "--temperature", "0"]
    assert run(["chat", "Hello", *words]) == 0
    assert capsys.readouterr().out == "Hi.\n"
    assert server.asked[0]["temperature"] == 0
    assert server.keys == ["Bearer k"]


def test_questions_may_come_from_a_pipe(server: Server, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    server.script = [[delta("1"), "[DONE]"], [delta("2"), "[DONE]"]]
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert run(["chat", "--url", server.url]) == 0
    assert capsys.readouterr().out == "1\n2\n\n"


def test_a_server_without_models(server: Server) -> None:
    server.models = []
    with pytest.raises(RemoteError, match="serves no model yet"):
        ChatClient(server.url).first_model()
