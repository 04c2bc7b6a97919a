"""Token ids and prompts in answers, and usage in every chunk."""

import json

import pytest

from penstock.frontend.parsers.built_in import BuiltInParsers
from penstock.shapes import Delta, FinishReason, TokenLogprob

ENDPOINTS = {
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"model": "tiny", "prompt": [5, 6]},
}
SHOWN = {"return_token_ids": True, "max_tokens": 99}


async def chunks_of(served, path, **fields):
    response = await served.http.post(path, json=ENDPOINTS[path] | {"stream": True} | fields)
    *events, done, _ = response.text.split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_an_answer_has_its_token_ids_and_those_of_its_prompt(served, byte_level, path):
    response = await served.http.post(path, json=ENDPOINTS[path] | SHOWN)
    answer = response.json()
    (choice,), (request,) = answer["choices"], served.completer.requests
    assert choice["token_ids"] == byte_level.encode("Hello, 你好 😀!").ids
    holder = choice if path == "/v1/completions" else answer
    assert holder["prompt_token_ids"] == request.token_ids


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_a_stream_has_each_choices_token_ids_and_its_prompts_once(served, byte_level, path):
    chunks = await chunks_of(served, path, n=2, **SHOWN)
    for index in (0, 1):
        own = [chunk for chunk in chunks if chunk["choices"][0]["index"] == index]
        token_ids = [token_id for chunk in own for token_id in chunk["choices"][0]["token_ids"]]
        assert token_ids == byte_level.encode("Hello, 你好 😀!").ids
        holders = [chunk["choices"][0] if path == "/v1/completions" else chunk for chunk in own]
        assert holders[0]["prompt_token_ids"] == served.completer.requests[index].token_ids
        assert not any("prompt_token_ids" in holder for holder in holders[1:])


@pytest.mark.parametrize("parsed", [False, True])
async def test_the_text_of_a_chats_prompt_is_shown_once_for_each_choice(
    serve_script, byte_level, view_of, parsed
):
    view = view_of(byte_level, structured_output=True, tool_parser="hermes" if parsed else "")
    path = "/v1/chat/completions"
    async with serve_script("Hello, 你好 😀!", views=[view], parsers=BuiltInParsers()) as served:
        answer = (await served.http.post(path, json=ENDPOINTS[path] | {"return_prompt_text": True})).json()
        chunks = await chunks_of(served, path, n=2, return_prompt_text=True)
        plain = await chunks_of(served, path, n=2)
    prompt = answer["prompt_text"]
    assert byte_level.encode(prompt, add_special_tokens=False).ids == served.completer.requests[0].token_ids
    for index in (0, 1):
        own = [chunk for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert [chunk.get("prompt_text") for chunk in own] == [prompt] + [None] * (len(own) - 1)
    assert [chunk["choices"] for chunk in chunks] == [chunk["choices"] for chunk in plain]
    assert not any("prompt_text" in chunk for chunk in plain)


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_without_the_field_no_answer_has_token_ids(served, path):
    response = await served.http.post(path, json=ENDPOINTS[path])
    assert "token_ids" not in response.text
    assert "token_ids" not in json.dumps(await chunks_of(served, path))


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_log_probabilities_can_name_tokens_by_their_ids(serve_script, path):
    logprobs = [TokenLogprob(40, -0.5, [(40, -0.5), (41, -1.5)])]
    script = [Delta([40], finish_reason=FinishReason.LENGTH, logprobs=logprobs)]
    async with serve_script(lambda request: script) as served:
        wanted = {"logprobs": True, "top_logprobs": 2} if "chat" in path else {"logprobs": 2}
        body = ENDPOINTS[path] | wanted | {"return_tokens_as_token_ids": True}
        found = (await served.http.post(path, json=body)).json()["choices"][0]["logprobs"]
    if "chat" in path:
        (entry,) = found["content"]
        assert entry["token"] == "token_id:40"
        assert [other["token"] for other in entry["top_logprobs"]] == ["token_id:40", "token_id:41"]
    else:
        assert found["tokens"] == ["token_id:40"]
        assert found["top_logprobs"] == [{"token_id:40": -0.5, "token_id:41": -1.5}]


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_continuous_usage_counts_each_choice_so_far(served, path):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = await chunks_of(served, path, stream_options=options, n=2)
    counts = {0: [], 1: []}
    for chunk in chunks:
        counts[chunk["choices"][0]["index"]].append(chunk["usage"]["completion_tokens"])
    for found in counts.values():
        assert found == sorted(set(found))
        assert found[0] == 1
    assert last["usage"]["completion_tokens"] == counts[0][-1] + counts[1][-1]
    assert last["choices"] == []


async def test_continuous_usage_alone_asks_for_nothing(served):
    chunks = await chunks_of(served, "/v1/completions", stream_options={"continuous_usage_stats": True})
    assert not any("usage" in chunk for chunk in chunks)


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_named_tokens_are_the_alternatives_of_each_token(serve_script, path):
    logprobs = [TokenLogprob(40, -0.5, [(50, -4.0), (41, -1.5)])]
    script = [Delta([40], finish_reason=FinishReason.LENGTH, logprobs=logprobs)]
    body = ENDPOINTS[path] | {"logprob_token_ids": [50, 41], "return_tokens_as_token_ids": True}
    async with serve_script(lambda request: script) as served:
        wanted = {"logprobs": True} if "chat" in path else {"logprobs": 0}
        found = (await served.http.post(path, json=body | wanted)).json()["choices"][0]["logprobs"]
        alone = await served.http.post(path, json=body)
    sampling = served.completer.requests[0].sampling
    assert (sampling.logprobs, sampling.logprob_token_ids) == (2, (50, 41))
    if "chat" in path:
        shown = [(other["token"], other["logprob"]) for other in found["content"][0]["top_logprobs"]]
    else:
        shown = [pair for pair in found["top_logprobs"][0].items() if pair[0] != "token_id:40"]
    assert shown == [("token_id:50", -4.0), ("token_id:41", -1.5)]
    assert (alone.status_code, alone.json()["error"]["param"]) == (400, "logprob_token_ids")


async def test_named_tokens_of_an_echoed_prompt_are_refused(served):
    body = {"model": "tiny", "prompt": "a", "echo": True, "logprobs": 1, "logprob_token_ids": [5]}
    refused = (await served.http.post("/v1/completions", json=body)).json()["error"]
    assert (refused["param"], "echo" in refused["message"]) == ("logprob_token_ids", True)
