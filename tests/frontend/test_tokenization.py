"""/tokenize and /detokenize, over a real server."""

import asyncio
import json

import pytest

from penstock.frontend.http.api_keys import key_line
from penstock.frontend.text import model_text
from penstock.frontend.tokenization import TOKENIZE_REFUSED
from tests.frontend.conftest import CHATML

HI = [{"role": "user", "content": "Hi"}]


async def ask(served, path, **body):
    return await served.http.post(path, json={"model": "tiny", **body})


@pytest.mark.parametrize("prefix", ["", "/v1"])
async def test_a_text_becomes_tokens_and_the_tokens_that_text(served, byte_level, prefix):
    answer = (await ask(served, f"{prefix}/tokenize", prompt="Größe <|im_end|>")).json()
    tokens = byte_level.encode("Größe <|im_end|>").ids
    assert answer == {"count": len(tokens), "max_model_len": 2048, "tokens": tokens, "token_strs": None}
    answer = (await ask(served, f"{prefix}/detokenize", tokens=tokens)).json()
    assert answer == {"prompt": "Größe <|im_end|>"}
    assert served.completer.requests == []


async def test_token_strs_are_the_vocabularys_words(served, byte_level):
    answer = (await ask(served, "/tokenize", prompt="a Hi", return_token_strs=True)).json()
    assert answer["token_strs"] == [byte_level.id_to_token(token) for token in answer["tokens"]]
    assert any("Ġ" in name for name in answer["token_strs"])


async def test_special_tokens_are_added_to_texts_unless_told_otherwise(
    serve_script, view_of, sentencepiece
):
    async with serve_script("x", views=[view_of(sentencepiece)]) as served:
        bare = (await ask(served, "/tokenize", prompt="the", add_special_tokens=False)).json()["tokens"]
        answer = (await ask(served, "/tokenize", prompt="the")).json()
        assert answer["tokens"] == [sentencepiece.token_to_id("<s>"), *bare]
        assert (await ask(served, "/detokenize", tokens=bare)).json() == {"prompt": "the"}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        ({"add_generation_prompt": False}, "<|im_start|>user\nHi<|im_end|>\n"),
        ({"add_generation_prompt": False, "continue_final_message": True}, "<|im_start|>user\nHi"),
        ({"continue_final_message": True}, "<|im_start|>user\nHi"),
        (
            {"chat_template_kwargs": {"extra": "E"}},
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nE",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n1 tool",
        ),
    ],
)
async def test_a_chat_has_the_tokens_of_its_rendered_prompt(
    serve_script, view_of, byte_level, fields, text
):
    template = CHATML + "{{ extra }}{% if tools %}{{ tools | length }} tool{% endif %}"
    async with serve_script("x", views=[view_of(byte_level, template=template)]) as served:
        answer = (await ask(served, "/tokenize", messages=HI, **fields)).json()
        assert (await ask(served, "/detokenize", tokens=answer["tokens"])).json() == {"prompt": text}


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        ("/tokenize", {}, "prompt", "missing_field"),
        ("/tokenize", {"prompt": "x", "messages": HI}, "messages", "invalid_value"),
        ("/tokenize", {"prompt": 3}, "prompt", "invalid_value"),
        ("/tokenize", {"messages": []}, "messages", "invalid_value"),
        ("/tokenize", {"messages": HI, "chat_template": "x"}, "chat_template", "unsupported_value"),
        (
            "/tokenize",
            {"messages": HI, "continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            "invalid_value",
        ),
        ("/tokenize", {"prompt": "x" * 16 * 2049}, None, "context_length_exceeded"),
        ("/detokenize", {}, "tokens", "missing_field"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]", "invalid_value"),
        ("/detokenize", {"tokens": [2**31 - 1]}, "tokens", "invalid_value"),
        ("/detokenize", {"tokens": [1] * 2049}, None, "context_length_exceeded"),
    ],
)
async def test_a_bad_body_is_refused_by_the_fields_name(served, path, body, param, code):
    response = await ask(served, path, **body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.parametrize("name", TOKENIZE_REFUSED)
async def test_field_that_would_change_the_tokens_is_refused_by_its_name(served, name):
    refused = await ask(served, "/tokenize", messages=HI, **{name: {"x": 1}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)
    assert (await ask(served, "/tokenize", messages=HI, **{name: None})).status_code == 200


async def test_an_unknown_model_is_not_found(served):
    assert (await ask(served, "/tokenize", model="other", prompt="x")).status_code == 404


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/v1/tokenize", "/v1/detokenize"])
async def test_an_api_key_is_needed_where_keys_are_in_use(serve_script, tmp_path, path):
    keys = tmp_path / "keys"
    keys.write_text(key_line("team", "k" * 20))
    async with serve_script("x", api_keys_file=str(keys)) as served:
        body = json.dumps({"model": "tiny", "prompt": "x", "tokens": [1]}).encode()
        headers = {"content-type": "application/json"}
        assert (await served.http.post(path, content=body, headers=headers)).status_code == 401
        headers["authorization"] = "Bearer " + "k" * 20
        assert (await served.http.post(path, content=body, headers=headers)).status_code == 200


async def test_many_tokens_are_decoded_by_the_tokenizers_thread(served, monkeypatch):
    monkeypatch.setattr(model_text, "MAX_TOKENS_AT_ONCE", 2)
    tokens = (await ask(served, "/tokenize", prompt="What is my name?")).json()["tokens"]
    answers = await asyncio.gather(*(ask(served, "/detokenize", tokens=tokens) for _ in range(3)))
    assert [answer.json() for answer in answers] == [{"prompt": "What is my name?"}] * 3
