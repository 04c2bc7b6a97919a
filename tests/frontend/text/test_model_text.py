"""Prompts become the ids that the model's own tokenizer gives them."""

import asyncio
import errno
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from penstock.errors import ConfigError, Rejection, RequestRejected
from penstock.frontend.chat import template_input_of
from penstock.frontend.openai import decode_chat
from penstock.frontend.settings import FrontendSettings
from penstock.frontend.text import model_text
from penstock.frontend.text.model_text import MAX_LOADED_MODELS, ModelTexts
from penstock.frontend.text.tokenizing import Caller
from penstock.metrics import Metrics
from tests.frontend.conftest import byte_level_tokenizer
from tests.frontend.tag_parsers import TagParsers


@pytest.fixture
def texts():
    made = ModelTexts(FrontendSettings(long_text_chars=200), Metrics().tokenizer)
    yield made
    made.close()


async def encode(text, prompt, *, special=True):
    caller = Caller("", 0, time.perf_counter(), 60.0)
    (ids,) = await text.encode([prompt], caller, add_special_tokens=special)
    return ids


def chat_of(*contents):
    roles = ["user", "assistant"]
    messages = [{"role": roles[turn % 2], "content": content} for turn, content in enumerate(contents)]
    return template_input_of(decode_chat(json.dumps({"model": "tiny", "messages": messages}).encode()))


async def test_a_conversation_has_the_ids_of_its_whole_prompt(texts, view, byte_level):
    text = await texts.of(view)
    contents = ["Hi <|im_end|> there", "Größe 你好", "x " * 500, "", "😀"]
    for turns in range(1, len(contents) + 1):
        for _ in range(2):  # the second time from the cache
            prompt = text.chat_prompt("tiny", chat_of(*contents[:turns]))
            ids = await encode(text, prompt, special=False)
            assert ids == byte_level.encode(prompt, add_special_tokens=False).ids


async def test_long_texts_leave_the_event_loop_alone(texts, view):
    text = await texts.of(view)
    turns = 0

    async def others():
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    other = asyncio.ensure_future(others())
    await encode(text, "word " * 20_000)
    other.cancel()
    assert turns > 3


@pytest.mark.parametrize("family", ["byte-level", "metaspace first", "metaspace always", "word piece"])
async def test_plain_prompts_get_the_tokenizers_own_special_tokens(
    texts, tokenizer_families, view_of, family
):
    tokenizer = tokenizer_families[family]()
    text = await texts.of(view_of(tokenizer))
    for prompt in ("My name is", "", " <s> x"):
        for special in (True, False):
            ids = await encode(text, prompt, special=special)
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
    texts, sentencepiece, view_of, config, expected
):
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    text = await texts.of(view_of(sentencepiece, config={**names, **config}))
    ids = await encode(text, "a")
    assert [ids[0] == 1, ids[-1] == 2] == expected


async def test_truncation_and_padding_of_the_file_do_not_count(texts, tokenizer_families, view_of):
    tokenizer = tokenizer_families["byte-level"]()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    text = await texts.of(view_of(tokenizer))
    assert len(await encode(text, "one two three four five")) > 8
    assert len(await encode(text, "a")) == 1


async def test_a_model_is_loaded_once_and_again_when_it_changes(texts, view_of, byte_level):
    view = view_of(byte_level)
    first, second = await asyncio.gather(texts.of(view), texts.of(view))
    assert first is second
    changed = view_of(byte_level, template="changed", revision="other")
    assert (await texts.of(changed)).chat_prompt("tiny", chat_of("x")) == "changed"


async def test_only_so_many_models_are_kept(texts, view_of, word_piece):
    first = await texts.of(view_of(word_piece, revision="0"))
    for number in range(1, MAX_LOADED_MODELS + 1):
        await texts.of(view_of(word_piece, revision=str(number)))
    assert await texts.of(view_of(word_piece, revision="0")) is not first


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
async def test_unusable_files_are_the_servers_fault(texts, view_of, byte_level, changes, reason):
    for _ in range(2):
        with pytest.raises(RequestRejected, match=reason) as raised:
            await texts.of(view_of(byte_level, **changes))
        assert raised.value.kind is Rejection.INTERNAL


class FailingParsers(TagParsers):
    """Fails for reasons of the machine's as often as it is told to."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.loads = 0

    def load(self, model):
        self.loads += 1
        if self.errors:
            raise self.errors.pop(0)
        return super().load(model)


def full_disk():
    """As a parser reports it that has put the tokenizer into files."""
    error = ConfigError("its tokenizer cannot be loaded")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    return error


@pytest.fixture
def failing(monkeypatch):
    """A texts whose parsers fail like this at first, and a clock for its pauses."""
    made = []

    def make(*errors):
        clock = SimpleNamespace(now=1000.0)
        monkeypatch.setattr(model_text, "monotonic", lambda: clock.now)
        parsers = FailingParsers(*errors)
        made.append(ModelTexts(FrontendSettings(), Metrics().tokenizer, parsers))
        return made[-1], parsers, clock

    yield make
    for texts in made:
        texts.close()


@pytest.mark.parametrize("error", [MemoryError(), full_disk(), TimeoutError("no answer")], ids=repr)
async def test_a_failure_of_the_machine_is_tried_again_after_a_pause_that_doubles(failing, view_of, error):
    texts, parsers, clock = failing(error, error)
    view = view_of(byte_level_tokenizer(), tool_parser="tags")
    for loads, pause_s in ((1, 1.0), (2, 2.0)):
        for _ in range(3):  # within the pause nobody tries
            with pytest.raises(RequestRejected, match="could not be loaded") as raised:
                await texts.of(view)
            assert (raised.value.kind, raised.value.code) == (Rejection.UNAVAILABLE, "tokenizer_not_loaded")
            assert raised.value.retry_after_s
            clock.now += 0.3 * pause_s
        assert parsers.loads == loads
        clock.now += pause_s
    assert (await texts.of(view)).parser is not None


async def test_files_that_cannot_be_used_are_tried_again_only_when_the_model_is_published(failing, view_of):
    texts, parsers, clock = failing(KeyError("bad"), KeyError("bad"))
    view = view_of(byte_level_tokenizer(), tool_parser="tags")
    for tried in range(2):
        for call in (texts.publish, texts.of):
            with pytest.raises(RequestRejected) as raised:
                await call(view)
            assert (raised.value.kind, raised.value.code) == (Rejection.INTERNAL, "unusable_tokenizer")
            clock.now += 3600.0
        assert parsers.loads == tried + 1
    await texts.publish(view)
    await texts.publish(view)  # what is there stays
    assert parsers.loads == 3


async def test_a_loader_that_hangs_keeps_no_process_from_leaving(tmp_path):
    script = """
import asyncio, time
from penstock.frontend.text.model_text import ModelTexts
from penstock.frontend.settings import FrontendSettings
from penstock.metrics import Metrics
from tests.frontend.conftest import byte_level_tokenizer, view_of

class Parsers:
    def has(self, answering):
        return True

    def load(self, model):
        print("loading", flush=True)
        time.sleep(60)

async def main():
    texts = ModelTexts(FrontendSettings(), Metrics().tokenizer, Parsers())
    view = view_of(byte_level_tokenizer(), tool_parser="tags")
    with_limit = asyncio.wait_for(texts.of(view), 1.0)
    await asyncio.gather(with_limit, return_exceptions=True)
    texts.close()

asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=subprocess.PIPE)
    output, _ = await asyncio.wait_for(process.communicate(), 30.0)
    assert (output, process.returncode) == (b"loading\n", 0)


async def test_a_model_without_a_template_has_no_chat(texts, view_of, byte_level):
    text = await texts.of(view_of(byte_level, template=None))
    with pytest.raises(RequestRejected, match="no chat template") as raised:
        text.chat_prompt("tiny", chat_of("x"))
    assert raised.value.kind is Rejection.INVALID
