"""One choice of a call: its request, and its answer in the making. Tokens in, text out. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from penstock.core.attempt_times import AttemptTimes
from penstock.core.explanation import ExplainedRequest
from penstock.errors import Rejection, RequestRejected
from penstock.frontend.reply import Reply
from penstock.frontend.text.detokenize import Detokenizer
from penstock.frontend.text.logprobs import NO_LOGPROB, LogprobFormat
from penstock.frontend.text.repetition import REPETITION, RepetitionDetector
from penstock.frontend.text.stop_strings import StopMatcher
from penstock.shapes import Delta, FinishReason, JsonObject, Parsed, PromptLogprob, Request, TokenLogprob

# About what one token adds to an answer not yet sent: its log-probabilities, its id.
LOGPROB_CHARS = 128
TOKEN_ID_CHARS = 8


class Choice:
    """`feed` takes the engine's output, `take` gives what is new. The last output sets `finish_reason`.

    Choices are numbered prompt by prompt: choice k of prompt p has index p * n + k.
    """

    __slots__ = (
        "_detokenizer",
        "_echoes_logprobs",
        "_eos_tokens",
        "_includes_stop",
        "_logprob_format",
        "_logprobs",
        "_min_tokens",
        "_needs_prompt_logprobs",
        "_parts",
        "_repetition",
        "_shows_output",
        "_shows_prompt_logprobs",
        "_stop_tokens",
        "_stops",
        "_token_ids",
        "attempts",
        "cached_tokens",
        "explain",
        "finish_reason",
        "first_of_prompt",
        "index",
        "output_tokens",
        "prompt_logprobs",
        "reply",
        "request",
        "stop_reason",
        "token_at",
        "unsent_chars",
    )

    def __init__(
        self,
        index: int,
        request: Request,
        detokenizer: Detokenizer,
        *,
        first_of_prompt: bool = True,
        stops: StopMatcher | None = None,
        repetition: RepetitionDetector | None = None,
        min_tokens: int = 0,
        includes_stop: bool = False,
        stop_tokens: Collection[int] = (),
        eos_tokens: Collection[int] = (),
        reply: Reply | None = None,
        logprob_format: LogprobFormat | None = None,
        shows_token_ids: bool = False,
        shows_prompt_logprobs: bool = False,
        echo: str | None = None,
        shows_output: bool = True,
    ) -> None:
        """`first_of_prompt`: the usage counts each prompt once, with this choice. `stop_tokens` are those
        that end it, the model's own `eos_tokens` among them, part of its text only with `includes_stop`.
        `reply` gets the text instead of whoever calls `take`, to take it apart. Without a `logprob_format`
        log-probabilities are not shown. `shows_token_ids`: `take_token_ids` gives them.
        `shows_prompt_logprobs`: they are kept. `echo` is what the answer begins with; without
        `shows_output` that is all."""
        self.index = index
        self.request = request
        self.first_of_prompt = first_of_prompt
        self.reply = reply
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None  # the stop token or string that ended it; None for EOS
        self.output_tokens = 0
        self.cached_tokens = 0
        self.unsent_chars = 0
        self.prompt_logprobs: list[PromptLogprob] | None = None  # those from the second token on
        self.attempts: Sequence[AttemptTimes] = ()  # of its request; set by the call, as is the next
        self.explain: Callable[[], ExplainedRequest] | None = None  # what was decided for it
        self.token_at: float | None = None  # when the latest tokens came; kept by the call
        self._detokenizer = detokenizer
        self._stops = stops
        self._repetition = repetition
        self._min_tokens = min_tokens
        self._stop_tokens = stop_tokens
        self._eos_tokens = eos_tokens
        self._includes_stop = includes_stop
        self._logprob_format = logprob_format
        self._needs_prompt_logprobs = request.sampling.prompt_logprobs is not None
        self._echoes_logprobs = echo is not None and logprob_format is not None
        self._shows_prompt_logprobs = shows_prompt_logprobs
        self._shows_output = shows_output
        self._parts: list[str] = [echo] if echo else []
        self._logprobs: list[TokenLogprob] = []
        self._token_ids: list[int] | None = [] if shows_token_ids else None

    def feed(self, delta: Delta) -> None:
        """Take one step's tokens. Must not be called once `finish_reason` is set. Raises RequestRejected
        when the answer cannot be taken apart."""
        if self._needs_prompt_logprobs and delta.token_ids:
            self._add_prompt_logprobs(delta)
        if not self._shows_output:
            ended = None if delta.finish_reason is None else FinishReason.LENGTH
            delta = Delta([], None, ended, delta.cached_tokens)
        if self._repetition is not None:
            delta = self._cut(delta, self._repetition)
        token_ids = delta.token_ids
        self.output_tokens += len(token_ids)
        if delta.cached_tokens is not None:
            self.cached_tokens = delta.cached_tokens
        if delta.logprobs is not None:
            self._logprobs += delta.logprobs
            self.unsent_chars += LOGPROB_CHARS * len(delta.logprobs)
        if self._token_ids is not None:
            self._token_ids += token_ids
            self.unsent_chars += TOKEN_ID_CHARS * len(token_ids)
        reason = delta.finish_reason
        if reason is not None:
            if reason is FinishReason.STOP and token_ids and token_ids[-1] in self._stop_tokens:
                if token_ids[-1] not in self._eos_tokens:
                    self.stop_reason = token_ids[-1]
                if not self._includes_stop:
                    token_ids = token_ids[:-1]
            self.finish_reason = reason
        text = self._detokenizer.push(token_ids)
        if reason is not None:
            text += self._detokenizer.flush()
        if self._stops is not None and self.output_tokens > self._min_tokens:
            text = self._match(self._stops, text)
        self.unsent_chars += len(text)
        if self.reply is not None:
            self.reply.add(text, delta.token_ids, finished=self.finish_reason is not None)
        elif text:
            self._parts.append(text)

    def _cut(self, delta: Delta, repetition: RepetitionDetector) -> Delta:
        """Without what follows a repetition. As in vLLM, whatever else ends an answer counts first."""
        token_ids = delta.token_ids
        ends = delta.finish_reason is not None
        first = max(0, self._min_tokens - self.output_tokens - 1)
        end = repetition.end_of(token_ids[:-1] if ends else token_ids, first)
        if end is None:
            return delta
        self.stop_reason = REPETITION
        logprobs = None if delta.logprobs is None else delta.logprobs[:end]
        return Delta(
            token_ids[:end], logprobs, FinishReason.STOP, delta.cached_tokens, delta.prompt_logprobs
        )

    def _add_prompt_logprobs(self, delta: Delta) -> None:
        """They come with the first token. Their number is limited by itself."""
        self._needs_prompt_logprobs = False
        if delta.prompt_logprobs is None:
            message = "The worker gave no log-probabilities of the prompt."
            raise RequestRejected(message, kind=Rejection.INTERNAL)
        if self._echoes_logprobs:
            self._logprobs.append(TokenLogprob(self.request.token_ids[0], NO_LOGPROB))
            self._logprobs += delta.prompt_logprobs
        if self._shows_prompt_logprobs:
            self.prompt_logprobs = delta.prompt_logprobs

    def _match(self, stops: StopMatcher, text: str) -> str:
        text = stops.push(text)
        if stops.matched is not None:
            self.finish_reason, self.stop_reason = FinishReason.STOP, stops.matched
        elif self.finish_reason is not None:
            text += stops.flush()
        return text

    def take(self) -> tuple[str, list[TokenLogprob]]:
        """The text and the tokens' log-probabilities since the last call."""
        parts, logprobs = self._parts, self._logprobs
        self._parts = []
        if logprobs:
            self._logprobs = []
        self.unsent_chars = 0
        return parts[0] if len(parts) == 1 else "".join(parts), logprobs

    def take_token_ids(self) -> list[int] | None:
        """The token ids since the last call, whatever ended the answer among them; None when they are not
        shown."""
        token_ids = self._token_ids
        if token_ids:
            self._token_ids = []
        return token_ids

    def whole_reply(self, reply: Reply) -> Parsed:
        """The complete answer, taken apart. Raises RequestRejected(INTERNAL) when it cannot be."""
        by_stop_string = isinstance(self.stop_reason, str)
        return reply.whole(cut=by_stop_string or self.finish_reason is FinishReason.LENGTH)

    @property
    def shows_token_ids(self) -> bool:
        return self._token_ids is not None

    @property
    def shows_logprobs(self) -> bool:
        return self._logprob_format is not None

    def render_logprobs(self, logprobs: Sequence[TokenLogprob]) -> JsonObject | None:
        """The next of what `take` gave, in the shape of the API; None when they are not shown."""
        return None if self._logprob_format is None else self._logprob_format.render(logprobs)
