"""The description of the endpoints is right, whole, and holds what is really answered."""

import re
from pathlib import Path

import msgspec
import openapi_spec_validator
import pytest

from penstock.frontend import answers
from penstock.frontend.openai import ChatRequest, CompletionRequest
from penstock.frontend.responses_api.request_body import ResponsesRequest
from tests.frontend.test_app import CHAT

RESPONSE = {"model": "tiny", "input": "a"}


async def test_document_is_valid_and_describes_every_route(served):
    response = await served.http.get("/openapi.json")
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    openapi_spec_validator.validate(document)
    described = document["paths"]
    assert {"/v1/chat/completions", "/v1/responses/{id}", "/openapi.json", "/docs"} <= set(described)
    for path, operations in described.items():
        asked = await served.http.put(path.format(id="x", name="x"))
        methods = set(asked.headers["allow"].lower().split(", ")) - {"head"}
        of_ids = (
            {"get", "delete"} if path == "/v1/responses/input_tokens" else set()
        )  # it matches {id}, too
        assert set(operations) == methods - of_ids
    table = (Path(__file__).parents[2] / "docs" / "use.md").read_text(encoding="utf-8")
    named = {path.format(id="ID", name="NAME") for path in re.findall(r"`[A-Z]+ (/[^` ]*)`", table)}
    assert {path.format(id="ID", name="NAME") for path in described} >= named - {"/v1/models/"}


@pytest.mark.parametrize("request_type", [ChatRequest, CompletionRequest, ResponsesRequest])
async def test_request_schema_has_every_field_of_the_class_that_decodes_it(served, request_type):
    document = (await served.http.get("/openapi.json")).json()
    schema = document["components"]["schemas"][request_type.__name__]
    assert set(schema["properties"]) == {
        field.encode_name for field in msgspec.structs.fields(request_type)
    }
    assert "model" in schema["required"]


@pytest.mark.parametrize(
    ("method", "path", "body", "shape"),
    [
        ("POST", "/v1/chat/completions", CHAT | {"logprobs": True}, answers.ChatAnswer),
        ("POST", "/v1/chat/completions", CHAT | {"return_token_ids": True}, answers.ChatAnswer),
        ("POST", "/v1/completions", {"model": "tiny", "prompt": "a"}, answers.CompletionAnswer),
        ("POST", "/v1/responses", RESPONSE, answers.ResponseAnswer),
        ("POST", "/v1/messages", CHAT | {"max_tokens": 5}, answers.MessageAnswer),
        ("POST", "/v1/messages/count_tokens", CHAT, answers.TokenCount),
        ("POST", "/v1/responses/input_tokens", RESPONSE, answers.InputTokens),
        ("POST", "/tokenize", CHAT, answers.Tokenized),
        ("POST", "/detokenize", {"model": "tiny", "tokens": [1]}, answers.Detokenized),
        ("GET", "/v1/models", None, answers.ModelList),
        ("GET", "/v1/models/tiny", None, answers.ModelObject),
        ("GET", "/health", None, answers.Health),
        ("GET", "/live", None, answers.Live),
        ("GET", "/version", None, answers.Version),
        ("GET", "/v1/models/none", None, answers.ErrorAnswer),
        ("POST", "/v1/messages", {}, answers.AnthropicErrorAnswer),
    ],
)
async def test_answer_has_the_described_fields_and_no_others(served, method, path, body, shape):
    answer = (await served.http.request(method, path, json=body)).json()
    msgspec.convert(answer, _strict(shape))


async def test_stored_response_answers_as_described(served):
    created = (await served.http.post("/v1/responses", json=RESPONSE)).json()
    path = f"/v1/responses/{created['id']}"
    for method, end, shape in (
        ("GET", "", answers.ResponseAnswer),
        ("GET", "/input_items", answers.ItemList),
        ("DELETE", "", answers.DeletedResponse),
    ):
        msgspec.convert((await served.http.request(method, path + end)).json(), _strict(shape))


async def test_description_names_the_keys_and_the_prefix_that_are_in_use(serve_script):
    async with serve_script("x", api_key="secret", root_path="/llm") as served:
        document = (await served.http.get("/openapi.json")).json()
        page = await served.http.get("/llm/docs")
    openapi_spec_validator.validate(document)
    assert document["servers"] == [{"url": "/llm"}]
    chat, health = document["paths"]["/v1/chat/completions"]["post"], document["paths"]["/health"]["get"]
    assert chat["security"] == [{"bearer": []}, {"x-api-key": []}]
    assert "security" not in health
    assert 'href="/llm/openapi.json"' in page.text


async def test_page_shows_each_endpoint_and_field_without_scripts_or_outside_help(served):
    document = (await served.http.get("/openapi.json")).json()
    page = await served.http.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-security-policy"] == "default-src 'none'"
    for path in document["paths"]:
        assert path in page.text
    for field in ("top_logprobs", "reasoning_effort", "previous_response_id", "max_tokens"):
        assert f"<code>{field}</code>" in page.text
    assert not re.search(r"<script|<style|src=|https?://", page.text)
    names = set(re.findall(r'href="#(\w+)"', page.text))
    assert names <= set(re.findall(r'id="(\w+)"', page.text))


def _strict(shape):
    """The same class, which takes no other fields."""
    hints = msgspec.structs.fields(shape)
    fields = [
        (field.name, _strict_inside(field.type), *([] if field.required else [field.default]))
        for field in hints
    ]
    return msgspec.defstruct(shape.__name__, fields, kw_only=True, forbid_unknown_fields=True)


def _strict_inside(kind):
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return _strict(kind)
    if getattr(kind, "__origin__", None) is list:
        return list[_strict_inside(kind.__args__[0])]
    return kind
