"""Prompts become the ids that the model's own tokenizer gives them."""

import asyncio
import json
import time

import pytest

from penstock.errors import RequestRejected
from penstock.frontend.openai import decode_chat
from penstock.frontend.preprocess import MAX_LOADED_MODELS, Preprocessor
from penstock.frontend.settings import FrontendSettings
from penstock.frontend.tokenizing import Caller
from penstock.observability import Metrics
from tests.frontend.conftest import byte_level_tokenizer


@pytest.fixture
def preprocessor():
    made = Preprocessor(FrontendSettings(long_text_chars=200), Metrics().tokenizer)
    yield made
    made.close()


async def encode(preprocessor, text, prompt, *, special=True):
    (ids,) = await preprocessor.encode(
        text, [prompt], Caller("", 0, time.perf_counter(), 60.0), add_special_tokens=special
    )
    return ids


def chat_of(*contents):
    roles = ["user", "assistant"]
    messages = [{"role": roles[turn % 2], "content": content} for turn, content in enumerate(contents)]
    return decode_chat(json.dumps({"model": "tiny", "messages": messages}).encode())


async def test_a_conversation_has_the_ids_of_its_whole_prompt(preprocessor, view, byte_level):
    text = await preprocessor.text_of(view)
    contents = ["Hi <|im_end|> there", "Größe 你好", "x " * 500, "", "😀"]
    for turns in range(1, len(contents) + 1):
        request = chat_of(*contents[:turns])
        prompt = text.template.render(request)
        for _ in range(2):  # the second time from the cache
            prompt = preprocessor.chat_prompt(text, request)
            ids = await encode(preprocessor, text, prompt, special=False)
            assert ids == byte_level.encode(prompt, add_special_tokens=False).ids


async def test_long_texts_leave_the_event_loop_alone(preprocessor, view):
    text = await preprocessor.text_of(view)
    turns = 0

    async def others():
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    other = asyncio.ensure_future(others())
    await encode(preprocessor, text, "word " * 20_000)
    other.cancel()
    assert turns > 3


@pytest.mark.parametrize("family", ["byte-level", "metaspace first", "metaspace always", "word piece"])
async def test_plain_prompts_get_the_tokenizers_own_special_tokens(
    preprocessor, tokenizer_families, view_of, family
):
    tokenizer = tokenizer_families[family]()
    text = await preprocessor.text_of(view_of(tokenizer))
    for prompt in ("My name is", "", " <s> x"):
        for special in (True, False):
            ids = await encode(preprocessor, text, prompt, special=special)
            assert ids == tokenizer.encode(prompt, add_special_tokens=special).ids


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"add_bos_token": True, "add_eos_token": True}, [True, True]),
        ({"add_bos_token": False}, [False, False]),
        ({}, [True, False]),
    ],
)
async def test_the_configuration_overrules_the_post_processor(
    preprocessor, sentencepiece, view_of, config, expected
):
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    text = await preprocessor.text_of(view_of(sentencepiece, config={**names, **config}))
    ids = await encode(preprocessor, text, "a")
    assert [ids[0] == 1, ids[-1] == 2] == expected


async def test_truncation_and_padding_of_the_file_do_not_count(preprocessor, tokenizer_families, view_of):
    tokenizer = tokenizer_families["byte-level"]()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    text = await preprocessor.text_of(view_of(tokenizer))
    assert len(await encode(preprocessor, text, "one two three four five")) > 8
    assert len(await encode(preprocessor, text, "a")) == 1


async def test_a_model_is_loaded_once_and_again_when_it_changes(preprocessor, view_of, byte_level):
    view = view_of(byte_level)
    first, second = await asyncio.gather(preprocessor.text_of(view), preprocessor.text_of(view))
    assert first is second
    changed = view_of(byte_level, template="changed", revision="other")
    assert (await preprocessor.text_of(changed)).template.render(chat_of("x")) == "changed"


async def test_only_so_many_models_are_kept(preprocessor, view_of, word_piece):
    first = await preprocessor.text_of(view_of(word_piece, revision="0"))
    for number in range(1, MAX_LOADED_MODELS + 1):
        await preprocessor.text_of(view_of(word_piece, revision=str(number)))
    assert await preprocessor.text_of(view_of(word_piece, revision="0")) is not first


def edited(**changes):
    """Assets with a tokenizer.json that differs in these."""
    spec = json.loads(byte_level_tokenizer().to_str())
    return {"assets": {"tokenizer.json": json.dumps(spec | changes).encode()}}


FIXED_LENGTH = {"type": "FixedLength", "length": 0}
PRECOMPILED = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
NAMELESS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"assets": {}}, "without tokenizer.json"),
        # `tokenizers` panics with these
        (edited(post_processor=NAMELESS), "no entry found for key"),
        (edited(normalizer=PRECOMPILED), "Cannot parse precompiled_charsmap"),
        (edited(pre_tokenizer=FIXED_LENGTH), "chunk size must be non-zero"),
        ({"assets": {"tokenizer.json": b"{"}}, "cannot be used"),
        ({"assets": {"tokenizer.json": b"\xff"}}, "cannot be used"),
        ({"template": "{% if %}"}, "chat template, line 1"),
        ({"config": {"bos_token": {}}}, "cannot be used: 'content'"),
    ],
)
async def test_unusable_files_are_the_servers_fault(preprocessor, view_of, byte_level, changes, reason):
    for _ in range(2):
        with pytest.raises(RequestRejected, match=reason) as raised:
            await preprocessor.text_of(view_of(byte_level, **changes))
        assert raised.value.status == 500


async def test_a_model_without_a_template_has_no_chat(preprocessor, view_of, byte_level):
    text = await preprocessor.text_of(view_of(byte_level, template=None))
    with pytest.raises(RequestRejected, match="no chat template") as raised:
        preprocessor.chat_prompt(text, chat_of("x"))
    assert raised.value.status == 400
