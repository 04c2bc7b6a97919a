"""The protocol of an API that generates text, and how prompts become choices for every such API."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import msgspec
from msgspec.structs import replace

from penstock.errors import PenstockError, RequestRejected
from penstock.frontend.choice import Choice
from penstock.frontend.prompt_cut import PromptCut
from penstock.frontend.reply import Reply, ReplyRules
from penstock.frontend.sampling import choice_seed, too_long, with_room
from penstock.frontend.sessions import session_of
from penstock.frontend.text.logprobs import LogprobFormat, TokenBytes
from penstock.frontend.text.model_text import ModelText
from penstock.frontend.text.repetition import RepetitionDetector
from penstock.frontend.text.stop_strings import StopMatcher
from penstock.frontend.text.tokenizing import Caller
from penstock.frontend.wanted import Wanted
from penstock.shapes import (
    MAX_PROMPT_LOGPROBS,
    JsonObject,
    ModelCard,
    ModelKey,
    Request,
    Sampling,
    TraceContext,
)

MAX_CALL_TOKENS: Final = 4 * 1024 * 1024
"""Prompt tokens of all choices of a call. Each choice's prompt goes to its worker by itself, and with this
many they fit what may wait for one worker (`max_unsent_bytes` of a link)."""

MAX_CHARS_PER_TOKEN: Final = 16
"""A text with more than this for each token of the context is refused unread. Texts have 1 to 6; tokenizing
takes a second for each million characters."""


Shape = type[msgspec.Struct]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """What /openapi.json says of an endpoint."""

    summary: str  # what it does
    request: Shape | None = None  # the class that decodes its bodies; None: it takes none
    answer: Shape | None = None  # the class of its JSON; None: it answers with something else
    error: Shape | None = None  # the class of its errors; None: OpenAI's
    content_type: str = "application/json"  # of the answer
    query: tuple[str, ...] = ()  # parameters that its address may have
    streams: bool = False  # it may answer with an event stream instead
    needs_key: bool = True  # where API keys are in use


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEncoder:
    """Tokenizes one call's prompts with one revision of its model."""

    model: ModelCard
    text: ModelText
    caller: Caller

    cut: PromptCut | None = None

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Each prompt's token ids, without those that `cut` leaves out. Raises RequestRejected: INVALID for
        a prompt that is too long to be tokenized at all, OVERLOADED when the prompts would wait too long
        for the tokenizer."""
        limit = self.model.max_model_len * MAX_CHARS_PER_TOKEN
        lengths = [len(text) for text in texts]
        if self.cut is not None:
            texts = [self.cut.of_text(text, limit) for text in texts]
        elif max(lengths, default=0) > limit:
            raise self._unread(max(lengths), limit)
        prompts = await self.text.encode(texts, self.caller, add_special_tokens=add_special_tokens)
        if self.cut is None:
            return prompts
        kept, prefix = (
            self.cut.kept_tokens(self.model),
            self.text.prefix_tokens if add_special_tokens else 0,
        )
        for prompt, length in zip(prompts, lengths, strict=True):
            if length > limit and len(prompt) < kept:  # more of it would have been kept
                raise self._unread(length, limit)
        return [self.cut.of_tokens(prompt, kept, prefix) for prompt in prompts]

    def shortened(self, token_ids: list[int]) -> list[int]:
        """A prompt that came as token ids, without those that `cut` leaves out. Raises RequestRejected."""
        if self.cut is None:
            return token_ids
        return self.cut.of_tokens(token_ids, self.cut.kept_tokens(self.model), prefix=0)

    def _unread(self, length: int, limit: int) -> RequestRejected:
        chars = f"your prompt has {length} characters, more than {limit}"
        return too_long(self.model.max_model_len, chars)


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning(PromptEncoder):
    """One beginning of a call, with one revision of its model. When another revision replaces this one
    before the client has received anything, the call begins again."""

    answer_id: str  # as clients see it
    router_key: str  # what the router's names of the choices begin with
    http_request_id: str  # for APIs whose errors repeat it
    wanted: Wanted
    sampling: Sampling  # of all choices, but for what depends on the prompt and the choice
    revision: str
    default_max_tokens: int
    holds_schemas: bool = True  # see CallRecord
    trace: TraceContext | None = None
    created: int = field(default_factory=lambda: int(time.time()))  # seconds since 1970

    def choices(
        self,
        prompts: Sequence[list[int]],
        logprob_format: Callable[[TokenBytes, int], LogprobFormat],
        rules: ReplyRules | None = None,
        echoes: Sequence[str] | None = None,
    ) -> list[Choice]:
        """The choices of each prompt. Without `rules` answers are plain text. `echoes`: what the answers to
        each prompt begin with. Raises RequestRejected."""
        wanted, model, top = self.wanted, self.model, self.sampling.logprobs
        tokens = sum(map(len, prompts)) * wanted.choices
        if tokens > MAX_CALL_TOKENS:
            message = f"`n` times prompts have {tokens} prompt tokens, more than {MAX_CALL_TOKENS}."
            raise RequestRejected(message, field="n")
        numbers = tokens * ((self.sampling.prompt_logprobs or 0) + 1)
        if self.sampling.prompt_logprobs is not None and numbers > MAX_PROMPT_LOGPROBS:
            message = f"The prompts have {numbers} log-probabilities, more than {MAX_PROMPT_LOGPROBS}."
            field = "echo" if wanted.prompt_logprobs is None else "prompt_logprobs"
            raise RequestRejected(message, field=field)
        age_s = time.perf_counter() - self.caller.since
        token_bytes = _id_bytes if wanted.tokens_as_ids else self.text.token_bytes
        special, shows_token_ids = wanted.show_special_tokens, wanted.show_token_ids
        if rules is not None:
            special = not rules.parser.skip_special_tokens
            top = top if rules.show_tokens else None
            shows_token_ids = shows_token_ids and rules.show_tokens
        stop_tokens = frozenset((*model.eos_token_ids, *self.sampling.stop_token_ids))
        session = session_of(self.caller, wanted)
        choices: list[Choice] = []
        for place, prompt in enumerate(prompts):
            sampling = with_room(self.sampling, wanted, model, len(prompt), self.default_max_tokens)
            if rules is not None:
                sampling = replace(sampling, structured=rules.parser.structured(prompt))
            for number in range(wanted.choices):
                index = len(choices)
                seed = choice_seed(sampling.seed, number)
                request = Request(
                    request_id=f"{self.router_key}-{index}",
                    model=ModelKey(model.name, self.revision),
                    token_ids=prompt,
                    sampling=sampling if number == 0 else replace(sampling, seed=seed),
                    cache_salt=wanted.cache_salt,
                    priority=self.caller.priority,
                    tenant=self.caller.tenant,
                    call_id=self.router_key,
                    client_id=self.http_request_id,
                    age_s=age_s,
                    trace=self.trace,
                    session=session,
                )
                choice = Choice(
                    index,
                    request,
                    self.text.detokenizer(prompt, special=special),
                    first_of_prompt=number == 0,
                    stops=StopMatcher(wanted.stops, wanted.include_stop) if wanted.stops else None,
                    repetition=RepetitionDetector(wanted.repetition) if wanted.repetition else None,
                    min_tokens=sampling.min_tokens,
                    includes_stop=wanted.include_stop,
                    stop_tokens=stop_tokens,
                    eos_tokens=model.eos_token_ids,
                    reply=Reply(rules, prompt) if rules is not None else None,
                    logprob_format=None if top is None else logprob_format(token_bytes, top),
                    shows_token_ids=shows_token_ids,
                    shows_prompt_logprobs=wanted.prompt_logprobs is not None,
                    echo=None if echoes is None else echoes[place],
                    shows_output=wanted.max_tokens != 0,
                )
                choices.append(choice)
        return choices


def _id_bytes(token_id: int) -> bytes:
    """A token under its id, as vLLM writes it."""
    return b"token_id:%d" % token_id


class PromptEndpoint(Protocol):
    """One call of an API that needs no worker, only a model's template and tokenizer."""

    model: str

    async def answer(self, prompts: PromptEncoder) -> JsonObject:
        """The body of the response. Raises RequestRejected."""


class PromptApi(Protocol):
    """Such an API: a class whose objects are its calls, or an object that makes them."""

    name: str  # in metrics and the log
    operation: Operation

    def error_object(self, error: PenstockError) -> JsonObject:
        """The body of a response that is an error."""

    def decode(self, body: bytes) -> PromptEndpoint:
        """A body as a call. Raises RequestRejected naming the field at fault."""


class AnswerStream(Protocol):
    """Writes the answer to one call as a stream of events."""

    def chunk(self, choice: Choice) -> bytes:
        """What is new of a choice; empty when nothing is."""

    async def end(self, choices: Sequence[Choice]) -> bytes:
        """What follows the last chunk."""

    def failed(self, error: PenstockError) -> bytes:
        """What ends a stream that has begun and cannot go on."""


class Endpoint(Protocol):
    """One call of an API that generates text, with its body decoded. Two steps follow: turn it into
    choices, write the response."""

    wanted: Wanted

    async def choices(self, beginning: Beginning) -> list[Choice]:
        """Tokenize the prompts. Raises RequestRejected. May be called again, for another revision."""

    async def body(self, beginning: Beginning, choices: Sequence[Choice]) -> bytes:
        """The whole response, once all choices are complete."""

    def stream(self, beginning: Beginning, choices: Sequence[Choice]) -> AnswerStream:
        """The response in parts."""


class GenerationApi(Protocol):
    """An API that generates text: a class whose objects are its calls, or an object that makes them."""

    name: str  # in metrics and the log
    id_prefix: str  # of answers
    operation: Operation

    def error_object(self, error: PenstockError) -> JsonObject:
        """The body of a response that is an error."""

    def decode(self, body: bytes) -> Endpoint:
        """A body as a call. Raises RequestRejected naming the field at fault."""
