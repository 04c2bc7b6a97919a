"""vLLM's own parsers keep the contract of the port."""

from __future__ import annotations

import io
import logging

import msgspec
import pytest

from penstock.engines.vllm import differences, installed
from penstock.engines.vllm.parsing import VllmParsers
from penstock.errors import ConfigError, Rejection, RequestRejected
from penstock.frontend.reply import Reply, ReplyRules, joined
from penstock.shapes import FinishReason, ModelView
from tests.frontend.conftest import byte_level_tokenizer
from tests.frontend.conftest import view_of as make_view
from tests.frontend.parser_contract import TOOLS, ParserContract


@pytest.fixture
def byte_level():
    return byte_level_tokenizer()


@pytest.fixture
def view_of():
    return make_view


def with_answering(model: ModelView, **fields: str) -> ModelView:
    """The model, with other values in its card's `answering`."""
    replace = msgspec.structs.replace
    answering = replace(model.card.answering, **fields)
    return replace(model, card=replace(model.card, answering=answering))


class TestVllmParsers(ParserContract):
    @pytest.fixture
    def parsers(self) -> VllmParsers:
        return VllmParsers()

    @pytest.mark.parametrize(
        ("fields", "field"),
        [
            ({"messages": [{"content": "Hi"}]}, "messages"),
            ({"tools": TOOLS, "tool_choice": "some"}, "tool_choice"),
            ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, None),
        ],
    )
    def test_what_vllm_does_not_take_is_the_clients_fault(self, parsers, model, fields, field) -> None:
        body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields}
        with pytest.raises(RequestRejected) as raised:
            parsers.load(model).begin(body)
        assert raised.value.kind is Rejection.INVALID
        assert field is None or (raised.value.field or "").startswith(field)

    def test_one_parser_will_do(self, parsers, model) -> None:
        body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
        only_tools = with_answering(model, reasoning_parser="")
        assert parsers.load(only_tools).begin(body).answer([1]).whole("Hi", [300]).content == "Hi"
        only_reasoning = with_answering(model, tool_parser="")
        assert parsers.load(only_reasoning).begin(body).answer([1]).whole("Hi", [300]).reasoning == "Hi"

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("cut", ['{"name": "get", "argu', '{"name": "get"}', "[1]", "nonsense"])
    def test_a_call_that_was_cut_is_text_and_at_most_one_plain_line(
        self, parsers, model, caplog, stream, cut
    ) -> None:
        """By `max_tokens`, or by the model itself. vLLM's parser logs an error with a traceback of it."""
        caplog.set_level("INFO", "penstock.frontend")
        body = {
            "model": "m",
            "messages": [{"role": "user", "content": "Hi"}],
            "tools": TOOLS,
            "stream": stream,
            "chat_template_kwargs": {"enable_thinking": False},
        }
        answer = parsers.load(model).begin(body).answer([1])
        handler = logging.StreamHandler(written := io.StringIO())
        logging.getLogger("vllm").addHandler(handler)
        text = "Well. <tool_call>\n" + cut
        if stream:
            for at, piece in enumerate(text):
                answer.push(piece, [300], finished=at == len(text) - 1)
        else:
            assert answer.whole(text, [300]).content == text
        logging.getLogger("vllm").removeHandler(handler)
        assert written.getvalue() == ""
        lines = [record for record in caplog.records if record.name == "penstock.frontend"]
        assert len(lines) <= 1
        assert all((line.levelname, line.exc_info) == ("INFO", None) for line in lines)

    @pytest.mark.parametrize("length", range(4, 57, 4))
    def test_a_forced_call_that_the_model_breaks_off_is_the_same_whole_and_streamed(
        self, parsers, model, length
    ) -> None:
        text = '[{"name": "get", "parameters": {"city": "Paris"}}]\n'[:length]
        found = []
        for stream in (False, True):
            body = {
                "model": "m",
                "messages": [{"role": "user", "content": "Hi"}],
                "tools": TOOLS,
                "tool_choice": "required",
                "stream": stream,
                "chat_template_kwargs": {"enable_thinking": False},
            }
            rules = ReplyRules(
                parsers.load(model).begin(body), stream=stream, required=True, auto=False, show_tokens=True
            )
            reply = Reply(rules, [1])
            for at, piece in enumerate(text):
                reply.add(piece, [300], finished=at == len(text) - 1)
            parsed = joined(reply.take()) if stream else reply.whole(cut=False)
            calls = [(call.name, call.arguments) for call in parsed.tool_calls]
            found.append((parsed.content or "", calls, reply.finish_name(FinishReason.STOP)))
        assert found[0] == found[1]

    def test_those_of_an_unknown_version_are_tried_out(self, parsers, model, monkeypatch, caplog) -> None:
        monkeypatch.setattr(installed, "NEWEST_TESTED", (0, 1))
        parsers.load(model)
        assert "its parsers have passed a self-test" in caplog.text

    def test_those_of_an_unknown_version_are_refused_when_they_have_another_interface(
        self, parsers, model, monkeypatch
    ) -> None:
        def other(*args: object) -> None:
            raise TypeError("set_prompt_token_ids() takes 1 positional argument")

        monkeypatch.setattr(installed, "NEWEST_TESTED", (0, 1))
        monkeypatch.setattr(differences, "tell_prompt", other)
        with pytest.raises(ConfigError, match=r"its parsers cannot be used: .*1 positional argument"):
            parsers.load(model)
