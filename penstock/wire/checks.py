"""What must hold between the values of one message, beyond the limits of each, which are in their types."""

from __future__ import annotations

from penstock.errors import ProtocolError
from penstock.shapes import Attempt


def check_attempt(attempt: Attempt) -> None:
    """An attempt, whatever the engine; engines/active.py says whether one can serve it.

    Raises ProtocolError, which names the field."""
    tokens = len(attempt.token_ids)
    if not 1 <= attempt.prompt_len <= tokens:
        raise ProtocolError(f"attempt.prompt_len: {attempt.prompt_len}, of {tokens} token_ids")
    if attempt.handoff is not None and not 1 <= attempt.handoff.num_tokens <= tokens:
        raise ProtocolError(f"attempt.handoff.num_tokens: {attempt.handoff.num_tokens}, of {tokens}")
