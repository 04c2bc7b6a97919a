"""POST /v1/responses."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Final

import msgspec
from msgspec.structs import replace

from penstock.errors import PenstockError, RequestRejected, StoreUnavailable
from penstock.frontend.answers import InputTokens, ResponseAnswer
from penstock.frontend.chat import Chat
from penstock.frontend.choice import Choice
from penstock.frontend.endpoint import Beginning, Operation, PromptEncoder
from penstock.frontend.http.statuses import error_object
from penstock.frontend.messages import Message
from penstock.frontend.openai import MAX_MESSAGES, ChatRequest, SampledRequest
from penstock.frontend.responses_api.input_items import (
    MESSAGE,
    REFERENCE,
    PlacedItem,
    kind_of_item,
    messages_of,
)
from penstock.frontend.responses_api.output_items import OutputItems, item_id
from penstock.frontend.responses_api.request_body import (
    ENCRYPTED_REASONING,
    LOGPROBS,
    MAX_ID_CHARS,
    FlatSchemaFormat,
    InputItem,
    ResponsesRequest,
    decode_response_request,
)
from penstock.frontend.responses_api.response_object import ResponseObject
from penstock.frontend.responses_api.tool_names import OfferedTools, offered_tools
from penstock.frontend.responses_api.truncation import fitting
from penstock.frontend.sse import encode
from penstock.frontend.structured import JsonSchemaFormat, NamedSchema, ResponseFormat, as_openai_has_it
from penstock.frontend.tool_shapes import ToolShape, naming_tool_shapes
from penstock.ports import ResponseStore, StoredResponse
from penstock.shapes import FinishReason, JsonObject, Parsed

MAX_TURNS: Final = 512
"""Responses that continue each other, in one conversation."""

MAX_CONVERSATION_BYTES: Final = 16 * 1024 * 1024
"""Of stored items in one conversation, as much as a body may have: a few bytes can name a lot of them."""

MAX_LOOKUP_S: Final = 10.0
"""For all stored responses that a request needs, which are read one after another."""

_ITEM_ID: Final = re.compile(r"[a-z]+_([0-9a-f]{32})_(?:in)?\d+")
_ITEMS: Final = msgspec.json.Decoder(list[InputItem])
_FIELDS: Final = {
    "response_format": "text.format",
    "messages": "input",
}
"""Names of a chat's fields, and what they are here."""


class _Output(msgspec.Struct):
    """What is read of a stored response to go on from it."""

    output: list[InputItem]


_OUTPUT: Final = msgspec.json.Decoder(_Output)


class ResponsesApi:
    """A GenerationApi, with the store of its responses."""

    name = "responses"
    id_prefix = "resp_"
    operation = Operation(
        summary="Answers a conversation of items in the form of OpenAI's Responses API, whole or streamed.",
        request=ResponsesRequest,
        answer=ResponseAnswer,
        streams=True,
    )

    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    def error_object(self, error: PenstockError) -> JsonObject:
        return error_object(error)

    def decode(self, body: bytes) -> ResponseCall:
        return _decoded(body, self._store)


class ResponseCall:
    """An Endpoint: items in, the next items out."""

    def __init__(self, request: ResponsesRequest, store: ResponseStore) -> None:
        self._request = request
        self._store = store
        self._tools = offered_tools(request)
        self._own_items: list[PlacedItem] = []
        self._stored_bytes = 0  # of the conversation
        self._chat_request = _chat_request(request, self._tools)
        structured = "structured_outputs" if request.structured_outputs is not None else "text.format"
        try:
            wanted = self._chat_of([]).wanted
        except RequestRejected as error:
            raise _in_own_words(error) from None
        self.wanted = replace(wanted, max_tokens_field="max_output_tokens", structured_field=structured)

    async def choices(self, beginning: Beginning) -> list[Choice]:
        chat = await self._chat(beginning)
        try:
            return await chat.choices(beginning)
        except RequestRejected as error:
            raise _in_own_words(error) from None

    async def prompt(self, prompts: PromptEncoder) -> list[int]:
        """The token ids of the conversation. Raises RequestRejected."""
        chat = await self._chat(prompts)
        try:
            return await chat.prompt(prompts)
        except RequestRejected as error:
            raise _in_own_words(error) from None

    async def body(self, beginning: Beginning, choices: Sequence[Choice]) -> bytes:
        return encode(await ResponseEvents(self, beginning).whole(choices))

    def stream(self, beginning: Beginning, choices: Sequence[Choice]) -> ResponseEvents:
        return ResponseEvents(self, beginning)

    def object(self, beginning: Beginning) -> ResponseObject:
        return ResponseObject(self._request, beginning)

    def output(self, beginning: Beginning) -> OutputItems:
        return OutputItems(
            beginning.answer_id, self._tools.by_name, carries=self._request.includes(ENCRYPTED_REASONING)
        )

    async def keep(self, tenant: str, response: JsonObject) -> None:
        """Store the response, unless the client does not want it. `store` then says whether it is stored:
        who has waited for an answer gets it, also when the store does not take it."""
        if self._request.store is False:
            return
        own = [item for item, _ in self._own_items]
        items = [_identified(item, response["id"], index) for index, item in enumerate(own)]
        stored = StoredResponse(
            response["id"], encode(response), encode(items), self._request.previous_response_id or ""
        )
        response["store"] = await self._store.put(tenant, stored)

    async def _chat(self, prompts: PromptEncoder) -> Chat:
        """The conversation as a chat."""
        messages = messages_of(await self._conversation(prompts.caller.tenant))
        if self._request.instructions:
            messages.insert(0, Message("system", self._request.instructions))
        if not messages:
            raise RequestRejected("`input` has no item.", field="input")
        if self._request.truncation == "auto":
            try:
                messages = await fitting(messages, self._chat_of, prompts, self.wanted.max_tokens)
            except RequestRejected as error:
                raise _in_own_words(error) from None
        return self._chat_of(messages)

    def _chat_of(self, messages: list[Message]) -> Chat:
        return Chat(replace(self._chat_request, messages=messages))

    async def _conversation(self, tenant: str) -> list[PlacedItem]:
        """All items, the earliest first, each with its path. Raises RequestRejected when one of them is not
        there any more, or the store is too slow."""
        self._stored_bytes = 0
        try:
            async with asyncio.timeout(MAX_LOOKUP_S):
                self._own_items = await self._resolved(tenant)
                turns = await self._earlier_turns(tenant)
        except TimeoutError:
            raise StoreUnavailable() from None
        earlier: list[PlacedItem] = []
        for turn in reversed(turns):
            earlier += [(item, "previous_response_id") for item in _items_of(turn)]
        found = [*earlier, *self._own_items]
        if len(found) > MAX_MESSAGES:
            message = f"The conversation has {len(found)} items, more than {MAX_MESSAGES}."
            raise RequestRejected(message, field="input")
        return found

    async def _earlier_turns(self, tenant: str) -> list[StoredResponse]:
        """The latest first."""
        turns: list[StoredResponse] = []
        previous = self._request.previous_response_id or ""
        while previous:
            stored = await self._store.get(tenant, previous)
            if stored is None or len(turns) == MAX_TURNS:
                raise _no_response(previous)
            self._count(stored.size, "previous_response_id")
            turns.append(stored)
            previous = stored.previous_id
        return turns

    async def _resolved(self, tenant: str) -> list[PlacedItem]:
        """The request's own items, with those in place that it only refers to."""
        given = self._request.input
        if isinstance(given, str):
            return [(InputItem(MESSAGE, role="user", content=given), "input")]
        items: list[PlacedItem] = []
        known: dict[str, dict[str, InputItem]] = {}
        for index, item in enumerate(given or ()):
            where = f"input[{index}]"
            if kind_of_item(item) == REFERENCE:
                if not item.id:
                    message = f"Missing required field: `{where}.id`."
                    raise RequestRejected(message, code="missing_field", field=f"{where}.id")
                item = await self._referred(tenant, item.id, f"{where}.id", known)
            items.append((item, where))
        return items

    async def _referred(
        self, tenant: str, item_id: str, where: str, known: dict[str, dict[str, InputItem]]
    ) -> InputItem:
        """The stored item. `known` has the items by id of those responses that were looked at before."""
        match = _ITEM_ID.fullmatch(item_id)
        response_id = f"resp_{match[1]}" if match is not None else ""
        if response_id not in known:
            stored = await self._store.get(tenant, response_id)
            if stored is not None:
                self._count(stored.size, where)
            known[response_id] = {item.id or "": item for item in _items_of(stored)} if stored else {}
        item = known[response_id].get(item_id)
        if item is None:
            message = f"Item with id '{item_id[:MAX_ID_CHARS]}' not found."
            raise RequestRejected(message, code="item_not_found", field=where)
        self._count(len(encode(item)), where)
        return item

    def _count(self, size: int, where: str) -> None:
        self._stored_bytes += size
        if self._stored_bytes > MAX_CONVERSATION_BYTES:
            message = f"`{where}`: the stored items have more than {MAX_CONVERSATION_BYTES} bytes."
            raise RequestRejected(message, field=where)


class InputTokensApi:
    """A PromptApi: how many tokens the prompt of such a conversation has."""

    name = "input_tokens"
    operation = Operation(
        summary="Counts the tokens of a conversation's prompt.",
        request=ResponsesRequest,
        answer=InputTokens,
    )

    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    def error_object(self, error: PenstockError) -> JsonObject:
        return error_object(error)

    def decode(self, body: bytes) -> InputTokensCall:
        return InputTokensCall(_decoded(body, self._store))


class InputTokensCall:
    """A PromptEndpoint."""

    def __init__(self, call: ResponseCall) -> None:
        self.model = call.wanted.model
        self._call = call

    async def answer(self, prompts: PromptEncoder) -> JsonObject:
        tokens = await self._call.prompt(prompts)
        return {"object": "response.input_tokens", "input_tokens": len(tokens)}


class ResponseEvents:
    """Writes the answer as OpenAI's events."""

    def __init__(self, call: ResponseCall, beginning: Beginning) -> None:
        self._call = call
        self._tenant = beginning.caller.tenant
        self._object = call.object(beginning)
        self._output = call.output(beginning)
        self._begun = False

    def chunk(self, choice: Choice, *, whole: bool = False) -> bytes:
        """What is new, or the `whole` answer, as one event for each part."""
        text, logprobs = choice.take()
        more = self._begun and not logprobs  # nearly each time
        if choice.reply is not None:
            parts = [choice.whole_reply(choice.reply)] if whole else choice.reply.take()
        elif more:
            return self._output.add_text(text)
        else:
            parts = [Parsed(text)]
        if more and len(parts) == 1:
            return self._output.add(parts[0], ())
        shown = choice.render_logprobs(logprobs) if logprobs else None
        entries = shown["content"] if shown is not None else ()
        events = [self._opening()]
        for part in parts or [Parsed()]:
            events.append(self._output.add(part, entries))
            entries = ()
        return b"".join(events)

    async def end(self, choices: Sequence[Choice]) -> bytes:
        opening, last = self._opening(), self._close(choices)
        response = await self._response(choices)
        name = f"response.{response['status']}"
        return b"".join((opening, last, self._output.event(name, {"response": response})))

    async def whole(self, choices: Sequence[Choice]) -> JsonObject:
        """The response to a call that does not stream."""
        self.chunk(choices[0], whole=True)
        self._close(choices)
        return await self._response(choices)

    def _close(self, choices: Sequence[Choice]) -> bytes:
        return self._output.end(complete=choices[0].finish_reason is not FinishReason.LENGTH)

    async def _response(self, choices: Sequence[Choice]) -> JsonObject:
        """The complete response, which is stored with this."""
        response = self._object.ended(choices, self._output.items)
        await self._call.keep(self._tenant, response)
        return response

    def failed(self, error: PenstockError) -> bytes:
        response = self._object.failed(error, self._output.items)
        opening = self._opening()
        return opening + self._output.event("response.failed", {"response": response})

    def _opening(self) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        response = {"response": self._object.begun()}
        event = self._output.event
        return event("response.created", response) + event("response.in_progress", response)


def _decoded(body: bytes, store: ResponseStore) -> ResponseCall:
    with naming_tool_shapes(body, ToolShape.RESPONSES):
        return ResponseCall(decode_response_request(body), store)


def _chat_request(request: ResponsesRequest, tools: OfferedTools) -> ChatRequest:
    """The same, but for its messages, which may have to be looked up."""
    effort = request.reasoning.effort if request.reasoning is not None else None
    shows_logprobs = request.includes(LOGPROBS)
    return ChatRequest(
        **{name: getattr(request, name) for name in SampledRequest.__struct_fields__},
        messages=[],
        max_completion_tokens=request.max_output_tokens,
        response_format=_response_format(request),
        logprobs=shows_logprobs or None,
        top_logprobs=request.top_logprobs if shows_logprobs else None,
        tools=tools.tools,
        tool_choice=tools.choice,
        parallel_tool_calls=request.parallel_tool_calls,
        reasoning_effort=effort,
        include_reasoning=request.include_reasoning,
        chat_template_kwargs=request.chat_template_kwargs,
    )


def _items_of(stored: StoredResponse) -> list[InputItem]:
    """What a response answered, and its answer. Raises RequestRejected when another version of Penstock, or
    somebody else, wrote it in another form."""
    try:
        return [*_ITEMS.decode(stored.items), *_OUTPUT.decode(stored.response).output]
    except msgspec.DecodeError:
        raise _no_response(stored.response_id) from None


def _response_format(request: ResponsesRequest) -> ResponseFormat | None:
    format = request.text.format if request.text is not None else None
    if isinstance(format, FlatSchemaFormat):
        schema = NamedSchema(format.name, format.schema, format.description, format.strict)
        return JsonSchemaFormat(schema)
    return as_openai_has_it(format)


def _identified(item: InputItem, response_id: str, index: int) -> JsonObject:
    """An input item as it is listed: with a type and an id."""
    kind = kind_of_item(item)
    shown: JsonObject = msgspec.to_builtins(item)
    return {**shown, "type": kind, "id": item.id or item_id(kind, response_id, f"in{index}")}


def _no_response(response_id: str) -> RequestRejected:
    return RequestRejected(
        f"Previous response with id '{response_id}' not found.",
        code="previous_response_not_found",
        field="previous_response_id",
    )


def _in_own_words(error: RequestRejected) -> RequestRejected:
    """The same error, with the names that the fields have here."""
    for name, own in _FIELDS.items():
        if error.field == name or (error.field or "").startswith((f"{name}.", f"{name}[")):
            error.field = own
        error.message = error.message.replace(f"`{name}`", f"`{own}`")
    error.args = (error.message,)
    return error
