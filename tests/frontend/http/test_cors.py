"""Web pages of other origins: which of them may use a frontend from a browser."""

import json

import pytest

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
PAGE = "https://chat.example.com"
OTHER = "https://other.example.com"
ALLOWED = "access-control-allow-origin"


def asking(origin, **headers):
    return {"origin": origin, "access-control-request-method": "POST", **headers}


@pytest.mark.parametrize(
    ("origins", "origin", "said"),
    [((PAGE,), PAGE, PAGE), ((OTHER, PAGE), PAGE, PAGE), (("*",), PAGE, "*"), (("*",), "null", "*")],
)
async def test_a_page_that_is_named_may_send_and_read(serve_script, origins, origin, said):
    wanted = {"access-control-request-headers": "authorization,content-type,x-stainless-os"}
    async with serve_script("x", cors_origins=origins) as served:
        before = await served.http.options("/v1/chat/completions", headers=asking(origin, **wanted))
        answer = await served.http.post("/v1/chat/completions", json=CHAT, headers={"origin": origin})
    assert (before.status_code, before.content) == (204, b"")
    assert before.headers[ALLOWED] == answer.headers[ALLOWED] == said
    assert before.headers["access-control-allow-headers"] == wanted["access-control-request-headers"]
    assert "POST" in before.headers["access-control-allow-methods"]
    assert answer.status_code == 200
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    for response in (before, answer):
        assert "access-control-allow-credentials" not in response.headers


async def test_a_page_may_read_errors_and_streams_too(serve_script):
    async with serve_script("x", cors_origins=(PAGE,), api_key="key") as served:
        headers = {"origin": PAGE}
        refused = await served.http.post("/v1/chat/completions", json=CHAT, headers=headers)
        missing = await served.http.get("/nothing", headers=headers)
        headers = {**headers, "authorization": "Bearer key", "content-type": "application/json"}
        body = json.dumps({**CHAT, "stream": True}).encode()
        stream = await served.http.post("/v1/chat/completions", content=body, headers=headers)
    assert [response.status_code for response in (refused, missing, stream)] == [401, 404, 200]
    assert {response.headers[ALLOWED] for response in (refused, missing, stream)} == {PAGE}


@pytest.mark.parametrize("origins", [(), (PAGE,)])
async def test_a_page_that_is_not_named_may_neither_send_nor_read(serve_script, origins):
    async with serve_script("x", cors_origins=origins) as served:
        before = await served.http.options("/v1/chat/completions", headers=asking(OTHER))
        answer = await served.http.get("/v1/models", headers={"origin": OTHER})
    assert before.status_code == 405
    for response in (before, answer):
        assert ALLOWED not in response.headers
        assert response.headers.get("vary") == ("origin" if origins else None)


async def test_options_of_no_page_is_refused(serve_script):
    async with serve_script("x", cors_origins=("*",)) as served:
        assert (await served.http.options("/v1/models")).status_code == 405
