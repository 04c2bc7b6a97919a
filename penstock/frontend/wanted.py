"""What a call asks for, in the same terms for every API."""

from __future__ import annotations

import msgspec

from penstock.frontend.prompt_cut import PromptCut
from penstock.frontend.text.repetition import RepetitionDetection
from penstock.shapes import Sampling, StructuredOutput


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What every later step needs of a call's body, apart from its prompts. Made when it is decoded."""

    model: str
    choices: int = 1
    """Answers to each prompt."""

    sampling: Sampling
    """Without `max_tokens`, which depends on the prompt; without a seed unless it is `reproducible`."""

    left_out: tuple[str, ...] = ()
    """Fields of `sampling` that the client left out, for the model's own defaults."""

    max_tokens: int | None = None
    """None: what is left of the context."""

    any_max_tokens: bool = False
    """Whether `max_tokens` may be more than the whole context. Where an API requires it, clients that do
    not know the model send a default of theirs."""

    cut: PromptCut | None = None
    needs_reasoning: bool = True
    """Whether a limit of reasoning is wrong for a model without any."""

    max_tokens_field: str = "max_tokens"
    """Where the client said so; errors name it. The same for `structured_field`."""

    structured_field: str = ""
    structured_hint: StructuredOutput | None = None
    """What `sampling.structured` becomes where the engine cannot compile that; None where it must."""

    stops: tuple[str, ...] = ()
    bad_words: tuple[str, ...] = ()
    """Texts that no answer may contain."""

    repetition: RepetitionDetection | None = None
    """Which repetition ends an answer."""

    include_stop: bool = False
    """Whether a stop string that ends an answer is part of it."""

    show_special_tokens: bool = False
    echo: bool = False
    """Whether an answer begins with its prompt. With `max_tokens` 0 that is all of it."""

    prompt_logprobs: int | None = None
    """The prompt's log-probabilities are shown beside the answer, with as many alternatives."""

    show_token_ids: bool = False
    """Whether the token ids of prompts and answers are shown."""

    tokens_as_ids: bool = False
    """Whether log-probabilities are shown with token ids in place of texts."""

    extra_fields: tuple[str, ...] = ()
    """What the answer tells of how it was made (frontend/nvext.py)."""

    stream: bool = False
    priority: int = 0
    cache_salt: str = ""
    session: str = ""
    """As the body names it (frontend/sessions.py)."""
