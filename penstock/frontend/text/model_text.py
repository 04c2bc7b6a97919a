"""Conversations and texts to token ids, and token ids to text, with each model's own files."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from time import monotonic

import jinja2
from tokenizers import Tokenizer

from penstock.detached import detached
from penstock.errors import Rejection, RequestRejected
from penstock.frontend.parsers.built_in import BuiltInParsers
from penstock.frontend.settings import FrontendSettings
from penstock.frontend.text.chat_template import CONFIG_FILE, ChatTemplate, TemplateInput, special_tokens
from penstock.frontend.text.detokenize import Detokenizer, TableDetokenizer, TokenTable, WindowDetokenizer
from penstock.frontend.text.segments import SegmentCache, Segmenter
from penstock.frontend.text.tokenizing import Caller, TokenizerThread, TurnBudget
from penstock.frontend.text.words import WordEncoder
from penstock.metrics import TokenizerMetrics
from penstock.ports import ChatParser, ChatParsers
from penstock.shapes import JsonObject, ModelView

log = logging.getLogger("penstock.frontend")

# One prompt at a time gains nothing from the library's own threads, which cost a wake-up each.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TOKENIZER_FILE = "tokenizer.json"
NOT_LOADED = "tokenizer_not_loaded"
LOAD_RETRY_MIN_S = 1.0  # after a failure that may pass; doubles up to the next
LOAD_RETRY_MAX_S = 60.0
MAX_TOKENS_AT_ONCE = 8192  # decoded on the event loop in 1 ms; more go to the tokenizer's thread
MAX_LOADED_MODELS = 16  # texts kept in memory; the least recently used one is loaded again when needed


class ModelText:
    """One model's chat template, tokenizer and parser, and the text of its tokens."""

    def __init__(
        self,
        view: ModelView,
        cache_bytes: int,
        thread: TokenizerThread,
        turn: TurnBudget,
        parsers: ChatParsers,
    ) -> None:
        """Loads the files: up to a second of work, and more for the model's parsers, if it has any.
        `thread` and `turn` are those of all models.

        Raises RequestRejected: INTERNAL when the files are unusable, UNAVAILABLE when loading them
        failed for a reason that may pass.
        """
        self._thread = thread
        self._turn = turn
        if TOKENIZER_FILE not in view.assets:
            raise _unusable(view, f"it came without {TOKENIZER_FILE}")
        try:
            self._load(view, cache_bytes)
            self.parser = _parser(view, parsers)
        except jinja2.TemplateSyntaxError as error:
            raise _unusable(view, f"chat template, line {error.lineno}: {error}") from None
        # No content of a worker's files may end a frontend. Some files make `tokenizers` panic, which is
        # no Exception; and nothing is cancelled in the loader's thread.
        except BaseException as error:  # noqa: BLE001
            reason = str(error) or repr(error)
            raise (_not_loaded(view, reason) if _may_pass(error) else _unusable(view, reason)) from None

    def _load(self, view: ModelView, cache_bytes: int) -> None:
        content = view.assets[TOKENIZER_FILE].decode()
        self._tokenizer = Tokenizer.from_str(content)
        config = json.loads(view.assets.get(CONFIG_FILE, b"{}"))
        self._template = ChatTemplate.of(view.assets)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        spec = json.loads(content)
        self._table = TokenTable.of(self._tokenizer, spec)
        self._words = WordEncoder(self._tokenizer, spec)
        self._segmenter = Segmenter(self._tokenizer.get_added_tokens_decoder().values())
        self._cache = SegmentCache(cache_bytes)
        self._prefix, self._suffix = _affixes(self._tokenizer, config)

    def detokenizer(self, prompt_ids: Sequence[int], *, special: bool = False) -> Detokenizer:
        """A detokenizer for one answer to this prompt. `special`: it shows special tokens by their
        names."""
        if self._table is not None:
            return TableDetokenizer(self._table, special=special)
        return WindowDetokenizer(self._tokenizer, prompt_ids, special=special)

    @property
    def prefix_tokens(self) -> int:
        """How many tokens the tokenizer puts before a text of its own accord."""
        return len(self._prefix)

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text of a prompt that came as token ids, special tokens by their names."""
        detokenizer = self.detokenizer((), special=True)
        return detokenizer.push(token_ids) + detokenizer.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for, special tokens by their names; for logprobs."""
        if self._table is not None:
            return self._table.raw_pieces.get(token_id, b"")
        return self._tokenizer.decode([token_id], skip_special_tokens=False).encode()

    def token_names(self, token_ids: Sequence[int]) -> list[str]:
        """The tokens as the vocabulary has them; empty for ids that no token has."""
        return [self._tokenizer.id_to_token(token_id) or "" for token_id in token_ids]

    async def decode(self, token_ids: list[int], caller: Caller) -> str:
        """The text of these ids alone, special tokens by their names."""
        work = partial(self._tokenizer.decode, token_ids, skip_special_tokens=False)
        return work() if len(token_ids) <= MAX_TOKENS_AT_ONCE else await caller.wait(self._thread.run(work))

    def chat_prompt(self, model: str, conversation: TemplateInput) -> str:
        """The prompt of a chat with the model of this name. The template writes the special tokens itself.
        Raises RequestRejected when there is none, or when it refuses the conversation."""
        if self._template is None:
            raise RequestRejected(f"`{model}` has no chat template; use /v1/completions.", field="model")
        return self._template.render(conversation)

    async def encode(
        self, texts: Sequence[str], caller: Caller, *, add_special_tokens: bool
    ) -> list[list[int]]:
        """Each text's ids. What has no place in this turn of the event loop waits for the thread. Raises
        RequestRejected(OVERLOADED) when it would wait there too long."""
        segmented = [self._segmenter.split(text) for text in texts]
        known = {segment: self._cache.get(segment) for segments in segmented for segment in segments}
        missing = [segment for segment, token_ids in known.items() if token_ids is None]
        if missing:
            if self._turn.has_place(sum(map(len, missing))):
                encoded = self._words.encode(missing)
            else:
                encoded = await caller.wait(self._thread.encode(self._words, missing, caller))
            known.update(zip(missing, encoded, strict=True))
            for segment, token_ids in zip(missing, encoded, strict=True):
                self._cache.put(segment, token_ids)
        return [self._joined(segments, known, add_special_tokens) for segments in segmented]

    def _joined(
        self, segments: list[str], known: Mapping[str, array[int] | None], add_special_tokens: bool
    ) -> list[int]:
        whole = list(self._prefix) if add_special_tokens else []
        for segment in segments:
            whole.extend(known[segment] or ())
        return whole + self._suffix if add_special_tokens else whole


class _Loading:
    """A model's text while it is loaded, and then; or the error that loading ended with."""

    def __init__(self, text: asyncio.Future[ModelText], failures: int) -> None:
        self.text = text
        self.failures = failures  # in a row, each of a kind that may pass
        self.retry_at = math.inf  # of the monotonic clock

    @property
    def failed(self) -> bool:
        return self.text.done() and (self.text.cancelled() or self.text.exception() is not None)

    def ended(self, text: asyncio.Future[ModelText]) -> None:
        """Say when to try again, if it is worth trying."""
        error = None if text.cancelled() else text.exception()
        if isinstance(error, RequestRejected) and error.code == NOT_LOADED:
            pause_s = min(LOAD_RETRY_MIN_S * 2**self.failures, LOAD_RETRY_MAX_S)
            self.failures += 1
            self.retry_at = monotonic() + pause_s
            log.warning("%s Trying again after %g s.", error, pause_s)


class ModelTexts:
    """Loads models, and keeps them. One thread tokenizes long prompts and another loads models: both would
    block the event loop, and no prompt of a loaded model waits while another model is loaded."""

    def __init__(
        self, settings: FrontendSettings, metrics: TokenizerMetrics, parsers: ChatParsers | None = None
    ) -> None:
        """`parsers`: None for the built-in ones."""
        self._settings = settings
        self._parsers = parsers or BuiltInParsers()
        self._loading: OrderedDict[str, _Loading] = OrderedDict()  # by revision
        self._one_at_a_time = asyncio.Lock()
        self._thread = TokenizerThread(settings.tokenizing, metrics)
        self._turn = TurnBudget(settings.long_text_chars)

    async def of(self, view: ModelView, caller: Caller | None = None) -> ModelText:
        """The model's text, loaded once for each revision. After a failure that may pass, loading is tried
        again after a pause, which doubles. `caller` limits the wait; without it there is no limit."""
        loading = self._loading.get(view.revision)
        if loading is None or loading.retry_at <= monotonic():
            loading = self._load(view, 0 if loading is None else loading.failures)
        self._loading.move_to_end(view.revision)
        # When one client leaves, the loading goes on for the others.
        if loading.text.done():
            return loading.text.result()
        shielded = asyncio.shield(loading.text)
        return await (shielded if caller is None else caller.wait(shielded))

    async def publish(self, view: ModelView) -> None:
        """Load a model that is about to be served, trying again at once whatever failed before. Raises as
        `of`."""
        loading = self._loading.get(view.revision)
        if loading is not None and loading.failed:
            del self._loading[view.revision]
        await self.of(view)

    def _load(self, view: ModelView, failures: int) -> _Loading:
        async def load() -> ModelText:
            async with self._one_at_a_time:
                cache_bytes = self._settings.segment_cache_bytes
                return await detached(
                    partial(ModelText, view, cache_bytes, self._thread, self._turn, self._parsers)
                )

        loading = _Loading(asyncio.ensure_future(load()), failures)
        loading.text.add_done_callback(loading.ended)
        self._loading[view.revision] = loading
        while len(self._loading) > MAX_LOADED_MODELS:
            self._loading.popitem(last=False)
        return loading

    def close(self) -> None:
        """End the threads, without waiting for a model that is being loaded."""
        self._thread.close()
        for loading in self._loading.values():
            loading.text.cancel()


def _parser(view: ModelView, parsers: ChatParsers) -> ChatParser | None:
    answering = view.card.answering
    names = [name for name in (answering.tool_parser, answering.reasoning_parser) if name]
    if not names:
        return None
    if not parsers.has(answering):
        log.warning(
            "%s needs parsers that vLLM has (%s), but vLLM is not installed here: reasoning stays in the"
            " content of answers, and tools are refused",
            view.card.name,
            ", ".join(names),
        )
        return None
    return parsers.load(view)


def _unusable(view: ModelView, reason: str) -> RequestRejected:
    message = f"The tokenizer of `{view.card.name}` cannot be used: {reason}"
    return RequestRejected(message, kind=Rejection.INTERNAL, code="unusable_tokenizer")


def _not_loaded(view: ModelView, reason: str) -> RequestRejected:
    message = f"The tokenizer of `{view.card.name}` could not be loaded: {reason}."
    return RequestRejected(
        message, kind=Rejection.UNAVAILABLE, code=NOT_LOADED, retry_after_s=LOAD_RETRY_MIN_S
    )


def _may_pass(error: BaseException) -> bool:
    """Whether it was the machine that failed (no memory, a full disk, too many open files), and not the
    model's files. Hugging Face raises OSError for files that it cannot use, too, but without a number."""
    if isinstance(error, MemoryError | TimeoutError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return True
    return error.__cause__ is not None and _may_pass(error.__cause__)


def _affixes(tokenizer: Tokenizer, config: JsonObject) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts before and after a text. `add_bos_token` and
    `add_eos_token` in tokenizer_config.json overrule it, as in transformers."""
    inner = tokenizer.encode("a", add_special_tokens=False).ids
    outer = tokenizer.encode("a", add_special_tokens=True).ids
    places = range(len(outer) - len(inner) + 1)
    start = next((place for place in places if outer[place : place + len(inner)] == inner), 0)
    prefix, suffix = outer[:start], outer[start + len(inner) :]
    tokens = special_tokens(config)
    bos, eos = (tokenizer.token_to_id(tokens.get(name, "")) for name in ("bos_token", "eos_token"))
    if bos is not None and (wanted := config.get("add_bos_token")) is not None:
        prefix = [bos] if wanted else [token_id for token_id in prefix if token_id != bos]
    if eos is not None and (wanted := config.get("add_eos_token")) is not None:
        suffix = [eos] if wanted else [token_id for token_id in suffix if token_id != eos]
    return prefix, suffix
