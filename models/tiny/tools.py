"""Dialogues with tools: which tool fits a question, what it is called with, what it said.

Tools are made up for each dialogue, as names are, so that they are read from the prompt. Their text is
that of the chat template (`tokenizer.py`), which follows the form that Hermes and Qwen models use.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

import phrases
from names import draw_name
from turns import Chosen, Copied, Dialogue, Forced, Part, Turn

Schema = dict[str, Any]
Value = str | int | bool

INTRODUCTION = "# Tools\nYou may call these tools:\n<tools>"
INSTRUCTION = '</tools>\nTo call one, write\n<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>'
UNKNOWN = "unknown"
"""The value of a field for which the text has none."""


@dataclass(frozen=True)
class Parameter:
    """One property of a tool's arguments. `choices` are the values of an `enum`."""

    name: str
    kind: str  # "string", "integer", "number" or "boolean"
    required: bool = True
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tool:
    """A tool, its text in the prompt, and how a user asks for what it does."""

    name: str
    definition: Schema
    parameters: tuple[Parameter, ...]
    questions: tuple[str, ...]  # `{}` stands for each value
    topics: frozenset[str] = frozenset()  # two tools of one topic would answer the same question
    expression: bool = False


@dataclass
class Call:
    """A call of a tool. The values of its arguments stand in the question."""

    tool: Tool
    arguments: dict[str, Value] = field(default_factory=dict)


def tools_text(definitions: list[Schema]) -> str:
    """The block of the system turn that names the tools; equal to what the chat template writes."""
    lines = "\n".join(dumps(description_first(definition)) for definition in definitions)
    return f"{INTRODUCTION}\n{lines}\n{INSTRUCTION}"


def description_first(definition: Schema) -> Schema:
    """The same tool, its description before its name: whoever reads the name has then read what it is for,
    and needs one step of attention less to choose it."""
    function = definition["function"]
    front = {key: function[key] for key in ("description",) if key in function}
    return {**definition, "function": {**front, **function}}


def dumps(value: object) -> str:
    """JSON as chat templates write it."""
    return json.dumps(value, ensure_ascii=False)


# --- making tools ---


def draw_noun(rng: random.Random) -> str:
    if rng.random() < 0.75:
        return rng.choice(phrases.TOPICS)
    return draw_name(rng).split()[0].split("-")[0].lower().replace("'", "")


def tool_name(rng: random.Random, noun: str) -> str:
    words = noun.split()
    kind = rng.random()
    if kind < 0.10:
        return "_".join(words)
    verb = "get" if kind < 0.45 else rng.choice(phrases.TOOL_VERBS)
    if kind < 0.65 or kind >= 0.80:
        words = [verb, *words] if rng.random() < 0.85 else [verb, "current", *words]
    else:
        words = [*words, rng.choice(("tool", "lookup", "search", "info"))]
    if rng.random() < 0.10:
        return words[0] + "".join(word.capitalize() for word in words[1:])
    return ("-" if rng.random() < 0.05 else "_").join(words)


def _string_parameter(rng: random.Random, taken: set[str]) -> str:
    while True:
        name = rng.choice(phrases.STRING_PARAMETERS)
        if rng.random() < 0.10:
            name = draw_name(rng).split()[0].lower()
        if name not in taken:
            return name


def _property(rng: random.Random, parameter: Parameter, titles: bool) -> Schema:
    schema: Schema = {"type": parameter.kind}
    if not parameter.required and rng.random() < 0.5:
        schema = {"anyOf": [{"type": parameter.kind}, {"type": "null"}], "default": None}
    if rng.random() < 0.35:
        thing = parameter.name.replace("_", " ")
        schema["description"] = rng.choice(phrases.PARAMETER_DESCRIPTIONS).format(thing)
    if parameter.choices:
        schema["enum"] = list(parameter.choices)
    if titles:
        schema["title"] = parameter.name.replace("_", " ").title()
    if rng.random() < 0.3:
        items = list(schema.items())
        rng.shuffle(items)
        schema = dict(items)
    return schema


def _definition(
    rng: random.Random, name: str, description: str, parameters: tuple[Parameter, ...]
) -> Schema:
    titles = rng.random() < 0.25
    schema: Schema = {
        "type": "object",
        "properties": {p.name: _property(rng, p, titles) for p in parameters},
        "required": [p.name for p in parameters if p.required],
    }
    if not schema["required"] and rng.random() < 0.5:
        del schema["required"]
    if rng.random() < 0.35:
        schema["additionalProperties"] = False
    if rng.random() < 0.10:
        schema["$schema"] = rng.choice(phrases.SCHEMA_DIALECTS)
    if rng.random() < 0.2:
        items = list(schema.items())
        rng.shuffle(items)
        schema = dict(items)
    function: Schema = {"name": name, "description": description, "parameters": schema}
    if not description:
        del function["description"]
    if rng.random() < 0.2:
        function["strict"] = rng.random() < 0.5
    return {"type": "function", "function": function}


def lookup_tool(rng: random.Random) -> Tool:
    """Says something about a thing that the question names: the weather in a city."""
    noun = draw_noun(rng)
    name = tool_name(rng, noun)
    taken: set[str] = set()
    names = []
    for _ in range(rng.choice((1, 1, 1, 1, 1, 2))):
        names.append(_string_parameter(rng, taken))
        taken.add(names[-1])
    parameters = [Parameter(each, "string") for each in names]
    patterns = phrases.TWO_PLACES if len(names) == 2 else phrases.ONE_PLACE
    questions = list(patterns)
    if len(names) == 1 and rng.random() < 0.2:
        counted = rng.choice(("days", "count", "limit", "hours", "amount", "number", "n"))
        parameters.append(Parameter(counted, rng.choice(("integer", "number"))))
        questions = [f"{pattern.rstrip('.?')} for {{}} days?" for pattern in patterns]
    if rng.random() < 0.25:
        choices = rng.choice(phrases.CHOICES)
        parameters.append(
            Parameter(rng.choice(phrases.CHOICE_PARAMETERS), "string", rng.random() < 0.4, choices)
        )
    elif rng.random() < 0.12:
        kind = rng.choice(("string", "integer", "boolean"))
        left_out = rng.choice(("page", "locale", "verbose", "sort"))
        parameters.append(Parameter(left_out, kind, required=False))
    described = rng.choice(phrases.TOOL_DESCRIPTIONS).format(noun=noun, thing=names[0].replace("_", " "))
    texts = [text.replace("<noun>", noun).replace("<tool>", name) for text in questions]
    if noun in phrases.OTHER_WORDS and len(parameters) == 1 and rng.random() < 0.4:
        texts = list(phrases.OTHER_WORDS[noun])
    shape = tuple(parameters)
    return Tool(name, _definition(rng, name, described, shape), shape, tuple(texts), frozenset([noun]))


def arithmetic_tool(rng: random.Random) -> Tool:
    """Takes the numbers of the question, or the expression."""
    if rng.random() < 0.2:
        name = rng.choice(("calculate", "calculator", "evaluate", "eval_expression"))
        parameter = (Parameter(rng.choice(("expression", "formula", "input")), "string"),)
        described = rng.choice(("Evaluate an expression.", "Calculates a mathematical expression.", ""))
        definition = _definition(rng, name, described, parameter)
        questions = ("What is {}?", "Calculate {}.", "{}?", "How much is {}?", "Compute {}.")
        topics = frozenset(names[0] for names, _, _ in phrases.ARITHMETIC)
        return Tool(name, definition, parameter, questions, topics, expression=True)
    names, described, questions = rng.choice(phrases.ARITHMETIC)
    name = rng.choice(names)
    kind = rng.choice(("integer", "number"))
    pair = rng.choice((("a", "b"), ("x", "y"), ("first", "second"), ("left", "right")))
    parameters = tuple(Parameter(each, kind) for each in pair)
    definition = _definition(rng, name, described if rng.random() < 0.85 else "", parameters)
    general = (f"Call {name} with {{}} and {{}}.", f"Use {name} on {{}} and {{}}.")
    return Tool(name, definition, parameters, (*questions, *questions, *general), frozenset(names[:1]))


def bare_tool(rng: random.Random) -> Tool:
    """Takes no arguments."""
    noun = draw_noun(rng)
    name = tool_name(rng, noun)
    described = rng.choice((f"Get the {noun}.", f"Returns the current {noun}", ""))
    definition = _definition(rng, name, described, ())
    questions = ("What is the {0}?", "Tell me the {0}.", "What is the current {0}?", "Call {1}.")
    return Tool(
        name, definition, (), tuple(text.format(noun, name) for text in questions), frozenset([noun])
    )


def draw_tool(rng: random.Random) -> Tool:
    """A tool of any kind."""
    kind = rng.random()
    if kind < 0.74:
        return lookup_tool(rng)
    return arithmetic_tool(rng) if kind < 0.95 else bare_tool(rng)


def draw_tools(rng: random.Random, count: int) -> list[Tool]:
    """Tools of which no two answer the same question."""
    tools: list[Tool] = []
    while len(tools) < count:
        tool = draw_tool(rng)
        if all(not alike(tool, other) for other in tools):
            tools.append(tool)
    return tools


def draw_count(rng: random.Random) -> int:
    """How many tools a client offers: mostly one or two."""
    return rng.choice((1, 1, 1, 1, 1, 2, 2, 2, 3, 3))


def alike(one: Tool, other: Tool) -> bool:
    return one.name == other.name or bool(one.topics & other.topics)


# --- making values ---


def draw_text(rng: random.Random, held_out: bool = False) -> str:
    """A value as a user writes it: a name above all, a word, a few words, a code, an address or a path."""
    kind = rng.random()
    if kind < 0.72 or held_out:
        return draw_name(rng, held_out=held_out)
    if kind < 0.80:
        return rng.choice(phrases.THINGS).removeprefix("the ").removeprefix("a ")
    if kind < 0.92:
        return rng.choice(("", "A", "ORD-", "#", "X-")) + "".join(
            rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ0123456789" if rng.random() < 0.5 else "0123456789")
            for _ in range(rng.randint(3, 7))
        )
    word = draw_name(rng).split()[0].lower().replace("'", "")
    return rng.choice((f"{word}@example.com", f"/tmp/{word}.txt", f"{word}.py", f"{word}.md", f"{word}_1"))


def draw_number(rng: random.Random, kind: str) -> Value:
    """A number of one to four digits; seldom with a fraction."""
    if kind == "number" and rng.random() < 0.15:
        return round(rng.uniform(0.1, 99.9), 1)  # type: ignore[return-value]
    return rng.randint(0, 10 ** rng.randint(1, 4) - 1)


def draw_call(rng: random.Random, tool: Tool, held_out: bool = False) -> tuple[str, Call]:
    """A question for this tool, and the call that answers it."""
    call = Call(tool)
    asked: list[str] = []
    for parameter in tool.parameters:
        if parameter.choices:
            mentioned = rng.random() < 0.5
            choice = rng.choice(parameter.choices) if mentioned else parameter.choices[0]
            if mentioned or parameter.required:
                call.arguments[parameter.name] = choice
            if mentioned:
                asked.append(f" in {choice}" if rng.random() < 0.6 else f", in {choice} please")
        elif not parameter.required:
            continue
        elif parameter.kind == "boolean":
            call.arguments[parameter.name] = True
        elif tool.expression:
            sign = rng.choice(("+", "-", "*", "/"))
            parts = [str(draw_number(rng, "integer")) for _ in range(rng.choice((2, 2, 3)))]
            call.arguments[parameter.name] = f" {sign} ".join(parts)
        elif parameter.kind == "string":
            call.arguments[parameter.name] = draw_text(rng, held_out)
        else:
            call.arguments[parameter.name] = draw_number(rng, parameter.kind)
    values = [call.arguments[p.name] for p in tool.parameters if p.required and not p.choices]
    pattern = rng.choice(tool.questions)
    text = pattern.format(*(str(value) for value in values))
    for more in asked:
        text = text.rstrip("?.") + more + ("?" if text.endswith("?") else ".")
    return text, call


def _said(rng: random.Random) -> str:
    """A few words of a result. Most are made up, as names are, so that they are read and not guessed."""
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(phrases.RESULT_WORDS)
    if kind < 0.50:
        return draw_name(rng)
    if kind < 0.70:
        return " ".join(draw_name(rng).lower() for _ in range(rng.choice((1, 1, 2, 3))))
    if kind < 0.80:
        return f"{rng.randint(0, 23)}:{rng.randint(0, 59):02}"
    if kind < 0.88:
        return f"20{rng.randint(10, 99)}-0{rng.randint(1, 9)}-{rng.randint(10, 31)}"
    return rng.choice((*phrases.THINGS, *phrases.SUBJECTS, *phrases.WHENS))


def draw_result(rng: random.Random, call: Call) -> str:
    """What a tool says: a number, words, a sentence, JSON, an error."""
    kind = rng.random()
    words = _said(rng)
    number = draw_number(rng, "number")
    if kind < 0.22:
        return str(number)
    if kind < 0.42:
        return words
    if kind < 0.52:
        return f"{words}, {number} {rng.choice(('degrees', 'C', 'km', 'euros', 'points', 'items', '%'))}"
    if kind < 0.64:
        subject = next((str(v) for v in call.arguments.values() if isinstance(v, str)), "it")
        pattern = rng.choice(phrases.RESULT_SENTENCES)
        return pattern.format(words, subject)
    if kind < 0.68:
        return f"Error: {rng.choice(('not found', 'no such entry', 'timed out', words))}"
    result: dict[str, Any] = {}
    for _ in range(rng.choice((1, 1, 2, 2, 3))):
        key = rng.choice(phrases.RESULT_KEYS) if rng.random() < 0.8 else draw_name(rng).split()[0].lower()
        result[key] = rng.choice((number, words, _said(rng), draw_number(rng, "integer")))
    return dumps(result)


# --- dialogues ---


def call_parts(call: Call, arguments_key: str = "arguments") -> list[Part]:
    """`{"name": ..., "arguments": {...}}`, the values and the tool's name marked as copied."""
    head: list[Part] = ['{"name": "', Chosen(call.tool.name), f'", "{arguments_key}": ']
    return [*head, *object_parts(call.arguments), "}"]


def object_parts(arguments: dict[str, Value]) -> list[Part]:
    """A flat JSON object, its keys and values marked as copied."""
    parts: list[Part] = ["{"]
    for number, (key, value) in enumerate(arguments.items()):
        parts += [", " if number else "", '"', Chosen(dumps(key)[1:-1]), '": ']
        if isinstance(value, str):
            parts += ['"', Copied(dumps(value)[1:-1]), '"']
        else:
            parts.append(Copied(dumps(value)))
    return [*parts, "}"]


def calls_turn(calls: list[Call]) -> Turn:
    """The assistant's calls as it writes them when it may choose."""
    parts: list[Part] = []
    for number, call in enumerate(calls):
        parts += ["\n" if number else "", "<tool_call>\n", *call_parts(call), "\n</tool_call>"]
    return Turn("assistant", tuple(parts))


def forced_turn(rng: random.Random, calls: list[Call]) -> Turn:
    """The forms that a client's `tool_choice` forces: a list of calls, or one tool's arguments."""
    if len(calls) == 1 and rng.random() < 0.5:
        first, *rest = object_parts(calls[0].arguments)
        return Turn("assistant", (Forced(str(first)), *rest))
    parts: list[Part] = [Forced('[{"name": "')]
    for number, call in enumerate(calls):
        parts += [", " if number else "", *call_parts(call, "parameters")[0 if number else 1 :]]
    return Turn("assistant", (*parts, "]"))


def results_turns(rng: random.Random, calls: list[Call]) -> tuple[Dialogue, list[str]]:
    """The tools' results, as the template writes them, and the answer which passes them on."""
    results = [draw_result(rng, call) for call in calls]
    text = "\n".join(f"<tool_response>\n{result}\n</tool_response>" for result in results)
    parts: list[Part] = []
    for number, (call, result) in enumerate(zip(calls, results, strict=True)):
        parts += ["\n" if number else "", "According to ", Copied(call.tool.name), ": ", Copied(result)]
    return [Turn.of("user", text), Turn("assistant", tuple(parts))], results


def question_and_calls(rng: random.Random, tool: Tool, held_out: bool) -> tuple[str, list[Call]]:
    """A question and its call; sometimes two calls, for `in A and B`."""
    text, call = draw_call(rng, tool, held_out)
    calls = [call]
    required = [p for p in tool.parameters if p.required]
    if len(tool.parameters) == 1 and len(required) == 1 and not tool.expression and rng.random() < 0.2:
        key = required[0].name
        value = call.arguments[key]
        if isinstance(value, str) and text.count(value) == 1:
            other = draw_text(rng, held_out)
            text = text.replace(value, f"{value} {rng.choice(('and', 'and in', 'and also'))} {other}")
            calls.append(Call(tool, {key: other}))
    if rng.random() < 0.1 and not held_out:
        text = rng.choice(phrases.BEFORE_INTRO) + " " + text
    if rng.random() < 0.12 and not held_out:
        text += " " + rng.choice(phrases.AFTER_TOOL_QUESTION)
    return text, calls


def tool_dialogue(rng: random.Random, *, held_out: bool = False, forced: bool | None = None) -> Dialogue:
    """Questions, the calls that answer them, the results, the answers. The system turn is the caller's,
    with `tools_text` of the first turn's tools."""
    tools = draw_tools(rng, draw_count(rng))
    if forced is None:
        forced = rng.random() < 0.12
    dialogue: Dialogue = []
    for number in range(rng.choice((1, 1, 1, 1, 2, 2))):
        text, calls = question_and_calls(rng, rng.choice(tools), held_out)
        dialogue.append(Turn.of("user", text))
        if forced and number == 0:
            dialogue.append(forced_turn(rng, calls))
            break
        told, _ = results_turns(rng, calls)
        dialogue += [calls_turn(calls), *told]
    return [system_turn(rng, tools), *dialogue]


def system_turn(rng: random.Random, tools: list[Tool]) -> Turn:
    """The system turn with the tools in it."""
    text = tools_text([tool.definition for tool in tools])
    if rng.random() < 0.6:
        usual = rng.random() < 0.5
        start = phrases.SYSTEMS[0] if usual else rng.choice(phrases.SYSTEMS + phrases.AGENT_SYSTEMS)
        text = f"{start}\n\n{text}"
    return Turn.of("system", text)


def final_tool_dialogue(rng: random.Random) -> Dialogue:
    """An agent whose answer is itself a call: a tool that takes the values of what was said or found."""
    name = rng.choice(phrases.FINAL_TOOLS)
    text_key, number_key = rng.choice(phrases.STRING_PARAMETERS), rng.choice(phrases.NUMBER_KEYS)
    parameters = [Parameter(text_key, "string"), Parameter(number_key, "integer")]
    if rng.random() < 0.5:
        parameters.reverse()
    described = rng.choice(phrases.FINAL_DESCRIPTIONS)
    shape = tuple(parameters)
    final = Tool(name, _definition(rng, name, described, shape), shape, ())
    subject, number = draw_text(rng), draw_number(rng, "integer")
    values: dict[str, Value] = {text_key: subject, number_key: number}
    answer = Call(final, {p.name: values[p.name] for p in shape})
    if rng.random() < 0.4:
        pattern = rng.choice(phrases.TELLING)
        asked = Turn.of("user", pattern.format(subject, number))
        turn = forced_turn(rng, [answer]) if rng.random() < 0.4 else calls_turn([answer])
        return [system_turn(rng, [final]), asked, turn]
    tool = lookup_tool(rng)
    while len(tool.parameters) != 1:
        tool = lookup_tool(rng)
    text = rng.choice(tool.questions).format(subject)
    call = Call(tool, {tool.parameters[0].name: subject})
    result = rng.choice((str(number), f"{number} degrees", dumps({number_key: number}), f"It is {number}."))
    tools = [tool, final] if rng.random() < 0.7 else [final, tool]
    response = Turn.of("user", f"<tool_response>\n{result}\n</tool_response>")
    last = forced_turn(rng, [answer]) if rng.random() < 0.3 else calls_turn([answer])
    return [system_turn(rng, tools), Turn.of("user", text), calls_turn([call]), response, last]
