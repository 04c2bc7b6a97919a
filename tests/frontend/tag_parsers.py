"""Parsers of a made-up model, which writes what parser_contract.py says.

It reasons unless its template was told otherwise. They stand in for vLLM's; both are held to that contract.
"""

import json
import re
from itertools import count

from penstock.errors import ConfigError, Rejection, RequestRejected
from penstock.shapes import Parsed, StructuredOutput, ToolCallDelta

_END = "</think>"
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_ids = count()


class TagParsers:
    def has(self, answering):
        return True

    def load(self, model):
        if "unknown" in (model.card.answering.tool_parser, model.card.answering.reasoning_parser):
            raise ConfigError("there is no parser unknown")
        end_id = next(
            token["id"]
            for token in json.loads(model.assets["tokenizer.json"])["added_tokens"]
            if token["content"] == _END
        )
        return TagParser(end_id)


class TagParser:
    def __init__(self, end_id):
        self._end_id = end_id

    def begin(self, body):
        return TagCall(body, self._end_id)


class TagCall:
    skip_special_tokens = True

    def __init__(self, body, end_id):
        self._body = body
        self._end_id = end_id

    def structured(self, prompt_ids):
        if self._body.get("tool_choice") == "required":
            return StructuredOutput("json", '{"type":"array"}', reasoning_ended=False)
        given = self._body.get("structured_outputs")
        return StructuredOutput("regex", given["regex"]) if given else None

    def answer(self, prompt_ids):
        return TagAnswer(self._body, self._end_id)


class TagAnswer:
    """Takes the text so far apart anew with each step, and gives what has grown."""

    def __init__(self, body, end_id):
        self._body = body
        self._end_id = end_id
        self._reasons = (body.get("chat_template_kwargs") or {}).get("enable_thinking", True)
        self._text = ""
        self._told = ("", "", 0)

    def push(self, text, token_ids, *, finished):
        self._text += text
        reasoning, content, calls = self._parts(self._text, finished)
        before = self._told
        self._told = (reasoning, content, len(calls))
        more = Parsed(
            content[len(before[1]) :] or None,
            reasoning[len(before[0]) :] or None,
            [self._call(index, calls[index]) for index in range(before[2], len(calls))],
        )
        if not self._body.get("include_reasoning", True):
            more.reasoning = None
        return more if more.content or more.reasoning or more.tool_calls else None

    def whole(self, text, token_ids):
        reasoning, content, calls = self._parts(text, True)
        if not self._body.get("include_reasoning", True):
            reasoning = ""
        return Parsed(
            content or None,
            reasoning or None,
            [self._call(index, call) for index, call in enumerate(calls)],
        )

    def reasoning_tokens(self, token_ids):
        if not self._reasons:
            return 0
        token_ids = list(token_ids)
        return token_ids.index(self._end_id) if self._end_id in token_ids else len(token_ids)

    def _parts(self, text, finished):
        if "unreadable" in text:
            raise RequestRejected("it says unreadable", kind=Rejection.INTERNAL, code="unparsable_answer")
        reasoning = ""
        if self._reasons:
            reasoning, end, text = text.partition(_END)
            if not end:
                return reasoning, "", []
        if not self._body.get("tools") or self._body.get("tool_choice") == "none":
            return reasoning, text, []
        calls = _CALL.findall(text)
        if self._body.get("parallel_tool_calls") is False:
            calls = calls[:1]
        return reasoning, text.partition("<tool_call>")[0], calls

    def _call(self, index, call):
        fields = json.loads(call)
        return ToolCallDelta(index, f"call-{next(_ids)}", fields["name"], json.dumps(fields["arguments"]))
