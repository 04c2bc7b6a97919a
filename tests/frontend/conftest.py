"""A scripted router, tokenizers of several families, and a real server around them."""

import asyncio
import json
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import httpx
import openai
import pytest
import uvloop
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from penstock.core.attempt_times import AttemptTimes
from penstock.core.decision_record import RoutedRequest
from penstock.core.explanation import ExplainedRequest, Explanation
from penstock.core.misses import MissReport
from penstock.core.recording import Recording, RecordingWanted
from penstock.errors import PenstockError, Rejection, RequestRejected
from penstock.frontend.app import App
from penstock.frontend.http.server import serve
from penstock.frontend.settings import FrontendSettings
from penstock.metrics import Metrics
from penstock.shapes import Delta, FinishReason, InstanceView, Load, ModelCard, ModelView, Request, Role
from tests.cards import changed

SAMPLE = """The quick brown fox jumps over the lazy dog. What is my name? My name is Ottoline.
You are a helpful assistant. Answer in one short sentence. def main(): return 42
Größe, café, naïve, 你好世界, こんにちは, привет, 😀 👍🏽 and a few numbers: 1234 567.
"""

QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def byte_level_tokenizer() -> Tokenizer:
    """As Qwen's: NFC, GPT-4-like words, byte-level BPE, ChatML's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([SAMPLE] * 3, trainer)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    marks = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in marks])
    return tokenizer


def sentencepiece_tokenizer(scheme: str = "first") -> Tokenizer:
    """As Llama 2's: BPE over Metaspace with byte fallback, `<s>` put before each prompt."""
    marks = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted(set("▁" + SAMPLE.split("Größe")[0].replace(" ", "").replace("\n", "")))
    vocabulary = {piece: number for number, piece in enumerate([*marks, *letters])}
    merges = []
    for left, right in (
        ("▁", "t"),
        ("▁t", "h"),
        ("▁th", "e"),
        ("i", "n"),
        ("▁", "a"),
        ("e", "r"),
        ("▁", "▁"),
    ):
        merges.append((left, right))
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return tokenizer


def word_piece_tokenizer() -> Tokenizer:
    """As BERT's: lower-cased, decoded with a view to its neighbours."""
    words = {word.strip(".,?:()").lower() for word in SAMPLE.split()}
    pieces = ["[UNK]", "[CLS]", "[SEP]", *sorted(words | {".", ",", "?", "##s", "##ing", "a", "##n"})]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces)) if piece}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    return tokenizer


def view_of(tokenizer: Tokenizer, *, name="tiny", template=CHATML, **changes) -> ModelView:
    config = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"}}
    if template is not None:
        config["chat_template"] = template
    config.update(changes.pop("config", {}))
    end = tokenizer.token_to_id("<|im_end|>")
    card = ModelCard(
        name,
        max_model_len=2048,
        vocab_size=tokenizer.get_vocab_size() + 8,  # padded, as real models' are
        eos_token_ids=[end] if end is not None else [],
    )
    assets = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    return changed(ModelView(card, f"{name}-0123456789abcdef", assets), **changes)


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def sentencepiece() -> Tokenizer:
    return sentencepiece_tokenizer()


@pytest.fixture(scope="session")
def word_piece() -> Tokenizer:
    return word_piece_tokenizer()


@pytest.fixture(scope="session")
def tokenizer_families() -> dict[str, Callable[[], Tokenizer]]:
    """Makers, for tests that change a tokenizer."""
    return {
        "byte-level": byte_level_tokenizer,
        "metaspace first": sentencepiece_tokenizer,
        "metaspace always": lambda: sentencepiece_tokenizer("always"),
        "word piece": word_piece_tokenizer,
    }


@pytest.fixture(scope="session", name="view_of")
def _view_of():
    return view_of


@pytest.fixture
def view(byte_level) -> ModelView:
    return view_of(byte_level)


# --- the router -----------------------------------------------------------------------------------


class ScriptedTicket:
    def __init__(self, owner: "ScriptedCompleter", request_id: str) -> None:
        self._owner = owner
        self.request_id = request_id
        self.cancelled = False
        self.done = False
        self.attempts = [
            AttemptTimes("a.1", "prefill-1", True, 0.002, 0.001, first_output_s=0.032),
            AttemptTimes("a.2", "decode-1", False, 0.032, first_output_s=0.040),
        ]

    def explain(self) -> ExplainedRequest:
        return ExplainedRequest(self.request_id, None, 0.0, "tiny", 1, "running", None, 0, None, "it", [])

    def cancel(self, *, complete: bool = False) -> None:
        if not self.done and not self.cancelled:
            self.cancelled = True
            self._owner.cancelled.append(self.request_id)


Script = Callable[[Request], list[Delta | PenstockError]]


@dataclass
class ScriptedCompleter:
    """Plays a script for each request: one item per `step_s`, from the event loop."""

    views: list[ModelView]
    script: Script
    step_s: float = 0.0
    requests: list[Request] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    absent: list[Role] = field(default_factory=list)
    serving: bool = True
    submit_error: RequestRejected | None = None
    check_error: RequestRejected | None = None
    checked: list[tuple[str, str, int]] = field(default_factory=list)
    explained: list[tuple[str, str | None]] = field(default_factory=list)
    recordings: list[Recording] = field(default_factory=list)
    aliases: dict[str, ModelView] = field(default_factory=dict)

    def models(self) -> dict[str, ModelView]:
        return {view.card.name: view for view in reversed(self.views)} | self.aliases  # the first of a name

    def model(self, name: str) -> ModelView:
        view = self.models().get(name)
        if view is None:
            raise RequestRejected(
                f"no `{name}`", kind=Rejection.NOT_FOUND, code="model_not_found", field="model"
            )
        if not self.serving:
            raise RequestRejected(
                "nobody serves it", kind=Rejection.UNAVAILABLE, code="no_worker", retry_after_s=5.0
            )
        return view

    def instances(self) -> list[InstanceView]:
        return [InstanceView("w-1", Role.AGGREGATED, "tiny", "ready", "127.0.0.1:1", Load(running=2))]

    def missing(self) -> list[Role]:
        return self.absent

    def discovery(self) -> str:
        return ""

    def explain(self, name: str, tenant: str | None) -> Explanation:
        self.explained.append((name, tenant))
        if name not in {request.call_id for request in self.requests}:
            raise RequestRejected("not kept", kind=Rejection.NOT_FOUND, code="request_not_found")
        return Explanation(name, [])

    def misses(self, last_s: float) -> tuple[MissReport, list[RoutedRequest]]:
        return MissReport(0.0, "kv", 0.0, [], {}), []

    def foresee(self, request: Request) -> ExplainedRequest:
        return ScriptedTicket(self, request.request_id).explain()

    def record(self, wanted: RecordingWanted, tenant: str | None, on_more: Callable[[], None]) -> Recording:
        self.recordings.append(Recording(wanted, tenant, 0.0, 0.0, on_more))
        return self.recordings[-1]

    def stop_recording(self, recording: Recording) -> None:
        self.recordings.remove(recording)

    def check(self, model: str, tenant: str, priority: int) -> None:
        self.checked.append((model, tenant, priority))
        if self.check_error is not None:
            raise self.check_error

    def submit(self, request, on_delta, on_error) -> ScriptedTicket:
        if self.submit_error is not None:
            raise self.submit_error
        self.requests.append(request)
        ticket = ScriptedTicket(self, request.request_id)
        steps = iter(self.script(request))

        def step() -> None:
            item = next(steps, None)
            if item is None or ticket.cancelled:
                return
            if isinstance(item, PenstockError):
                ticket.done = True
                on_error(item)
                return
            ticket.done = item.finish_reason is not None
            on_delta(item)
            asyncio.get_running_loop().call_later(self.step_s, step)

        asyncio.get_running_loop().call_later(self.step_s, step)
        return ticket


def deltas(token_ids, *, finish=FinishReason.LENGTH, cached=0, per_step=1) -> list[Delta]:
    """The tokens, `per_step` at a time; the last ones with `finish`."""
    pieces = [token_ids[start : start + per_step] for start in range(0, len(token_ids), per_step)]
    out = [Delta(piece) for piece in pieces]
    out[0].cached_tokens = cached
    out[-1].finish_reason = finish
    return out


def saying(tokenizer, text, **options) -> Script:
    """A script that always answers with `text`."""
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    return lambda request: deltas(token_ids, **options)


# --- the server -----------------------------------------------------------------------------------


class _AsyncioOfUvicorn:
    """asyncio, but it sleeps shorter."""

    def __getattr__(self, name: str) -> object:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / 20)


@pytest.fixture(autouse=True)
def servers_end_soon(monkeypatch):
    """uvicorn looks every 100 ms whether it shall end, which hundreds of tests would wait for."""
    monkeypatch.setattr("uvicorn.server.asyncio", _AsyncioOfUvicorn())


@dataclass
class Served:
    completer: ScriptedCompleter
    metrics: Metrics
    settings: FrontendSettings
    host: str
    port: int
    stop: asyncio.Event
    client: openai.AsyncOpenAI
    http: httpx.AsyncClient
    task: asyncio.Task

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


@asynccontextmanager
async def serving(completer, *, grace_s=5.0, parsers=None, store=None, inherited=None, **settings):
    settings = FrontendSettings(**{"port": 0, **settings})
    metrics, stop = Metrics(), asyncio.Event()
    app = App(completer, settings, metrics, parsers, store)
    listening = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(
        serve(
            app,
            settings,
            stop=stop,
            grace_s=grace_s,
            on_listening=lambda *at: listening.set_result(at),
            inherited=inherited,
        )
    )
    await asyncio.wait([task, listening], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    host, port = listening.result()
    url = f"http://{host}:{port}"
    # Without TLS there is no need to read all certificates, which takes longer than most tests.
    async with httpx.AsyncClient(base_url=url, timeout=60.0, verify=False, trust_env=False) as http:
        client = openai.AsyncOpenAI(
            base_url=url + "/v1", api_key="none", max_retries=0, timeout=60.0, http_client=http
        )
        try:
            yield Served(completer, metrics, settings, host, port, stop, client, http, task)
        finally:
            stop.set()
            if not task.done():
                await asyncio.wait_for(task, 60)


@pytest.fixture
def serve_script(view, byte_level):
    """`async with serve_script(script, ...)`: a server whose router plays the script (or says a text)."""

    def start(script, *, views=None, step_s=0.0, **settings):
        if isinstance(script, str):
            script = saying(byte_level, script)
        completer = ScriptedCompleter(views or [view], script, step_s)
        return serving(completer, **settings)

    return start


@pytest.fixture(name="deltas")
def _deltas():
    return deltas


@pytest.fixture(name="saying")
def _saying(byte_level):
    return partial(saying, byte_level)


@pytest.fixture
async def served(serve_script):
    async with serve_script("Hello, 你好 😀!") as running:
        yield running


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that frontends run on."""
    return {"uvloop": uvloop.new_event_loop}
