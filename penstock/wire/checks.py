"""What a message must be in itself, beyond the limits of each of its values, which are in their types.

Each check raises ProtocolError, which names the field.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from penstock.errors import ProtocolError
from penstock.shapes import Attempt, Card
from penstock.wire.messages import Generate, Welcome

_DEFAULT_RANGES: Final = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "top_k": (-1.0, 2.0**31 - 1),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
    "repetition_penalty": (1e-3, 100.0),
}
"""What a model may recommend: requests that leave these out are sent with them, so they are bounded as in
shapes.Sampling."""


def check_card(card: Card) -> None:
    """A worker's card: what its model recommends for requests."""
    for name, value in card.model.answering.sampling_defaults.items():
        low, high = _DEFAULT_RANGES.get(name, (value, value))
        if not low <= value <= high:
            field = f"card.engine.model.answering.sampling_defaults.{name}"
            raise ProtocolError(f"{field}: {value:g}, expected {low:g} to {high:g}")


def check_attempt(attempt: Attempt) -> None:
    """An attempt, whatever the engine; engines/active.py says whether one can serve it."""
    tokens = len(attempt.token_ids)
    if not 1 <= attempt.prompt_len <= tokens:
        raise ProtocolError(f"attempt.prompt_len: {attempt.prompt_len}, of {tokens} token_ids")
    if attempt.handoff is not None and not 1 <= attempt.handoff.num_tokens <= tokens:
        raise ProtocolError(f"attempt.handoff.num_tokens: {attempt.handoff.num_tokens}, of {tokens}")


CHECKS: Final[dict[type, Callable[[Any], None]]] = {
    Welcome: lambda message: check_card(message.card),
    Generate: lambda message: check_attempt(message.attempt),
}
"""By the type of the message."""
