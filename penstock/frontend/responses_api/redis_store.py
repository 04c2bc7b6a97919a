"""Responses that are kept in Redis, or in Valkey, for all frontends of a namespace.

A response is one key, which Redis deletes `age_s` after it was written or last read.

Nothing waits longer than `call_s` for the store. After a failed connection or a timeout, further calls fail
at once for `pause_s`, so that not each of them waits for a store that is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec
from redis.asyncio import BlockingConnectionPool, Connection, Redis, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from penstock.errors import ConfigError, StoreUnavailable
from penstock.logs.quiet_log import QuietLog
from penstock.net.address import is_loopback, join_address
from penstock.ports import StoredResponse

log = logging.getLogger(__name__)

_PORT = 6379
_PROTOCOL = 2  # RESP2, which every version of Redis and Valkey speaks


class RedisAddress(msgspec.Struct, frozen=True):
    """Where Redis is, and as whom to use it."""

    host: str
    port: int = _PORT
    database: int = 0
    tls: bool = False
    user: str = ""
    password: str = ""

    @property
    def shown(self) -> str:
        """For the log: without the password."""
        return f"{'rediss' if self.tls else 'redis'}://{join_address(self.host, self.port)}/{self.database}"


class RedisSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings and limits of the store."""

    address: RedisAddress

    namespace: str = "default"
    """Only frontends of the same namespace share responses."""

    age_s: float = 24 * 3600.0
    """How long a response is kept after it was made or last used."""

    value_bytes_max: int = 16 * 1024 * 1024
    """A response that has more by itself is not kept: no conversation could continue it."""

    call_s: float = 2.0
    """For one command: waiting for a connection, connecting, and the answer. The largest value takes 1.4 s
    at 100 Mbit/s."""

    pause_s: float = 1.0
    """After a failed connection or a timeout, until the store is asked again."""

    connections_max: int = 16
    """A command takes a fraction of a millisecond; further ones wait for a connection, within `call_s`."""


class _Value(msgspec.Struct):
    """What a key has. It names its owner and its response, so that what another key has, or an answer to
    somebody else's command, is never taken for it."""

    tenant: str
    stored: StoredResponse


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Value).decode


class _TlsConnection(SSLConnection):
    """The store's connections have one TLS context: to read all authorities takes some 30 ms."""

    def __init__(self, *, tls: ssl.SSLContext, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.ssl_context.context = tls


class RedisResponseStore:
    """A ResponseStore over one Redis server. Use from one event loop.

    Args:
        failed: called with every command that failed.
    """

    def __init__(self, settings: RedisSettings, failed: Callable[[], object]) -> None:
        self._settings = settings
        self._failed = failed
        self._quiet_log = QuietLog(log)
        self._asked_again_at = 0.0
        self._redis = Redis(connection_pool=_pool(settings))

    async def check(self) -> None:
        """Log whether the store answers, so that a wrong address or password shows at the start."""
        address = self._settings.address
        if not address.tls and not is_loopback(address.host):
            log.warning(
                "--response-store: conversations, and a password if there is one, travel to %s unencrypted;"
                " use rediss:// for TLS",
                address.shown,
            )
        with contextlib.suppress(StoreUnavailable):  # which is logged
            await self._execute("PING")
            log.info("responses are stored in %s", address.shown)

    async def put(self, tenant: str, stored: StoredResponse) -> bool:
        value = _encode(_Value(tenant, stored))
        if len(value) > self._settings.value_bytes_max:
            return False
        try:
            await self._execute("SET", self._key(tenant, stored.response_id), value, "PX", self._age_ms)
        except StoreUnavailable:  # which is logged, and counted
            return False
        return True

    async def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        found = await self._execute("GETEX", self._key(tenant, response_id), "PX", self._age_ms)
        if found is None:
            return None
        try:
            value = _decode(found)
        except msgspec.DecodeError as error:
            self._quiet_log.error("stored response cannot be read: reason=%s", error)
            return None
        if (value.tenant, value.stored.response_id) != (tenant, response_id):
            self._quiet_log.error("the store gave another response than was asked for")
            raise StoreUnavailable()
        return value.stored

    async def delete(self, tenant: str, response_id: str) -> bool:
        return bool(await self._execute("DEL", self._key(tenant, response_id)))

    async def close(self) -> None:
        await self._redis.connection_pool.disconnect()

    @property
    def _age_ms(self) -> int:
        return max(1, int(self._settings.age_s * 1e3))

    def _key(self, tenant: str, response_id: str) -> str:
        """Neither namespaces nor tenants have a colon in their names, so no two of them share a key."""
        return f"penstock:{self._settings.namespace}:response:{tenant}:{response_id}"

    async def _execute(self, *command: str | bytes | int) -> Any:
        """Raises StoreUnavailable."""
        if time.monotonic() < self._asked_again_at:
            self._failed()
            raise StoreUnavailable()
        try:
            async with asyncio.timeout(self._settings.call_s):
                return await self._redis.execute_command(*command)  # type: ignore[no-untyped-call]
        except (RedisError, OSError) as error:  # a TimeoutError is an OSError
            self._failed()
            if not isinstance(error, ResponseError):
                self._asked_again_at = time.monotonic() + self._settings.pause_s
            reason = str(error) or f"no answer within {self._settings.call_s:g} s"
            self._quiet_log.warning(
                "store of responses failed: address=%s reason=%r", self._settings.address.shown, reason
            )
            raise StoreUnavailable() from None


def parse_redis_url(url: str) -> RedisAddress:
    """`redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE]`, or `rediss://` with TLS. Raises ConfigError,
    which shows nothing of the URL, as that may have a password."""
    try:
        parts = urlsplit(url)
        port = parts.port or _PORT
        database = parts.path.removeprefix("/") or "0"
    except ValueError:
        raise _wrong_url() from None
    plain = not parts.query and not parts.fragment and database.isascii() and database.isdigit()
    if parts.scheme not in ("redis", "rediss") or not parts.hostname or not plain:
        raise _wrong_url()
    return RedisAddress(
        host=parts.hostname,
        port=port,
        database=int(database),
        tls=parts.scheme == "rediss",
        user=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
    )


def _wrong_url() -> ConfigError:
    return ConfigError(
        "--response-store: expected memory, none, or redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE]"
        " (rediss:// with TLS), without options"
    )


def _pool(settings: RedisSettings) -> BlockingConnectionPool:
    address = settings.address
    arguments: dict[str, Any] = {
        "host": address.host,
        "port": address.port,
        "db": address.database,
        "username": address.user or None,
        "password": address.password or None,
        "socket_timeout": None,  # `call_s` is for all that a call does
        "socket_connect_timeout": None,
        "retry": Retry(NoBackoff(), 1),  # an idle connection may have been closed
        "protocol": _PROTOCOL,
    }
    kind: type[Connection] = Connection
    if address.tls:
        kind = _TlsConnection
        arguments["tls"] = ssl.create_default_context()
    return BlockingConnectionPool(
        max_connections=settings.connections_max,
        timeout=None,
        connection_class=kind,
        **arguments,
    )
