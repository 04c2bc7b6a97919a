"""Errors as HTTP: the status of each kind of rejection, and the body in the shape of each API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from penstock.errors import PenstockError, Rejection, RequestRejected
from penstock.shapes import JsonObject

REQUEST_ID: Final = "request_id"

ErrorObject = Callable[[PenstockError], JsonObject]
"""The body of an error, in the shape of one API. Where it has a REQUEST_ID, the exchange fills that in."""

CLIENT_LEFT_STATUS: Final = 499  # nginx has this status for it; only metrics and logs show it

_INVALID: Final = "invalid_request_error"
_SERVER: Final = "server_error"

_STATUSES: Final[dict[Rejection, tuple[int, str, str]]] = {
    Rejection.INVALID: (400, _INVALID, _INVALID),
    Rejection.UNAUTHENTICATED: (401, "authentication_error", "authentication_error"),
    Rejection.NOT_FOUND: (404, _INVALID, "not_found_error"),
    Rejection.METHOD_NOT_ALLOWED: (405, _INVALID, _INVALID),
    Rejection.BODY_TOO_SLOW: (408, _INVALID, "timeout_error"),
    Rejection.BODY_TOO_LARGE: (413, _INVALID, "request_too_large"),
    Rejection.URL_TOO_LONG: (414, _INVALID, "request_too_large"),
    Rejection.UNSUPPORTED_CONTENT: (415, _INVALID, _INVALID),
    Rejection.UNMET_EXPECTATION: (417, _INVALID, _INVALID),
    Rejection.OVERLOADED: (429, "rate_limit_error", "rate_limit_error"),
    Rejection.HEAD_TOO_LARGE: (431, _INVALID, "request_too_large"),
    Rejection.CLIENT_LEFT: (CLIENT_LEFT_STATUS, _INVALID, _INVALID),
    Rejection.INTERNAL: (500, _SERVER, "api_error"),
    Rejection.NOT_IMPLEMENTED: (501, _INVALID, _INVALID),
    Rejection.WORKERS_FAILED: (502, _SERVER, "api_error"),
    Rejection.UNAVAILABLE: (503, _SERVER, "overloaded_error"),
    Rejection.TIMED_OUT: (504, _SERVER, "timeout_error"),
    Rejection.UNSUPPORTED_VERSION: (505, _INVALID, _INVALID),
}
"""By kind: the HTTP status, OpenAI's type of error, and Anthropic's."""


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
    _, error_type, _ = _STATUSES[kind_of(error)]
    return {"error": {"message": str(error), "type": error_type, "param": field, "code": code_of(error)}}


def anthropic_error(error: PenstockError, request_id: str = "") -> JsonObject:
    """An error in Anthropic's shape. Its messages name the field at fault, for which there is no place."""
    _, _, error_type = _STATUSES[kind_of(error)]
    shown: JsonObject = {"type": error_type, "message": str(error)}
    if getattr(error, "field", None) == "thread":
        # By this their SDKs' tool runners know to send the whole conversation, in every turn.
        shown["details"] = {"error_code": "thread_unsupported_request"}
    return {"type": "error", "error": shown, REQUEST_ID: request_id}
