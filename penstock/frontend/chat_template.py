"""Chat templates: a model's own Jinja program that turns messages into one prompt.

The environment is the one that transformers sets up (`utils/chat_template_utils.py`), since that is what
templates are written for: sandboxed, `trim_blocks`, `lstrip_blocks`, loop controls, a `tojson` that does
not escape HTML, `raise_exception`, `strftime_now`, and a `{% generation %}` block (used there to mask
training data) that only renders its body.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import msgspec
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from penstock.errors import RequestRejected
from penstock.frontend.json_limits import check_depth
from penstock.frontend.openai import ChatRequest, Message, ToolCall
from penstock.frontend.tools import template_tools
from penstock.structs import JsonObject

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

# Names of templates in tokenizer_config.json, where there are several (transformers' names).
_DEFAULT = "default"
_TOOL_USE = "tool_use"

# What a template may raise: its own refusals, and what its expressions do with shapes it did not expect.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class ChatTemplate:
    """One model's compiled template, or two: one of them for requests with tools."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], tools_source: str | None = None
    ) -> None:
        """Raises jinja2.TemplateSyntaxError when a source is not a template."""
        environment = _environment()
        self._template = self._tools_template = environment.from_string(source)
        if tools_source is not None:
            self._tools_template = environment.from_string(tools_source)
        self._globals = dict(self._template.globals)
        self._special_tokens = dict(special_tokens)

    @classmethod
    def of(cls, assets: Mapping[str, bytes]) -> ChatTemplate | None:
        """The template among a model's files; None when it has none. Errors as in the constructor."""
        config = json.loads(assets.get(CONFIG_FILE, b"{}"))
        sources = _sources(config, assets)
        if _DEFAULT not in sources:
            return None
        return cls(sources[_DEFAULT], special_tokens(config), sources.get(_TOOL_USE))

    def render(self, request: ChatRequest) -> str:
        """The prompt. Raises RequestRejected(400) with the template's own words."""
        messages = [_template_message(message, index) for index, message in enumerate(request.messages)]
        tools = template_tools(request.tools)
        template = self._tools_template if tools else self._template
        variables: JsonObject = {**self._special_tokens, **request.template_variables}
        variables.update(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=request.add_generation_prompt,
        )
        try:
            # As Template.render does, but for looking through the environment's globals each time.
            context = template.new_context({**self._globals, **variables}, shared=True)
            prompt = "".join(template.root_render_func(context))
        except _TEMPLATE_ERRORS as error:
            reason = str(error) or type(error).__name__
            raise RequestRejected(
                400, f"The model's chat template refused the messages: {reason}", field="messages"
            ) from None
        return _without_end(prompt, messages[-1]["content"]) if request.continue_final_message else prompt


def special_tokens(config: JsonObject) -> dict[str, str]:
    """Special tokens by role (`bos_token`, ...), from a tokenizer_config.json."""
    named = {name: config.get(name) for name in SPECIAL_TOKENS}
    texts = {name: token["content"] if isinstance(token, dict) else token for name, token in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _sources(config: JsonObject, assets: Mapping[str, bytes]) -> dict[str, str]:
    """Templates by name."""
    if TEMPLATE_FILE in assets:
        return {_DEFAULT: assets[TEMPLATE_FILE].decode()}
    source = config.get("chat_template")
    if isinstance(source, list):
        return {entry["name"]: entry["template"] for entry in source}
    return {_DEFAULT: source} if source is not None else {}


def _template_message(message: Message, index: int) -> JsonObject:
    # Text parts become one string: every template takes that, not every one takes a list.
    content = message.content or ""
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    shown: JsonObject = {"role": message.role, "content": content}
    for name in ("name", "tool_call_id"):
        value = getattr(message, name)
        if value is not None:
            shown[name] = value
    reasoning = message.reasoning if message.reasoning is not None else message.reasoning_content
    if reasoning is not None:  # templates know either name
        shown["reasoning"] = shown["reasoning_content"] = reasoning
    if message.tool_calls:
        where = f"messages[{index}].tool_calls"
        shown["tool_calls"] = [
            _template_call(call, f"{where}[{number}]") for number, call in enumerate(message.tool_calls)
        ]
    return shown


def _template_call(call: ToolCall, where: str) -> JsonObject:
    """Templates write arguments as JSON themselves, so they want them as an object."""
    field = f"{where}.function.arguments"
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestRejected(400, f"`{field}` is not a JSON object: {error}", field=field) from None
    check_depth(arguments, field)
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": call.type, "function": function}


def _without_end(prompt: str, final_content: str) -> str:
    """The prompt up to the end of its last message's content, without what the template puts after it.

    Templates may strip the content, so it is looked for stripped (as transformers does)."""
    start = prompt.rfind(final_content.strip())
    if start < 0:
        raise RequestRejected(
            400, "The chat template changes the final message; it cannot be continued.", field="messages"
        )
    kept = final_content.lstrip()
    end = start + len(kept if prompt.startswith(kept, start) else final_content.strip())
    return prompt[:end]


# --- the environment ------------------------------------------------------------------------------


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` renders its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
