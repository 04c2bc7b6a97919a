"""POST /tokenize and /detokenize, as vLLM has them: prompts to token ids, and token ids to text."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final

import msgspec
from msgspec import Meta

from penstock.errors import PenstockError, RequestRejected
from penstock.frontend.answers import Detokenized, Tokenized
from penstock.frontend.chat import Chat
from penstock.frontend.decoding import decoded
from penstock.frontend.endpoint import Operation, PromptEncoder
from penstock.frontend.http.statuses import error_object
from penstock.frontend.messages import Message
from penstock.frontend.openai import MAX_MESSAGES, MAX_MODEL_CHARS, ChatRequest, TokenId, check_chat
from penstock.frontend.sampling import check_vocabulary, too_long
from penstock.frontend.tools import MAX_TOOLS, Tool
from penstock.frontend.unserved import REFUSED, check_refused, with_refused
from penstock.frontend.wording import rejected
from penstock.shapes import JsonObject

TOKENIZE_REFUSED: Final = {
    name: REFUSED[name] for name in ("chat_template", "media_io_kwargs", "mm_processor_kwargs")
}
"""Fields of vLLM's that would change the answer, and are not served."""

_CHAT_FIELDS: Final = (
    "messages",
    "tools",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
)


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /tokenize: a text, or the conversation of a chat."""

    model: Annotated[str, Meta(min_length=1, max_length=MAX_MODEL_CHARS)]
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    chat_template_kwargs: JsonObject | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None  # default: for a text yes, for a chat no
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    model: Annotated[str, Meta(min_length=1, max_length=MAX_MODEL_CHARS)]
    tokens: list[TokenId]


_TOKENIZE = with_refused(TokenizeRequest, TOKENIZE_REFUSED)
_TOKENIZE_DECODER = msgspec.json.Decoder(_TOKENIZE)
_DETOKENIZE_DECODER = msgspec.json.Decoder(DetokenizeRequest)


class Tokenize:
    """A PromptApi whose objects are PromptEndpoints: a prompt's token ids."""

    name: ClassVar = "tokenize"
    operation: ClassVar = Operation(
        summary="Makes token ids of a text or a chat.", request=TokenizeRequest, answer=Tokenized
    )

    def __init__(self, request: TokenizeRequest) -> None:
        """Raises RequestRejected for what does not go together."""
        self.model = request.model
        self._request = request
        self._chat = None
        if request.messages is not None:
            given = {name: getattr(request, name) for name in (*_CHAT_FIELDS, "add_special_tokens")}
            chat = ChatRequest(model=request.model, **given)
            check_chat(chat)
            self._chat = Chat(chat)

    @staticmethod
    def error_object(error: PenstockError) -> JsonObject:
        return error_object(error)

    @classmethod
    def decode(cls, body: bytes) -> Tokenize:
        request = decoded(body, _TOKENIZE_DECODER, _TOKENIZE, _explained)
        check_refused({name: getattr(request, name) for name in TOKENIZE_REFUSED}, TOKENIZE_REFUSED)
        if request.prompt is None and request.messages is None:
            message = "Missing required field: `prompt`, or `messages` for a chat."
            raise RequestRejected(message, code="missing_field", field="prompt")
        if request.prompt is not None:
            for name in _CHAT_FIELDS:
                if getattr(request, name) is not None:
                    raise RequestRejected(f"`{name}` needs a chat; leave out `prompt`.", field=name)
        return cls(request)

    async def answer(self, prompts: PromptEncoder) -> JsonObject:
        if self._chat is not None:
            tokens = await self._chat.prompt(prompts)
        else:
            special = self._request.add_special_tokens is not False
            (tokens,) = await prompts.encode([self._request.prompt or ""], add_special_tokens=special)
        return {
            "count": len(tokens),
            "max_model_len": prompts.model.max_model_len,
            "tokens": tokens,
            "token_strs": prompts.text.token_names(tokens) if self._request.return_token_strs else None,
        }


class Detokenize:
    """A PromptApi whose objects are PromptEndpoints: the text that token ids stand for."""

    name: ClassVar = "detokenize"
    operation: ClassVar = Operation(
        summary="Makes text of token ids.", request=DetokenizeRequest, answer=Detokenized
    )

    def __init__(self, request: DetokenizeRequest) -> None:
        self.model = request.model
        self._tokens = request.tokens

    @staticmethod
    def error_object(error: PenstockError) -> JsonObject:
        return error_object(error)

    @classmethod
    def decode(cls, body: bytes) -> Detokenize:
        return cls(decoded(body, _DETOKENIZE_DECODER, DetokenizeRequest, _explained))

    async def answer(self, prompts: PromptEncoder) -> JsonObject:
        limit = prompts.model.max_model_len
        if len(self._tokens) > limit:
            raise too_long(limit, f"you sent {len(self._tokens)} tokens")
        check_vocabulary("tokens", self._tokens, prompts.model.vocab_size)
        return {"prompt": await prompts.text.decode(self._tokens, prompts.caller)}


def _explained(body: bytes, error: msgspec.ValidationError, kind: type[msgspec.Struct]) -> RequestRejected:
    return rejected(error, kind)
