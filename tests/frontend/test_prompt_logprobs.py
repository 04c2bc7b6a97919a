"""What answers say of their prompt: `echo`, and log-probabilities of its tokens."""

import pytest

from penstock.shapes import Delta, FinishReason, PromptLogprob, TokenLogprob

HI = [{"role": "user", "content": "Hi"}]


def complete(served, **fields):
    return served.client.completions.create(**{"model": "tiny", "prompt": "My name is", **fields})


async def collect(stream):
    return [chunk async for chunk in stream]


def scored(request):
    """An engine that gives log-probabilities of its prompt, and answers with token 40."""
    wanted, entries = request.sampling, None
    if wanted.prompt_logprobs is not None:
        entries = [PromptLogprob(token_id, -1.0, [(41, -0.5)], 3) for token_id in request.token_ids[1:]]
    logprobs = [TokenLogprob(40, -2.0)] if wanted.logprobs is not None else None
    return [Delta([40], logprobs, FinishReason.STOP, 0, entries)]


@pytest.fixture
async def served_scores(serve_script):
    async with serve_script(scored) as running:
        yield running


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("max_tokens", "rest"), [(0, []), (1, [-2.0])])
async def test_echo_shows_the_prompt_with_its_log_probabilities(
    serve_script, byte_level, stream, max_tokens, rest
):
    prompt = byte_level.encode("Hi 你!").ids
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": max_tokens, "n": 2}
    async with serve_script(scored) as served:
        response = await complete(served, stream=stream, **body)
        choices = await collect(response) if stream else [response]
        for choice in (choice for answer in choices for choice in answer.choices):
            text = "Hi 你!" + (byte_level.decode([40]) if rest else "")
            assert choice.text == text
            logprobs = choice.logprobs
            assert logprobs.token_logprobs == [None] + [-1.0] * (len(prompt) - 1) + rest
            assert logprobs.top_logprobs[0] is None
            assert logprobs.text_offset[:2] == [0, 1]
            assert len(logprobs.tokens) == len(logprobs.text_offset) == len(prompt) + len(rest)
            assert choice.finish_reason == ("stop" if rest else "length")
        if not stream:
            assert response.usage.completion_tokens == 2 * len(rest)


async def test_echo_without_log_probabilities_asks_the_engine_for_none(serve_script):
    async with serve_script(scored) as served:
        answer = await complete(served, prompt=["Hi", "You"], echo=True, max_tokens=0)
        assert [choice.text for choice in answer.choices] == ["Hi", "You"]
        assert [choice.logprobs for choice in answer.choices] == [None, None]
        assert all(request.sampling.prompt_logprobs is None for request in served.completer.requests)


# --- prompt_logprobs ------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [0, 1])
async def test_chat_has_the_log_probabilities_of_its_prompt_beside_its_choices(served_scores, top):
    body = {"model": "tiny", "messages": HI, "prompt_logprobs": top, "n": 2}
    answer = (await served_scores.http.post("/v1/chat/completions", json=body)).json()
    first, *rest = answer["prompt_logprobs"]
    prompt = served_scores.completer.requests[0].token_ids
    assert first is None
    assert [next(iter(entry)) for entry in rest] == [str(token_id) for token_id in prompt[1:]]
    assert all(len(entry) == 1 + top for entry in rest)
    last = rest[-1]
    assert last[str(prompt[-1])] == {"logprob": -1.0, "rank": 3, "decoded_token": "\n"}
    if top:
        assert last["41"] == {"logprob": -0.5, "rank": 1, "decoded_token": "J"}
    assert [choice["logprobs"] for choice in answer["choices"]] == [None, None]


async def test_completion_has_the_log_probabilities_of_its_prompt_in_each_choice(served_scores):
    body = {"model": "tiny", "prompt": [[7, 8], [9]], "n": 2, "prompt_logprobs": 0}
    body["return_tokens_as_token_ids"] = True  # which vLLM does not do here
    answer = (await served_scores.http.post("/v1/completions", json=body)).json()
    (_, scored), *others = [choice["prompt_logprobs"] for choice in answer["choices"]]
    assert scored == {"8": {"logprob": -1.0, "rank": 3, "decoded_token": ")"}}
    assert others == [[None, scored], [None], [None]]


async def test_echo_and_prompt_logprobs_each_have_their_own_number_of_alternatives(served_scores):
    body = {"model": "tiny", "prompt": [7, 8], "max_tokens": 0, "echo": True}
    for logprobs, prompt_logprobs in ((0, 1), (1, 0), (None, 1)):
        fields = {"logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
        response = await served_scores.http.post("/v1/completions", json=body | fields)
        (choice,) = response.json()["choices"]
        assert choice["text"] == "()"
        assert len(choice["prompt_logprobs"][1]) == 1 + prompt_logprobs
        if logprobs is None:
            assert choice["logprobs"] is None
        else:
            assert len(choice["logprobs"]["top_logprobs"][1]) == 1 + logprobs


async def test_answers_without_the_field_have_no_log_probabilities_of_the_prompt(served_scores):
    for path, prompt in (("chat/completions", {"messages": HI}), ("completions", {"prompt": "Hi"})):
        response = await served_scores.http.post(f"/v1/{path}", json={"model": "tiny", **prompt})
        assert "prompt_logprobs" not in response.text


@pytest.mark.parametrize("wrong", [{"prompt_logprobs": -1}, {"prompt_logprobs": 0, "stream": True}])
async def test_log_probabilities_of_the_whole_vocabulary_and_in_streams_are_refused(served_scores, wrong):
    response = await served_scores.http.post(
        "/v1/completions", json={"model": "tiny", "prompt": "Hi", **wrong}
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt_logprobs"


async def test_a_worker_that_gives_no_log_probabilities_of_the_prompt_fails_the_call(served):
    body = {"model": "tiny", "prompt": "Hi", "echo": True, "logprobs": 1}
    response = await served.http.post("/v1/completions", json=body)
    assert response.status_code == 500


async def test_too_many_log_probabilities_of_prompts_are_refused(serve_script, view):
    async with serve_script(scored, views=[view]) as served:
        body = {"prompt": [[5] * 600] * 25, "echo": True, "logprobs": 20, "max_tokens": 0}
        response = await served.http.post("/v1/completions", json={"model": "tiny", **body})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "echo"
        body = {"prompt": [[5] * 600] * 25, "prompt_logprobs": 20}
        response = await served.http.post("/v1/completions", json={"model": "tiny", **body})
        assert response.json()["error"]["param"] == "prompt_logprobs"


async def test_writing_many_log_probabilities_lets_other_calls_run(serve_script, view_of, byte_level):
    def scripted(request):
        top = [(token_id, -0.5) for token_id in range(20)]
        entries = [PromptLogprob(token_id, -1.0, top, 3) for token_id in request.token_ids[1:]]
        return [Delta([40], None, FinishReason.STOP, 0, entries)]

    async with serve_script(scripted) as served:
        body = {"model": "tiny", "prompt": [[5] * 2000] * 6, "prompt_logprobs": 20}
        answer = (await served.http.post("/v1/completions", json=body)).json()
        assert [len(choice["prompt_logprobs"]) for choice in answer["choices"]] == [2000] * 6
