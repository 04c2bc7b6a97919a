"""The one exception tree.

    PenstockError
    ├── ConfigError       a setting or file is wrong: refuse to start
    ├── RequestRejected   the client's request cannot be served: becomes one HTTP status
    │   └── ModelReplaced no worker is left of the model's revision that it was tokenized for
    ├── RemoteError       an instance failed this attempt: another attempt is allowed
    └── ProtocolError     bytes on a link that this version cannot accept

Foreign errors (sockets, msgspec, safetensors, ...) are mapped to these once, at the border where they
arise. Only `frontend/app.py` turns one into HTTP.
"""

from __future__ import annotations


class PenstockError(Exception):
    """Base of every error that Penstock raises on purpose."""


class ConfigError(PenstockError):
    """A setting, flag or file is wrong. The message is one line and names the field."""


class RequestRejected(PenstockError):
    """A client's request cannot be served, for a reason the client can read.

    Args:
        status: HTTP status (400, 401, 404, 413, 415, 429, 431, 499, 500, 503 or 504).
        message: one sentence for the client.
        code: machine-readable reason, e.g. `context_length_exceeded`. By default that of a wrong field.
        field: the request field at fault, as a path (`messages[0].content`); None when no field is.
        retry_after_s: seconds after which a retry may succeed; None when retrying is pointless.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str = "invalid_value",
        field: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.field = field
        self.retry_after_s = retry_after_s


class ModelReplaced(RequestRejected):
    """No worker is left of the model's revision that this request was tokenized for, and another revision
    is served. While the client has got nothing of the answer, it can be tokenized again for that one."""

    def __init__(self, model: str) -> None:
        super().__init__(
            503,
            f"`{model}` was replaced by another revision of it before this answer was complete.",
            code="model_replaced",
            retry_after_s=1.0,
        )


class RemoteError(PenstockError):
    """An instance failed an attempt; the request itself may succeed elsewhere."""


class ProtocolError(PenstockError):
    """A peer sent bytes that are not this protocol, or broke its order. The connection ends."""
