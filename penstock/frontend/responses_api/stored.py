"""GET, DELETE and cancel of stored responses, and their input items."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import parse_qs

import msgspec
from starlette.types import Scope

from penstock.errors import Rejection, RequestRejected
from penstock.frontend.http.exchange import HttpExchange
from penstock.frontend.responses_api.request_body import MAX_ID_CHARS
from penstock.frontend.unserved import unsupported
from penstock.ports import ResponseStore, StoredResponse
from penstock.shapes import JsonObject

MAX_LISTED: Final = 100
LISTED: Final = 20


class StoredResponses:
    """What can be done with responses that are stored. Each tenant sees its own only."""

    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    async def retrieve(self, exchange: HttpExchange, scope: Scope, tenant: str) -> None:
        if _query(scope).get("stream", "").lower() not in ("", "false"):
            raise unsupported("stream", " for a stored response", "it is given whole")
        await exchange.respond(200, (await self._stored(scope, tenant)).response)

    async def delete(self, exchange: HttpExchange, scope: Scope, tenant: str) -> None:
        response_id = scope["path_params"]["id"]
        if not await self._store.delete(tenant, response_id):
            raise _not_found(response_id)
        deleted = {"id": response_id, "object": "response", "deleted": True}
        await exchange.respond(200, msgspec.json.encode(deleted))

    async def cancel(self, exchange: HttpExchange, scope: Scope, tenant: str) -> None:
        await self._stored(scope, tenant)
        raise RequestRejected("Cannot cancel a synchronous response: close its connection instead.")

    async def input_items(self, exchange: HttpExchange, scope: Scope, tenant: str) -> None:
        stored = await self._stored(scope, tenant)
        page = _page(msgspec.json.decode(stored.items), _query(scope))
        await exchange.respond(200, msgspec.json.encode(page))

    async def _stored(self, scope: Scope, tenant: str) -> StoredResponse:
        response_id = scope["path_params"]["id"]
        stored = await self._store.get(tenant, response_id)
        if stored is None:
            raise _not_found(response_id)
        return stored


def _page(items: list[JsonObject], query: dict[str, str]) -> JsonObject:
    """The items after one of them, the latest first unless it is asked otherwise."""
    order, limit = query.get("order", "desc"), query.get("limit", str(LISTED))
    after = query.get("after", "")
    if order not in ("asc", "desc"):
        raise RequestRejected("`order` must be `asc` or `desc`.", field="order")
    if not (limit.isascii() and limit.isdigit() and len(limit) <= 3 and 1 <= int(limit) <= MAX_LISTED):
        raise RequestRejected(f"`limit` must be an integer from 1 to {MAX_LISTED}.", field="limit")
    if order == "desc":
        items = items[::-1]
    if after:
        places = [place for place, item in enumerate(items) if item["id"] == after]
        if not places:
            raise RequestRejected("`after` is no item of this response.", field="after")
        items = items[places[0] + 1 :]
    shown: list[Any] = items[: int(limit)]
    return {
        "object": "list",
        "data": [_listed(item) for item in shown],
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(shown) < len(items),
    }


def _listed(item: JsonObject) -> JsonObject:
    """With a message's content as parts, as clients expect it."""
    content = item.get("content")
    if item["type"] != "message" or not isinstance(content, str):
        return {"status": "completed", **item}
    assistant = item["role"] == "assistant"
    part: JsonObject = {"type": "output_text" if assistant else "input_text", "text": content}
    if assistant:
        part["annotations"] = []
    return {"status": "completed", **item, "content": [part]}


def _query(scope: Scope) -> dict[str, str]:
    given = parse_qs(scope["query_string"].decode("latin-1"), max_num_fields=32)
    return {name: values[-1] for name, values in given.items()}


def _not_found(response_id: str) -> RequestRejected:
    return RequestRejected(
        f"Response with id '{response_id[:MAX_ID_CHARS]}' not found.", kind=Rejection.NOT_FOUND
    )
