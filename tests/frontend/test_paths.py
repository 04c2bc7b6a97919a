"""Requests whose path is not served, or not with their method."""

import json
import time

import pytest

from penstock.frontend.paths import MAX_COMPARED_CHARS
from tests.frontend.test_app import CHAT, JSON, error_of


@pytest.mark.parametrize(
    ("method", "path", "meant"),
    [
        ("POST", "/chat/completions", "POST /v1/chat/completions"),
        ("POST", "/v1/v1/chat/completions", "POST /v1/chat/completions"),
        ("POST", "//v1//chat/completions", "POST /v1/chat/completions"),
        ("POST", "/V1/Chat/Completions", "POST /v1/chat/completions"),
        ("POST", "/v1/chat/completion", "POST /v1/chat/completions"),
        ("POST", "/openai/deployments/tiny/chat/completions", "POST /v1/chat/completions"),
        ("POST", "/messages", "POST /v1/messages"),
        ("GET", "/models", "GET /v1/models"),
        ("GET", "/v1/model", "GET /v1/models"),
        ("GET", "/v1/health", "GET /health"),
        ("GET", "/healthz", "GET /health"),
    ],
)
async def test_path_that_resembles_a_served_one_is_answered_with_that_one(served, method, path, meant):
    response = await served.http.request(method, f"{served.url}{path}")
    assert response.status_code == 404
    assert error_of(response)["message"].endswith(f"did you mean `{meant}`?")


@pytest.mark.parametrize("path", ["/v1/embeddings", "/index.html", "/api/generate", "/%ff", "//", "/v1"])
async def test_path_that_resembles_none_is_answered_with_all_apis(served, path):
    response = await served.http.post(f"{served.url}{path}")
    assert response.status_code == 404
    message = error_of(response)["message"]
    assert "did you mean" not in message
    assert "POST /v1/chat/completions, " in message
    assert "GET /v1/models" in message


async def test_long_path_is_answered_at_once_and_shown_in_part(served):
    for path in ("/" + "a/" * 30_000, "/" + "a" * 60_000, "/v1/chat/" + "completions" * MAX_COMPARED_CHARS):
        start = time.perf_counter()
        response = await served.http.get(path)
        assert (response.status_code, len(response.content) < 1000) == (404, True)
        assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("path", "allow"),
    [
        ("/v1/chat/completions", "POST"),
        ("/v1/models", "GET, HEAD"),
        ("/v1/responses/resp_1", "DELETE, GET, HEAD"),
        ("/v1/responses/resp_1/cancel", "POST"),
        ("/", "GET, HEAD"),
    ],
)
async def test_path_asked_with_a_wrong_method_names_all_of_its_methods(served, path, allow):
    response = await served.http.put(path)
    assert (response.status_code, response.headers["allow"]) == (405, allow)
    assert error_of(response)["message"] == f"`PUT {path}` is not served; use {allow}."


async def test_path_with_a_slash_at_its_end_is_redirected_with_method_body_and_query(served):
    response = await served.http.post("/v1/chat/completions/?a=b", json=CHAT)
    assert (response.status_code, response.headers["location"]) == (307, "../completions?a=b")
    followed = await served.http.post("/v1/chat/completions/", json=CHAT, follow_redirects=True)
    assert followed.json()["object"] == "chat.completion"
    assert followed.url.path == "/v1/chat/completions"
    health = await served.http.get("/health/", follow_redirects=True)
    assert health.json()["status"] == "healthy"
    listed = await served.http.get("/v1/models/")
    assert listed.json()["object"] == "list"


async def test_redirect_names_an_escaped_segment_as_it_was_sent(served):
    response = await served.http.get("/v1/responses/a%3A%20%0Db/")
    assert response.headers["location"] == "../a%3A%20%0Db"
    assert "x-request-id" in response.headers


async def test_slashes_in_front_of_a_host_redirect_nowhere(served):
    response = await served.http.get(f"{served.url}//elsewhere.example/")
    assert response.status_code == 404


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/metrics", "/nowhere"])
async def test_head_request_is_answered_as_get_without_its_body(served, path):
    got, head = await served.http.get(path), await served.http.head(path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    assert head.headers["content-type"] == got.headers["content-type"]


async def test_body_of_an_unserved_path_is_not_needed_for_the_next_request(served):
    content = json.dumps(CHAT)
    for path, status in (("/chat/completions", 404), ("/v1/chat/completions", 200)):
        response = await served.http.post(path, content=content, headers=JSON)
        assert response.status_code == status


@pytest.mark.parametrize("prefix", ["/llm", ""], ids=["kept by the proxy", "cut off by the proxy"])
async def test_path_behind_a_proxy_is_served_with_its_prefix_and_without(serve_script, prefix):
    async with serve_script("x", root_path="/llm") as served:
        answer = await served.http.post(f"{prefix}/v1/chat/completions", json=CHAT)
        page = await served.http.get(f"{prefix}/")
        bare = await served.http.get(prefix or "/")
        redirected = await served.http.get(f"{prefix}/health/", follow_redirects=True)
        wrong = await served.http.get(f"{prefix}/v1/chat/completions")
        unknown = await served.http.post(f"{prefix}/chat/completions")
    assert answer.json()["object"] == "chat.completion"
    assert f"{served.url}/llm/v1/chat/completions" in page.text
    assert 'href="/llm/v1/models"' in page.text
    assert bare.text == page.text
    assert redirected.url.path == f"{prefix}/health"
    assert wrong.headers["allow"] == "POST"
    assert "`POST /v1/chat/completions`" in error_of(unknown)["message"]
    refused = b'endpoint="chat_completions",model="",outcome="rejected",status="405"} 1.0'
    assert refused in served.metrics.render()


@pytest.mark.parametrize("path", ["/llmx/health", "/other/health", "/llm/llm/health", "/LLM/health"])
async def test_path_with_another_prefix_is_not_served(serve_script, path):
    async with serve_script("x", root_path="/llm") as served:
        assert (await served.http.get(path)).status_code == 404


async def test_path_behind_a_proxy_needs_its_key_all_the_same(serve_script):
    async with serve_script("x", root_path="/llm", api_key="secret") as served:
        for path in ("/v1/models", "/llm/v1/models"):
            assert (await served.http.get(path)).status_code == 401
