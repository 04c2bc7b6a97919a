"""Why a request went where it did: GET /v1/explain/ID, a header of the answer itself, and for one that is
not sent POST /v1/explain."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Final
from urllib.parse import parse_qs

import msgspec
from starlette.types import Scope

from penstock.core.explanation import Explanation
from penstock.errors import PenstockError, RequestRejected
from penstock.frontend.chat import Chat
from penstock.frontend.choice import Choice
from penstock.frontend.completer import Completer
from penstock.frontend.completions import Completions
from penstock.frontend.endpoint import Operation, PromptEncoder
from penstock.frontend.http.cors import Header
from penstock.frontend.http.exchange import HttpExchange
from penstock.frontend.http.statuses import error_object
from penstock.frontend.openai import ChatRequest
from penstock.frontend.sampling import with_room
from penstock.frontend.sessions import session_of
from penstock.shapes import JsonObject, Request

ASK_HEADER: Final = "x-penstock-explain"
DEFAULT_MINUTES: Final = 10
MAX_MINUTES: Final = 7 * 24 * 60
REQUESTS_AT_ONCE: Final = 128
"""Of a report on misses, before other calls may run: two milliseconds."""

DRY_RUN: Final = "dry-run"
ANSWER_HEADER: Final = b"x-penstock-explanation"


def explanation_asked(exchange: HttpExchange) -> bool:
    """Whether the answer's header is to say where the request went. Raises RequestRejected."""
    given = exchange.header(ASK_HEADER.encode())
    if given is None or given.lower() in (b"true", b"false"):
        return given is not None and given.lower() == b"true"
    raise RequestRejected(f"The header `{ASK_HEADER}` is neither `true` nor `false`.", field=ASK_HEADER)


def explanation_headers(choice: Choice) -> Sequence[Header]:
    """The latest decision for a choice as JSON in ASCII; none where nothing is decided yet."""
    told = choice.explain() if choice.explain is not None else None
    if told is None or not told.decisions:
        return ()
    latest = told.decisions[-1]
    shown = {
        "request_id": told.request_id,
        "summary": latest.summary,
        "path": latest.path,
        "decode": latest.decode,
        "prefill": latest.prefill,
        "prompt_tokens": told.prompt_tokens,
        "predicted": msgspec.to_builtins(latest.predicted),
    }
    return [(ANSWER_HEADER, json.dumps(shown).encode("ascii"))]


class _Kind(msgspec.Struct):
    """What tells the body of a chat from one of completions."""

    messages: msgspec.Raw | None = None


class DryRun:
    """A PromptEndpoint: where a call would go now, which no worker gets."""

    def __init__(self, call: Chat | Completions, completer: Completer, default_max_tokens: int) -> None:
        self.model = call.wanted.model
        self._call = call
        self._completer = completer
        self._default_max_tokens = default_max_tokens

    async def answer(self, prompts: PromptEncoder) -> JsonObject:
        wanted, caller, model = self._call.wanted, prompts.caller, prompts.model
        encoder = replace(prompts, cut=wanted.cut)
        call = self._call
        encoded = [await call.prompt(encoder)] if isinstance(call, Chat) else await call.prompts(encoder)
        key = self._completer.model(self.model).key
        foreseen = [
            self._completer.foresee(
                Request(
                    request_id=f"{DRY_RUN}-{number}",
                    model=key,
                    token_ids=prompt,
                    sampling=with_room(
                        wanted.sampling, wanted, model, len(prompt), self._default_max_tokens
                    ),
                    cache_salt=wanted.cache_salt,
                    priority=max(0, wanted.priority) if caller.tenant else wanted.priority,
                    tenant=caller.tenant,
                    call_id=DRY_RUN,
                    session=session_of(caller, wanted),
                )
            )
            for number, prompt in enumerate(encoded)
        ]
        answer: JsonObject = msgspec.to_builtins(Explanation(DRY_RUN, foreseen))
        return answer


class DryRuns:
    """The PromptApi of POST /v1/explain: bodies of chats, or of completions."""

    name = "explain"
    operation = Operation(
        summary="Where a chat or a completion would go now, and why. Nothing is sent to a worker.",
        request=ChatRequest,
        answer=Explanation,
    )

    def __init__(self, completer: Completer, default_max_tokens: int) -> None:
        self._completer = completer
        self._default_max_tokens = default_max_tokens

    @staticmethod
    def error_object(error: PenstockError) -> JsonObject:
        return error_object(error)

    def decode(self, body: bytes) -> DryRun:
        call = Chat.decode(body) if _is_chat(body) else Completions.decode(body)
        return DryRun(call, self._completer, self._default_max_tokens)


def _is_chat(body: bytes) -> bool:
    try:
        return _KIND.decode(body).messages is not None
    except msgspec.DecodeError:
        return True  # whose decoder says what is wrong


_KIND = msgspec.json.Decoder(_Kind)


class Explaining:
    """Answers from the router's record. `tenant`: whose requests may be seen; None: everybody's."""

    def __init__(self, completer: Completer) -> None:
        self._completer = completer

    async def one(self, exchange: HttpExchange, scope: Scope, tenant: str | None) -> None:
        """One call. Raises RequestRejected."""
        explanation = self._completer.explain(scope["path_params"]["id"].removesuffix("/"), tenant)
        await exchange.respond(200, msgspec.json.encode(explanation))

    async def misses(self, exchange: HttpExchange, scope: Scope, tenant: str | None) -> None:
        """Where cached prompts were lost in the last `minutes`. Raises RequestRejected."""
        report, requests = self._completer.misses(60 * _minutes(scope["query_string"]))
        for number, routed in enumerate(requests, 1):
            report.add(routed, counts=tenant in (None, routed.request.tenant))
            if number % REQUESTS_AT_ONCE == 0:
                await asyncio.sleep(0)
        await exchange.respond(200, msgspec.json.encode(report.result()))


def _minutes(query: bytes) -> float:
    given = parse_qs(query.decode("latin-1")).get("minutes", [str(DEFAULT_MINUTES)])[-1]
    try:
        minutes = float(given)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes <= MAX_MINUTES:
        message = f"`minutes` must be a number above 0, up to {MAX_MINUTES}."
        raise RequestRejected(message, field="minutes")
    return minutes
