"""Request bodies of OpenAI's API, checked field by field.

JSON types are strict, as OpenAI's are: no numbers in strings, no booleans as numbers; 1.0 is accepted for
an integer, as in JSON Schema. Null is the same as leaving a field out. Fields nobody knows are ignored;
those that are known and not served are in frontend/unserved.py.

Sources: the API reference at platform.openai.com/docs/api-reference, and for the fields beyond it
(top_k, min_p, repetition_penalty, stop_token_ids, min_tokens, ignore_eos, cache_salt, priority, ...) vLLM's
OpenAI-compatible server.
"""

from __future__ import annotations

import contextlib
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from penstock.errors import RequestRejected
from penstock.frontend.decoding import decoded, with_integers
from penstock.frontend.http.json_limits import check_depth
from penstock.frontend.messages import Message, settle
from penstock.frontend.prompt_cut import PromptCut, Side
from penstock.frontend.sampling import client_seed
from penstock.frontend.structured import (
    ResponseFormat,
    StructuredOutputs,
    as_openai_has_it,
    constraint,
    hinted,
)
from penstock.frontend.text.repetition import RepetitionDetection
from penstock.frontend.tools import MAX_TOOLS, AllowedTools, Tool, ToolChoice, ToolSelection, check_tools
from penstock.frontend.unserved import (
    CHAT_REFUSED,
    COMPLETION_REFUSED,
    NVEXT_HARMLESS,
    NVEXT_REFUSED,
    check_refused,
    only_refused,
    refuse,
    unsupported,
    with_refused,
)
from penstock.frontend.wanted import Wanted
from penstock.frontend.wording import rejected, wrong_entries
from penstock.shapes import (
    MAX_ALLOWED_TOKENS,
    MAX_BAD_SEQUENCES,
    MAX_LOGPROBS,
    JsonObject,
    Sampling,
    SamplingDefaults,
)

MAX_CHOICES: Final = 128  # n times prompts
MAX_STOPS: Final = 16
MAX_STOP_CHARS: Final = 4096
MAX_STOP_TOKENS: Final = 128
MAX_LOGIT_BIASES: Final = 1024
MAX_BAD_WORDS: Final = MAX_BAD_SEQUENCES // 2  # each may be two sequences: with a space before it
MAX_BAD_WORD_CHARS: Final = 256
MAX_MESSAGES: Final = 4096
MAX_TOP_LOGPROBS: Final = 20
MAX_SALT_CHARS: Final = 256
MAX_SESSION_CHARS: Final = 512
MAX_MODEL_CHARS: Final = 256  # an error repeats it
COMPLETION_MAX_TOKENS: Final = 16  # OpenAI's default for /v1/completions

MAX_EXTRA_FIELDS: Final = 16

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TopLogprobs = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
ExtraField = Literal["worker_id", "timing", "explanation"]
BadWord = Annotated[str, Meta(min_length=1, max_length=MAX_BAD_WORD_CHARS)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
TopK = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
RepetitionPenalty = Annotated[float, Meta(gt=0, le=10)]
ThinkingBudget = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
Salt = Annotated[str, Meta(min_length=1, max_length=MAX_SALT_CHARS)]  # an empty one keeps nothing apart
SessionName = Annotated[str, Meta(max_length=MAX_SESSION_CHARS)]


class StreamOptions(msgspec.Struct):
    """Only with `stream`."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class NvExt(msgspec.Struct, forbid_unknown_fields=True):
    """What is served of `nvext`, Dynamo's own object: older places of fields that count before these, and
    what the answer is to tell of itself."""

    ignore_eos: bool | None = None
    top_k: TopK | None = None
    repetition_penalty: RepetitionPenalty | None = None
    cache_salt: Salt | None = None
    extra_fields: Annotated[list[ExtraField], Meta(max_length=MAX_EXTRA_FIELDS)] | None = None
    max_thinking_tokens: ThinkingBudget | None = None
    greed_sampling: bool | None = None  # true: temperature 0, whatever else is said


class SampledRequest(msgspec.Struct, kw_only=True):
    """What all of OpenAI's APIs share. None and absence mean the model's or the API's default."""

    model: Annotated[str, Meta(min_length=1, max_length=MAX_MODEL_CHARS)]
    stream: bool | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: TopK | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Meta(max_length=MAX_LOGIT_BIASES)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKENS)] | None = None
    bad_words: Annotated[list[BadWord], Meta(max_length=MAX_BAD_WORDS)] | None = None
    allowed_token_ids: (
        Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_ALLOWED_TOKENS)] | None
    ) = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    cache_salt: Salt | None = None
    prompt_cache_key: SessionName | None = None
    session_id: SessionName | None = None  # vLLM's name for the same
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    structured_outputs: StructuredOutputs | None = None
    skip_special_tokens: bool | None = None


class GenerationRequest(SampledRequest, kw_only=True):
    """What both kinds of completion share."""

    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    response_format: ResponseFormat | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    truncation_side: Side | None = None
    prompt_logprobs: TopLogprobs | None = None
    # Whose log-probabilities are shown, in place of the most likely tokens'.
    logprob_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_LOGPROBS)] | None = None
    thinking_token_budget: ThinkingBudget | None = None  # -1: no limit
    echo: bool | None = None  # of completions; see `decode_chat`
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None  # in log-probabilities
    repetition_detection: RepetitionDetection | None = None
    best_of: int | None = None  # only what `n` says
    nvext: JsonObject | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk has a usage. Counts only with the other option, as in vLLM."""
        options = self.stream_options
        return options is not None and bool(options.include_usage and options.continuous_usage_stats)


class ChatRequest(GenerationRequest, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    return_prompt_text: bool | None = None  # the text that the template made
    chat_template_kwargs: JsonObject | None = None
    chat_template_args: JsonObject | None = None  # Dynamo's name for the same
    documents: list[JsonObject] | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    include_reasoning: bool | None = None

    @property
    def calls_tools(self) -> bool:
        """Whether an answer may be a call of a tool."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def allowed_tools(self) -> AllowedTools | None:
        """Those tools that an answer may call; None when it may call each of them."""
        choice = self.tool_choice
        return choice.allowed_tools if isinstance(choice, ToolSelection) else None

    @property
    def template_variables(self) -> JsonObject:
        """What the chat template is told beside messages and tools. To ask for an effort is to ask for
        reasoning, which some templates must be told apart (as in vLLM)."""
        variables: JsonObject = {}
        if self.reasoning_effort is not None:
            enabled = self.reasoning_effort != "none"
            variables = {"reasoning_effort": self.reasoning_effort, "enable_thinking": enabled}
        return variables | (self.chat_template_kwargs or {})


class CompletionRequest(GenerationRequest, kw_only=True):
    """POST /v1/completions. `prompt` is a text, token ids, or a list of either."""

    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None  # 0 only with `echo`
    prompt: str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
    logprobs: TopLogprobs | None = None
    add_special_tokens: bool | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt. Raises RequestRejected for a list of mixed kinds."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        kinds = {type(item) for item in self.prompt}
        if len(kinds) > 1:
            raise RequestRejected(
                "A list of prompts must be all strings, all token ids or all token lists.", field="prompt"
            )
        if kinds == {int}:
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]


_CHAT = with_refused(ChatRequest, CHAT_REFUSED)
_COMPLETION = with_refused(CompletionRequest, COMPLETION_REFUSED)
_CHAT_DECODER = msgspec.json.Decoder(_CHAT)
_COMPLETION_DECODER = msgspec.json.Decoder(_COMPLETION)


def decode_chat(body: bytes) -> ChatRequest:
    """Raises RequestRejected naming the field."""
    request = decoded(body, _CHAT_DECODER, _CHAT, _rejected)
    _check(request)
    if request.echo:
        raise unsupported("echo", instead="/v1/completions has it")
    check_chat(request)
    return request


def decode_completion(body: bytes) -> CompletionRequest:
    """Raises RequestRejected naming the field."""
    request = decoded(body, _COMPLETION_DECODER, _COMPLETION, _rejected)
    _check(request)
    if request.max_tokens == 0 and not request.echo:
        raise RequestRejected("`max_tokens` must be at least 1 without `echo`.", field="max_tokens")
    choices = len(request.prompts) * (request.n or 1)
    if choices > MAX_CHOICES:
        raise RequestRejected(
            f"{choices} choices (n times prompts) are more than {MAX_CHOICES}.", field="prompt"
        )
    return request


def wanted_of(
    request: GenerationRequest,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    max_tokens_field: str = "max_tokens",
) -> Wanted:
    """What a body asks for, apart from its prompts. `logprobs`: how many alternatives beside each token's
    log-probability; None for none at all."""
    defaults = SamplingDefaults.__struct_fields__  # what models may recommend for requests without it
    given = {name: value for name in defaults if (value := getattr(request, name)) is not None}
    if "top_k" in given:
        given["top_k"] = max(0, given["top_k"])  # -1 means off, as 0 does
    budget = request.thinking_token_budget
    kept = request.truncate_prompt_tokens
    echoed = logprobs if request.echo else None
    named = tuple(request.logprob_token_ids or ())
    if named:
        _check_named(request, logprobs)
        logprobs = len(named)
    scores = [top for top in (request.prompt_logprobs, echoed) if top is not None]
    repetition = request.repetition_detection
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return Wanted(
        model=request.model,
        choices=request.n or 1,
        sampling=Sampling(
            max_tokens=0,
            min_tokens=request.min_tokens or 0,
            seed=client_seed(request.seed),
            logit_bias=request.logit_bias or {},
            stop_token_ids=tuple(request.stop_token_ids or ()),
            ignore_eos=bool(request.ignore_eos),
            allowed_token_ids=tuple(request.allowed_token_ids or ()),
            logprobs=logprobs,
            logprob_token_ids=named,
            prompt_logprobs=max(scores, default=None),
            thinking_budget=None if budget == -1 else budget,
            structured=constraint(request.response_format, request.structured_outputs),
            reproducible=request.seed is not None,
            **given,
        ),
        left_out=tuple(name for name in defaults if name not in given),
        max_tokens=max_tokens,
        cut=None if kept is None else PromptCut(kept, request.truncation_side),
        max_tokens_field=max_tokens_field,
        structured_hint=hinted(request.response_format),
        structured_field="response_format" if request.response_format is not None else "structured_outputs",
        stops=tuple(stops),
        repetition=repetition if repetition is not None and repetition.max_pattern_size else None,
        bad_words=tuple(request.bad_words or ()),
        include_stop=bool(request.include_stop_str_in_output),
        show_special_tokens=request.skip_special_tokens is False,
        echo=bool(request.echo),
        prompt_logprobs=request.prompt_logprobs,
        show_token_ids=bool(request.return_token_ids),
        tokens_as_ids=bool(request.return_tokens_as_token_ids),
        extra_fields=tuple((request.nvext or {}).get("extra_fields") or ()),  # checked with the rest
        stream=bool(request.stream),
        priority=request.priority or 0,
        cache_salt=request.cache_salt or "",
        session=request.prompt_cache_key or request.session_id or "",
    )


def _check_named(request: GenerationRequest, logprobs: int | None) -> None:
    """Raises RequestRejected for `logprob_token_ids` where no log-probabilities are shown, or the prompt's
    are as well."""
    if logprobs is None:
        raise RequestRejected("`logprob_token_ids` needs `logprobs`.", field="logprob_token_ids")
    if request.echo:
        message = "`logprob_token_ids` and `echo` cannot be combined."
        raise RequestRejected(message, field="logprob_token_ids")


# --- decoding -------------------------------------------------------------------------------------


def _rejected(body: bytes, error: msgspec.ValidationError, kind: type[msgspec.Struct]) -> RequestRejected:
    """Why a body is refused: for a field that is not served rather than for another's value, since such a
    value may be right together with that field."""
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        try:
            refuse(msgspec.json.decode(body, type=only_refused(kind)))
        except RequestRejected as refused:
            return refused
        if "$.logit_bias" in str(error):
            bias = msgspec.json.decode(body, type=_OnlyBias).logit_bias
            if wrong := [token for token in bias if not _is_token(token)]:
                return wrong_entries("logit_bias", wrong, 'must be token ids, as in `{"42": 5}`')
            if wrong := [token for token, value in bias.items() if not _is_bias(value)]:
                return wrong_entries("logit_bias", wrong, "must have numbers from -100 to 100")
    return rejected(error, kind)


class _OnlyBias(msgspec.Struct):
    logit_bias: JsonObject


def _is_token(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10 and int(text) < 2**31


def _is_bias(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -100 <= value <= 100


# --- what goes together ---------------------------------------------------------------------------


def _check(request: GenerationRequest) -> None:
    refuse(request)
    if request.nvext is not None:
        _read_nvext(request, request.nvext)
    request.response_format = as_openai_has_it(request.response_format)
    options = request.stream_options
    if options is not None and not request.stream:
        raise RequestRejected("`stream_options` needs `stream`.", field="stream_options")
    if request.prompt_logprobs is not None and request.stream:
        message = "`prompt_logprobs` needs an answer that is not streamed."
        raise RequestRejected(message, field="prompt_logprobs")
    if request.truncate_prompt_tokens == 0:
        message = "`truncate_prompt_tokens` must be at least 1, or -1 for all that fit."
        raise RequestRejected(message, field="truncate_prompt_tokens")
    if request.repetition_detection is not None:
        _check_repetition(request.repetition_detection)
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise unsupported("best_of", " other than `n`")


def _check_repetition(wanted: RepetitionDetection) -> None:
    largest = wanted.max_pattern_size or 0
    if (wanted.min_pattern_size or 0) > largest:
        field = "repetition_detection.min_pattern_size"
        raise RequestRejected(f"`{field}` must not be above `max_pattern_size`.", field=field)
    if largest and (wanted.min_count or 0) < 2:
        field = "repetition_detection.min_count"
        raise RequestRejected(f"`{field}` must be at least 2.", field=field)


def _read_nvext(request: GenerationRequest, given: JsonObject) -> None:
    """Put what is served of Dynamo's object where it belongs."""
    check_refused(given, NVEXT_REFUSED, "nvext.")
    left = {name: given[name] for name in given.keys() - NVEXT_REFUSED.keys() - NVEXT_HARMLESS.keys()}
    try:
        served = msgspec.convert(with_integers(left), NvExt)
    except msgspec.ValidationError as error:
        raise rejected(error, NvExt, "nvext.") from None
    for name in ("ignore_eos", "top_k", "repetition_penalty", "cache_salt"):
        if getattr(request, name) is None:
            setattr(request, name, getattr(served, name))
    if request.thinking_token_budget is None:
        request.thinking_token_budget = served.max_thinking_tokens
    if served.greed_sampling:
        request.temperature = 0.0


def check_chat(request: ChatRequest) -> None:
    """Put a conversation into the form that templates get. Raises RequestRejected for fields that
    contradict each other."""
    check_tools(request.tools, request.tool_choice)
    if request.chat_template_args is not None:
        if request.chat_template_kwargs is not None:
            message = "`chat_template_args` and `chat_template_kwargs` are the same; send one of them."
            raise RequestRejected(message, field="chat_template_args")
        request.chat_template_kwargs, request.chat_template_args = request.chat_template_args, None
    for name in ("chat_template_kwargs", "documents"):
        if (given := getattr(request, name)) is not None:
            check_depth(given, name)
    if request.top_logprobs and not request.logprobs:
        raise RequestRejected("`top_logprobs` needs `logprobs`.", field="top_logprobs")
    if request.continue_final_message:
        if request.add_generation_prompt:
            message = "`continue_final_message` and `add_generation_prompt` contradict each other."
            raise RequestRejected(message, field="continue_final_message")
        request.add_generation_prompt = False
    settle(request.messages)
