"""vLLM's own parsers of reasoning and tool calls, for frontends: `vllm serve` without its server.

What happens to a chat request there, in entrypoints/openai/chat_completion/serving.py and
renderers/online_renderer.py of vLLM 0.32, happens here in the same order and with the same objects: one
ChatCompletionRequest a call, which the parser may adjust, and one parser an answer.
"""

from __future__ import annotations

import json
import logging
import tempfile
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from penstock.engines.vllm import differences
from penstock.engines.vllm.installed import TESTED, installed_version, is_tested, prepare_environment
from penstock.engines.vllm.logs import hear_parsers, one_line, parser_complaints
from penstock.errors import ConfigError, Rejection, RequestRejected
from penstock.ports import CALL_ID_PREFIX
from penstock.shapes import (
    Answering,
    JsonObject,
    ModelView,
    Parsed,
    StructuredOutput,
    ToolCallDelta,
)

if TYPE_CHECKING:
    from vllm.entrypoints.generate.base.protocol import DeltaMessage
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.parser.abstract_parser import Parser
    from vllm.sampling_params import StructuredOutputsParams

log = logging.getLogger("penstock.frontend")

KINDS: Final = ("json", "regex", "choice", "grammar", "structural_tag")  # of StructuredOutput, with a spec

VLLM_CALL_ID_PREFIX: Final = "chatcmpl-tool-"  # of ids that say nothing to the model

_T = TypeVar("_T")


class VllmParsers:
    """Loads parsers; importing vLLM, the first time, takes about 10 s of CPU and 450 MB."""

    def has(self, answering: Answering) -> bool:
        """As ChatParsers.has: `load` finds out."""
        return True

    def load(self, model: ModelView) -> VllmChatParser:
        """As ChatParsers.load."""
        prepare_environment()
        try:
            from vllm.tokenizers import get_tokenizer

            with tempfile.TemporaryDirectory(prefix="penstock-tokenizer-") as folder:
                for name, content in model.assets.items():
                    Path(folder, name).write_bytes(content)
                tokenizer = get_tokenizer(folder)
        except Exception as error:  # an import's, the disk's, Hugging Face's or vLLM's own
            log.exception("the tokenizer of %s cannot be loaded", model.card.name)
            raise ConfigError(f"its tokenizer cannot be loaded: {one_line(error)}") from error
        answering = model.card.answering
        parser = parser_class(answering.tool_parser, answering.reasoning_parser, tokenizer)
        hear_parsers()
        chat_parser = VllmChatParser(partial(parser, tokenizer, model_config=_model_config(model)), parser)
        if not is_tested(installed_version()):
            _try_out(chat_parser, model.card.name)
        return chat_parser


def _try_out(parser: VllmChatParser, model: str) -> None:
    """Use the parser once. Raises ConfigError when an unknown version of vLLM has parsers that cannot be
    used like those of the versions that Penstock is tested with."""
    unknown = f"vllm {installed_version()} is not a version that Penstock is tested with ({TESTED})"
    try:
        call = parser.begin({"model": model, "messages": [{"role": "user", "content": "Hi"}]})
        call.structured([0])
        call.answer([0]).push("Hi", [0], finished=True)
        call.answer([0]).whole("Hi", [0])
        call.answer([0]).reasoning_tokens([0])
    except Exception as error:
        raise ConfigError(f"{unknown}, and its parsers cannot be used: {one_line(error)}") from error
    log.warning("%s; its parsers have passed a self-test", unknown)


def _model_config(model: ModelView) -> SimpleNamespace:
    """What parsers look for in vLLM's ModelConfig: the model's type and architecture. The whole of it could
    only be made of the whole model."""
    config = json.loads(model.assets.get("config.json", b"{}"))
    return SimpleNamespace(
        model=model.card.name,
        architecture=next(iter(config.get("architectures") or ()), None),
        hf_config=SimpleNamespace(**config),
        hf_text_config=SimpleNamespace(**config.get("text_config", config)),
        hf_overrides=None,
    )


def parser_class(tool_parser: str, reasoning_parser: str, tokenizer: Any) -> Any:
    """vLLM's Parser for these two names, of which one may be empty. Raises ConfigError when vLLM does not
    have them, or they cannot read what this tokenizer writes."""
    try:
        return differences.parser_class(
            tokenizer,
            tool_parser_name=tool_parser,
            reasoning_parser_name=reasoning_parser,
            enable_auto_tools=bool(tool_parser),
        )
    except Exception as error:  # each parser has its own, and so has each parser's import
        raise ConfigError(f"--tool-call-parser, --reasoning-parser: {one_line(error)}") from error


class VllmChatParser:
    """A ChatParser."""

    def __init__(self, make: Callable[..., Parser], kind: type[Parser]) -> None:
        """`make` makes a parser of the kind from tools and chat_template_kwargs."""
        self._make = make
        self._kind = kind

    def begin(self, body: JsonObject) -> VllmCallParser:
        """As ChatParser.begin."""
        from pydantic import ValidationError
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.exceptions import VLLMClientError

        messages = [
            {name: value for name, value in message.items() if value is not None}
            for message in body["messages"]
        ]
        try:
            request = ChatCompletionRequest.model_validate(body | {"messages": messages})
            return VllmCallParser(request, self._make, self._kind)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"]))
            raise RequestRejected(f"Invalid value for `{field}`: {first['msg']}.", field=field) from None
        except (VLLMClientError, ValueError) as error:
            parameter = getattr(error, "parameter", None)
            raise RequestRejected(str(error), field=parameter) from None
        except Exception as error:  # each parser reads tools and template variables in its own way
            log.exception("a parser failed on a request")
            message = f"The model's parser cannot take this request: {error!r}."
            raise RequestRejected(message) from error


class VllmCallParser:
    """A CallParser."""

    def __init__(
        self, request: ChatCompletionRequest, make: Callable[..., Parser], kind: type[Parser]
    ) -> None:
        # The template's variables, some of which tell whether the model reasons at all.
        variables = request.build_chat_params(None, "auto").with_defaults({}).chat_template_kwargs
        self._variables: JsonObject = variables
        self._request = request
        self._make = partial(make, request.tools, chat_template_kwargs=variables)
        self._first = self._make()
        adjusts = differences.always_adjusts(kind) or kind.reasoning_parser_cls is not None
        if adjusts or request.tool_choice != "none":
            self._make().adjust_request(request)  # in place; as there, what it returns is not looked at
        self.skip_special_tokens = request.skip_special_tokens is not False  # None: vLLM 0.33 decides later

    def structured(self, prompt_ids: Sequence[int]) -> StructuredOutput | None:
        """As CallParser.structured."""
        params = self._request.extract_structured_outputs()
        if params is None:
            return None
        kind, spec = _constraint(params)
        reasons = self._first.reasoning_parser is not None
        return StructuredOutput(
            kind,
            spec,
            reasoning_ended=differences.reasoning_ended(self._request, self._first, list(prompt_ids)),
            template_variables=self._variables if reasons else {},
            disable_any_whitespace=params.disable_any_whitespace,
            whitespace_pattern=params.whitespace_pattern or "",
        )

    def answer(self, prompt_ids: Sequence[int]) -> VllmAnswerParser:
        """As CallParser.answer."""
        return VllmAnswerParser(self._make(), self._request, list(prompt_ids))


class VllmAnswerParser:
    """An AnswerParser."""

    def __init__(self, parser: Parser, request: ChatCompletionRequest, prompt_ids: list[int]) -> None:
        self._parser = parser
        self._request = request
        self._prompt_ids = prompt_ids
        self._complained = False

    def push(self, text: str, token_ids: Sequence[int], *, finished: bool) -> Parsed | None:
        """As AnswerParser.push."""
        delta: DeltaMessage | None = self._guarded(
            lambda: self._parser.parse_delta(
                text, list(token_ids), self._request, self._prompt_ids, finished=finished
            )
        )
        if delta is None:
            return None
        calls = [
            ToolCallDelta(
                call.index,
                _call_id(call.id) if call.id is not None else None,
                call.function.name if call.function else None,
                call.function.arguments if call.function else None,
            )
            for call in delta.tool_calls
            if call.index == 0 or self._request.parallel_tool_calls is not False
        ]
        if not (delta.content or delta.reasoning or calls):
            return None
        return Parsed(delta.content or None, delta.reasoning or None, calls)

    def whole(self, text: str, token_ids: Sequence[int]) -> Parsed:
        """As AnswerParser.whole."""
        differences.tell_prompt(self._parser, self._prompt_ids)
        reasoning, content, calls = self._guarded(
            lambda: self._parser.parse(
                text, self._request, enable_auto_tools=True, model_output_token_ids=token_ids
            )
        )
        if self._request.parallel_tool_calls is False:
            calls = calls[:1] if calls else calls
        if self._request.tool_choice not in ("none", "auto", None):
            content = content or ""  # it was forced to call: as there, no content is no null then
        return Parsed(
            content,
            reasoning if self._request.include_reasoning else None,
            [
                ToolCallDelta(index, _call_id(call.id), call.name, call.arguments)
                for index, call in enumerate(calls or ())
            ],
        )

    def reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """As AnswerParser.reasoning_tokens."""
        count: int = self._guarded(lambda: self._parser.count_reasoning_tokens(tuple(token_ids)))
        return count

    def _guarded(self, parse: Callable[[], _T]) -> _T:
        with parser_complaints() as complaints:
            try:
                parsed = parse()
            # Parsers are many and read what a model wrote: any error is possible.
            except Exception as error:
                log.debug("an answer could not be parsed", exc_info=True)
                raise RequestRejected(
                    f"The model's answer could not be parsed: {error!r}",
                    kind=Rejection.INTERNAL,
                    code="unparsable_answer",
                ) from error
        if complaints and not self._complained:
            self._complained = True
            log.info(
                "vLLM's parser could not read a part of an answer, which stays text: %s", complaints[0]
            )
        return parsed


def _call_id(given: str | None) -> str:
    """In OpenAI's form, unless the model's format has ids of its own."""
    if given is None:
        return f"{CALL_ID_PREFIX}{uuid.uuid4().hex[:24]}"
    is_vllms = given.startswith(VLLM_CALL_ID_PREFIX)
    return given.replace(VLLM_CALL_ID_PREFIX, CALL_ID_PREFIX, 1) if is_vllms else given


def _constraint(params: StructuredOutputsParams) -> tuple[Any, str]:
    """A StructuredOutput's kind and spec."""
    for kind in KINDS:
        value = getattr(params, kind)
        if value is not None:
            return kind, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "json_object", ""
