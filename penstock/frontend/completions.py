"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

from penstock.errors import PenstockError, RequestRejected
from penstock.frontend.answers import CompletionAnswer
from penstock.frontend.choice import Choice
from penstock.frontend.completion_objects import answer_body, envelope_of, prompt_logprobs_of
from penstock.frontend.endpoint import Beginning, Operation, PromptEncoder
from penstock.frontend.http.statuses import error_object
from penstock.frontend.nvext import nvext_fields, nvext_of
from penstock.frontend.openai import CompletionRequest, decode_completion, wanted_of
from penstock.frontend.sampling import check_vocabulary
from penstock.frontend.sse import Chunks
from penstock.frontend.text.logprobs import CompletionLogprobs
from penstock.shapes import JsonObject

COMPLETION_MAX_TOKENS: Final = 16  # OpenAI's default
OBJECT: Final = "text_completion"  # of answers and of chunks


class Completions:
    """A GenerationApi whose objects are Endpoints: texts or token ids in, their continuations out."""

    name: ClassVar = "completions"
    id_prefix: ClassVar = "cmpl-"
    operation: ClassVar = Operation(
        summary="Continues text or token ids, whole or streamed.",
        request=CompletionRequest,
        answer=CompletionAnswer,
        streams=True,
    )

    def __init__(self, request: CompletionRequest) -> None:
        most = request.max_tokens if request.max_tokens is not None else COMPLETION_MAX_TOKENS
        self.wanted = wanted_of(request, max_tokens=most, logprobs=request.logprobs)
        self._prompts = request.prompts
        self._special = request.add_special_tokens is not False
        self._request = request

    @staticmethod
    def error_object(error: PenstockError) -> JsonObject:
        return error_object(error)

    @classmethod
    def decode(cls, body: bytes) -> Completions:
        return cls(decode_completion(body))

    async def prompts(self, encoder: PromptEncoder) -> list[list[int]]:
        """The token ids of each prompt. Raises RequestRejected."""
        for prompt in self._prompts:
            if not isinstance(prompt, str):
                check_vocabulary("prompt", prompt, encoder.model.vocab_size)
        texts = [prompt for prompt in self._prompts if isinstance(prompt, str)]
        encoded = iter(await encoder.encode(texts, add_special_tokens=self._special))
        prompts = [
            next(encoded) if isinstance(prompt, str) else encoder.shortened(prompt)
            for prompt in self._prompts
        ]
        if not all(prompts):
            raise RequestRejected("A prompt is empty.", field="prompt")
        return prompts

    async def choices(self, beginning: Beginning) -> list[Choice]:
        prompts = await self.prompts(beginning)
        echoes = None
        if beginning.wanted.echo:
            echoes = [
                sent if isinstance(sent, str) and beginning.cut is None else beginning.text.text_of(prompt)
                for sent, prompt in zip(self._prompts, prompts, strict=True)
            ]
        return beginning.choices(prompts, CompletionLogprobs, echoes=echoes)

    async def body(self, beginning: Beginning, choices: Sequence[Choice]) -> bytes:
        shown = []
        for choice in choices:
            text, logprobs = choice.take()
            fields = {
                "index": choice.index,
                "text": text,
                "logprobs": choice.render_logprobs(logprobs),
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
            }
            fields.update(await prompt_logprobs_of(beginning, choice))
            if choice.shows_token_ids:
                fields["token_ids"] = choice.take_token_ids()
                fields["prompt_token_ids"] = choice.request.token_ids
            shown.append(fields)
        more = nvext_fields(beginning, choices)
        return answer_body(envelope_of(beginning, OBJECT), shown, choices, more)

    def stream(self, beginning: Beginning, choices: Sequence[Choice]) -> CompletionChunks:
        envelope = envelope_of(beginning, OBJECT)
        return CompletionChunks(
            envelope,
            len(choices),
            include_usage=self._request.include_usage,
            continuous_usage=self._request.continuous_usage,
            nvext=nvext_of(beginning),
        )


class CompletionChunks(Chunks):
    """Chunks whose text is in `text`."""

    before = first = b'"text":'
    prompt_in_choice = True
