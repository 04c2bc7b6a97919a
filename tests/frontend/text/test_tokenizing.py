"""Long prompts that wait for the tokenizer's thread: order, cancellation, refusals and deadlines."""

import asyncio
import json
import random
import threading
import time
from functools import partial

import pytest
from msgspec import structs

from penstock.frontend.http.api_keys import key_line
from penstock.frontend.settings import FrontendSettings
from penstock.frontend.text.model_text import ModelTexts
from penstock.frontend.text.tokenizing import Caller, TokenizerThread
from penstock.frontend.text.words import WordEncoder
from penstock.metrics import Metrics
from tests.frontend.tag_parsers import TagParsers
from tests.waiting import until

KEYS = {"greedy": "greedy-key-of-many-letters", "modest": "modest-key-of-many-letters"}


def new_text(chars: int, seed: int = 0) -> str:
    """Words that no cache has seen."""
    rng = random.Random(seed)
    return " ".join(f"{rng.getrandbits(60):015x}" for _ in range(chars // 16 + 1))[:chars]


class Recorded(WordEncoder):
    """Notes whose slices go, by a mark in the text."""

    order: list[str]

    def encode(self, texts):
        self.order.append(texts[0].split("|")[0].strip())
        return super().encode(texts)


@pytest.fixture
def words(byte_level):
    made = Recorded(byte_level, json.loads(byte_level.to_str()))
    made.order = []
    return made


SLICE = 4096


@pytest.fixture
def thread(monkeypatch):
    monkeypatch.setattr("penstock.frontend.text.tokenizing.SLICE_CHARS", SLICE)
    made = TokenizerThread(FrontendSettings().tokenizing, Metrics().tokenizer)
    yield made
    made.close()


def marked(name: str, slices: int) -> str:
    """A text of so many slices, each of which begins with `name|`."""
    part = f" {name}|" + new_text(SLICE).replace(" ", "-")
    return (part * slices)[1:]


def start(thread, words, tenant, text, priority=0):
    return asyncio.ensure_future(
        thread.encode(words, [text], Caller(tenant, priority, time.perf_counter(), 60.0))
    )


async def test_slices_of_two_keys_alternate(thread, words, byte_level):
    texts = {name: marked(name, slices) for name, slices in (("g1", 6), ("g2", 6), ("m1", 1), ("m2", 1))}
    greedy = [start(thread, words, "greedy", texts[name]) for name in ("g1", "g2")]
    await asyncio.sleep(0)  # it has begun
    modest = [start(thread, words, "modest", texts[name]) for name in ("m1", "m2")]
    for name, task in zip(texts, [*greedy, *modest], strict=True):
        (token_ids,) = await task
        assert list(token_ids) == byte_level.encode(texts[name], add_special_tokens=False).ids
    assert words.order[0] == "g1"
    assert sorted(words.order[1:4]) == ["g1", "m1", "m2"]
    assert words.order[4:] == ["g1"] * 4 + ["g2"] * 6


async def test_cancelled_prompt_is_not_tokenized(thread, words):
    first = start(thread, words, "a", marked("first", 2))
    second = start(thread, words, "a", marked("second", 2))
    third = start(thread, words, "a", marked("third", 1))
    await asyncio.sleep(0)
    second.cancel()
    await first
    await third
    assert words.order == ["first", "first", "third"]


async def test_error_in_one_prompt_leaves_others_alone(thread, words, monkeypatch):
    class Broken(Recorded):
        def encode(self, texts):
            raise ZeroDivisionError

    words.__class__ = Broken
    broken = start(thread, words, "a", marked("broken", 3))
    with pytest.raises(ZeroDivisionError):
        await broken
    words.__class__ = Recorded
    await start(thread, words, "a", marked("whole", 1))
    assert words.order == ["whole"]


# --- over HTTP ------------------------------------------------------------------------------------


@pytest.fixture
def serving(serve_script, view_of, byte_level, tmp_path):
    """A server with two keys and room for millions of tokens."""
    keys = tmp_path / "keys"
    keys.write_text("".join(f"{key_line(name, key)}\n" for name, key in KEYS.items()))

    def start(**settings):
        views = [view_of(byte_level, max_model_len=4_000_000)]
        return serve_script("x", views=views, api_keys_file=str(keys), **settings)

    return start


def ask(served, tenant, prompt, **fields):
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 1, **fields}
    headers = {"Authorization": f"Bearer {KEYS[tenant]}"}
    call = served.http.post("/v1/completions", json=body, headers=headers, timeout=120.0)
    return asyncio.ensure_future(call)


def metric(served, name):
    lines = served.metrics.render().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"penstock_tokenizer_{name}"))


async def test_long_prompts_of_one_key_do_not_delay_another_key(serving):
    """Those of the second are tokenized between slices of the first one's first prompt."""
    async with serving() as served:
        greedy = [ask(served, "greedy", new_text(400_000, seed)) for seed in range(3)]
        await until(lambda: metric(served, "queued ") == 3)
        for seed in range(3):
            answer = await ask(served, "modest", new_text(10_000, 100 + seed))
            assert answer.status_code == 200
            # Shorter ones do not even wait for a slice.
            assert (await ask(served, "greedy", new_text(5000, 200 + seed))).status_code == 200
        assert not all(task.done() for task in greedy)
        assert [answer.status_code for answer in await asyncio.gather(*greedy)] == [200] * 3
        ages_s = [request.age_s for request in served.completer.requests if request.tenant == "greedy"]
        assert max(ages_s) == ages_s[-1]
        assert metric(served, "queue_seconds_count") == 6
        assert (
            metric(served, "queued ")
            == metric(served, "queued_chars")
            == metric(served, "wait_seconds")
            == 0
        )


async def test_short_prompts_of_one_call_wait_for_the_thread_when_they_are_long_together(
    serving, byte_level
):
    async with serving() as served:
        prompts = [f"{number} {new_text(900, number)}" for number in range(20)]
        assert (await ask(served, "modest", [*prompts, "", [5, 6]])).status_code == 400
        assert (await ask(served, "modest", prompts)).status_code == 200
        ids = [request.token_ids for request in served.completer.requests]
        assert ids == [byte_level.encode(prompt).ids for prompt in prompts]
        assert metric(served, "queue_seconds_count") == 1


async def test_calls_of_one_moment_wait_for_the_thread_when_they_are_long_together(byte_level, view_of):
    model_texts = ModelTexts(FrontendSettings(), (metrics := Metrics()).tokenizer)
    text = await model_texts.of(view_of(byte_level))
    prompts = [new_text(3000, seed) for seed in range(10)]

    def encode(prompt):
        return text.encode([prompt], Caller("", 0, time.perf_counter(), 60.0), add_special_tokens=False)

    encoded = await asyncio.gather(*map(encode, prompts))
    assert encoded == [[byte_level.encode(prompt).ids] for prompt in prompts]
    rendered = metrics.render().decode()
    assert "penstock_tokenizer_queue_seconds_count 8.0" in rendered
    for seed in range(10, 14):  # one after the other
        await encode(new_text(3000, seed))
        await asyncio.sleep(0)
    assert metrics.render().decode().count("penstock_tokenizer_queue_seconds_count 8.0") == 1
    model_texts.close()


async def test_prompt_that_would_wait_too_long_is_refused_at_once(serving, caplog):
    caplog.set_level("INFO", "penstock.frontend")
    tokenizing = FrontendSettings().tokenizing
    async with serving(tokenizing=structs.replace(tokenizing, max_wait_ms=1000.0)) as served:
        first = ask(served, "greedy", new_text(3_000_000, 1))
        await until(lambda: metric(served, "queued ") == 1)
        refused = await ask(served, "greedy", new_text(1_000_000, 2))
        assert not first.done()
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        error = refused.json()["error"]
        assert (error["code"], error["type"]) == ("overloaded", "rate_limit_error")
        assert "waiting for the tokenizer (reason=wait " in error["message"]
        first.cancel()
        assert metric(served, 'rejected_total{reason="wait"}') == 1
    (line,) = [record.getMessage() for record in caplog.records if "status=429" in record.getMessage()]
    assert f"finish=overloaded tenant=greedy error={error['message']!r}" in line


async def test_prompts_of_clients_that_hung_up_are_not_tokenized(serving, caplog):
    caplog.set_level("INFO", "penstock.frontend")
    async with serving() as served:
        tasks = [ask(served, "greedy", new_text(2_000_000, seed)) for seed in range(3)]
        await until(lambda: metric(served, "queued ") == 3)
        for task in tasks:
            task.cancel()
        await until(lambda: metric(served, "queued ") == 0)
        assert (await ask(served, "greedy", new_text(10_000, 9))).status_code == 200
        assert len(served.completer.requests) == 1
    assert sum("status=499" in record.getMessage() for record in caplog.records) == 3


async def test_prompt_not_tokenized_within_its_deadline_is_answered_with_503(serving):
    async with serving(prepare_timeout_s=0.2) as served:
        late = await ask(served, "greedy", new_text(4_000_000))
        assert late.status_code == 503
        assert late.json()["error"]["code"] == "tokenizer_timeout"
        assert late.headers["retry-after"] == "1"
        assert not served.completer.requests
        await until(lambda: metric(served, "queued ") == 0)


async def test_waiting_prompt_is_refused_when_the_frontend_stops(serving):
    async with serving(grace_s=0.05) as served:
        waiting = ask(served, "greedy", new_text(4_000_000))
        await until(lambda: metric(served, "queued ") == 1)
        served.stop.set()
        assert (await waiting).json()["error"]["code"] == "shutting_down"


class SlowParsers(TagParsers):
    """Load a model when they are told to."""

    def __init__(self):
        self.loading, self.go_on = threading.Event(), threading.Event()

    def load(self, model):
        self.loading.set()
        self.go_on.wait(60)
        return super().load(model)


@pytest.fixture
def serve_slow(serve_script, view_of, byte_level):
    """A server with two models, one of which is slow to load."""
    views = [
        view_of(byte_level, max_model_len=100_000),
        view_of(byte_level, name="slow", revision="other", reasoning_parser="tag"),
    ]
    return partial(serve_script, "x", views=views)


def post(served, model, prompt):
    body = {"model": model, "prompt": prompt, "max_tokens": 1}
    return asyncio.ensure_future(served.http.post("/v1/completions", json=body, timeout=60.0))


async def test_slow_load_of_one_model_does_not_delay_another(serve_slow):
    parsers = SlowParsers()
    async with serve_slow(parsers=parsers) as served:
        assert (await post(served, "tiny", "Hi")).status_code == 200
        slow = post(served, "slow", "Hi")
        try:
            await asyncio.to_thread(parsers.loading.wait, 30)
            assert (await post(served, "tiny", new_text(20_000))).status_code == 200
            assert not slow.done()
        finally:
            parsers.go_on.set()
        assert (await slow).status_code == 200


async def test_request_for_a_model_that_loads_too_slowly_is_answered_with_503(serve_slow):
    parsers = SlowParsers()
    async with serve_slow(parsers=parsers, prepare_timeout_s=0.2) as served:
        try:
            late = await post(served, "slow", "Hi")
        finally:
            parsers.go_on.set()
        assert (late.status_code, late.json()["error"]["code"]) == (503, "tokenizer_timeout")
    async with serve_slow(parsers=parsers) as served:
        assert (await post(served, "slow", "Hi")).status_code == 200
