"""Errors as HTTP (frontend/http/statuses.py)."""

from __future__ import annotations

import pytest

from penstock.errors import Rejection, RemoteError, RequestRejected
from penstock.frontend.http.statuses import error_object, status_of

STATUSES = {
    Rejection.INVALID: (400, "invalid_request_error"),
    Rejection.UNAUTHENTICATED: (401, "authentication_error"),
    Rejection.NOT_FOUND: (404, "invalid_request_error"),
    Rejection.METHOD_NOT_ALLOWED: (405, "invalid_request_error"),
    Rejection.BODY_TOO_SLOW: (408, "invalid_request_error"),
    Rejection.BODY_TOO_LARGE: (413, "invalid_request_error"),
    Rejection.UNSUPPORTED_CONTENT: (415, "invalid_request_error"),
    Rejection.UNMET_EXPECTATION: (417, "invalid_request_error"),
    Rejection.OVERLOADED: (429, "rate_limit_error"),
    Rejection.URL_TOO_LONG: (414, "invalid_request_error"),
    Rejection.HEAD_TOO_LARGE: (431, "invalid_request_error"),
    Rejection.CLIENT_LEFT: (499, "invalid_request_error"),
    Rejection.INTERNAL: (500, "server_error"),
    Rejection.NOT_IMPLEMENTED: (501, "invalid_request_error"),
    Rejection.WORKERS_FAILED: (502, "server_error"),
    Rejection.UNAVAILABLE: (503, "server_error"),
    Rejection.TIMED_OUT: (504, "server_error"),
    Rejection.UNSUPPORTED_VERSION: (505, "invalid_request_error"),
}


@pytest.mark.parametrize("kind", Rejection)
def test_rejection_of_each_kind_has_its_status_and_type(kind: Rejection) -> None:
    error = RequestRejected("why", kind=kind)
    assert (status_of(error), error_object(error)["error"]["type"]) == STATUSES[kind]


def test_rejection_shows_message_code_and_field() -> None:
    error = RequestRejected("why", code="missing_field", field="messages[0]")
    assert error_object(error)["error"] == {
        "message": "why",
        "type": "invalid_request_error",
        "param": "messages[0]",
        "code": "missing_field",
    }


def test_rejection_without_a_code_shows_its_kind_as_code() -> None:
    error = RequestRejected("why", kind=Rejection.OVERLOADED)
    assert error_object(error)["error"]["code"] == "overloaded"


def test_error_of_a_worker_is_a_502() -> None:
    error = RemoteError("step failed")
    assert status_of(error) == 502
    assert error_object(error)["error"] == {
        "message": "step failed",
        "type": "server_error",
        "param": None,
        "code": "worker_failed",
    }
