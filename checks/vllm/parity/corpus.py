"""Requests that are sent to `vllm serve` and to Penstock: by name, the path and the body."""

from __future__ import annotations

from typing import Any

MODEL = "tools"
CONTEXT = 4096  # tokens, of that model

ALICE = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "My name is Alice."},
    {"role": "assistant", "content": "Hello Alice! Nice to meet you."},
    {"role": "user", "content": "What is my name?"},
]
EXPLAIN = [{"role": "user", "content": "Explain disaggregated serving benefits"}]
UNICODE = [
    {"role": "user", "content": "My name is Zoë-Łukasz 你好 😀."},
    {"role": "assistant", "content": "Hello Zoë-Łukasz 你好 😀! Nice to meet you."},
    {"role": "user", "content": "What is my name?"},
]
PLAIN = {"enable_thinking": False}  # no reasoning, by the template

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'The weather in a city <now> & "here"',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 8},
                "unit": {"enum": ["celsius", "fahrenheit", None]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "get_time", "strict": True, "parameters": {"type": "object"}},
}
BARE = {"type": "function", "function": {"name": "ping"}}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TURNS_WITH_TOOLS = [
    *ALICE[:2],
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call-1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Zürich", "unit": null}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call-1", "content": "12 °C"},
    {"role": "assistant", "content": "Cold.", "reasoning": "12 is not much"},
    ALICE[3],
]


def _chat(messages: list[dict[str, Any]] = ALICE, **fields: Any) -> tuple[str, dict[str, Any]]:
    defaults = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 40}
    return "/v1/chat/completions", defaults | fields


def _plain(messages: list[dict[str, Any]] = ALICE, **fields: Any) -> tuple[str, dict[str, Any]]:
    return _chat(messages, chat_template_kwargs=PLAIN, **fields)


def _text(prompt: Any = "My name is", **fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {
        "model": MODEL,
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": 16,
    } | fields


def _named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def _json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}


def _calling(arguments: str) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": arguments}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": function}],
    }


def _parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


CORPUS: dict[str, tuple[str, dict[str, Any]]] = {
    # Plain answers, and how they end.
    "plain": _plain(),
    "long": _plain(EXPLAIN, max_tokens=120),
    "length": _plain(EXPLAIN, max_tokens=5),
    "one token": _plain(max_completion_tokens=1),
    "default max_tokens": _plain(max_tokens=None),
    "text parts": _plain(
        [{"role": "user", "content": [{"type": "text", "text": t} for t in ("My", "name?")]}]
    ),
    "named author": _plain([{"role": "user", "name": "Bob", "content": "What is my name?"}]),
    "continued": _plain(
        [*ALICE, {"role": "assistant", "content": "Your na"}],
        add_generation_prompt=False,
        continue_final_message=True,
    ),
    "unicode": _plain(UNICODE),
    "unicode cut": _plain(UNICODE, max_tokens=11),
    "seeded": _plain(EXPLAIN, temperature=0.9, seed=7, max_tokens=30),
    "seeded top_p top_k": _plain(EXPLAIN, temperature=1.2, seed=3, top_p=0.9, top_k=20, min_p=0.01),
    "penalties": _plain(EXPLAIN, presence_penalty=1.0, frequency_penalty=0.7, repetition_penalty=1.2),
    "logit_bias": _plain(logit_bias={"300": 100.0}, max_tokens=3),
    "n": _plain(EXPLAIN, n=3, temperature=1.0, seed=11, max_tokens=12),
    "min_tokens": _plain(min_tokens=25),
    "ignore_eos": _plain(ignore_eos=True, max_tokens=20),
    "stop": _plain(EXPLAIN, stop=["decode", "zzz"], max_tokens=60),
    "stop kept": _plain(EXPLAIN, stop=["decode"], include_stop_str_in_output=True, max_tokens=60),
    "stop across tokens": _plain(stop="ame i"),
    "stop_token_ids": _plain(stop_token_ids=[300, 301, 302, 303, 304, 14, 17], max_tokens=60),
    "special tokens shown": _plain(skip_special_tokens=False),
    "special tokens shown, eos ignored": _plain(skip_special_tokens=False, ignore_eos=True, max_tokens=20),
    "logprobs": _plain(logprobs=True, max_tokens=8),
    "top_logprobs": _plain(logprobs=True, top_logprobs=4, max_tokens=8),
    "logprobs unicode": _plain(UNICODE, logprobs=True, top_logprobs=2),
    "logprobs n stop": _plain(
        EXPLAIN, logprobs=True, n=2, seed=5, temperature=0.7, stop=["."], max_tokens=30
    ),
    # Reasoning.
    "reasoning": _chat(),
    "reasoning cut": _chat(EXPLAIN, max_tokens=6),
    "reasoning of another effort": _chat(reasoning_effort="low"),
    "no reasoning by effort": _chat(reasoning_effort="none"),
    "reasoning hidden": _chat(include_reasoning=False, logprobs=True),
    "reasoning with logprobs": _chat(logprobs=True, top_logprobs=1),
    "reasoning given back": _plain(
        [*ALICE[:2], {"role": "assistant", "reasoning_content": "A name.", "content": "Hi."}, ALICE[3]]
    ),
    "reasoning with stop": _chat(stop=["Ali"]),
    # Tools.
    "tools, none called": _plain(tools=[WEATHER, CLOCK, BARE]),
    "tools after reasoning, none called": _chat(tools=[WEATHER]),
    "tool_choice none": _plain(tools=[WEATHER], tool_choice="none"),
    "tools, one called": _plain(tools=[WEATHER], structured_outputs={"choice": [CALL]}, max_tokens=80),
    "tools, one called after words": _plain(
        tools=[WEATHER], structured_outputs={"choice": ["Well. " + CALL]}, max_tokens=80
    ),
    "tools, two called": _plain(
        tools=[WEATHER], structured_outputs={"choice": [CALL + "\n" + CALL]}, max_tokens=120
    ),
    "tools, two called, one wanted": _plain(
        tools=[WEATHER],
        structured_outputs={"choice": [CALL + "\n" + CALL]},
        parallel_tool_calls=False,
        max_tokens=120,
    ),
    "tools, a call cut": _plain(tools=[WEATHER], structured_outputs={"choice": [CALL]}, max_tokens=20),
    "tools, reasoning and a call": _chat(
        tools=[WEATHER], structured_outputs={"choice": [CALL]}, max_tokens=100
    ),
    "required": _plain(tools=[WEATHER, CLOCK], tool_choice="required", max_tokens=120),
    "required after reasoning": _chat(tools=[WEATHER], tool_choice="required", max_tokens=120),
    "required, cut": _plain(tools=[WEATHER], tool_choice="required", max_tokens=12),
    "required, one": _plain(
        tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_tokens=120
    ),
    "named": _plain(tools=[WEATHER, CLOCK], tool_choice=_named("get_weather"), max_tokens=80),
    "named after reasoning": _chat(tools=[WEATHER], tool_choice=_named("get_weather"), max_tokens=100),
    "turns with tools": _plain(TURNS_WITH_TOOLS, tools=[WEATHER]),
    "turns with tools, and none any more": _plain(TURNS_WITH_TOOLS),
    "two named, n": _plain(
        tools=[WEATHER],
        tool_choice=_named("get_weather"),
        n=2,
        temperature=0.8,
        seed=4,
        max_tokens=80,
    ),
    # What agents send back of what a model wrote.
    **{
        f"arguments {arguments!r} given back": _plain([*ALICE[:2], _calling(arguments), *ALICE[2:]])
        for arguments in ("{", '{"city": "Par', "null", "[]", "7", '"text"', "", '{"a": {"b": [1]}}')
    },
    "empty tool_calls": _plain([*ALICE[:2], {**ALICE[2], "tool_calls": []}, ALICE[3]]),
    "tool message of parts": _plain(
        [
            *ALICE[:2],
            _calling("{}"),
            {"role": "tool", "tool_call_id": "1", "content": _parts("a", "b")},
            ALICE[3],
        ]
    ),
    "refusal given back": _plain(
        [*ALICE[:2], {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, ALICE[3]]
    ),
    "empty text part": _plain(
        [{"role": "user", "content": [{"type": "text", "text": None}, *_parts("name?")]}]
    ),
    "function role": _plain([*ALICE[:2], {"role": "function", "name": "f", "content": "y"}, ALICE[3]]),
    # How prompts are rendered.
    "developer": _plain([{**ALICE[0], "role": "developer"}, *ALICE[1:]]),
    "developer beside system": _plain([*ALICE[:3], {"role": "developer", "content": "Be kind."}, ALICE[3]]),
    **{
        f"continued {text!r}": _plain(
            [*ALICE, {"role": "assistant", "content": text}],
            add_generation_prompt=False,
            continue_final_message=True,
        )
        for text in ("|", "<", "i", "end", "Your name is ")
    },
    "max_tokens beyond what is left": _plain(max_tokens=CONTEXT),
    # What the answer must look like.
    "json_schema": _plain(response_format=_json_schema(PERSON), max_tokens=60),
    "json_schema after reasoning": _chat(response_format=_json_schema(PERSON), max_tokens=80),
    "json_schema, reasoning hidden": _chat(
        response_format=_json_schema(PERSON), include_reasoning=False, max_tokens=80
    ),
    "json_schema sampled": _plain(
        response_format=_json_schema(PERSON), temperature=1.0, seed=2, max_tokens=60
    ),
    "json_object": _plain(response_format={"type": "json_object"}, max_tokens=30),
    "format text": _plain(response_format={"type": "text"}),
    "regex": _plain(structured_outputs={"regex": "[A-Z][a-z]{3,8}( [a-z]{2,5}){2}!"}),
    "choice": _plain(structured_outputs={"choice": ["Alice", "Bob", "Zoë 😀"]}),
    "grammar": _plain(structured_outputs={"grammar": 'root ::= "a" root | "b"'}, max_tokens=12),
    "json as text": _plain(structured_outputs={"json": '{"type": "boolean"}'}),
    "structural_tag": _plain(
        response_format={
            "type": "structural_tag",
            "structures": [{"begin": "<f>", "schema": PERSON, "end": "</f>"}],
            "triggers": ["<f>"],
        }
    ),
    "json with logprobs": _plain(response_format=_json_schema(PERSON), logprobs=True, max_tokens=60),
    "format with tools": _plain(tools=[WEATHER], response_format=_json_schema(PERSON), max_tokens=60),
    # Text completions.
    "text": _text(),
    "text of ids": _text([10, 20, 30, 300, 301]),
    "texts": _text(["My name is", "Hello"]),
    "text logprobs": _text(logprobs=3),
    "text logprobs unicode": _text("你好 😀 Zoë", logprobs=2, max_tokens=12),
    "text seeded n": _text(n=2, temperature=0.8, seed=9),
    "text stop": _text("Explain disaggregated serving benefits", stop=[" ", "e"], max_tokens=40),
    "text regex": _text(structured_outputs={"regex": "[a-z]{4}"}),
    "text json_schema": _text(response_format=_json_schema(PERSON), max_tokens=60),
    # What is said of prompts.
    "prompt_logprobs": _plain(prompt_logprobs=2, max_tokens=2),
    "prompt_logprobs, none but the prompt's": _plain(prompt_logprobs=0, max_tokens=2),
    "text prompt_logprobs": _text(
        ["My name is", "Zoë 你好"], prompt_logprobs=1, n=2, seed=4, temperature=0.5
    ),
    "too many prompt_logprobs": _text(prompt_logprobs=21),
    "prompt_logprobs of all tokens": _text(prompt_logprobs=-1),
    # Reasoning that is limited: what the model's own mark begins.
    "thinking_token_budget": _text("<think>My name is", thinking_token_budget=6, max_tokens=24),
    "thinking_token_budget of 0": _text("<think>", thinking_token_budget=0, max_tokens=8),
    "thinking_token_budget, no reasoning": _plain(thinking_token_budget=2),
    "thinking_token_budget below -1": _plain(thinking_token_budget=-2),
    # Prompts that are shortened.
    "cut": _plain(truncate_prompt_tokens=40),
    "cut at the right": _plain(truncate_prompt_tokens=40, truncation_side="right"),
    "cut to what fits": _plain([{"role": "user", "content": "word " * 9000}], truncate_prompt_tokens=-1),
    "text cut": _text("one two three four five", truncate_prompt_tokens=3),
    "text of ids cut": _text([10, 20, 30, 300, 301], truncate_prompt_tokens=2, truncation_side="left"),
    "cut to more than the context": _plain(truncate_prompt_tokens=CONTEXT + 1),
    "cut to less than nothing": _plain(truncate_prompt_tokens=-2),
    # What is wrong: the status must be the same.
    "bad role": _chat([{"role": "king", "content": "x"}]),
    "bad temperature": _chat(temperature=-1),
    "bad stop": _chat(stop=5),
    "too long": _chat([{"role": "user", "content": "word " * 9000}]),
    "max_tokens too large": _chat(max_tokens=100_000),
    "unknown model": _chat(model="nobody"),
    "unknown format": _chat(response_format={"type": "xml"}),
    "no schema": _chat(response_format={"type": "json_schema"}),
    "bad schema": _plain(response_format=_json_schema({"type": "nonsense"})),
    "bad regex": _plain(structured_outputs={"regex": "((("}),
    "bad grammar": _plain(structured_outputs={"grammar": "root ::= what"}),
    "two constraints": _plain(structured_outputs={"regex": "a", "choice": ["b"]}),
    "choice without tools": _chat(tool_choice="required"),
    "unknown tool": _chat(tools=[WEATHER], tool_choice=_named("nothing")),
    "tool without a name": _chat(tools=[{"type": "function", "function": {}}]),
    "empty prompt": _text(""),
    "foreign token": _text([5000]),
}
