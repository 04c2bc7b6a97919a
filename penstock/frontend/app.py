"""The frontend as an ASGI application: paths, keys, and errors in the shape of the API that was asked.

Starlette's router finds the endpoint. Its application class is not used: its two middlewares would wrap
each `send`, once per streamed chunk.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import msgspec
from starlette.exceptions import HTTPException
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from penstock import __version__
from penstock.errors import Rejection, RequestRejected
from penstock.frontend.anthropic_messages import CountTokens, Messages
from penstock.frontend.chat import Chat
from penstock.frontend.completer import Completer
from penstock.frontend.completion_objects import model_list, model_object
from penstock.frontend.completions import Completions
from penstock.frontend.endpoint import GenerationApi, PromptEndpoint
from penstock.frontend.generation import GenerationServer, outcome_of, why
from penstock.frontend.http.api_keys import ApiKeys
from penstock.frontend.http.cors import Header
from penstock.frontend.http.exchange import Bodies, HttpExchange
from penstock.frontend.http.statuses import anthropic_error, status_of
from penstock.frontend.prompting import PromptServer
from penstock.frontend.responses_api.create import ResponsesApi
from penstock.frontend.responses_api.store import MemoryResponseStore
from penstock.frontend.responses_api.stored import StoredResponses
from penstock.frontend.settings import FrontendSettings
from penstock.frontend.start_page import START_PAGE_HEADERS, START_PAGE_TYPE, start_page
from penstock.frontend.text.model_text import ModelTexts
from penstock.frontend.tokenization import Detokenize, Tokenize
from penstock.logs.quiet_log import QuietLog
from penstock.metrics import METRICS_CONTENT_TYPE, Metrics
from penstock.ports import ChatParsers
from penstock.shapes import InstanceView, JsonObject, ModelView

log = logging.getLogger("penstock.frontend")

Handler = Callable[[HttpExchange, Scope], Awaitable[None]]

_EXCHANGE = "penstock.exchange"  # in the scope, for the endpoints

MAX_SHOWN_PATH_CHARS: Final = 200  # of a path in an error and in the log
ENDPOINTS: Final[dict[str, GenerationApi]] = {
    "/v1/chat/completions": Chat,
    "/v1/completions": Completions,
    "/v1/messages": Messages,
}
"""The APIs that generate text, by path."""

PROMPT_ENDPOINTS: Final[dict[str, type[PromptEndpoint]]] = {
    "/v1/messages/count_tokens": CountTokens,
    "/tokenize": Tokenize,
    "/detokenize": Detokenize,
    "/v1/tokenize": Tokenize,
    "/v1/detokenize": Detokenize,
}
"""Those that need a model's template and tokenizer only."""

RESPONSES_PATH: Final = "/v1/responses"
"""The one API that keeps something: its object has the store."""

_GENERATING: Final = (*ENDPOINTS, RESPONSES_PATH, *PROMPT_ENDPOINTS)
SERVED: Final = (*(f"POST {path}" for path in _GENERATING), "GET /v1/models")
_MODELS: Final = "models"
_OTHER: Final = "other"


class App:
    """The ASGI application. Call `close` after its last request."""

    def __init__(
        self,
        completer: Completer,
        settings: FrontendSettings,
        metrics: Metrics,
        parsers: ChatParsers | None = None,
    ) -> None:
        self._completer = completer
        self._settings = settings
        self._quiet_log = QuietLog(log)
        self._metrics = metrics
        self._keys = ApiKeys(settings.api_key, settings.api_keys_file)
        self._bodies = Bodies(settings.max_reading_bytes, settings.max_bodies_bytes)
        self._texts = ModelTexts(settings, metrics.tokenizer, parsers)
        self._generation = GenerationServer(completer, self._texts, settings, metrics.frontend)
        self._prompting = PromptServer(completer, self._texts, settings, metrics.frontend)
        self._created = int(time.time())
        store = MemoryResponseStore(
            settings.max_stored_responses, settings.max_stored_bytes, settings.stored_response_age_s
        )
        apis: dict[str, GenerationApi] = {**ENDPOINTS, RESPONSES_PATH: ResponsesApi(store)}
        self._router = Router(
            [
                *(_route("POST", path, self._generate(api)) for path, api in apis.items()),
                *self._stored_routes(StoredResponses(store)),
                *(_route("POST", path, self._prompt(api)) for path, api in PROMPT_ENDPOINTS.items()),
                _route("GET", "/v1/models", self._models),
                _route("GET", "/v1/models/{name:path}", self._model),
                _route("GET", "/", self._start_page),
                _route("GET", "/health", self._health),
                _route("GET", "/ping", self._health),
                _route("GET", "/live", self._live),
                _route("GET", "/metrics", self._render_metrics),
                _route("GET", "/version", self._version),
            ],
            redirect_slashes=False,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = scope[_EXCHANGE] = HttpExchange(scope, receive, send, self._settings, self._bodies)
        scope["app"] = self  # makes the router raise for what it does not find
        try:
            exchange.check_host()
            if await exchange.answer_preflight():
                return
            await self._router(scope, receive, send)
        except RequestRejected as error:
            await self._reject(scope, exchange, error)
        except HTTPException as error:
            headers = [
                (name.lower().encode(), value.encode()) for name, value in (error.headers or {}).items()
            ]
            await self._reject(scope, exchange, _no_endpoint(scope, error), headers)
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

    def close(self) -> None:
        """Free the tokenizer threads."""
        self._texts.close()

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

    def _generate(self, api: GenerationApi) -> Handler:
        async def generate(exchange: HttpExchange, scope: Scope) -> None:
            exchange.error_object = api.error_object
            await self._generation.serve(api, exchange, self._tenant(exchange))

        return generate

    def _prompt(self, api: type[PromptEndpoint]) -> Handler:
        async def answer(exchange: HttpExchange, scope: Scope) -> None:
            exchange.error_object = api.error_object
            await self._prompting.serve(api, exchange, self._tenant(exchange))

        return answer

    def _stored_routes(self, stored: StoredResponses) -> list[Route]:
        def of_tenant(handle: Callable[[HttpExchange, Scope, str], Awaitable[None]]) -> Handler:
            async def handle_own(exchange: HttpExchange, scope: Scope) -> None:
                await handle(exchange, scope, self._tenant(exchange))

            return handle_own

        one = RESPONSES_PATH + "/{id}"
        return [
            _route("GET", one, of_tenant(stored.retrieve)),
            _route("DELETE", one, of_tenant(stored.delete)),
            _route("POST", one + "/cancel", of_tenant(stored.cancel)),
            _route("GET", one + "/input_items", of_tenant(stored.input_items)),
        ]

    async def _models(self, exchange: HttpExchange, scope: Scope) -> None:
        self._tenant(exchange)
        models = [model_object(model, self._created) for model in self._completer.models()]
        await exchange.respond(200, msgspec.json.encode(model_list(models)))

    async def _model(self, exchange: HttpExchange, scope: Scope) -> None:
        name = scope["path_params"]["name"]
        if not name:
            return await self._models(exchange, scope)
        self._tenant(exchange)
        model = self._completer.model(name)
        await exchange.respond(200, msgspec.json.encode(model_object(model, self._created)))

    async def _start_page(self, exchange: HttpExchange, scope: Scope) -> None:
        host = exchange.header(b"host") or b"localhost"
        models = [model.card.name for model in self._completer.models()]
        page = start_page(f"{scope['scheme']}://{host.decode('ascii')}", models, self._completer.missing())
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


def create_app(
    router: Completer, settings: FrontendSettings, metrics: Metrics, parsers: ChatParsers | None = None
) -> App:
    """The frontend over a router. Must be called inside the event loop that will serve it."""
    return App(router, settings, metrics, parsers)


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
    if path == RESPONSES_PATH or path.startswith(f"{RESPONSES_PATH}/"):
        return ResponsesApi.name
    return _MODELS if path == "/v1/models" or path.startswith("/v1/models/") else _OTHER


def _no_endpoint(scope: Scope, error: HTTPException) -> RequestRejected:
    """For a path that is not served, or not with this method."""
    asked = f"`{scope['method']} {scope['path'][:MAX_SHOWN_PATH_CHARS]}`"
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return RequestRejected(f"{asked} is not served; use {allowed}.", kind=Rejection.METHOD_NOT_ALLOWED)
    message = f"Penstock does not serve {asked}; it serves {', '.join(SERVED)}."
    return RequestRejected(message, kind=Rejection.NOT_FOUND)


class _Endpoint:
    """An endpoint as an ASGI application; Starlette would wrap a plain function in more."""

    def __init__(self, handle: Handler) -> None:
        self._handle = handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._handle(scope[_EXCHANGE], scope)


def _route(method: str, path: str, handle: Handler) -> Route:
    return Route(path, endpoint=_Endpoint(handle), methods=[method])
