"""`truncate_prompt_tokens` and `truncation_side`."""

import pytest

CONTEXT = 2048  # of the model that `view_of` makes
WORDS = "the quick brown fox jumps over the lazy dog "


async def prompt_of(served, **fields):
    """The token ids that the engine gets, or the refused field."""
    path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
    response = await served.http.post(path, json={"model": "tiny", **fields})
    if response.status_code != 200:
        assert response.status_code == 400
        return response.json()["error"]["param"] or response.json()["error"]["code"]
    return served.completer.requests[-1].token_ids


@pytest.mark.parametrize(("side", "kept"), [(None, [8, 9]), ("left", [8, 9]), ("right", [5, 6])])
async def test_prompt_of_token_ids_keeps_as_many_at_one_end(served, side, kept):
    cut = {"truncate_prompt_tokens": 2, "truncation_side": side}
    assert await prompt_of(served, prompt=[5, 6, 7, 8, 9], **cut) == kept
    assert await prompt_of(served, prompt=[5], **cut) == [5]


async def test_chat_loses_its_beginning(served):
    chat = {"messages": [{"role": "user", "content": WORDS}]}
    whole = await prompt_of(served, **chat)
    assert await prompt_of(served, **chat, truncate_prompt_tokens=7) == whole[-7:]


async def test_minus_one_leaves_room_for_one_token_of_answer(served):
    chat = {"messages": [{"role": "user", "content": WORDS * CONTEXT}]}
    assert await prompt_of(served, **chat) == "context_length_exceeded"
    assert len(await prompt_of(served, **chat, truncate_prompt_tokens=-1)) == CONTEXT - 1


async def test_without_a_side_the_tokenizers_own_token_stays_in_front(serve_script, sentencepiece, view_of):
    async with serve_script("Hi", views=[view_of(sentencepiece)]) as served:
        bos, *rest = await prompt_of(served, prompt=WORDS)
        for side, kept in ((None, [bos, *rest[-3:]]), ("left", rest[-4:]), ("right", [bos, *rest[:3]])):
            cut = {"truncate_prompt_tokens": 4, "truncation_side": side}
            assert await prompt_of(served, prompt=WORDS, **cut) == kept
        assert await prompt_of(served, prompt=WORDS, truncate_prompt_tokens=1) == [bos]


@pytest.mark.parametrize("wrong", [0, -2, CONTEXT + 1])
async def test_number_that_is_none_of_tokens_is_refused(served, wrong):
    assert await prompt_of(served, prompt="Hi", truncate_prompt_tokens=wrong) == "truncate_prompt_tokens"


async def test_long_text_is_tokenized_no_further_than_the_limit(served, byte_level):
    text = "x" * 16 * CONTEXT + WORDS
    kept = byte_level.encode(WORDS).ids[-3:]
    assert await prompt_of(served, prompt=text, truncate_prompt_tokens=3) == kept


async def test_text_is_refused_when_the_part_within_the_limit_has_too_few_tokens(
    serve_script, tokenizer_families, view_of
):
    tokenizer = tokenizer_families["byte-level"]()
    tokenizer.add_tokens(["-" * 32])
    async with serve_script("Hi", views=[view_of(tokenizer)]) as served:
        text = "-" * 32 * CONTEXT
        tokens = CONTEXT // 2
        kept = await prompt_of(served, prompt=text, truncate_prompt_tokens=tokens)
        assert kept == [tokenizer.token_to_id("-" * 32)] * tokens
        refused = await prompt_of(served, prompt=text, truncate_prompt_tokens=tokens + 1)
        assert refused == "context_length_exceeded"


async def test_echo_is_the_text_of_the_tokens_that_are_kept(served, byte_level):
    body = {"model": "tiny", "prompt": WORDS, "echo": True, "max_tokens": 0, "truncate_prompt_tokens": 4}
    response = await served.http.post("/v1/completions", json=body)
    assert response.json()["choices"][0]["text"] == byte_level.decode(byte_level.encode(WORDS).ids[-4:])
