"""`penstock record`: what production is asked, as a trace without any text."""

from __future__ import annotations

import os
import secrets
import sys
import threading
from pathlib import Path
from typing import Annotated, Any, TextIO

import msgspec
import typer

from penstock.core.recording import RecordedRequest
from penstock.errors import ConfigError, PenstockError, RemoteError

SALT_BYTES = 32

MAX_HASHES = 50_000_000
"""Hashes that get a number; a recording ends with the last of them. They take some 5 GB of memory here."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("record")(record)


def record(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The trace to write: a name with .jsonl.")],
    url: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="A frontend; again for each further one. [the running graph's]"),
    ] = None,
    duration: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=1, help="For how long. [until Ctrl-C]")
    ] = None,
    model: Annotated[str, typer.Option(metavar="NAME", help="Only this model. [all]")] = "",
    block_tokens: Annotated[
        int, typer.Option(metavar="N", min=16, max=65_536, help="Tokens in a block; 512 is Mooncake's.")
    ] = 64,
    api_key: Annotated[
        str,
        typer.Option(
            metavar="KEY", envvar="PENSTOCK_API_KEY", show_envvar=False, help="Key of the frontends."
        ),
    ] = "",
) -> None:
    """Record requests of a running graph as a trace, without text."""
    from penstock.cli.chat import ChatClient
    from penstock.cli.talk import running_url

    if not file.name.endswith(".jsonl"):
        raise ConfigError(f"record: `{file}` must end in .jsonl, as what reads traces expects")
    clients = [ChatClient(each, api_key) for each in url or [running_url()]]
    body = {"salt": secrets.token_hex(SALT_BYTES), "block_tokens": block_tokens, "model": model}
    try:
        with file.open("x", encoding="utf-8") as out:
            trace = RecordedTrace(out)
            errors = _read(clients, body, trace, duration)
            trace.close()
        _sort(file)
    except OSError as error:
        raise ConfigError(f"record: {file}: {error.strerror}") from error
    if trace.left_out:
        print(f"penstock: {trace.left_out} requests were left out: they came too fast", file=sys.stderr)
    print(f"{file}: {trace.requests} requests")
    if errors:
        raise errors[0]


class RecordedTrace:
    """Writes requests of several frontends into one file, as they end, with numbers for hashes."""

    def __init__(self, out: TextIO) -> None:
        self.requests = 0
        self.left_out = 0
        self._out = out
        self._closed = False
        self._numbers: dict[int, int] = {}  # by hash
        self._sessions: dict[int, int] = {}
        self._lock = threading.Lock()

    def add(self, line: bytes) -> None:
        """A line of a frontend's stream. Raises RemoteError where there are too many hashes."""
        recorded = _DECODER.decode(line)
        with self._lock:
            if self._closed:
                return
            recorded.hash_ids = [self._number(each) for each in recorded.hash_ids]
            recorded.output_hash_ids = [self._number(each) for each in recorded.output_hash_ids]
            if recorded.session is not None:
                recorded.session = self._sessions.setdefault(recorded.session, len(self._sessions))
            self._out.write(msgspec.json.encode(recorded).decode() + "\n")
            self._out.flush()
            self.requests += 1
            self.left_out += recorded.left_out
            if len(self._numbers) > MAX_HASHES:
                raise RemoteError(f"the recording has more than {MAX_HASHES} different blocks, and ends")

    def close(self) -> None:
        """Take no more."""
        with self._lock:
            self._closed = True

    def _number(self, name: int) -> int:
        return self._numbers.setdefault(name, len(self._numbers))


_DECODER = msgspec.json.Decoder(RecordedRequest)


def _read(
    clients: list[Any], body: dict[str, Any], trace: RecordedTrace, duration: float | None
) -> list[PenstockError]:
    """Read all streams until the time is up, one of them ends, or Ctrl-C. Returns why some ended."""
    over, errors = threading.Event(), []
    answered = threading.Semaphore(0)

    def read(client: Any) -> None:
        try:
            for line in client.events("/v1/recordings", body, answered.release):
                trace.add(line)
        except PenstockError as error:
            errors.append(error)
        over.set()
        answered.release()

    for client in clients:
        threading.Thread(target=read, args=(client,), daemon=True).start()
    try:
        for _ in clients:
            answered.acquire()
        if not over.is_set():
            names = ", ".join(client.url for client in clients)
            print(f"penstock: recording {names}; Ctrl-C ends it", file=sys.stderr)
        over.wait(duration)
    except KeyboardInterrupt:
        pass
    return errors


def _sort(file: Path) -> None:
    """In the order in which the requests came, with times from the first one on."""
    decode = _DECODER.decode
    recorded = sorted(map(decode, file.read_bytes().splitlines()), key=lambda each: each.timestamp)
    start = recorded[0].timestamp if recorded else 0.0
    sorted_file = file.with_name(file.name + ".sorted")
    with sorted_file.open("wb") as out:
        for each in recorded:
            each.timestamp = round(each.timestamp - start, 3)
            out.write(msgspec.json.encode(each) + b"\n")
    os.replace(sorted_file, file)
