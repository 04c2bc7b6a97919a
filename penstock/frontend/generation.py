"""The calls of all APIs that generate text: from an HTTP request to its last byte."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from msgspec.structs import replace

from penstock.core.events import REJECTED_BY_ENGINE
from penstock.core.spans import Attributes, request_span
from penstock.errors import ModelReplaced, PenstockError, Rejection, RequestRejected
from penstock.frontend.call import ClientCall, LoopTurn
from penstock.frontend.choice import Choice
from penstock.frontend.completer import Completer
from penstock.frontend.completion_objects import usage_of
from penstock.frontend.endpoint import AnswerStream, Beginning, Endpoint, GenerationApi
from penstock.frontend.explaining import explanation_asked, explanation_headers
from penstock.frontend.http.exchange import ID_BYTES, HttpExchange
from penstock.frontend.http.statuses import CLIENT_LEFT_STATUS, code_of, kind_of, status_of
from penstock.frontend.sampling import bad_sequences, bad_word_texts, name_field, sampling_of
from penstock.frontend.sessions import session_in_headers
from penstock.frontend.settings import FrontendSettings
from penstock.frontend.text.model_text import ModelTexts
from penstock.frontend.text.tokenizing import Caller
from penstock.frontend.wanted import Wanted
from penstock.metrics import FrontendMetrics
from penstock.ports import BegunTrace, Tracing
from penstock.shapes import ModelView

log = logging.getLogger("penstock.frontend")

LONG_BODY_BYTES: Final = 1024 * 1024  # decoded in 2 ms, if it is text
RETRY_AFTER_S: Final = 1.0  # when the frontend is full or shuts down

MAX_BEGINNINGS: Final = 4
"""How often a call may begin, each time with another revision of its model, before it fails."""


@dataclass(slots=True, eq=False)
class CallRecord:
    """What the log line and the metrics of a call need, and what can end it from outside."""

    received_at: float  # perf_counter, as all times here
    tenant: str  # the name of its API key; empty where none are needed
    model: str = ""  # only when it is known to exist: metrics keep a series per model
    call_id: str = ""  # the `id` of the response; the router's request ids begin with it
    limit: asyncio.Timeout | None = None  # of the whole call; also ends it while `call` is None
    call: ClientCall | None = None
    stream: AnswerStream | None = None  # once there is a call that streams
    answering: bool = False  # part of its answer is sent
    began: float = field(init=False)  # once the request was read; until then, when it was received
    tokenized_at: float | None = None  # of the latest beginning
    trace: BegunTrace | None = None  # where traces are collected
    beginnings: int = 0  # how often it was begun, with one revision of its model after another
    holds_schemas: bool = True  # of answers and forced calls of tools, where those are not strict
    explains: bool = False  # the answer's headers are to say where it went
    error: PenstockError | None = None

    def __post_init__(self) -> None:
        self.began = self.received_at

    @property
    def router_key(self) -> str:
        """The router's name for the call. It differs with each beginning, so that no late output of an
        earlier one is taken for this one's."""
        return self.call_id if self.beginnings == 1 else f"{self.call_id}-again{self.beginnings}"

    def hang_up(self) -> None:
        """The client has left."""
        if self.call is not None:
            self.call.hang_up()
        else:
            self._abandon(RequestRejected("The client left.", kind=Rejection.CLIENT_LEFT))

    def fail(self, error: PenstockError) -> None:
        """Only the first error counts, and none after the end."""
        if self.call is not None:
            self.call.fail(error)
        else:
            self._abandon(error)

    def forget_call(self) -> None:
        """Cancel what was submitted, before another beginning."""
        if self.call is not None:
            self.call.close()
        self.call = None

    def _abandon(self, error: PenstockError) -> None:
        # A limit that has expired raises TimeoutError by itself, and must not be rescheduled.
        if self.error is None and self.limit is not None and not self.limit.expired():
            self.error = error
            self.limit.reschedule(0.0)


class GenerationServer:
    """Serves the endpoints that generate text, and knows every call that is under way."""

    def __init__(
        self,
        completer: Completer,
        texts: ModelTexts,
        settings: FrontendSettings,
        metrics: FrontendMetrics,
        tracing: Tracing | None = None,
    ) -> None:
        self._completer = completer
        self._texts = texts
        self._rng = random.Random()
        self._settings = settings
        self._metrics = metrics
        self._tracing = tracing
        self._watching: set[CallRecord] = set()
        self._turn = LoopTurn()
        self._inflight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    async def drain(self, grace_s: float) -> None:
        """Take no new calls, let those under way finish, and fail what is left after `grace_s`."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), grace_s)
        except TimeoutError:
            log.warning("shutting down with requests=%d unfinished after %g s", self._inflight, grace_s)
            for record in list(self._watching):
                record.fail(_leaving())

    async def serve(self, api: GenerationApi, exchange: HttpExchange, tenant: str) -> None:
        """Answer one request, be it with an error."""
        record = CallRecord(time.perf_counter(), tenant)
        if self._tracing is not None:
            record.trace = self._tracing.begin(api.name, exchange.trace_context(), record.received_at)
        self._inflight += 1
        self._idle.clear()
        try:
            try:
                async with asyncio.timeout(self._settings.request_timeout_s) as record.limit:
                    await self._serve(api, exchange, record)
            except PenstockError as error:
                record.error = error
            except TimeoutError:
                message = f"The request took longer than {self._settings.request_timeout_s:g} s."
                record.error = record.error or RequestRejected(message, kind=Rejection.TIMED_OUT)
            except Exception:
                record.error = RequestRejected("Internal error.", kind=Rejection.INTERNAL)
                raise
            if record.error is not None:
                await _tell(exchange, record, record.error)
        finally:
            exchange.close()
            self._account(api, exchange, record)
            self._inflight -= 1
            if self._inflight == 0:
                self._idle.set()

    async def _serve(self, api: GenerationApi, exchange: HttpExchange, record: CallRecord) -> None:
        if self.draining:
            raise _leaving()
        if self._inflight > self._settings.max_inflight:
            raise RequestRejected(
                "Too many requests at a time.", kind=Rejection.OVERLOADED, retry_after_s=RETRY_AFTER_S
            )
        content = await exchange.body()
        endpoint, record.explains = api.decode(content), explanation_asked(exchange)
        session = session_in_headers(exchange)
        if len(content) > LONG_BODY_BYTES:
            await asyncio.sleep(0)  # let other calls run first: rendering takes as long as decoding did
        record.began = time.perf_counter()
        wanted = endpoint.wanted
        view = self._completer.model(wanted.model)
        record.model = view.card.name
        # Where there are tenants, none of them may put itself before the others; after them it may.
        priority = max(0, wanted.priority) if record.tenant else wanted.priority
        self._completer.check(view.card.name, record.tenant, priority)  # before the work of tokenizing
        client_id = exchange.request_id.decode()
        with self._metrics.of(view.card.name).inflight.track_inprogress():
            record.call_id = api.id_prefix + os.urandom(ID_BYTES).hex()
            if log.isEnabledFor(logging.DEBUG):
                log.debug(
                    "received: request_id=%s id=%s endpoint=%s model=%s body_bytes=%d stream=%s tenant=%s",
                    client_id,
                    record.call_id,
                    api.name,
                    record.model,
                    len(content),
                    wanted.stream,
                    record.tenant or "-",
                )
            async with self._watched(record, exchange):
                limit_s = self._settings.prepare_timeout_s
                caller = Caller(record.tenant, priority, record.began, limit_s, session)
                while True:
                    try:
                        return await self._answer(endpoint, exchange, record, view, caller)
                    except ModelReplaced:
                        if record.answering or record.beginnings == MAX_BEGINNINGS:
                            raise
                        record.forget_call()
                        view = self._completer.model(wanted.model)
                    except RequestRejected as error:
                        if not (record.holds_schemas and _refuses_hint(error, wanted)):
                            raise
                        log.info("schemas that are not strict are not held to: request_id=%s", client_id)
                        record.forget_call()
                        record.holds_schemas = False

    async def _answer(
        self,
        endpoint: Endpoint,
        exchange: HttpExchange,
        record: CallRecord,
        view: ModelView,
        caller: Caller,
    ) -> None:
        """Answer with this revision of the model."""
        record.beginnings += 1
        wanted = endpoint.wanted
        sampling = sampling_of(wanted, view.card, self._rng)  # refuses before the work of tokenizing
        if wanted.structured_hint is not None and not record.holds_schemas:
            sampling = replace(sampling, structured=wanted.structured_hint)
        text = await self._texts.of(view, caller)
        if wanted.bad_words:
            words = await text.encode(bad_word_texts(wanted.bad_words), caller, add_special_tokens=False)
            sampling = replace(sampling, bad_words=bad_sequences(words))
        beginning = Beginning(
            answer_id=record.call_id,
            router_key=record.router_key,
            http_request_id=exchange.request_id.decode(),
            wanted=wanted,
            sampling=sampling,
            model=view.card,
            revision=view.revision,
            text=text,
            caller=caller,
            cut=wanted.cut,
            holds_schemas=record.holds_schemas,
            default_max_tokens=self._settings.default_max_tokens,
            trace=record.trace.context if record.trace is not None else exchange.trace_context(),
        )
        choices = await endpoint.choices(beginning)
        record.tokenized_at = time.perf_counter()
        if record.error is not None:  # the client left, or the frontend ends
            raise record.error
        record.call = call = ClientCall(
            choices,
            metrics=self._metrics.of(view.card.name),
            streaming=wanted.stream,
            max_unsent_chars=self._settings.max_unsent_chars,
            on_overflow=exchange.abort,
            turn=self._turn,
        )
        call.start(self._completer)
        if record.explains:
            exchange.more_headers = partial(explanation_headers, choices[0])
        try:
            if wanted.stream:
                record.stream = endpoint.stream(beginning, choices)
                return await _stream(exchange, record, call, record.stream)
            await call.changed()
            if call.error is not None:
                raise call.error
        except RequestRejected as error:
            name_field(error, wanted, choices[0].request.sampling)
            raise
        if not call.gone:
            await exchange.respond(200, await endpoint.body(beginning, choices))

    @contextlib.asynccontextmanager
    async def _watched(self, record: CallRecord, exchange: HttpExchange) -> AsyncIterator[None]:
        """While this lasts, the call ends when its client leaves or the frontend does."""

        async def watch() -> None:
            await exchange.disconnected()
            record.hang_up()

        watcher = asyncio.create_task(watch())
        self._watching.add(record)
        try:
            yield
        finally:
            self._watching.discard(record)
            if record.call is not None:
                record.call.close()
            watcher.cancel()
            await asyncio.wait([watcher])

    def _account(self, api: GenerationApi, exchange: HttpExchange, record: CallRecord) -> None:
        ended = time.perf_counter()
        call, error = record.call, record.error
        gone = (call is not None and call.gone) or (error is not None and _left(error))
        status = CLIENT_LEFT_STATUS if gone else exchange.status or 500
        outcome = outcome_of(status, error)
        if record.model:
            self._metrics.of(record.model).requests(api.name, status, outcome).inc()
        else:
            self._metrics.requests.labels("", api.name, status, outcome).inc()
        exchange.accounted = True
        prompt = output = cached = 0
        ttft_s = 0.0
        if call is not None:
            usage = usage_of(call.choices)
            prompt, output = usage.prompt_tokens, usage.completion_tokens
            cached = usage.prompt_tokens_details["cached_tokens"]
            metrics = self._metrics.of(record.model)
            metrics.request_duration.observe(ended - record.began)
            if call.first_token_at is not None:
                ttft_s = call.first_token_at - record.began
                metrics.time_to_first_token.observe(ttft_s)
                metrics.prompt_tokens.inc(prompt)
                metrics.output_tokens.inc(output)
                metrics.cached_tokens.inc(cached)
        log.info(
            "request_id=%s id=%s endpoint=%s model=%s status=%d outcome=%s prompt=%d output=%d cached=%d"
            " ttft_ms=%.1f duration_ms=%.1f finish=%s%s",
            exchange.request_id.decode(),
            record.call_id or "-",
            api.name,
            record.model or "-",
            status,
            outcome,
            prompt,
            output,
            cached,
            ttft_s * 1e3,
            (ended - record.began) * 1e3,
            _finish(record, gone),
            why(record.error, record.tenant),
        )
        if record.trace is not None and record.trace.recording:
            counts = {"input_tokens": prompt, "output_tokens": output, "cached_tokens": cached}
            attributes: Attributes = {
                "http.response.status_code": status,
                "gen_ai.request.model": record.model,
                **{f"gen_ai.usage.{name}": count for name, count in counts.items()},
                "penstock.request_id": exchange.request_id.decode(),
                "penstock.id": record.call_id,
                "penstock.outcome": outcome,
            }
            span = request_span(
                api.name,
                record.received_at,
                ended,
                attributes=attributes,
                error=_finish(record, gone) if outcome == "failed" else "",
                read_at=record.began,
                tokenized_at=record.tokenized_at,
                choices=[choice.attempts for choice in call.choices] if call is not None else (),
            )
            record.trace.end(span)


async def _stream(
    exchange: HttpExchange, record: CallRecord, call: ClientCall, stream: AnswerStream
) -> None:
    """The response begins with the first token, so that a failure before it still has its HTTP status; or
    without it, before a proxy takes the silence for the end of the connection."""
    silence_s = exchange.allowed_silence_s if exchange.status is None else None
    try:
        async with asyncio.timeout(silence_s):
            changed = await call.changed()
    except TimeoutError:
        await exchange.begin_stream()
        changed = await call.changed()
    if call.error is not None:
        raise call.error
    if not call.gone and exchange.status is None:
        await exchange.begin_stream()
    record.answering = True
    left = b""  # what `push` could not write

    def push(changed: Sequence[Choice]) -> bool:
        nonlocal left
        body = b"".join([stream.chunk(choice) for choice in changed])
        if not body or exchange.write_now(body):
            return True
        left = body
        return False

    call.push_with(push)
    while not call.ended:
        body = b"".join((left, *[stream.chunk(choice) for choice in changed]))
        left = b""
        if body:
            await exchange.write(body)
        changed = await call.changed()
    if call.gone:
        return
    last = [left, *[stream.chunk(choice) for choice in changed]]
    if call.error is not None:
        await exchange.write(b"".join(last))
        raise call.error
    await exchange.write(b"".join((*last, await stream.end(call.choices))), more=False)


async def _tell(exchange: HttpExchange, record: CallRecord, error: PenstockError) -> None:
    if exchange.status is not None and record.stream is not None:
        await exchange.write(record.stream.failed(error), more=False)
    elif exchange.status is None and not _left(error):
        await exchange.reject(error)


def _refuses_hint(error: RequestRejected, wanted: Wanted) -> bool:
    """Whether an engine cannot hold an answer to its schema, or a call that the model is forced to make to
    that of its tool, which may not have to be held to."""
    fields = {"tools"} if wanted.structured_hint is None else {"tools", wanted.structured_field}
    return error.code == REJECTED_BY_ENGINE and error.field in fields


def _leaving() -> RequestRejected:
    return RequestRejected(
        "This server is shutting down.",
        kind=Rejection.UNAVAILABLE,
        code="shutting_down",
        retry_after_s=RETRY_AFTER_S,
    )


def outcome_of(status: int, error: PenstockError | None) -> str:
    """How a request ended, for log and metrics: ok, rejected, failed or cancelled. A stream that fails
    after its first token has failed, although its status was 200."""
    if status == CLIENT_LEFT_STATUS:
        return "cancelled"
    if error is None and status < 400:
        return "ok"
    return "rejected" if 400 <= status < 500 else "failed"


def why(error: PenstockError | None, tenant: str = "") -> str:
    """For the log: the field at fault; and of what was turned away for lack of room, or failed, whose it
    was and the reason with its figures. Other messages may repeat what the client said: only for `debug`.
    """
    if error is None or _left(error):
        return ""
    field = getattr(error, "field", None)
    param = f" param={field!r}" if field is not None else ""
    shown = kind_of(error) is Rejection.OVERLOADED or status_of(error) >= 500
    if not shown and not log.isEnabledFor(logging.DEBUG):
        return param
    return f"{param} tenant={tenant or '-'} error={str(error)!r}"


def _left(error: PenstockError) -> bool:
    return kind_of(error) is Rejection.CLIENT_LEFT


def _finish(record: CallRecord, gone: bool) -> str:
    if record.error is not None:
        return code_of(record.error)
    if gone:
        return "gone"
    reasons = {choice.finish_reason for choice in record.call.choices} if record.call else set()
    return ",".join(sorted(reason for reason in reasons if reason is not None))
