"""A client for the part of etcd's v3 API that discovery uses, over the JSON gateway of every member.

JSON over HTTP is used instead of gRPC: it is a part of etcd, it needs no compiled package of 20 MB with
threads of its own, a cancelled call ends at once, and it works with Penstock's TLS contexts. The gateway
writes int64 as text and bytes as base64; msgspec decodes both.

A call tries the members in turn, each with a deadline, beginning with the one that answered last. It tries
the next member if one does not answer, or reports that it has lost contact with the others.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

import httpcore2  # noqa: F401 - else the first client imports it, while the event loop waits
import httpx2
import msgspec

from penstock.detached import PatientCaller
from penstock.discovery.etcd_settings import EtcdSettings
from penstock.errors import ConfigError, PenstockError

INVALID_ARGUMENT, NOT_FOUND, OUT_OF_RANGE, UNAUTHENTICATED = 3, 5, 11, 16
"""gRPC status codes that matter to callers."""

_MEMBER_FAILED = {1, 2, 4, 8, 13, 14}
"""Codes of a failure of the member rather than a refusal of the call: cancelled, unknown, deadline
exceeded, resource exhausted, internal, unavailable."""

_TOKEN_REFUSED = ("invalid auth token", "revision of auth store is old", "user name is empty")
"""Messages by which etcd refuses a token: it has forgotten the token, or its users were changed."""

_TEXT_MAX = 200
"""Most characters shown of a reply that is not etcd's JSON."""

Reply = TypeVar("Reply", bound=msgspec.Struct)


class EtcdError(PenstockError):
    """A call to etcd failed. `code` is gRPC's status code; 14, unavailable, if no member answered."""

    def __init__(self, message: str, code: int = 14) -> None:
        super().__init__(message)
        self.code = code


class Header(msgspec.Struct):
    revision: int = 0


class KeyValue(msgspec.Struct):
    key: bytes = b""
    value: bytes = b""
    mod_revision: int = 0
    lease: int = 0


class RangeReply(msgspec.Struct):
    header: Header
    kvs: list[KeyValue] = []
    count: int = 0


class TxnReply(msgspec.Struct):
    header: Header
    succeeded: bool = False


class LeaseReply(msgspec.Struct):
    ttl: int = msgspec.field(name="TTL", default=0)


class Event(msgspec.Struct):
    kv: KeyValue
    type: str = "PUT"


class WatchReply(msgspec.Struct):
    canceled: bool = False
    compact_revision: int = 0
    cancel_reason: str = ""
    events: list[Event] = []


class _ErrorReply(msgspec.Struct):
    """An error of etcd, in a reply or in a stream."""

    message: str = ""
    code: int = 0
    grpc_code: int = 0


class _Streamed(msgspec.Struct, Generic[Reply]):
    """A message of a stream."""

    result: Reply | None = None
    error: _ErrorReply | None = None


class _Token(msgspec.Struct):
    token: str


class _Done(msgspec.Struct):
    """A reply whose content does not matter."""


class EtcdClient:
    """A client of one etcd cluster, for one event loop. Methods raise EtcdError. `close` it at the end."""

    def __init__(self, settings: EtcdSettings) -> None:
        """Raises ConfigError when the TLS files cannot be used."""
        self._settings = settings
        self._at = 0  # index of the endpoint in use
        self._token = ""
        self._tls: ssl.SSLContext | None = None
        self._loader: PatientCaller[None] = PatientCaller(settings.call_s)
        if any(endpoint.startswith("https:") for endpoint in settings.endpoints):
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            settings.load_tls(self._tls)
        self._http = httpx2.AsyncClient(
            verify=self._tls or False,
            trust_env=False,  # no proxy: etcd is in the same network
            # Deadlines are kept in this class, except those of connecting, TCP and TLS with half each: if a
            # handshake were cancelled from outside, the library would leave its socket open.
            timeout=httpx2.Timeout(None, connect=settings.call_s / 2),
            headers={"accept-encoding": "identity"},
        )

    async def list_below(self, prefix: str, limit: int) -> RangeReply:
        """The keys below a prefix with their values, at most `limit`. `count` is the number of all such
        keys."""
        return await self._call("kv/range", _below(prefix) | {"limit": limit}, RangeReply)

    async def get(self, key: str) -> KeyValue | None:
        """A key with its value; None if there is no such key."""
        reply = await self._call("kv/range", {"key": _base64(key)}, RangeReply)
        return reply.kvs[0] if reply.kvs else None

    async def put(self, key: str, value: bytes, lease: int, mod_revision: int) -> bool:
        """Write a key if it has not changed since `mod_revision` (0: if it does not exist). Returns whether
        it was written."""
        unchanged = {"key": _base64(key), "target": "MOD", "result": "EQUAL", "mod_revision": mod_revision}
        put = {"key": _base64(key), "value": base64.b64encode(value).decode(), "lease": lease}
        body = {"compare": [unchanged], "success": [{"request_put": put}]}
        return (await self._call("kv/txn", body, TxnReply)).succeeded

    async def grant(self, lease: int, ttl_s: int) -> None:
        """Create a lease with this id."""
        await self._call("lease/grant", {"ID": lease, "TTL": ttl_s}, LeaseReply)

    async def keep_alive(self, lease: int) -> bool:
        """Renew a lease. Returns False if it does not exist."""
        reply = await self._call("lease/keepalive", {"ID": lease}, _Streamed[LeaseReply])
        return reply.result is not None and reply.result.ttl > 0

    async def revoke(self, lease: int) -> None:
        """End a lease; etcd then deletes its keys."""
        try:
            await self._call("lease/revoke", {"ID": lease}, _Done)
        except EtcdError as error:
            if error.code != NOT_FOUND:
                raise

    async def watch(self, prefix: str, revision: int, handle: Callable[[WatchReply], None]) -> None:
        """Call `handle` with the changes below a prefix since a revision, until the stream ends.

        Raises EtcdError, with OUT_OF_RANGE if etcd no longer has the revision. The caller must set a
        timeout, since a stream may stay silent for ever.
        """
        endpoint = self._settings.endpoints[self._at]
        body = {"create_request": _below(prefix) | {"start_revision": revision}}
        line = b""
        try:
            async with self._http.stream("POST", f"{endpoint}/v3/watch", **self._request(body)) as response:
                if response.status_code != httpx2.codes.OK:
                    raise _refusal(response.status_code, await self._read(response))
                async for chunk in response.aiter_raw():
                    *lines, line = (line + chunk).split(b"\n")
                    for whole in lines:
                        handle(_watched(whole))
                    self._check_size(len(line))
        except (httpx2.HTTPError, OSError) as error:
            raise EtcdError(f"{endpoint}: {_said(error)}") from error
        if line:
            handle(_watched(line))

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    # --- calls --------------------------------------------------------------------------------------

    async def _call(self, path: str, body: dict[str, Any], reply: type[Reply]) -> Reply:
        """Try the members in turn, and again with a new token if the token was refused."""
        try:
            return await self._try_members(path, body, reply)
        except EtcdError as error:
            if not (self._settings.user and any(words in str(error) for words in _TOKEN_REFUSED)):
                raise
        self._token = ""
        name_and_password = {"name": self._settings.user, "password": self._settings.password}
        self._token = (await self._try_members("auth/authenticate", name_and_password, _Token)).token
        return await self._try_members(path, body, reply)

    async def _try_members(self, path: str, body: dict[str, Any], reply: type[Reply]) -> Reply:
        failed = []
        for _ in self._settings.endpoints:
            at = self._at
            endpoint = self._settings.endpoints[at]
            try:
                async with asyncio.timeout(self._settings.call_s):
                    return await self._ask(endpoint, path, body, reply)
            except (httpx2.HTTPError, OSError) as error:
                failed.append(f"{endpoint}: {_said(error)}")
            except EtcdError as error:
                if error.code not in _MEMBER_FAILED:
                    raise
                failed.append(f"{endpoint}: {error}")
            if self._at == at:  # else another task has already moved on
                self._at = (at + 1) % len(self._settings.endpoints)
        await self._tls_again(failed)
        raise EtcdError("; ".join(failed))

    async def _tls_again(self, failed: list[str]) -> None:
        """Load the TLS files again after a failure, since they may have been replaced."""
        if self._tls is not None:
            try:
                await self._loader.result(partial(self._settings.load_tls, self._tls))
            except ConfigError as error:
                failed.append(str(error))
            except TimeoutError as error:
                failed.append(f"reading the TLS files: {error}")

    async def _ask(self, endpoint: str, path: str, body: dict[str, Any], reply: type[Reply]) -> Reply:
        async with self._http.stream("POST", f"{endpoint}/v3/{path}", **self._request(body)) as response:
            content = await self._read(response)
        if response.status_code != httpx2.codes.OK:
            raise _refusal(response.status_code, content)
        return _decoded(content, reply)

    async def _read(self, response: httpx2.Response) -> bytes:
        content = bytearray()
        async for chunk in response.aiter_raw():
            content += chunk
            self._check_size(len(content))
        return bytes(content)

    def _request(self, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"authorization": self._token} if self._token else {}
        return {"content": msgspec.json.encode(body), "headers": headers}

    def _check_size(self, size: int) -> None:
        if size > self._settings.reply_bytes_max:
            raise EtcdError(f"the reply has more than {self._settings.reply_bytes_max} bytes")


def _decoded(content: bytes, reply: type[Reply]) -> Reply:
    try:
        decoded = msgspec.json.decode(content, type=reply, strict=False)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise EtcdError(f"the answer is not etcd's: {error}") from error
    if isinstance(decoded, _Streamed) and decoded.error is not None:
        raise EtcdError(decoded.error.message, decoded.error.grpc_code or decoded.error.code)
    return decoded


def _watched(line: bytes) -> WatchReply:
    reply = _decoded(line, _Streamed[WatchReply]).result or WatchReply()
    if reply.canceled:
        code = OUT_OF_RANGE if reply.compact_revision else UNAUTHENTICATED
        raise EtcdError(reply.cancel_reason or "the watch was cancelled", code)
    return reply


def _refusal(status: int, content: bytes) -> EtcdError:
    try:
        said = msgspec.json.decode(content, type=_ErrorReply)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        text = content[:_TEXT_MAX].decode(errors="replace").strip()
        return EtcdError(f"HTTP {status} instead of an answer: {text!r}")
    return EtcdError(said.message, said.code or said.grpc_code)


def _said(error: BaseException) -> str:
    """The message of the error's first cause: `connection refused` rather than `read error`."""
    if isinstance(error, TimeoutError | httpx2.TimeoutException):
        return "no answer in time"
    said = type(error).__name__
    cause: BaseException | None = error
    while cause is not None:
        said = str(cause) or said
        cause = cause.__cause__ or cause.__context__
    return said


def _below(prefix: str) -> dict[str, Any]:
    end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
    return {"key": _base64(prefix), "range_end": _base64(end)}


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
