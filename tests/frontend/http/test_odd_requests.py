"""Requests that few clients send: each is answered as RFC 9110 and 9112 say, in words, and the connection
goes on or ends as they say."""

import asyncio
import json

import pytest

BODY = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 1}).encode()
HEAD = b"host: x\r\ncontent-type: application/json\r\n"
WITH_LENGTH = HEAD + b"content-length: %d\r\n" % len(BODY)
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
NEXT = b"GET /version HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


def post(headers, body=BODY, line=b"POST /v1/completions HTTP/1.1"):
    return line + b"\r\n" + headers + b"\r\n" + body


def get(target=b"/live", method=b"GET", version=b"HTTP/1.1", headers=b""):
    return b"%b %b %b\r\nhost: x\r\n%b\r\n" % (method, target, version, headers)


async def answers(served, sent):
    """The status and the body of the first answer, and whether the next request is served."""
    reader, writer = await asyncio.open_connection(served.host, served.port)
    try:
        writer.write(sent + NEXT)
        found = await asyncio.wait_for(reader.read(-1), 10)
    finally:
        writer.close()
    first, *more = found.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").split(b"HTTP/1.1 ")[1:]
    return int(first[:3]), first.partition(b"\r\n\r\n")[2].decode(), bool(more) and b'"version"' in more[-1]


@pytest.mark.parametrize(
    "sent",
    [
        post(WITH_LENGTH + b"te: gzip\r\n"),
        post(WITH_LENGTH + b"expect: 100-Continue\r\n"),
        post(HEAD + b"transfer-encoding: Chunked\r\n", CHUNKED),
        get(b"http://x/live"),
        get(b"HTTPS://x/live?a=b"),
        get(b"http://x"),
        get(b"http://x?a=b"),
    ],
)
async def test_what_http_allows_is_served_and_the_connection_goes_on(served, sent):
    status, _, goes_on = await answers(served, sent)
    assert (status, goes_on) == (200, True)


@pytest.mark.parametrize(
    ("sent", "status", "code", "said"),
    [
        (post(WITH_LENGTH + b"expect: foo\r\n"), 417, "unsupported_expectation", "foo"),
        (
            post(HEAD + b"transfer-encoding: gzip, chunked\r\n", CHUNKED),
            501,
            "unsupported_content_encoding",
            "gzip",
        ),
        (
            post(HEAD + b"transfer-encoding: gzip\r\ntransfer-encoding: chunked\r\n", CHUNKED),
            501,
            "unsupported_content_encoding",
            "gzip, chunked",
        ),
        (get(b"/v1/completions", b"PATCH"), 405, "method_not_allowed", "use POST"),
    ],
)
async def test_what_is_refused_leaves_the_connection_to_the_next_request(served, sent, status, code, said):
    found, body, goes_on = await answers(served, sent)
    error = json.loads(body)["error"]
    assert (found, error["code"], goes_on) == (status, code, True)
    assert said in error["message"]


@pytest.mark.parametrize(
    ("sent", "status", "code", "said"),
    [
        (post(WITH_LENGTH, line=b"POST /v1/completions HTTP/2.0"), 505, "unsupported_http_version", "1.1"),
        (get(version=b"HTTP/0.9"), 505, "unsupported_http_version", "use HTTP/1.1"),
        (get(version=b"HTTP/3.0"), 505, "unsupported_http_version", "use HTTP/1.1"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "unsupported_http_version", "use HTTP/1.1"),
        (get(method=b"BREW"), 501, "unknown_method", "`BREW`"),
        (get(method=b"get"), 501, "unknown_method", "capitals"),
        (get(headers=b"x: a\r\n b\r\n"), 400, "invalid_http", "whitespace after header value"),
        (get(headers=b"x : a\r\n"), 400, "invalid_http", "header token"),
        (post(WITH_LENGTH + b"content-length: 3\r\n"), 400, "invalid_http", "Content-Length"),
        (post(HEAD + b"content-length: 5, 5\r\n"), 400, "invalid_http", "Content-Length"),
        (post(HEAD + b"transfer-encoding: gzip\r\n"), 400, "invalid_http", "Transfer-Encoding"),
        (post(HEAD + b"transfer-encoding: chunked, gzip\r\n"), 400, "invalid_http", "Transfer-Encoding"),
        (
            post(WITH_LENGTH + b"transfer-encoding: chunked\r\n", CHUNKED),
            400,
            "invalid_http",
            "Content-Length",
        ),
        (get(b"live"), 400, "invalid_http", "url"),
        (get(b"x:443", b"CONNECT"), 400, "invalid_http", "target"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", 400, "invalid_http", "TLS"),
        (b"hello\r\n\r\n", 400, "invalid_http", "method"),
    ],
)
async def test_what_cannot_be_read_is_refused_in_words_and_ends_the_connection(
    served, sent, status, code, said
):
    found, body, goes_on = await answers(served, sent)
    error = json.loads(body)["error"]
    assert (found, error["code"], goes_on) == (status, code, False)
    assert said in error["message"]


async def test_client_of_http_1_0_is_not_invited_to_send_its_body(served):
    sent = post(WITH_LENGTH + b"expect: 100-continue\r\n", line=b"POST /v1/completions HTTP/1.0")
    reader, writer = await asyncio.open_connection(served.host, served.port)
    writer.write(sent)
    found = await asyncio.wait_for(reader.read(-1), 10)
    writer.close()
    assert found.startswith(b"HTTP/1.1 200 OK\r\n")
