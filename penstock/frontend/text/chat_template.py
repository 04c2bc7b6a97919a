"""Chat templates: a model's own Jinja program that turns messages into one prompt.

The environment is the one that transformers sets up (`utils/chat_template_utils.py`), since that is what
templates are written for: sandboxed, `trim_blocks`, `lstrip_blocks`, loop controls, a `tojson` that does
not escape HTML, `raise_exception`, `strftime_now`, and a `{% generation %}` block (used there to mask
training data) that only renders its body.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from penstock.errors import RequestRejected
from penstock.shapes import JsonObject

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

_END_MARK = "CONTINUE_FINAL_MESSAGE_TAG "  # transformers' own, so that templates treat it alike

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


class TemplateInput(NamedTuple):
    """What a template is shown. The messages are its own: rendering may change them."""

    messages: list[JsonObject]
    tools: list[JsonObject] | None
    documents: list[JsonObject] | None
    variables: JsonObject
    """More that the client wants it to know."""

    add_generation_prompt: bool
    continue_final_message: bool


class ChatTemplate:
    """One model's compiled template, or two: one of them for requests with tools."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], tools_source: str | None = None
    ) -> None:
        """Raises jinja2.TemplateSyntaxError when a source is not a template."""
        environment = _environment()
        self._template = self._tools_template = environment.from_string(source)
        self._knows_developer = self._tools_know_developer = _knows_developer(source)
        if tools_source is not None:
            self._tools_template = environment.from_string(tools_source)
            self._tools_know_developer = _knows_developer(tools_source)
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

    def render(self, conversation: TemplateInput) -> str:
        """The prompt. Raises RequestRejected with the template's own words."""
        messages, tools = conversation.messages, conversation.tools
        template = self._tools_template if tools else self._template
        knows_developer = self._tools_know_developer if tools else self._knows_developer
        if not knows_developer and any(message["role"] == "developer" for message in messages):
            messages = _with_one_system(messages)
        if conversation.continue_final_message:
            messages[-1]["content"] += _END_MARK
        variables: JsonObject = {**self._special_tokens, **conversation.variables}
        variables.update(
            messages=messages,
            tools=tools,
            documents=conversation.documents,
            add_generation_prompt=conversation.add_generation_prompt,
        )
        try:
            prompt = self._written(template, variables)
        except _TEMPLATE_ERRORS as error:
            if not _has_later_system(conversation):
                raise _refusal(error) from None
            # Agents remind a model in the middle of a conversation; some templates want all of the
            # system's at the front.
            variables["messages"] = _with_one_system(messages)
            try:
                prompt = self._written(template, variables)
            except _TEMPLATE_ERRORS:
                raise _refusal(error) from None
        return _up_to_mark(prompt) if conversation.continue_final_message else prompt

    def _written(self, template: jinja2.Template, variables: JsonObject) -> str:
        """As Template.render does it, but for looking through the environment's globals each time."""
        context = template.new_context({**self._globals, **variables}, shared=True)
        return "".join(template.root_render_func(context))


def _refusal(error: Exception) -> RequestRejected:
    reason = str(error) or type(error).__name__
    message = f"The model's chat template refused the messages: {reason}"
    return RequestRejected(message, code="rejected_by_template", field="messages")


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


def _knows_developer(source: str) -> bool:
    """Whether a template mentions this role; by the same sign as in vLLM."""
    return '"developer"' in source or "'developer'" in source


def _has_later_system(conversation: TemplateInput) -> bool:
    """Whether a system message could go to the front. One that is to be continued could not."""
    end = -1 if conversation.continue_final_message else None
    return any(message["role"] == "system" for message in conversation.messages[1:end])


def _with_one_system(messages: Sequence[JsonObject]) -> list[JsonObject]:
    """The same for a template that has only `system`, perhaps only as the first message, and may drop any
    other role: what developers say is the system's, and all of the system's is one message at the front."""
    system = [message for message in messages if message["role"] in ("system", "developer")]
    others = [message for message in messages if message["role"] not in ("system", "developer")]
    if len(system) == 1 and messages[0] is system[0]:
        return [{**system[0], "role": "system"}, *others]
    text = "\n\n".join(message["content"] for message in system if message["content"])
    return [{"role": "system", "content": text}, *others]


def _up_to_mark(prompt: str) -> str:
    """The prompt up to the end of its last message's content, without what the template puts after it.

    The end was marked before the template ran: a search for the content itself would find the same letters
    in the template's own text. A template that strips the content strips the mark's last character, too;
    then the content's trailing space goes as well (as transformers does it)."""
    end = prompt.rfind(_END_MARK.strip())
    if end < 0:
        raise RequestRejected(
            "The chat template leaves out the final message; it cannot be continued.",
            code="rejected_by_template",
            field="messages",
        )
    kept = prompt[:end]
    return kept if prompt.startswith(_END_MARK, end) else kept.rstrip()


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
