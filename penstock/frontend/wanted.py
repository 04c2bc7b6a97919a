"""What a call asks for, in the same terms for every API."""

from __future__ import annotations

import msgspec

from penstock.shapes import Sampling


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

    max_tokens_field: str = "max_tokens"
    """Where the client said so; errors name it. The same for `structured_field`."""

    structured_field: str = ""
    stops: tuple[str, ...] = ()
    bad_words: tuple[str, ...] = ()
    """Texts that no answer may contain."""

    include_stop: bool = False
    """Whether a stop string that ends an answer is part of it."""

    show_special_tokens: bool = False
    echo: bool = False
    """Whether an answer begins with its prompt. With `max_tokens` 0 that is all of it."""

    show_token_ids: bool = False
    """Whether the token ids of prompts and answers are shown."""

    tokens_as_ids: bool = False
    """Whether log-probabilities are shown with token ids in place of texts."""

    stream: bool = False
    priority: int = 0
    cache_salt: str = ""
