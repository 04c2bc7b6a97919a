"""Request bodies of OpenAI's API, checked field by field.

JSON types are strict, as OpenAI's are: no numbers in strings, no booleans as numbers; 1.0 is accepted for
an integer, as in JSON Schema. Fields nobody knows are ignored. Fields that would change the answer but
cannot be served yet are refused by name, since an answer that ignores them would be wrong.

Sources: the API reference at platform.openai.com/docs/api-reference, and for the fields beyond it
(top_k, min_p, repetition_penalty, stop_token_ids, min_tokens, ignore_eos, cache_salt, priority, ...) vLLM's
OpenAI-compatible server.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from penstock.errors import RequestRejected
from penstock.frontend.json_limits import check_depth, check_size
from penstock.frontend.structured import ResponseFormat, StructuredOutputs
from penstock.frontend.tools import MAX_TOOLS, NamedTool, Tool, check_tools
from penstock.structs import JsonObject

MAX_CHOICES: Final = 128  # n times prompts
MAX_STOPS: Final = 16
MAX_STOP_CHARS: Final = 128
MAX_STOP_TOKENS: Final = 128
MAX_LOGIT_BIASES: Final = 1024
MAX_MESSAGES: Final = 4096
MAX_TOP_LOGPROBS: Final = 20
MAX_SALT_CHARS: Final = 256
MAX_MODEL_CHARS: Final = 256  # an error repeats it
COMPLETION_MAX_TOKENS: Final = 16  # OpenAI's default for /v1/completions

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TopLogprobs = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
Bias = Annotated[float, Meta(ge=-100, le=100)]


class StreamOptions(msgspec.Struct):
    """Only with `stream`."""

    include_usage: bool | None = None


class GenerationRequest(msgspec.Struct, kw_only=True):
    """What both kinds of completion share. None and absence mean the model's or the API's default."""

    model: Annotated[str, Meta(min_length=1, max_length=MAX_MODEL_CHARS)]
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Meta(max_length=MAX_LOGIT_BIASES)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    user: str | None = None
    cache_salt: Annotated[str, Meta(max_length=MAX_SALT_CHARS)] | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] = 0
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    skip_special_tokens: bool = True

    # Read only to be refused when they ask for something (see _refuse).
    use_beam_search: bool = False
    best_of: int | None = None
    echo: bool | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None

    @property
    def stops(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wanted_max_tokens(self) -> int | None:
        """None for what is left of the context."""
        raise NotImplementedError

    @property
    def wanted_logprobs(self) -> int | None:
        """How many alternatives beside the chosen token's log-probability; None for none at all."""
        raise NotImplementedError


class ContentPart(msgspec.Struct):
    """One part of a message's content. Only text can be served."""

    type: Literal["text"]
    text: str


class FunctionCall(msgspec.Struct):
    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    """A call an assistant made in an earlier turn."""

    function: FunctionCall
    id: str = ""
    type: Literal["function"] = "function"


class Message(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None  # its older name


class ChatRequest(GenerationRequest, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: JsonObject | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    include_reasoning: bool = True

    chat_template: str | None = None
    functions: list[Any] | None = None
    modalities: list[str] | None = None
    audio: Any = None

    @property
    def calls_tools(self) -> bool:
        """Whether an answer may be a call of a tool."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def template_variables(self) -> JsonObject:
        """What the chat template is told beside messages and tools. To ask for an effort is to ask for
        reasoning, which some templates must be told apart (as in vLLM)."""
        variables: JsonObject = {}
        if self.reasoning_effort is not None:
            enabled = self.reasoning_effort != "none"
            variables = {"reasoning_effort": self.reasoning_effort, "enable_thinking": enabled}
        return variables | (self.chat_template_kwargs or {})

    @property
    def wanted_max_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest, kw_only=True):
    """POST /v1/completions. `prompt` is a text, token ids, or a list of either."""

    prompt: str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
    logprobs: TopLogprobs | None = None
    add_special_tokens: bool = True

    suffix: str | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt. Raises RequestRejected for a list of mixed kinds."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        kinds = {type(item) for item in self.prompt}
        if len(kinds) > 1:
            raise RequestRejected(
                400,
                "A list of prompts must be all strings, all token ids or all token lists.",
                field="prompt",
            )
        if kinds == {int}:
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]

    @property
    def wanted_max_tokens(self) -> int | None:
        return self.max_tokens if self.max_tokens is not None else COMPLETION_MAX_TOKENS

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs


Body = TypeVar("Body", ChatRequest, CompletionRequest)

_CHAT_DECODER = msgspec.json.Decoder(ChatRequest)
_COMPLETION_DECODER = msgspec.json.Decoder(CompletionRequest)


def decode_chat(body: bytes) -> ChatRequest:
    """Raises RequestRejected(400) naming the field."""
    request = _decode(body, _CHAT_DECODER)
    _refuse(request)
    _refuse_in_chat(request)
    return request


def decode_completion(body: bytes) -> CompletionRequest:
    """Raises RequestRejected(400) naming the field."""
    request = _decode(body, _COMPLETION_DECODER)
    _refuse(request)
    if request.suffix:
        raise unsupported("suffix")
    choices = len(request.prompts) * (request.n or 1)
    if choices > MAX_CHOICES:
        raise RequestRejected(
            400, f"{choices} choices (n times prompts) are more than {MAX_CHOICES}.", field="prompt"
        )
    return request


def unsupported(field: str, what: str = "") -> RequestRejected:
    """The refusal of a field that would change the answer."""
    return RequestRejected(400, f"`{field}`{what} is not supported.", code="unsupported_value", field=field)


# --- decoding -------------------------------------------------------------------------------------


def _decode(body: bytes, decoder: msgspec.json.Decoder[Body]) -> Body:
    check_size(body)
    try:
        try:
            return decoder.decode(body)
        except msgspec.ValidationError as error:
            if "got `float`" not in str(error):
                raise
            return msgspec.convert(_with_integers(msgspec.json.decode(body)), decoder.type, str_keys=True)
    except msgspec.ValidationError as error:
        raise _rejected(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestRejected(400, f"The body is not valid JSON: {error}", code="invalid_json") from None


def _with_integers(value: Any) -> Any:
    """The same JSON with 1 for 1.0, which JSON Schema takes for the same number."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_with_integers(item) for item in value]
    if isinstance(value, dict):
        return {key: _with_integers(item) for key, item in value.items()}
    return value


_AT = re.compile(r"^(?P<what>.*?)(?: - at (?:`key` in )?`\$\.?(?P<path>.*)`)?$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<name>[^`]+)`$")


def _rejected(message: str) -> RequestRejected:
    """msgspec's message, with its path as OpenAI's `param`."""
    match = _AT.match(message)
    what, path = (match["what"], match["path"] or "") if match else (message, "")
    missing = _MISSING.match(what)
    if missing:
        path = f"{path}.{missing['name']}" if path else missing["name"]
        return RequestRejected(400, f"Missing required field: `{path}`.", code="missing_field", field=path)
    # An entry of an object is shown without its key: name the object.
    path = path.removesuffix("[...]")
    where = f"`{path}`" if path else "the body"
    return RequestRejected(
        400, f"Invalid value for {where}: {what}.", code="invalid_value", field=path or None
    )


# --- what cannot be served ------------------------------------------------------------------------


def _refuse(request: GenerationRequest) -> None:
    if request.stream_options is not None and not request.stream:
        raise RequestRejected(400, "`stream_options` needs `stream`.", field="stream_options")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise unsupported("best_of", " other than `n`")
    for field in _UNSUPPORTED:
        value = getattr(request, field)
        if value is not None and value is not False:
            raise unsupported(field)


_UNSUPPORTED = (
    "use_beam_search",
    "echo",
    "prompt_logprobs",
    "truncate_prompt_tokens",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)


def _refuse_in_chat(request: ChatRequest) -> None:
    check_tools(request.tools, request.tool_choice)
    check_depth(request.chat_template_kwargs, "chat_template_kwargs")
    if request.functions:
        raise unsupported("functions")
    if request.audio is not None:
        raise unsupported("audio")
    if request.chat_template is not None:
        raise unsupported("chat_template")
    if request.modalities and request.modalities != ["text"]:
        raise unsupported("modalities", " other than text")
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestRejected(400, "`top_logprobs` needs `logprobs`.", field="top_logprobs")
    if request.continue_final_message and request.add_generation_prompt:
        raise RequestRejected(
            400,
            "`continue_final_message` needs `add_generation_prompt` set to false.",
            field="continue_final_message",
        )
    for index, message in enumerate(request.messages):
        if message.content is None and message.role != "assistant":
            field = f"messages[{index}].content"
            raise RequestRejected(400, f"`{field}` must be a string or a list of text parts.", field=field)
