"""What is fuzzed: each target takes any bytes, and must end in a value or an error of the tree, in time.

The same targets serve hypothesis (test_fuzz.py), atheris (guided.py, `make fuzz`) and the corpus, in which
every input that once broke something is kept (test_corpus.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shlex
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from penstock.discovery.file import DirectoryScan, FileDiscoverySettings
from penstock.errors import ConfigError, ProtocolError, RequestRejected
from penstock.frontend.anthropic_messages import CountTokens, Messages
from penstock.frontend.app import App
from penstock.frontend.chat import Chat
from penstock.frontend.choice import Choice
from penstock.frontend.completions import Completions
from penstock.frontend.endpoint import Beginning, GenerationApi, PromptApi, PromptEncoder
from penstock.frontend.http.api_keys import read_api_keys
from penstock.frontend.http.connection import connection_class
from penstock.frontend.responses_api.create import ResponsesApi
from penstock.frontend.responses_api.memory_store import MemoryResponseStore
from penstock.frontend.sampling import sampling_of
from penstock.frontend.settings import FrontendSettings
from penstock.frontend.text.model_text import ModelTexts
from penstock.frontend.text.tokenizing import Caller
from penstock.frontend.tokenization import Detokenize, Tokenize
from penstock.graph import Overrides, build_graph, parse_manifest
from penstock.graph.container_command import parse_command
from penstock.link.peer import Peer
from penstock.link.session import Session
from penstock.link.settings import ClientSettings, ServerSettings
from penstock.metrics import Metrics
from penstock.shapes import JsonObject, ModelView
from penstock.transfer import messages as kv
from penstock.wire.frames import MAX_FRAME_BYTES, encode
from penstock.wire.handshake import FrontendHandshake, WorkerHandshake
from penstock.wire.messages import Generate, Snapshot
from tests.cards import card
from tests.frontend.conftest import ScriptedCompleter, byte_level_tokenizer, saying, view_of
from tests.fuzz.delivered import deliver
from tests.link.conftest import FakeListener, FakeTransport, FakeWorker, attempt

CARD = card()


@cache
def loop() -> asyncio.AbstractEventLoop:
    """One loop for all inputs: making one costs more than most of them."""
    return asyncio.new_event_loop()


def run(work: Awaitable[None]) -> None:
    loop().run_until_complete(work)


# --- the link -----------------------------------------------------------------------------------------


class _OpenDoor:
    """Lets in whoever knows the secret."""

    def opened(self, peer: Peer) -> None:
        pass

    def objection(self, peer: Peer) -> str:
        return ""

    def welcomed(self, peer: Peer) -> None:
        pass

    def gone(self, peer: Peer, reason: str) -> None:
        pass


def to_worker(data: bytes) -> None:
    """Bytes of a stranger, and the same from a frontend that has proved itself."""

    async def receive(greeted: bool) -> None:
        peer = Peer(ServerSettings(), FakeWorker({1, 2}), _OpenDoor(), b"w" * 16)
        transport = FakeTransport(peer.connection)
        transport.open()
        if greeted:
            challenge = WorkerHandshake([], b"w" * 16).challenge()
            transport.receive(FrontendHandshake("", b"f" * 16, "f1").answer(challenge))
            transport.receive(Generate(seq=1, attempt=attempt()))
        await _fed(transport, peer.connection, data)

    run(receive(False))
    run(receive(True))


def to_frontend(data: bytes) -> None:
    """Bytes of whoever listens at a worker's address, and the same from a worker that is up."""

    async def receive(live: bool) -> None:
        handshake = FrontendHandshake("", b"f" * 16, "f1")
        session = Session(ClientSettings(), handshake, None, FakeListener())
        transport = FakeTransport(session.connection)
        transport.open()
        if live:
            worker = WorkerHandshake([], b"w" * 16)
            hello = FrontendHandshake("", b"f" * 16, "f1").answer(worker.challenge())
            transport.receive(worker.challenge())
            transport.receive(worker.answer(hello, CARD))
            transport.receive(Snapshot(hashes=[1], last=True))
            session.download("00")
        await _fed(transport, session.connection, data)

    run(receive(False))
    run(receive(True))


async def _fed(transport: FakeTransport, connection: Any, data: bytes) -> None:
    """The bytes in two reads, cut where the first of them says."""
    cut = data[0] * len(data) // 255 if data else 0
    for part in (data[:cut], data[cut:]):
        if part and not transport.ending:
            connection.data_received(part)
    assert connection._decoder.held_bytes <= MAX_FRAME_BYTES + len(data)
    if not transport.ending:
        transport.abort()
    assert await asyncio.wait_for(connection.ended, 5)


def to_router(data: bytes) -> None:
    """Bytes of a worker that is up, delivered to a router."""
    if data:
        deliver(data, "w0", "f0")


def to_engine(data: bytes) -> None:
    """Bytes of a frontend that has proved itself, delivered to a worker with its engine."""
    if data:
        deliver(data, "f0", "w0")


def kv_transfer(data: bytes) -> None:
    """A frame's body, as either end of a KV transfer reads it."""
    for kind in (kv.Read, kv.Granted, kv.Done, kv.StillHeld):
        with contextlib.suppress(ProtocolError):
            kv.parsed(kind, data)


# --- HTTP ---------------------------------------------------------------------------------------------


@cache
def _view() -> ModelView:
    return view_of(byte_level_tokenizer(), name="m", structured_output=True)


@cache
def _texts() -> ModelTexts:
    return ModelTexts(FrontendSettings(), Metrics().tokenizer)


def _begun(api: GenerationApi, data: bytes) -> None:
    """A body, up to the attempts that would be sent."""

    async def begin() -> list[Choice]:
        call = api.decode(data)
        beginning = Beginning(
            answer_id="a",
            router_key="c",
            http_request_id="h",
            wanted=call.wanted,
            sampling=sampling_of(call.wanted, _view().card, random.Random(1)),
            model=_view().card,
            revision=_view().revision,
            text=await _texts().of(_view()),
            caller=Caller("tenant", 0, time.perf_counter(), 60.0),
            cut=call.wanted.cut,
            default_max_tokens=FrontendSettings().default_max_tokens,
        )
        return await call.choices(beginning)

    with contextlib.suppress(RequestRejected):
        choices = loop().run_until_complete(begin())
        assert 0 < len(choices) <= 128
        for request in (choice.request for choice in choices):
            assert 0 < len(request.token_ids) < _view().card.max_model_len
            assert max(request.token_ids) < _view().card.vocab_size
            sent = attempt()
            sent.token_ids, sent.sampling = request.token_ids, request.sampling
            encode(Generate(seq=1, attempt=sent))


def chat(data: bytes) -> None:
    """A body of /v1/chat/completions."""
    _begun(Chat, data)


def _answer(api: PromptApi, data: bytes) -> JsonObject:
    """To a body of an API that needs a model's template and tokenizer only. Raises RequestRejected."""

    async def answer() -> JsonObject:
        caller = Caller("tenant", 0, time.perf_counter(), 60.0)
        encoder = PromptEncoder(model=_view().card, text=await _texts().of(_view()), caller=caller)
        return await api.decode(data).answer(encoder)

    return loop().run_until_complete(answer())


def message(data: bytes) -> None:
    """A body of /v1/messages, and of /v1/messages/count_tokens."""
    _begun(Messages, data)
    with contextlib.suppress(RequestRejected):
        assert _answer(CountTokens, data)["input_tokens"] >= 0


def tokenize(data: bytes) -> None:
    """A body of /tokenize. What it gives, /detokenize takes."""
    with contextlib.suppress(RequestRejected):
        found = _answer(Tokenize, data)
        assert found["count"] == len(found["tokens"]) < found["max_model_len"]
        assert len(found["token_strs"] or found["tokens"]) == found["count"]
        body = {"model": _view().card.name, "tokens": found["tokens"]}
        assert isinstance(_answer(Detokenize, json.dumps(body).encode())["prompt"], str)


def detokenize(data: bytes) -> None:
    """A body of /detokenize."""
    with contextlib.suppress(RequestRejected):
        assert isinstance(_answer(Detokenize, data)["prompt"], str)


def completion(data: bytes) -> None:
    """A body of /v1/completions."""
    _begun(Completions, data)


@cache
def _responses_api() -> ResponsesApi:
    return ResponsesApi(MemoryResponseStore(10, 1_000_000, 60.0))


def responses(data: bytes) -> None:
    """A body of /v1/responses."""
    _begun(_responses_api(), data)


@cache
def _server() -> tuple[uvicorn.Config, type[asyncio.Protocol]]:
    settings = FrontendSettings(max_body_bytes=100_000, api_key="key")
    completer = ScriptedCompleter([_view()], saying(byte_level_tokenizer(), "Hi"))

    async def make() -> App:
        return App(completer, settings, Metrics())

    app = loop().run_until_complete(make())
    config = uvicorn.Config(app, ws="none", lifespan="off", interface="asgi3", log_config=None)
    config.load()
    return config, connection_class(settings, app.refused)


class _HttpTransport(FakeTransport):
    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        pass

    def is_closing(self) -> bool:
        return bool(self.ending)


def http(data: bytes) -> None:
    """Bytes on an HTTP connection: whole responses or none, and the end when the client leaves."""

    config, protocol = _server()

    async def receive() -> None:
        state = ServerState()
        connection = protocol(config, state, {}, loop())  # type: ignore[call-arg]
        transport = _HttpTransport(connection)
        connection.connection_made(transport)
        cut = data[0] * len(data) // 255 if data else 0
        for part in (data[:cut], data[cut:]):
            if part and not transport.ending:
                connection.data_received(part)
                await asyncio.sleep(0)
        for _ in range(200):
            if not state.tasks:
                break
            await asyncio.sleep(0)
        written = bytes(transport.written)
        assert not written or written.startswith(b"HTTP/1.1 ")
        assert b"HTTP/1.1 500" not in written
        transport.abort()
        async with asyncio.timeout(5):
            while state.tasks or state.connections:
                await asyncio.sleep(0)

    run(receive())


# --- files --------------------------------------------------------------------------------------------


def graph(data: bytes) -> None:
    """A manifest."""
    with contextlib.suppress(ConfigError, UnicodeDecodeError):
        build_graph(parse_manifest(data.decode(), "fuzz.yaml"), Overrides(), "fuzz.yaml")


def command(data: bytes) -> None:
    """What a container runs, as its words and as a script."""
    with contextlib.suppress(ConfigError, UnicodeDecodeError):
        text = data.decode()
        with contextlib.suppress(ConfigError):
            parse_command(["/bin/sh", "-c", text], {"A": "penstock"})
        try:
            words = shlex.split(text)
        except ValueError:
            words = text.split()
        parse_command(words, {"A": "penstock"})


def keys(data: bytes) -> None:
    """A file of API keys."""
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(ConfigError):
        path = Path(folder) / "keys"
        path.write_bytes(data)
        assert all(len(digest) == 32 and name for digest, name in read_api_keys(path).items())


def registration(data: bytes) -> None:
    """A file in a discovery directory, read by whoever watches it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.json").write_bytes(data)
        scan = DirectoryScan(Path(folder), FileDiscoverySettings())
        for _ in range(2):
            assert len(scan.instances()) <= 1


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        to_worker,
        to_frontend,
        to_router,
        to_engine,
        kv_transfer,
        chat,
        message,
        completion,
        responses,
        tokenize,
        detokenize,
        http,
        graph,
        command,
        keys,
        registration,
    )
}
"""By name, which is also that of its folder in corpus/."""
