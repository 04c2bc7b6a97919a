"""The frontend as an ASGI application: paths, keys, and errors in the shape of the API that was asked.

Starlette's router finds the endpoint. Its application class is not used: its two middlewares would wrap
each `send`, once per streamed chunk.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import msgspec
from starlette.exceptions import HTTPException
from starlette.routing import Router
from starlette.types import Receive, Scope, Send

from penstock import __version__
from penstock.core.explanation import Explanation
from penstock.core.misses import Misses
from penstock.errors import Rejection, RequestRejected
from penstock.frontend.answers import (
    DeletedResponse,
    Health,
    ItemList,
    Live,
    ModelList,
    ModelObject,
    ResponseAnswer,
    Version,
)
from penstock.frontend.anthropic_messages import CountTokens, Messages
from penstock.frontend.chat import Chat
from penstock.frontend.completer import Completer
from penstock.frontend.completion_objects import model_list, model_object
from penstock.frontend.completions import Completions
from penstock.frontend.endpoint import GenerationApi, Operation, PromptApi, Shape
from penstock.frontend.explaining import DryRuns, Explaining
from penstock.frontend.generation import GenerationServer, outcome_of, why
from penstock.frontend.http.api_keys import ADMIN, ApiKeys
from penstock.frontend.http.cors import Header
from penstock.frontend.http.exchange import Bodies, HttpExchange
from penstock.frontend.http.statuses import anthropic_error, status_of
from penstock.frontend.openapi import JSON_TYPE, DescribedRoute, docs_page, openapi_document
from penstock.frontend.paths import MAX_SHOWN_PATH_CHARS, Paths, without_prefix, wrong_method
from penstock.frontend.prompting import PromptServer
from penstock.frontend.recording import RECORDINGS_PATH, Recordings
from penstock.frontend.responses_api.create import InputTokensApi, ResponsesApi
from penstock.frontend.responses_api.memory_store import MemoryResponseStore
from penstock.frontend.responses_api.stored import StoredResponses
from penstock.frontend.settings import FrontendSettings
from penstock.frontend.start_page import START_PAGE_HEADERS, START_PAGE_TYPE, start_page
from penstock.frontend.text.model_text import ModelTexts
from penstock.frontend.tokenization import Detokenize, Tokenize
from penstock.logs.quiet_log import QuietLog
from penstock.metrics import METRICS_CONTENT_TYPE, Metrics
from penstock.ports import ChatParsers, ResponseStore, Tracing
from penstock.shapes import InstanceView, JsonObject, ModelView

log = logging.getLogger("penstock.frontend")

Handler = Callable[[HttpExchange, Scope], Awaitable[None]]

_EXCHANGE = "penstock.exchange"  # in the scope, for the endpoints

ENDPOINTS: Final[dict[str, GenerationApi]] = {
    "/v1/chat/completions": Chat,
    "/v1/completions": Completions,
    "/v1/messages": Messages,
}
"""The APIs that generate text, by path."""

PROMPT_ENDPOINTS: Final[dict[str, PromptApi]] = {
    "/v1/messages/count_tokens": CountTokens,
    "/tokenize": Tokenize,
    "/detokenize": Detokenize,
    "/v1/tokenize": Tokenize,
    "/v1/detokenize": Detokenize,
}
"""Those that need a model's template and tokenizer only."""

EXPLAIN_PATH: Final = "/v1/explain"

RESPONSES_PATH: Final = "/v1/responses"
"""The one API that keeps something: its object has the store."""

INPUT_TOKENS_PATH: Final = f"{RESPONSES_PATH}/input_tokens"

_EXPLAIN: Final = "explain"
_MODELS: Final = "models"
_OTHER: Final = "other"
_RECORDINGS: Final = "recordings"


class App:
    """The frontend over a router, as an ASGI application. Without a `store`, its memory keeps responses.

    Must be made inside the event loop that will serve it. Call `close` after its last request."""

    def __init__(
        self,
        completer: Completer,
        settings: FrontendSettings,
        metrics: Metrics,
        parsers: ChatParsers | None = None,
        store: ResponseStore | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._completer = completer
        self._settings = settings
        self._quiet_log = QuietLog(log)
        self._metrics = metrics
        self._keys = ApiKeys(settings.api_key, settings.api_keys_file)
        self._bodies = Bodies(settings.max_reading_bytes, settings.max_bodies_bytes)
        self._texts = ModelTexts(settings, metrics.tokenizer, parsers)
        self._generation = GenerationServer(completer, self._texts, settings, metrics.frontend, tracing)
        self._prompting = PromptServer(completer, self._texts, settings, metrics.frontend)
        self._recordings = Recordings(completer)
        self._created = int(time.time())
        if store is None:
            store = MemoryResponseStore(
                settings.max_stored_responses, settings.max_stored_bytes, settings.stored_response_age_s
            )
        apis: dict[str, GenerationApi] = {**ENDPOINTS, RESPONSES_PATH: ResponsesApi(store)}
        prompt_apis: dict[str, PromptApi] = {
            **PROMPT_ENDPOINTS,
            INPUT_TOKENS_PATH: InputTokensApi(store),
            EXPLAIN_PATH: DryRuns(completer, settings.default_max_tokens),
        }
        routes = [
            *(_route("POST", path, self._generate(api), api.operation) for path, api in apis.items()),
            *(_route("POST", path, self._prompt(api), api.operation) for path, api in prompt_apis.items()),
            *self._stored_routes(StoredResponses(store)),
            *self._explaining_routes(Explaining(completer)),
            _route("POST", RECORDINGS_PATH, self._record, Recordings.operation),
            _route(
                "GET",
                "/v1/models",
                self._models,
                Operation(summary="Lists the served models.", answer=ModelList),
            ),
            _route(
                "GET",
                "/v1/models/{name:path}",
                self._model,
                Operation(summary="One of the served models.", answer=ModelObject),
            ),
            *self._open_routes(),
        ]
        self._described = routes
        self._made_descriptions: tuple[bytes, bytes] | None = None
        self._paths = Paths(routes)
        self._router = Router(routes, redirect_slashes=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = scope[_EXCHANGE] = HttpExchange(scope, receive, send, self._settings, self._bodies)
        scope["app"] = self  # makes the router raise for what it does not find
        scope["path"] = without_prefix(scope["path"], self._settings.root_path)
        try:
            exchange.check_head()
            if await exchange.answer_preflight():
                return
            await self._router(scope, receive, send)
        except RequestRejected as error:
            await self._reject(scope, exchange, error)
        except HTTPException:
            await self._answer_other(scope, exchange)
        except Exception:  # the top of the request's task: a bug of ours, which must not end the process
            log.exception("request_id=%s failed", exchange.request_id.decode())
            if exchange.status is not None:
                raise  # the server drops the connection
            bug = RequestRejected("Internal error.", kind=Rejection.INTERNAL)
            await self._reject(scope, exchange, bug)

    def refused(self, error: RequestRejected) -> None:
        """Count what was refused before it was a request."""
        self._count(_OTHER, error)

    async def prepare(self, model: ModelView) -> None:
        """Load what the model's requests will need, so that the first one does not wait for it."""
        with contextlib.suppress(RequestRejected):  # each of its requests will say so
            await self._texts.publish(model)

    @property
    def healthy(self) -> bool:
        """Whether every role that is needed is there."""
        return not self._completer.missing()

    async def drain(self, grace_s: float) -> None:
        """/health turns 503, new calls are refused, calls under way may finish for `grace_s`."""
        await self._generation.drain(grace_s)
        self._recordings.close()

    def close(self) -> None:
        """Free the tokenizer threads."""
        self._texts.close()

    async def _answer_other(self, scope: Scope, exchange: HttpExchange) -> None:
        """A path that is not served, or not with this method."""
        method, path = scope["method"], scope["path"]
        allowed = self._paths.methods(path)
        if allowed:
            error = wrong_method(method, path, allowed)
            await self._reject(scope, exchange, error, [(b"allow", ", ".join(allowed).encode())])
        elif path.endswith("/") and path != "//" and self._paths.methods(path[:-1]):
            # Relative, and so right behind any proxy, whatever prefix that one cuts off.
            *_, last, _ = scope["raw_path"].split(b"/")
            await exchange.redirect(b"../" + last, scope["query_string"])
        else:
            await self._reject(scope, exchange, self._paths.not_served(method, path))

    async def _reject(
        self, scope: Scope, exchange: HttpExchange, error: RequestRejected, headers: Sequence[Header] = ()
    ) -> None:
        if not exchange.accounted:
            endpoint = _endpoint_of(scope["path"])
            self._count(endpoint, error)
            # Anybody may ask for anything: at most some lines a minute.
            self._quiet_log.info(
                "request_id=%s endpoint=%s method=%s path=%r status=%d outcome=%s finish=%s%s",
                exchange.request_id.decode(),
                endpoint,
                scope["method"],
                scope["path"][:MAX_SHOWN_PATH_CHARS],
                status_of(error),
                outcome_of(status_of(error), error),
                error.code,
                why(error),
            )
        if exchange.header(b"anthropic-version") is not None:
            exchange.error_object = anthropic_error
        await exchange.reject(error, headers)

    def _count(self, endpoint: str, error: RequestRejected) -> None:
        status = status_of(error)
        self._metrics.frontend.requests.labels("", endpoint, status, outcome_of(status, error)).inc()

    # --- endpoints --------------------------------------------------------------------------------

    def _tenant(self, exchange: HttpExchange) -> str:
        """Whose API key the request brings. Raises RequestRejected(UNAUTHENTICATED)."""
        return self._keys.check(exchange.header(b"authorization"), exchange.header(b"x-api-key"))

    def _owner(self, exchange: HttpExchange) -> str | None:
        """Whose requests may be told of to who asks; None: everybody's. Raises as `_tenant`."""
        tenant = self._tenant(exchange)
        return None if tenant in ("", ADMIN) else tenant

    def _generate(self, api: GenerationApi) -> Handler:
        async def generate(exchange: HttpExchange, scope: Scope) -> None:
            exchange.error_object = api.error_object
            await self._generation.serve(api, exchange, self._tenant(exchange))

        return generate

    def _prompt(self, api: PromptApi) -> Handler:
        async def answer(exchange: HttpExchange, scope: Scope) -> None:
            exchange.error_object = api.error_object
            await self._prompting.serve(api, exchange, self._tenant(exchange))

        return answer

    def _open_routes(self) -> list[DescribedRoute]:
        """Those that need no API key."""
        page = START_PAGE_TYPE.decode()
        described: list[tuple[str, Handler, Operation]] = [
            ("/", self._start_page, _open("A page for browsers.", page)),
            ("/docs", self._docs, _open("This description as a page for browsers.", page)),
            ("/openapi.json", self._openapi, _open("This description.", JSON_TYPE)),
            (
                "/health",
                self._health,
                _open("Whether every expected role is connected: 200 or 503.", Health),
            ),
            ("/ping", self._health, _open("The same as /health.", Health)),
            ("/live", self._live, _open("Answers while the process responds.", Live)),
            ("/metrics", self._render_metrics, _open("Metrics for Prometheus.", METRICS_CONTENT_TYPE)),
            ("/version", self._version, _open("The version of Penstock.", Version)),
        ]
        return [_route("GET", path, handle, operation) for path, handle, operation in described]

    def _explaining_routes(self, explaining: Explaining) -> list[DescribedRoute]:
        def for_owner(handle: Callable[[HttpExchange, Scope, str | None], Awaitable[None]]) -> Handler:
            async def handle_own(exchange: HttpExchange, scope: Scope) -> None:
                await handle(exchange, scope, self._owner(exchange))

            return handle_own

        one = Operation(summary="Why a request went where it did, and what came of it.", answer=Explanation)
        misses = Operation(
            summary="Where cached prompts were lost, and why.", answer=Misses, query=("minutes",)
        )
        return [
            _route("GET", EXPLAIN_PATH + "/misses", for_owner(explaining.misses), misses),
            _route("GET", EXPLAIN_PATH + "/{id:path}", for_owner(explaining.one), one),
        ]

    def _stored_routes(self, stored: StoredResponses) -> list[DescribedRoute]:
        def of_tenant(handle: Callable[[HttpExchange, Scope, str], Awaitable[None]]) -> Handler:
            async def handle_own(exchange: HttpExchange, scope: Scope) -> None:
                await handle(exchange, scope, self._tenant(exchange))

            return handle_own

        one = RESPONSES_PATH + "/{id}"
        retrieve = Operation(summary="A stored response.", answer=ResponseAnswer)
        delete = Operation(summary="Deletes a stored response.", answer=DeletedResponse)
        cancel = Operation(summary="Refused: no response runs in the background.", answer=ResponseAnswer)
        items = Operation(
            summary="Lists the input items of a stored response.",
            answer=ItemList,
            query=("after", "limit", "order"),
        )
        return [
            _route("GET", one, of_tenant(stored.retrieve), retrieve),
            _route("DELETE", one, of_tenant(stored.delete), delete),
            _route("POST", one + "/cancel", of_tenant(stored.cancel), cancel),
            _route("GET", one + "/input_items", of_tenant(stored.input_items), items),
        ]

    async def _record(self, exchange: HttpExchange, scope: Scope) -> None:
        await self._recordings.serve(exchange, self._owner(exchange))

    async def _models(self, exchange: HttpExchange, scope: Scope) -> None:
        self._tenant(exchange)
        models = [
            model_object(name, model, self._created) for name, model in self._completer.models().items()
        ]
        await exchange.respond(200, msgspec.json.encode(model_list(models)))

    async def _model(self, exchange: HttpExchange, scope: Scope) -> None:
        name = scope["path_params"]["name"].removesuffix("/")
        if not name:
            return await self._models(exchange, scope)
        self._tenant(exchange)
        model = self._completer.model(name)
        await exchange.respond(200, msgspec.json.encode(model_object(name, model, self._created)))

    async def _start_page(self, exchange: HttpExchange, scope: Scope) -> None:
        host = exchange.header(b"host") or b"localhost"
        models = list(self._completer.models())
        origin = f"{scope['scheme']}://{host.decode('ascii')}"
        page = start_page(origin, self._settings.root_path, models, self._completer.missing())
        await exchange.respond(200, page, START_PAGE_HEADERS, START_PAGE_TYPE)

    async def _descriptions(self) -> tuple[bytes, bytes]:
        """What this frontend serves, for programs and for browsers. Made once, in a thread: it takes as
        long as hundreds of steps of streams."""
        if self._made_descriptions is None:
            self._made_descriptions = await asyncio.to_thread(self._make_descriptions)
        return self._made_descriptions

    def _make_descriptions(self) -> tuple[bytes, bytes]:
        keys = bool(self._settings.api_key or self._settings.api_keys_file)
        document = openapi_document(self._described, self._settings.root_path, keys=keys)
        return msgspec.json.encode(document), docs_page(document)

    async def _openapi(self, exchange: HttpExchange, scope: Scope) -> None:
        document, _ = await self._descriptions()
        await exchange.respond(200, document)

    async def _docs(self, exchange: HttpExchange, scope: Scope) -> None:
        _, page = await self._descriptions()
        await exchange.respond(200, page, START_PAGE_HEADERS, START_PAGE_TYPE)

    async def _health(self, exchange: HttpExchange, scope: Scope) -> None:
        missing = self._completer.missing()
        healthy = not missing and not self._generation.draining
        status = "healthy" if healthy else "unhealthy"
        answer = {
            "status": status,
            "missing": missing,
            "draining": self._generation.draining,
            "discovery": self._completer.discovery() or "ok",
            "instances": [_instance_object(instance) for instance in self._completer.instances()],
        }
        await exchange.respond(200 if healthy else 503, msgspec.json.encode(answer))

    async def _live(self, exchange: HttpExchange, scope: Scope) -> None:
        await exchange.respond(200, b'{"status":"live"}')

    async def _version(self, exchange: HttpExchange, scope: Scope) -> None:
        await exchange.respond(200, msgspec.json.encode({"version": __version__}))

    async def _render_metrics(self, exchange: HttpExchange, scope: Scope) -> None:
        await exchange.respond(200, self._metrics.render(), content_type=METRICS_CONTENT_TYPE.encode())


def _instance_object(instance: InstanceView) -> JsonObject:
    """The view with its load by names; on the link it is an array, to be short."""
    rates = msgspec.structs.asdict(instance.load.rates)
    load = {**msgspec.structs.asdict(instance.load), "rates": rates}
    return {**msgspec.structs.asdict(instance), "load": load}


def _endpoint_of(path: str) -> str:
    """The endpoint as metrics name it: one of few, whatever is asked for."""
    if path in ENDPOINTS:
        return ENDPOINTS[path].name
    if path in PROMPT_ENDPOINTS:
        return PROMPT_ENDPOINTS[path].name
    if path == INPUT_TOKENS_PATH:
        return InputTokensApi.name
    if path == RESPONSES_PATH or path.startswith(f"{RESPONSES_PATH}/"):
        return ResponsesApi.name
    if path == RECORDINGS_PATH:
        return _RECORDINGS
    if path == EXPLAIN_PATH or path.startswith(f"{EXPLAIN_PATH}/"):
        return _EXPLAIN
    return _MODELS if path == "/v1/models" or path.startswith("/v1/models/") else _OTHER


class _Endpoint:
    """An endpoint as an ASGI application; Starlette would wrap a plain function in more."""

    def __init__(self, handle: Handler) -> None:
        self._handle = handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._handle(scope[_EXCHANGE], scope)


def _open(summary: str, answer: Shape | str) -> Operation:
    """Of an endpoint that needs no API key. `answer`: the class of its JSON, or another type of content."""
    if isinstance(answer, str):
        return Operation(summary=summary, content_type=answer, needs_key=False)
    return Operation(summary=summary, answer=answer, needs_key=False)


def _route(method: str, path: str, handle: Handler, operation: Operation) -> DescribedRoute:
    return DescribedRoute(method, path, _Endpoint(handle), operation)
