"""An API is a class: one more of them needs a line in the table of paths, and nothing else."""

import json
from typing import ClassVar

import pytest

from penstock.errors import RequestRejected
from penstock.frontend import app
from penstock.frontend.endpoint import Operation
from penstock.frontend.text.logprobs import ChatLogprobs
from penstock.frontend.wanted import Wanted
from penstock.shapes import Sampling


class Words:
    """An API that takes a text, and answers with words in brackets."""

    name: ClassVar = "words"
    id_prefix: ClassVar = "w-"
    operation: ClassVar = Operation(summary="Answers with words in brackets.")

    @staticmethod
    def error_object(error):
        return {"wrong": getattr(error, "field", None), "why": str(error)}

    def __init__(self, fields):
        if "text" not in fields:
            raise RequestRejected("Missing required field: `text`.", field="text")
        self.wanted = Wanted(
            model=fields["model"],
            sampling=Sampling(max_tokens=0),
            choices=fields.get("count", 1),
            stream=fields.get("stream", False),
        )
        self._text = fields["text"]

    @classmethod
    def decode(cls, body):
        return cls(json.loads(body))

    async def choices(self, beginning):
        prompts = await beginning.encode([self._text], add_special_tokens=False)
        return beginning.choices(prompts, ChatLogprobs)

    async def body(self, beginning, choices):
        return json.dumps({"id": beginning.answer_id, "words": [c.take()[0] for c in choices]}).encode()

    def stream(self, beginning, choices):
        return WordStream()


class WordStream:
    def chunk(self, choice):
        text, _ = choice.take()
        return f"[{text}]".encode() if text else b""

    async def end(self, choices):
        return b"%d choices" % len(choices)

    def failed(self, error):
        return f"failed: {error}".encode()


@pytest.fixture
async def served_words(serve_script, monkeypatch):
    monkeypatch.setitem(app.ENDPOINTS, "/v1/words", Words)
    async with serve_script("abc") as served:
        yield served


async def test_further_api_answers_whole_and_is_counted_by_its_name(served_words):
    body = {"model": "tiny", "text": "Hi", "count": 2}
    answer = await served_words.http.post("/v1/words", json=body)
    assert answer.json()["words"] == ["abc", "abc"]
    assert answer.json()["id"].startswith("w-")
    labels = 'endpoint="words",model="tiny",outcome="ok",status="200"'
    assert labels in (await served_words.http.get("/metrics")).text


async def test_further_api_streams_its_own_chunks(served_words):
    body = {"model": "tiny", "text": "Hi", "stream": True}
    answer = await served_words.http.post("/v1/words", json=body)
    shown, _, end = answer.text.rpartition("]")
    assert (shown.replace("[", "").replace("]", ""), end) == ("abc", "1 choices")


async def test_further_api_says_its_errors_in_its_own_shape(served_words):
    answer = await served_words.http.post("/v1/words", json={"model": "tiny"})
    assert (answer.status_code, answer.json()) == (
        400,
        {"wrong": "text", "why": "Missing required field: `text`."},
    )
    answer = await served_words.http.post(
        "/v1/words", content=b"{}", headers={"content-type": "text/plain"}
    )
    assert (answer.status_code, set(answer.json())) == (415, {"wrong", "why"})


async def test_path_of_no_api_names_those_that_are_served(served_words):
    message = (await served_words.http.post("/v1/other", json={})).json()["error"]["message"]
    assert all(path in message for path in ("/v1/chat/completions", "/v1/completions", "/v1/models"))
