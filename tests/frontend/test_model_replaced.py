"""A call whose model is replaced before its client has got anything begins again with the new one."""

from __future__ import annotations

import openai
import pytest

from penstock.errors import ModelReplaced
from penstock.frontend.generation import MAX_BEGINNINGS
from penstock.shapes import Delta
from tests.frontend.conftest import (
    ScriptedCompleter,
    saying,
    serving,
    view_of,
    word_piece_tokenizer,
)

ANSWER = "you are a helpful assistant"
HI = [{"role": "user", "content": "Hi"}]


class ReplacedModel(ScriptedCompleter):
    """Serves the first view until its script says ModelReplaced, then the second, and so on."""

    def submit(self, request, on_delta, on_error):
        def on_failure(error):
            if isinstance(error, ModelReplaced) and request.model.revision == self.views[0].revision:
                self.views = self.views[1:] or self.views
            on_error(error)

        return super().submit(request, on_delta, on_failure)


@pytest.fixture
def replaced(byte_level):
    """A completer whose first revision gives these deltas before it is replaced by another tokenizer's."""
    views = [view_of(byte_level, revision="old"), view_of(word_piece_tokenizer(), revision="new")]
    answer = saying(word_piece_tokenizer(), ANSWER)

    def build(*given: Delta, views=views):
        def script(request):
            return [*given, ModelReplaced("tiny")] if request.model.revision == "old" else answer(request)

        return ReplacedModel(list(views), script)

    return build


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choices", [1, 2])
async def test_a_call_without_tokens_is_tokenized_for_the_new_revision(replaced, stream, choices) -> None:
    async with serving(replaced()) as served:
        client = served.client.chat.completions
        answer = await client.create(model="tiny", messages=HI, stream=stream, n=choices)
        if stream:
            chunks = [chunk async for chunk in answer]
            texts = [
                "".join(
                    part.delta.content or ""
                    for chunk in chunks
                    for part in chunk.choices
                    if part.index == n
                )
                for n in range(choices)
            ]
            assert {chunk.system_fingerprint for chunk in chunks} == {"fp_new"}
        else:
            texts = [choice.message.content for choice in answer.choices]
            assert answer.system_fingerprint == "fp_new"
        assert [text.strip() for text in texts] == [ANSWER] * choices
        first, last = served.completer.requests[0], served.completer.requests[-1]
        assert (first.model.revision, last.model.revision) == ("old", "new")
        assert first.token_ids != last.token_ids
        assert first.request_id != last.request_id  # late outputs of the first are not the last one's
    metrics = served.metrics.render().decode()  # once all is told
    assert 'penstock_inflight_requests{model="tiny"} 0.0' in metrics
    assert 'penstock_queued_requests{model="tiny"} 0.0' in metrics


async def test_a_whole_answer_begins_anew_even_after_tokens(replaced) -> None:
    """Its client has seen none of them."""
    async with serving(replaced(Delta([5]), Delta([6]))) as served:
        answer = await served.client.chat.completions.create(model="tiny", messages=HI)
        assert answer.choices[0].message.content.strip() == ANSWER
        assert answer.usage.completion_tokens == len(ANSWER.split())


async def test_a_stream_that_has_begun_ends_with_an_error(replaced) -> None:
    async with serving(replaced(Delta([5]), Delta([6])), default_max_tokens=9) as served:
        served.completer.step_s = 0.01
        stream = await served.client.chat.completions.create(model="tiny", messages=HI, stream=True)
        with pytest.raises(openai.APIError, match="replaced by another revision") as caught:
            async for _ in stream:
                pass
        assert caught.value.code == "model_replaced"
        assert len(served.completer.requests) == 1


async def test_a_model_that_is_replaced_again_and_again_ends_a_call_with_503(replaced, byte_level) -> None:
    async with serving(replaced(views=[view_of(byte_level, revision="old")])) as served:
        with pytest.raises(openai.InternalServerError) as caught:
            await served.client.chat.completions.create(model="tiny", messages=HI)
        assert caught.value.status_code == 503
        assert caught.value.code == "model_replaced"
        assert caught.value.response.headers["retry-after"] == "1"
        assert len(served.completer.requests) == MAX_BEGINNINGS


async def test_a_call_that_no_longer_fits_the_new_revision_hears_why(replaced, byte_level) -> None:
    small = view_of(byte_level, revision="new", max_model_len=4)
    async with serving(replaced(views=[view_of(byte_level, revision="old"), small])) as served:
        with pytest.raises(openai.BadRequestError) as caught:
            await served.client.chat.completions.create(model="tiny", messages=HI)
        assert caught.value.code == "context_length_exceeded"
