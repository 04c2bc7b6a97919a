"""The one exception tree.

    PenstockError
    ├── ConfigError       a setting or file is wrong: refuse to start
    ├── RequestRejected   the client's request cannot be served: of one kind of rejection
    │   └── ModelReplaced no worker is left of the model's revision that it was tokenized for
    ├── RemoteError       an instance failed this attempt: another attempt is allowed
    └── ProtocolError     bytes on a link that this version cannot accept

Foreign errors (sockets, msgspec, safetensors, ...) are mapped to these once, at the border where they
arise. Only `frontend/http/statuses.py` turns them into HTTP.
"""

from __future__ import annotations

from enum import StrEnum


class PenstockError(Exception):
    """Base of every error that Penstock raises on purpose."""


class ConfigError(PenstockError):
    """A setting, flag or file is wrong. The message is one line and names the field."""


class Rejection(StrEnum):
    """The kinds of rejection. A kind's value is the code of those that have no code of their own."""

    INVALID = "invalid_value"  # the request itself is wrong
    UNAUTHENTICATED = "unauthenticated"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    BODY_TOO_SLOW = "body_too_slow"
    BODY_TOO_LARGE = "body_too_large"
    UNSUPPORTED_CONTENT = "unsupported_content"  # a type or an encoding of the body
    UNMET_EXPECTATION = "unsupported_expectation"  # of the header Expect
    OVERLOADED = "overloaded"  # others' requests leave no room for it
    URL_TOO_LONG = "url_too_long"
    HEAD_TOO_LARGE = "headers_too_large"
    CLIENT_LEFT = "client_left"
    INTERNAL = "internal_error"
    NOT_IMPLEMENTED = "not_implemented"  # a method or an encoding that no path has
    UNSUPPORTED_VERSION = "unsupported_http_version"
    WORKERS_FAILED = "workers_failed"  # each attempt at it failed
    UNAVAILABLE = "unavailable"  # nobody can serve it now
    TIMED_OUT = "request_timeout"


class RequestRejected(PenstockError):
    """A client's request cannot be served, for a reason the client can read.

    Args:
        message: one sentence for the client.
        kind: of rejection.
        code: machine-readable reason, e.g. `context_length_exceeded`; by default that of its kind.
        field: the request field at fault, as a path (`messages[0].content`); None when no field is.
        retry_after_s: seconds after which a retry may succeed; None when retrying is pointless.
    """

    def __init__(
        self,
        message: str,
        *,
        kind: Rejection = Rejection.INVALID,
        code: str = "",
        field: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.kind = kind
        self.code = code or kind.value
        self.field = field
        self.retry_after_s = retry_after_s


class ModelReplaced(RequestRejected):
    """No worker is left of the model's revision that this request was tokenized for, and another revision
    is served. While the client has got nothing of the answer, it can be tokenized again for that one."""

    def __init__(self, model: str) -> None:
        super().__init__(
            f"`{model}` was replaced by another revision of it before this answer was complete.",
            kind=Rejection.UNAVAILABLE,
            code="model_replaced",
            retry_after_s=1.0,
        )


class StoreUnavailable(RequestRejected):
    """The store of responses does not answer, and this request needs it."""

    def __init__(self) -> None:
        super().__init__(
            "The store of responses does not answer.",
            kind=Rejection.UNAVAILABLE,
            code="response_store_unavailable",
            retry_after_s=2.0,
        )


class RemoteError(PenstockError):
    """An instance failed an attempt; the request itself may succeed elsewhere."""


class ProtocolError(PenstockError):
    """A peer sent bytes that are not this protocol, or broke its order. The connection ends."""
