"""Errors as HTTP: the status of each kind of rejection, and the body in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from penstock.errors import PenstockError, Rejection, RequestRejected
from penstock.shapes import JsonObject

ErrorObject = Callable[[PenstockError], JsonObject]
"""The body of an error, in the shape of one API."""

CLIENT_LEFT_STATUS: Final = 499  # nginx has this status for it; only metrics and logs show it

_INVALID: Final = "invalid_request_error"
_SERVER: Final = "server_error"

_STATUSES: Final[dict[Rejection, tuple[int, str]]] = {
    Rejection.INVALID: (400, _INVALID),
    Rejection.UNAUTHENTICATED: (401, "authentication_error"),
    Rejection.NOT_FOUND: (404, _INVALID),
    Rejection.METHOD_NOT_ALLOWED: (405, _INVALID),
    Rejection.BODY_TOO_SLOW: (408, _INVALID),
    Rejection.BODY_TOO_LARGE: (413, _INVALID),
    Rejection.UNSUPPORTED_CONTENT: (415, _INVALID),
    Rejection.OVERLOADED: (429, "rate_limit_error"),
    Rejection.HEAD_TOO_LARGE: (431, _INVALID),
    Rejection.CLIENT_LEFT: (CLIENT_LEFT_STATUS, _INVALID),
    Rejection.INTERNAL: (500, _SERVER),
    Rejection.WORKERS_FAILED: (502, _SERVER),
    Rejection.UNAVAILABLE: (503, _SERVER),
    Rejection.TIMED_OUT: (504, _SERVER),
}
"""By kind: the HTTP status, and OpenAI's type of error."""


def kind_of(error: PenstockError) -> Rejection:
    """An error that is no rejection came from a worker."""
    return error.kind if isinstance(error, RequestRejected) else Rejection.WORKERS_FAILED


def status_of(error: PenstockError) -> int:
    """The HTTP status."""
    return _STATUSES[kind_of(error)][0]


def code_of(error: PenstockError) -> str:
    """The machine-readable reason; `worker_failed` for what came from a worker."""
    return error.code if isinstance(error, RequestRejected) else "worker_failed"


def error_object(error: PenstockError) -> JsonObject:
    """An error in OpenAI's shape."""
    field: Any = getattr(error, "field", None)
    _, error_type = _STATUSES[kind_of(error)]
    return {"error": {"message": str(error), "type": error_type, "param": field, "code": code_of(error)}}
