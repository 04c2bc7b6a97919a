"""Request bodies of OpenAI's Responses API, checked field by field.

Types are as strict as for OpenAI's other APIs (frontend/openai.py), null is the same as leaving a field
out, and fields nobody knows are ignored.

Sources: the API reference at platform.openai.com/docs/api-reference/responses, the classes of its Python
client, and for the fields beyond them vLLM's server.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from penstock.errors import RequestRejected
from penstock.frontend.decoding import decoded
from penstock.frontend.http.json_limits import check_depth
from penstock.frontend.messages import ContentPart
from penstock.frontend.openai import MAX_MESSAGES, Count, SampledRequest, TopLogprobs
from penstock.frontend.structured import JsonObjectFormat, Text, TextFormat
from penstock.frontend.tools import MAX_TOOLS, FunctionName
from penstock.frontend.unserved import HARMLESS, REFUSED, RefusedField, check_refused, with_refused
from penstock.frontend.wording import rejected
from penstock.shapes import JsonObject

MAX_METADATA: Final = 16
MAX_METADATA_KEY_CHARS: Final = 64
MAX_METADATA_VALUE_CHARS: Final = 512
MAX_ID_CHARS: Final = 256

LOGPROBS: Final = "message.output_text.logprobs"
ENCRYPTED_REASONING: Final = "reasoning.encrypted_content"

_WITHOUT_SERVED: Final = {name: rule for name, rule in REFUSED.items() if name != "reasoning"}
RESPONSES_REFUSED: Final[dict[str, RefusedField]] = _WITHOUT_SERVED | {
    # OpenAI
    "background": RefusedField((False,), "use `stream` for long answers"),
    "background_options": RefusedField(({},)),
    "context_management": RefusedField(([],), "use `truncation`, or send fewer items"),
    "conversation": RefusedField((), "use `previous_response_id`, or send all items as `input`"),
    "prompt": RefusedField((), "send its text as `instructions` and `input`"),
    # Of OpenAI's other APIs
    "add_generation_prompt": RefusedField((True,)),
    "add_special_tokens": RefusedField((False,)),
    "best_of": RefusedField((1,)),
    "chat_template_args": RefusedField((), "use `chat_template_kwargs`"),
    "continue_final_message": RefusedField((False,)),
    "documents": RefusedField(([],), "use `chat_template_kwargs`"),
    "echo": RefusedField((False,), "/v1/completions has it"),
    "logprob_token_ids": RefusedField(([],), "/v1/chat/completions has it"),
    "logprobs": RefusedField((False,), f"use `include` with `{LOGPROBS}`"),
    "max_completion_tokens": RefusedField((), "use `max_output_tokens`"),
    "max_tokens": RefusedField((), "use `max_output_tokens`"),
    "messages": RefusedField((), "use `input`"),
    "n": RefusedField((1,)),
    "prompt_logprobs": RefusedField((), "/v1/chat/completions has it"),
    "reasoning_effort": RefusedField((), "use `reasoning.effort`"),
    "response_format": RefusedField((), "use `text.format`"),
    "repetition_detection": RefusedField((), "/v1/chat/completions has it"),
    "return_prompt_text": RefusedField((False,), "/v1/chat/completions has it"),
    "return_token_ids": RefusedField((False,), "/v1/chat/completions has it"),
    "return_tokens_as_token_ids": RefusedField((False,), "/v1/chat/completions has it"),
    "thinking_token_budget": RefusedField((-1,), "/v1/chat/completions has it"),
    "truncate_prompt_tokens": RefusedField((), "use `truncation`"),
    # vLLM
    "enable_response_messages": RefusedField((False,)),
    "previous_input_messages": RefusedField(([],), "use `previous_response_id`"),
    # Dynamo
    "nvext": RefusedField(({},), "use the fields of the request itself"),
}
"""Fields that would change the answer, and are not served."""

_SERVED_HERE: Final = (
    "metadata",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
RESPONSES_HARMLESS: Final[dict[str, str]] = {
    name: reason for name, reason in HARMLESS.items() if name not in _SERVED_HERE
} | {
    "access_programs": "chooses among OpenAI's own programs",
    "image": "counts for images only, which are refused themselves",
    "truncation_side": "counts with `truncate_prompt_tokens` only, which is refused itself",
}
"""Fields that change no answer, each with the reason. Some more are only repeated in the response."""


class InputItem(msgspec.Struct, omit_defaults=True):
    """One item of a conversation. Which of the fields it has depends on its type; a message needs none."""

    type: str | None = None
    id: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[ContentPart | str] | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: Any = None  # whatever the model wrote, as is `input`
    input: Any = None
    output: str | list[ContentPart | str] | None = None
    summary: str | list[ContentPart | str] | None = None
    encrypted_content: str | None = None
    status: str | None = None


class ToolFormat(msgspec.Struct, omit_defaults=True):
    """What the input of a custom tool looks like."""

    type: str = ""
    syntax: str | None = None
    definition: str | None = None


class ResponseTool(msgspec.Struct, omit_defaults=True):
    """A function, a custom tool, or a namespace of such; any other type is one that OpenAI runs itself."""

    type: str = ""
    name: FunctionName | None = None
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None
    defer_loading: bool | None = None
    format: ToolFormat | None = None
    tools: list[ResponseTool] | None = None
    external_web_access: bool | None = None
    input_schema: Any = None  # only of Anthropic's tools


class ResponseToolChoice(msgspec.Struct, omit_defaults=True):
    """One tool, or those that may be called."""

    type: str
    name: FunctionName | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[ResponseToolChoice] | None = None


class FlatSchemaFormat(msgspec.Struct, tag_field="type", tag="json_schema"):
    """JSON of this schema."""

    name: Text
    schema: JsonObject
    description: str | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct):
    format: TextFormat | JsonObjectFormat | FlatSchemaFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningConfig(msgspec.Struct):
    """A summary is never made: reasoning is given as it is."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None  # its older name
    context: Literal["auto", "current_turn", "all_turns"] | None = None
    mode: str | None = None


class ResponseStreamOptions(msgspec.Struct):
    """Obfuscation pads events against who listens on the way; there is none here."""

    include_obfuscation: bool | None = None


MetadataKey = Annotated[str, Meta(max_length=MAX_METADATA_KEY_CHARS)]
MetadataValue = Annotated[str, Meta(max_length=MAX_METADATA_VALUE_CHARS)]


class ResponsesRequest(SampledRequest, kw_only=True):
    """POST /v1/responses."""

    input: str | Annotated[list[InputItem], Meta(max_length=MAX_MESSAGES)] | None = None
    instructions: str | None = None
    previous_response_id: Annotated[str, Meta(min_length=1, max_length=MAX_ID_CHARS)] | None = None
    store: bool | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Meta(max_length=MAX_METADATA)] | None = None
    tools: Annotated[list[ResponseTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: list[str] | None = None
    max_output_tokens: Count | None = None
    top_logprobs: TopLogprobs | None = None
    truncation: Literal["auto", "disabled"] | None = None
    stream_options: ResponseStreamOptions | None = None
    chat_template_kwargs: JsonObject | None = None
    include_reasoning: bool | None = None

    # Only repeated in the response. (`max_tool_calls` counts calls of tools that the server runs.)
    max_tool_calls: Count | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    user: str | None = None

    def includes(self, what: str) -> bool:
        return self.include is not None and what in self.include


_REQUEST: Final = with_refused(ResponsesRequest, RESPONSES_REFUSED)
_DECODER: Final = msgspec.json.Decoder(_REQUEST)


def decode_response_request(body: bytes) -> ResponsesRequest:
    """Raises RequestRejected naming the field."""
    request = decoded(body, _DECODER, _REQUEST, _explained)
    check_refused({name: getattr(request, name) for name in RESPONSES_REFUSED}, RESPONSES_REFUSED)
    if request.input is None and request.previous_response_id is None:
        raise RequestRejected("Missing required field: `input`.", code="missing_field", field="input")
    if request.stream_options is not None and not request.stream:
        raise RequestRejected("`stream_options` needs `stream`.", field="stream_options")
    if request.text is not None:
        verbosity = {"text.verbosity": request.text.verbosity}
        check_refused(verbosity, {"text.verbosity": RefusedField(("medium",), "say it in `instructions`")})
    for name in request.include or ():
        if name not in (LOGPROBS, ENCRYPTED_REASONING) and not name.partition(".")[0].endswith("_call"):
            raise RequestRejected(f"`include`: there is no `{name[:80]}`.", field="include")
    if request.chat_template_kwargs is not None:
        check_depth(request.chat_template_kwargs, "chat_template_kwargs")
    return request


def _explained(body: bytes, error: msgspec.ValidationError, kind: type[msgspec.Struct]) -> RequestRejected:
    return rejected(error, kind)
