"""Streams what ends while a client listens, for `penstock record`: POST /v1/recordings."""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec
from msgspec.structs import replace

from penstock.core.recording import RecordedRequest, RecordingWanted
from penstock.errors import Rejection, RequestRejected
from penstock.frontend.completer import Completer
from penstock.frontend.decoding import decoded
from penstock.frontend.endpoint import Operation
from penstock.frontend.http.exchange import HttpExchange
from penstock.frontend.wording import rejected

RECORDINGS_PATH: Final = "/v1/recordings"

_DECODER = msgspec.json.Decoder(RecordingWanted)


class Recordings:
    """The recordings that are read from this frontend."""

    operation: Final = Operation(
        summary="Streams lengths, times and salted block hashes of requests as they end, without any text.",
        request=RecordingWanted,
        answer=RecordedRequest,
        streams=True,
    )

    def __init__(self, completer: Completer) -> None:
        self._completer = completer
        self._readers: set[asyncio.Event] = set()
        self._closing = False

    def close(self) -> None:
        """End all recordings once their readers have what there is."""
        self._closing = True
        for more in self._readers:
            more.set()

    async def serve(self, exchange: HttpExchange, tenant: str | None) -> None:
        """One recording, until its reader leaves. `tenant`: whose requests; None: everybody's. Raises
        RequestRejected."""
        more = asyncio.Event()
        left = None
        try:
            wanted = decoded(await exchange.body(), _DECODER, RecordingWanted, _explained)
            if wanted.model:
                wanted = replace(wanted, model=self._served_name(wanted.model))
            recording = self._completer.record(wanted, tenant, more.set)
            self._readers.add(more)
            try:
                await exchange.begin_stream()
                left = asyncio.create_task(exchange.disconnected())
                left.add_done_callback(lambda _: more.set())
                while not left.done():
                    more.clear()
                    lines = recording.take()
                    if lines:
                        await exchange.write(b"".join(b"data: %b\n\n" % line for line in lines))
                    elif self._closing:
                        return await exchange.write(b"", more=False)
                    else:
                        await more.wait()
            finally:
                self._completer.stop_recording(recording)
                self._readers.discard(more)
        finally:
            if left is not None:
                left.cancel()
            exchange.close()

    def _served_name(self, model: str) -> str:
        """The name under which requests for this model, or for the model with this alias, are recorded. One
        whose workers are away may come back. Raises RequestRejected for one that there is not."""
        try:
            return self._completer.model(model).card.name
        except RequestRejected as error:
            if error.kind is Rejection.NOT_FOUND:
                raise
            return model


def _explained(body: bytes, error: msgspec.ValidationError, kind: type[msgspec.Struct]) -> RequestRejected:
    return rejected(error, kind)
