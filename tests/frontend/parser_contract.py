"""What every ChatParsers does with a model that writes

    reasoning</think>content<tool_call>{"name": ..., "arguments": ...}</tool_call>

Subclasses have a fixture `parsers`; of vLLM's, `qwen3` and `hermes` read such a model.
"""

import json

import pytest

from penstock.errors import ConfigError
from penstock.frontend.text.detokenize import TableDetokenizer, TokenTable
from tests.cards import changed

TOOLS = [{"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}]
PLAIN = {"chat_template_kwargs": {"enable_thinking": False}}
PROMPT_IDS = [300, 301]


def call(**arguments):
    return "<tool_call>\n" + json.dumps({"name": "get", "arguments": arguments}) + "\n</tool_call>"


class ParserContract:
    @pytest.fixture
    def model(self, byte_level, view_of):
        return view_of(
            byte_level,
            structured_output=True,
            tool_parser="hermes",
            reasoning_parser="qwen3",
            config={"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"},
        )

    @pytest.fixture
    def read(self, parsers, model, byte_level):
        """Content, reasoning, calls and tokens of reasoning, equal whether streamed or not."""
        parser = parsers.load(model)
        table = TokenTable.of(byte_level, json.loads(byte_level.to_str()))

        def read(text, **fields):
            body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields}
            begun = parser.begin(body)
            token_ids = byte_level.encode(text, add_special_tokens=False).ids
            whole = begun.answer(PROMPT_IDS).whole(text, token_ids)
            ids = [part.id for part in whole.tool_calls]
            assert all(ids)
            assert len(set(ids)) == len(ids)
            answer, detokenizer = begun.answer(PROMPT_IDS), TableDetokenizer(table)
            parts = [
                answer.push(detokenizer.push([token_id]), [token_id], finished=place == len(token_ids) - 1)
                for place, token_id in enumerate(token_ids)
            ]
            calls = [(part.name, json.loads(part.arguments)) for part in whole.tool_calls]
            assert streamed(parts) == (whole.content or "", whole.reasoning or "", calls)
            counts = answer.reasoning_tokens(token_ids)
            return whole.content or "", whole.reasoning or "", calls, counts

        return read

    def test_content(self, read):
        assert read("It is 12.", **PLAIN) == ("It is 12.", "", [], 0)

    def test_reasoning_ends_by_its_mark(self, read, byte_level):
        tokens = len(byte_level.encode("hm, 12", add_special_tokens=False).ids)
        assert read("hm, 12</think>It is 12.") == ("It is 12.", "hm, 12", [], tokens)

    def test_reasoning_that_was_cut(self, read):
        content, reasoning, calls, _ = read("hm, 1")
        assert (content, reasoning, calls) == ("", "hm, 1", [])

    def test_reasoning_nobody_wants_to_see(self, read):
        assert read("hm</think>It is 12.", include_reasoning=False)[:2] == ("It is 12.", "")

    def test_calls(self, read):
        assert read(call(x=1, y="é"), tools=TOOLS, **PLAIN)[2] == [("get", {"x": 1, "y": "é"})]
        assert read(call(x=1) + "\n" + call(x=2), tools=TOOLS, **PLAIN)[2] == [
            ("get", {"x": 1}),
            ("get", {"x": 2}),
        ]

    def test_one_call_where_only_one_is_wanted(self, read):
        found = read(call(x=1) + "\n" + call(x=2), tools=TOOLS, parallel_tool_calls=False, **PLAIN)
        assert found[2] == [("get", {"x": 1})]

    def test_a_call_after_reasoning(self, read):
        found = read("hm</think>" + call(x=1), tools=TOOLS)
        assert (found[1], found[2]) == ("hm", [("get", {"x": 1})])

    def test_what_looks_like_a_call_is_none_where_none_may_be_made(self, read):
        text = call(x=1)
        assert read(text, **PLAIN)[2] == []
        assert read(text, tools=TOOLS, tool_choice="none", **PLAIN)[2] == []

    def test_what_the_answers_must_look_like(self, parsers, model):
        body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
        parser = parsers.load(model)
        assert parser.begin(body).structured(PROMPT_IDS) is None
        wanted = parser.begin(body | {"structured_outputs": {"regex": "a+"}}).structured(PROMPT_IDS)
        assert (wanted.kind, wanted.spec) == ("regex", "a+")
        forced = parser.begin(body | {"tools": TOOLS, "tool_choice": "required"}).structured(PROMPT_IDS)
        assert forced.spec
        assert forced.reasoning_ended is False

    def test_a_parser_that_does_not_exist(self, parsers, model):
        with pytest.raises(ConfigError, match="unknown"):
            parsers.load(changed(model, tool_parser="unknown"))


def streamed(parts):
    content, reasoning, calls = "", "", {}
    for part in parts:
        if part is None:
            continue
        content += part.content or ""
        reasoning += part.reasoning or ""
        for delta in part.tool_calls:
            name, arguments = calls.get(delta.index, ("", ""))
            calls[delta.index] = (delta.name or name, arguments + (delta.arguments or ""))
    return content, reasoning, [(name, json.loads(text)) for name, text in calls.values()]
