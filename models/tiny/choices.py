"""Dialogues in which one of several tools fits each question, and the model has to choose.

Choosing is learnt from many choices. So each of these dialogues asks for every tool that it offers, and
most tools are defined in few words: a step then holds many questions for its tokens.
"""

from __future__ import annotations

import random

import phrases
from names import draw_name
from tools import (
    Parameter,
    Schema,
    Tool,
    alike,
    calls_turn,
    draw_noun,
    draw_tool,
    question_and_calls,
    results_turns,
    system_turn,
    tool_name,
)
from turns import Dialogue, Turn
from usual import USUAL_TOOLS

BARE_QUESTIONS = ("What is the {0}?", "The {0}?", "Get the {0}.", "Tell me the {0}.")
BARE_DESCRIPTIONS = ("{}", "Get the {}.", "Returns the {}.", "The {}", "Get {}")


def bare_tool(rng: random.Random) -> Tool:
    """Takes no arguments. Its name often has nothing to do with what it does: then only the description
    says whether it fits."""
    noun = draw_noun(rng)
    name = tool_name(rng, noun) if rng.random() < 0.4 else draw_name(rng).split()[0][:5].lower()
    questions = tuple(each.format(noun) for each in BARE_QUESTIONS)
    return _tool(name, rng.choice(BARE_DESCRIPTIONS).format(noun), (), questions, noun)


def plain_tool(rng: random.Random) -> Tool:
    """Says something about a thing, and is defined in few words."""
    noun = draw_noun(rng)
    name = tool_name(rng, noun)
    parameter = rng.choice(phrases.STRING_PARAMETERS)
    described = rng.choice([text for text in phrases.TOOL_DESCRIPTIONS if text])
    text = described.format(noun=noun, thing=parameter.replace("_", " "))
    patterns = [*phrases.ONE_PLACE, *("Use the <tool> tool for {}.", "Call <tool> with {}.") * 3]
    questions = [each.replace("<noun>", noun).replace("<tool>", name) for each in patterns]
    return _tool(name, text, (Parameter(parameter, "string"),), tuple(questions), noun)


def usual_tool(rng: random.Random) -> Tool:
    """A tool as agents have it, asked for in their users' words."""
    names, descriptions, parameters, questions = rng.choice(USUAL_TOOLS)
    shape = tuple(Parameter(rng.choice(choice), "string") for choice in parameters)
    first, *others = names[0].split("_")
    return _tool(rng.choice(names), rng.choice(descriptions), shape, questions, " ".join(others or [first]))


def _tool(
    name: str, description: str, parameters: tuple[Parameter, ...], questions: tuple[str, ...], topic: str
) -> Tool:
    schema: Schema = {
        "type": "object",
        "properties": {parameter.name: {"type": parameter.kind} for parameter in parameters},
    }
    if parameters:
        schema["required"] = [parameter.name for parameter in parameters]
    function = {"name": name, "description": description, "parameters": schema}
    definition = {"type": "function", "function": function}
    return Tool(name, definition, parameters, questions, frozenset([topic]))


def _draw(rng: random.Random, kind: str) -> Tool:
    if kind == "bare":
        return bare_tool(rng)
    if rng.random() < 0.3:
        return usual_tool(rng)
    return plain_tool(rng) if kind == "plain" else draw_tool(rng)


def draw_choices(rng: random.Random, kind: str) -> list[Tool]:
    """Tools of which no two have a topic or a question in common."""
    count = rng.randint(2, 8) if kind == "bare" else rng.choice((2, 2, 2, 3, 3, 3, 4, 5))
    tools: list[Tool] = []
    while len(tools) < count:
        tool = _draw(rng, kind)
        if not any(alike(tool, other) or {*tool.questions} & {*other.questions} for other in tools):
            tools.append(tool)
    return tools


def choice_dialogue(rng: random.Random, kind: str) -> tuple[Dialogue, list[Tool]]:
    """A question for each tool, in any order, and for some a second one; and those tools. `kind` says how
    they are made: `bare`, `plain`, or `any`."""
    tools = draw_choices(rng, kind)
    asked = rng.sample(tools, len(tools))
    if kind != "bare":
        asked += rng.sample(tools, rng.randint(0, len(tools) // 2))
    dialogue = [system_turn(rng, tools)]
    for tool in asked:
        text, calls = question_and_calls(rng, tool, False)
        dialogue += [Turn.of("user", text), calls_turn(calls)]
        if kind != "bare" and rng.random() < 0.15:
            told, _ = results_turns(rng, calls)
            dialogue += told
    return dialogue, tools
