"""Paths, keys, health, and bad requests of all kinds, over a real server."""

import asyncio
import html
import json
import re
import shlex

import pytest

from penstock import __version__
from penstock.errors import Rejection, RequestRejected
from penstock.frontend.http.api_keys import key_line
from penstock.logs.quiet_log import BURST_LINES
from penstock.shapes import Role

JSON = {"content-type": "application/json"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


def error_of(response):
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def test_models(served):
    listed = [model async for model in await served.client.models.list()]
    assert [model.id for model in listed] == ["tiny"]
    one = await served.client.models.retrieve("tiny")
    assert (one.object, one.owned_by) == ("model", "penstock")
    assert one.model_extra["max_model_len"] == 2048


async def test_alias_is_listed_and_answers_name_the_model_by_its_own_name(serve_script, view):
    """As vLLM's do, where one model has several served names."""
    async with serve_script("x") as served:
        served.completer.aliases["gpt"] = view
        listed = [model.id async for model in await served.client.models.list()]
        one = await served.client.models.retrieve("gpt")
        page = await served.http.get("/")
        answers = [
            await served.http.post("/v1/chat/completions", json=CHAT | {"model": "gpt"}),
            await served.http.post("/v1/completions", json={"model": "gpt", "prompt": "a"}),
            await served.http.post("/v1/responses", json={"model": "gpt", "input": "a"}),
            await served.http.post("/v1/messages", json=CHAT | {"model": "gpt", "max_tokens": 5}),
        ]
        async with served.client.chat.completions.with_streaming_response.create(
            **CHAT | {"model": "gpt"}, stream=True
        ) as stream:
            chunks = (await stream.read()).decode()
        counted = await served.http.post("/tokenize", json={"model": "gpt", "prompt": "a"})
        metrics = served.metrics.render()
    assert listed == ["tiny", "gpt"]
    assert one.id == "gpt"
    assert "<li>gpt</li>" in page.text
    assert [answer.json()["model"] for answer in answers] == ["tiny"] * 4
    assert '"model":"tiny"' in chunks
    assert "gpt" not in chunks
    assert counted.status_code == 200
    assert {request.model.name for request in served.completer.requests} == {"tiny"}
    assert b'model="tiny"' in metrics
    assert b'model="gpt"' not in metrics


async def test_a_models_name_may_have_a_slash(serve_script, view_of, byte_level):
    async with serve_script("x", views=[view_of(byte_level, name="Qwen/Qwen3-32B")]) as served:
        assert (await served.client.models.retrieve("Qwen/Qwen3-32B")).id == "Qwen/Qwen3-32B"


async def test_health_says_what_is_missing(served):
    response = await served.http.get("/health")
    assert response.status_code == 200
    body = response.json()
    assert (body["status"], body["missing"]) == ("healthy", [])
    assert body["instances"][0]["instance_id"] == "w-1"
    assert body["instances"][0]["role"] == "aggregated"
    assert body["instances"][0]["load"]["running"] == 2
    assert body["instances"][0]["load"]["rates"]["step_ms"] == 1.0
    served.completer.absent = [Role.PREFILL, Role.DECODE]
    response = await served.http.get("/health")
    assert response.status_code == 503
    assert (response.json()["status"], response.json()["missing"]) == ("unhealthy", ["prefill", "decode"])


async def test_live_version_and_metrics(served):
    assert (await served.http.get("/live")).status_code == 200
    assert (await served.http.get("/version")).json() == {"version": __version__}
    metrics = await served.http.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert "penstock_requests_total" in metrics.text


async def test_ping_answers_as_health(served):
    assert (await served.http.get("/ping")).status_code == 200
    served.completer.absent = [Role.DECODE]
    assert (await served.http.get("/ping")).status_code == 503


async def test_a_browser_gets_a_page_with_the_models_and_a_line_to_try(serve_script, view_of, byte_level):
    name = "a<b>'s/model"
    async with serve_script("x", views=[view_of(byte_level, name=name)]) as served:
        page = await served.http.get("/")
        served.completer.absent = [Role.PREFILL]
        unhealthy = await served.http.get("/")
        served.completer.views = []
        empty = await served.http.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-security-policy"] == "default-src 'none'"
    assert "Health: healthy" in page.text
    assert "missing: prefill" in unhealthy.text
    assert "none yet" in empty.text
    assert "<b>" not in page.text
    assert "<script" not in page.text
    line = html.unescape(re.search("<pre>(.*)</pre>", page.text)[1])
    words = shlex.split(line)
    assert words[1] == f"{served.url}/v1/chat/completions"
    assert json.loads(words[-1])["model"] == name


async def test_a_head_request_has_no_body(served):
    response = await served.http.head("/health")
    assert (response.status_code, response.content) == (200, b"")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/", 405),
        ("GET", "/index.html", 404),
        ("GET", "/v2/models", 404),
        ("POST", "/v1/chat", 404),
        ("GET", "/v1/models/none", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/health", 405),
        ("POST", "/v1/models", 405),
    ],
)
async def test_wrong_paths_and_methods(served, method, path, status):
    response = await served.http.request(method, path)
    assert response.status_code == status
    assert error_of(response)["type"] == "invalid_request_error"
    if status == 405:
        assert response.headers["allow"]


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        (b"{", None, "invalid_json"),
        (b"", None, "invalid_json"),
        (b"[]", None, "invalid_value"),
        (json.dumps({**CHAT, "n": "x"}).encode(), "n", "invalid_value"),
        (json.dumps({**CHAT, "tools": [{}]}).encode(), "tools[0].function", "missing_field"),
        (
            json.dumps({**CHAT, "tools": [{"function": {"name": "f"}}]}).encode(),
            "tools",
            "unsupported_value",
        ),
        (
            json.dumps({**CHAT, "response_format": {"type": "json_object"}}).encode(),
            "response_format",
            "unsupported_value",
        ),
    ],
)
async def test_bad_bodies(served, body, param, code):
    response = await served.http.post("/v1/chat/completions", content=body, headers=JSON)
    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], error["code"]) == (param, code)
    assert served.completer.requests == []


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "application/json; charset=utf-8",
        "Application/JSON ;charset=UTF-8",
        "application/vnd.api+json",
        "application/problem+json; a=b",
    ],
)
async def test_a_body_is_json_by_its_header(served, content_type):
    headers = {"content-type": content_type}
    response = await served.http.post("/v1/chat/completions", content=json.dumps(CHAT), headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "text/plain;charset=UTF-8",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/plain; application/json",
        "text/plain, application/json",
        "application/jsonp",
        "json",
    ],
)
async def test_what_any_web_page_may_send_is_refused(served, path, content_type):
    """A form's types need no leave of the server, so a page could spend it; see docs/security.md."""
    headers = {"origin": "http://elsewhere", "host": "rebound.example"}
    if content_type is not None:
        headers["content-type"] = content_type
    response = await served.http.post(path, content=json.dumps(CHAT), headers=headers)
    assert response.status_code == 415
    error = error_of(response)
    assert error["code"] == "unsupported_content_type"
    assert "`Content-Type: application/json`" in error["message"]
    assert not [name for name in response.headers if name.startswith("access-control")]
    assert served.completer.requests == []


async def test_compressed_bodies_are_refused_by_the_name_of_their_encoding(served):
    for encoding in ("gzip", "br", "GZIP", "deflate, gzip"):
        headers = JSON | {"content-encoding": encoding}
        response = await served.http.post("/v1/completions", content=b"\x1f\x8b", headers=headers)
        assert (response.status_code, response.headers["accept-encoding"]) == (415, "identity")
        error = error_of(response)
        assert error["code"] == "unsupported_content_encoding"
        assert f"`{encoding}`" in error["message"]
    headers = JSON | {"content-encoding": "identity"}
    response = await served.http.post("/v1/chat/completions", content=json.dumps(CHAT), headers=headers)
    assert response.status_code == 200


async def test_odd_header_values_are_shown_escaped_and_cut(served):
    headers = {"content-type": b"text/\xff\x80" + b"x" * 5000}
    response = await served.http.post("/v1/completions", content=b"{}", headers=headers)
    message = error_of(response)["message"]
    assert "`text/\\xff\\x80xxx" in message
    assert len(message) < 300


# --- what is turned away is told --------------------------------------------------------------------


def lines_of(caplog):
    return [record.getMessage() for record in caplog.records if "request_id=" in record.getMessage()]


def counted(served, endpoint, status, outcome="rejected", model=""):
    labels = {"endpoint": endpoint, "model": model, "outcome": outcome, "status": status}
    shown = ",".join(f'{name}="{value}"' for name, value in labels.items())
    found = re.search(rf"penstock_requests_total{{{shown}}} (\S+)", served.metrics.render().decode())
    return float(found[1]) if found else 0.0


@pytest.mark.parametrize(
    ("method", "path", "status", "endpoint", "code"),
    [
        ("POST", "/v1/embeddings", 404, "other", "not_found"),
        ("POST", "/chat/completions", 404, "other", "not_found"),
        ("GET", "/index.html", 404, "other", "not_found"),
        ("GET", "/v1/models/none", 404, "models", "model_not_found"),
        ("GET", "/v1/chat/completions", 405, "chat_completions", "method_not_allowed"),
        ("DELETE", "/health", 405, "other", "method_not_allowed"),
    ],
)
async def test_paths_that_are_not_served_are_logged_and_counted(
    served, caplog, method, path, status, endpoint, code
):
    caplog.set_level("INFO", "penstock.frontend")
    response = await served.http.request(method, path)
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    (line,) = lines_of(caplog)
    assert f" endpoint={endpoint} method={method} path={path!r} status={status} outcome=rejected" in line
    assert f" finish={code}" in line
    assert counted(served, endpoint, status) == 1


async def test_a_path_that_is_not_served_is_told_what_is(served):
    error = error_of(await served.http.post("/v1/embeddings", json={}))
    assert error["message"].startswith(
        "Penstock does not serve `POST /v1/embeddings`; it serves POST /v1/chat"
    )
    assert "use POST" in error_of(await served.http.get("/v1/completions"))["message"]


async def test_strangers_paths_fill_neither_log_nor_metrics(served, caplog):
    caplog.set_level("INFO", "penstock.frontend")
    for number in range(30):
        await served.http.get(f"/{number}/" + "x" * 1000)
    await served.http.get("/a%0Ab")
    assert counted(served, "other", 404) == 31
    assert len(re.findall("penstock_requests_total{", served.metrics.render().decode())) == 1
    assert len(lines_of(caplog)) == BURST_LINES
    assert max(map(len, lines_of(caplog))) < 500


async def test_a_request_has_a_line_when_it_comes_and_one_when_it_ends_under_one_id(served, caplog):
    caplog.set_level("DEBUG", "penstock.frontend")
    answer = await served.http.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "mine"})
    async with asyncio.timeout(10):
        while len(lines_of(caplog)) < 2:  # the last one follows the answer
            await asyncio.sleep(0.01)
    came, ended = lines_of(caplog)
    assert came.startswith(f"received: request_id=mine id={answer.json()['id']} endpoint=chat_completions")
    assert ended.startswith(f"request_id=mine id={answer.json()['id']} endpoint=chat_completions")


async def test_a_wrong_key_is_logged_and_counted(serve_script, caplog):
    caplog.set_level("INFO", "penstock.frontend")
    async with serve_script("x", api_key="right") as served:
        assert (await served.http.post("/v1/chat/completions", json=CHAT)).status_code == 401
        (line,) = lines_of(caplog)
        assert " endpoint=chat_completions method=POST" in line
        assert line.endswith("status=401 outcome=rejected finish=missing_api_key")
        assert counted(served, "chat_completions", 401) == 1


async def test_a_400_is_logged_with_its_field_and_at_debug_with_its_message(served, caplog):
    caplog.set_level("INFO", "penstock.frontend")
    await served.http.post("/v1/chat/completions", json={**CHAT, "temperature": "hot"})
    await served.http.get("/live")  # by then it is written
    (line,) = lines_of(caplog)
    assert " status=400 outcome=rejected " in line
    assert line.endswith(" finish=invalid_value param='temperature'")
    assert counted(served, "chat_completions", 400) == 1
    caplog.set_level("DEBUG", "penstock.frontend")
    await served.http.post("/v1/chat/completions", json={**CHAT, "temperature": "hot"})
    await served.http.get("/live")
    assert lines_of(caplog)[-1].endswith(" error='`temperature` must be a number, not a string.'")


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"stream_options": {}}, "invalid_value"),
        ({"logprobs": False, "top_logprobs": 3}, "invalid_value"),
        ({"logit_bias": {"99999": 1}}, "invalid_value"),
        ({"max_tokens": 100_000}, "invalid_value"),
        ({"min_tokens": 9, "max_tokens": 5}, "invalid_value"),
        ({"tool_choice": "required"}, "invalid_value"),
        ({"model": None}, "missing_field"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "invalid_value"),
        ({"functions": [{}]}, "unsupported_value"),
    ],
)
async def test_every_refusal_has_a_code(served, caplog, fields, code):
    caplog.set_level("INFO", "penstock.frontend")
    response = await served.http.post("/v1/chat/completions", json=CHAT | fields)
    assert (response.status_code, error_of(response)["code"]) == (400, code)
    await served.http.get("/live")
    assert f" finish={code} param=" in lines_of(caplog)[0]


async def test_a_list_of_models_and_one_of_them_may_end_with_a_slash(served):
    assert (await served.http.get("/v1/models/")).json() == (await served.http.get("/v1/models")).json()
    one = await served.http.get("/v1/models/tiny")
    assert (await served.http.get("/v1/models/tiny/")).json() == one.json()


# --- keys -----------------------------------------------------------------------------------------


async def test_calls_with_a_key_are_answered_and_others_get_401(serve_script, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(key_line("team", "second-" * 4) + "\n")
    async with serve_script("x", api_key="first", api_keys_file=str(keys)) as served:

        async def status(path, key, method="GET"):
            headers = {"authorization": key} if key else {}
            response = await served.http.request(method, path, headers=headers, json=CHAT)
            if response.status_code == 401:
                assert response.headers["www-authenticate"] == "Bearer"
                assert error_of(response)["code"] in ("missing_api_key", "invalid_api_key")
            return response.status_code

        for path, method in (
            ("/v1/chat/completions", "POST"),
            ("/v1/models", "GET"),
            ("/v1/models/tiny", "GET"),
        ):
            assert await status(path, "Bearer first", method) == 200
            assert await status(path, "bearer " + "second-" * 4, method) == 200
            for wrong in (None, "Bearer", "Bearer third", "Basic first", "first", "Bearer first second"):
                assert await status(path, wrong, method) == 401
        for path in ("/health", "/live", "/metrics", "/version"):
            assert await status(path, None) == 200


# --- request ids ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/nothing"])
async def test_a_request_id_comes_back(served, path):
    response = await served.http.post(path, json=CHAT, headers={"x-request-id": "abc-123"})
    assert response.headers["x-request-id"] == "abc-123"
    for odd in ("", "a b", "x" * 200):
        response = await served.http.post(path, json=CHAT, headers={"x-request-id": odd})
        assert len(response.headers["x-request-id"]) == 32


async def test_equal_request_ids_do_not_collide(served):
    post = served.http.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "same"})
    again = served.http.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "same"})
    first, second = await asyncio.gather(post, again)
    assert first.json()["id"] != second.json()["id"]
    assert len({request.request_id for request in served.completer.requests}) == 2


# --- limits ---------------------------------------------------------------------------------------


async def test_a_body_that_says_it_is_too_long(serve_script):
    async with serve_script("x", max_body_bytes=1000) as served:
        response = await served.http.post("/v1/completions", content=b"x" * 1001, headers=JSON)
        assert response.status_code == 413
        assert error_of(response)["code"] == "body_too_large"
        assert (await served.http.get("/live")).status_code == 200


async def test_a_body_that_turns_out_too_long(serve_script):
    async with serve_script("x", max_body_bytes=1000) as served:

        async def pieces():
            for _ in range(1000):
                yield b"x" * 400

        response = await served.http.post("/v1/completions", content=pieces(), headers=JSON)
        assert response.status_code == 413  # and no reset connection, though most was not read before


async def test_too_many_requests_at_a_time(serve_script):
    async with serve_script("word " * 30, step_s=0.02, max_inflight=1) as served:
        first = asyncio.ensure_future(served.http.post("/v1/chat/completions", json=CHAT))
        while not served.completer.requests:
            await asyncio.sleep(0.005)
        response = await served.http.post("/v1/chat/completions", json=CHAT)
        assert response.status_code == 429
        assert error_of(response)["type"] == "rate_limit_error"
        assert response.headers["retry-after"] == "1"
        assert (await first).status_code == 200


async def test_a_key_stands_for_a_tenant_who_cannot_put_itself_before_others(serve_script, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(key_line("team-a", "a key of twenty chars".replace(" ", "-")))
    headers = {"Authorization": "Bearer a-key-of-twenty-chars"}
    async with serve_script("x", api_keys_file=str(keys)) as served:
        for given, counts in ((-7, 0), (7, 7)):
            body = {**CHAT, "priority": given, "n": 2}
            response = await served.http.post("/v1/chat/completions", json=body, headers=headers)
            assert response.status_code == 200
            requests, served.completer.requests = served.completer.requests, []
            assert {(request.tenant, request.priority) for request in requests} == {("team-a", counts)}
            assert len({request.call_id for request in requests}) == 1
            assert served.completer.checked.pop() == ("tiny", "team-a", counts)


async def test_who_would_wait_too_long_is_told_before_anything_is_done(serve_script, caplog):
    caplog.set_level("INFO", "penstock.frontend")
    async with serve_script("x") as served:
        reason = "Too many (reason=wait wait_ms=12000 bound_ms=10000)."
        served.completer.check_error = RequestRejected(reason, kind=Rejection.OVERLOADED, retry_after_s=3.0)
        # Its prompt is not looked at: the same without an error would be a 400.
        body = {**CHAT, "max_tokens": 10**9}
        response = await served.http.post("/v1/chat/completions", json=body)
        assert response.status_code == 429
        assert response.headers["retry-after"] == "3"
        assert error_of(response)["message"] == reason
        assert not served.completer.requests
    (line,) = [record.getMessage() for record in caplog.records if "status=429" in record.getMessage()]
    assert f"finish=overloaded tenant=- error={reason!r}" in line


async def test_a_request_cannot_last_for_ever(serve_script):
    async with serve_script("word " * 200, step_s=0.05, request_timeout_s=0.2) as served:
        response = await served.http.post("/v1/chat/completions", json=CHAT)
        assert response.status_code == 504
        assert error_of(response)["code"] == "request_timeout"
        streamed = await served.http.post("/v1/chat/completions", json={**CHAT, "stream": True})
        assert "took longer than 0.2 s" in streamed.text
        assert len(served.completer.cancelled) == 2


async def test_a_bug_is_a_500_and_a_log_line(served, monkeypatch, caplog):
    def broken(name):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(served.completer, "model", broken)
    response = await served.http.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 500
    assert error_of(response)["code"] == "internal_error"
    assert "secret" not in response.text
    assert "ZeroDivisionError: secret" in caplog.text
    monkeypatch.undo()
    assert (await served.http.post("/v1/chat/completions", json=CHAT)).status_code == 200
    metrics = (await served.http.get("/metrics")).text
    assert 'status="500"} 1.0' in metrics
