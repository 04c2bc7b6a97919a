"""The `Api` port over HTTPS.

lightkube provides the server's address, the trusted authorities and the credentials: from a kubeconfig, or
from the service account of this process's pod (whose token it reads again when the token was renewed).
Requests and answers are plain JSON; typed models would drop fields that they do not know.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpcore2  # noqa: F401 - else the first client imports it, while the event loop waits
import httpx2
import msgspec
import yaml
from lightkube.config.client_adapter import ConnectionParams
from lightkube.config.kubeconfig import SERVICE_ACCOUNT, KubeConfig, SingleConfig
from lightkube.core.exceptions import ConfigError as LightkubeConfigError

from penstock.errors import ConfigError
from penstock.kubernetes.api import (
    NAMESPACE_ENDS,
    ApiError,
    Change,
    Kind,
    Listing,
    LogLine,
    Object,
    name_of,
    namespace_of,
)
from penstock.kubernetes.kinds import PODS

CALL_S = 10.0
"""Timeout of each step of a call: connecting, or receiving the next bytes of an answer."""

WHOLE_CALL_S = 30.0
"""Timeout of a whole call, from connecting to the last byte."""

CONNECTIONS_MAX = 1000
"""Most connections at one time. Each watch and each followed log has its own."""

PAGE_ITEMS = 500
"""Objects in one answer of a list. The server keeps its answers in memory."""

LINE_BYTES_MAX = 8 * 1024 * 1024
"""Longest message of a watch. An object takes at most 1.5 MB in etcd; its JSON may be longer."""

LOG_LINE_BYTES_MAX = 64 * 1024
"""A longer line of a log is split."""

LOG_SILENCE_S = 300.0
"""How long a container may write nothing before its log is requested again. The server does not report
whether the container still runs."""

SILENCE_S = 30.0
"""How much longer than requested a watch may stay open without a byte."""

_TEXT_MAX = 300
"""Most characters of a reply that an error shows."""

_decode = msgspec.json.Decoder().decode


def connect(kubeconfig: str = "") -> HttpsApi:
    """A client of the API server in the current context of a kubeconfig. Without a kubeconfig: of the
    cluster in which this process runs; outside of clusters, from $KUBECONFIG or ~/.kube/config. Raises
    ConfigError."""
    return HttpsApi(_config(kubeconfig))


def own_namespace(kubeconfig: str = "") -> str:
    """The namespace of this pod, or of the kubeconfig's current context. Raises ConfigError."""
    return _config(kubeconfig).namespace


def in_cluster() -> bool:
    """Whether this process runs in a pod that has a service account's token."""
    return Path(SERVICE_ACCOUNT, "token").exists()


def _config(kubeconfig: str) -> SingleConfig:
    try:
        if kubeconfig:
            config = KubeConfig.from_file(kubeconfig)
        elif in_cluster():
            config = KubeConfig.from_service_account()
        else:
            config = KubeConfig.from_env()
        found = config.get()
    except LightkubeConfigError as error:
        raise ConfigError(f"Kubernetes: {error}") from error
    except (OSError, yaml.YAMLError, msgspec.ValidationError, KeyError, TypeError, AttributeError) as error:
        where = kubeconfig or "the kubeconfig"
        raise ConfigError(f"Kubernetes: cannot read {where}: {str(error).splitlines()[0]}") from error
    if found is None or found.user is None:
        raise ConfigError("Kubernetes: the kubeconfig has no current context with a cluster and a user")
    return found


class HttpsApi:
    """One API server."""

    def __init__(self, config: SingleConfig) -> None:
        """Does not connect yet. Raises ConfigError if certificates cannot be read."""
        limits = httpx2.Limits(max_connections=CONNECTIONS_MAX)
        try:
            given = ConnectionParams(timeout=httpx2.Timeout(CALL_S)).httpx_params(config)
            self._http = httpx2.AsyncClient(**given, limits=limits)
        except (LightkubeConfigError, OSError, ValueError) as error:
            raise ConfigError(f"Kubernetes: {error}") from error

    async def serves(self, kind: Kind) -> bool:
        try:
            found = await self._call("GET", _root(kind))
        except ApiError as error:
            if error.is_not_found:
                return False
            raise
        return any(resource.get("name") == kind.plural for resource in found.get("resources", ()))

    async def list(self, kind: Kind, namespace: str = "", labels: str = "") -> Listing:
        items: list[Object] = []
        query = {"limit": str(PAGE_ITEMS), "labelSelector": labels}
        while True:
            page = await self._call("GET", _path(kind, namespace), query)
            with _mapped(f"listing {kind}"):
                for item in page.get("items") or ():
                    _check(item)
                    # Items of a list lack apiVersion and kind. They are added, so that all objects have
                    # them.
                    items.append({"apiVersion": kind.api_version, "kind": kind.name, **item})
                following = page["metadata"].get("continue", "")
                version = str(page["metadata"]["resourceVersion"])
            if not following:
                return Listing(items, version)
            query["continue"] = following

    async def watch(
        self, kind: Kind, resource_version: str, namespace: str = "", labels: str = "", timeout_s: int = 300
    ) -> AsyncGenerator[Change, None]:
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(timeout_s),
            "labelSelector": labels,
        }
        request = self._http.build_request(
            "GET",
            _path(kind, namespace),
            params=_given(query),
            timeout=httpx2.Timeout(CALL_S, read=timeout_s + SILENCE_S),
        )
        with _mapped(f"watching {kind}"):
            response = await self._http.send(request, stream=True)
            async with contextlib.aclosing(response):
                if response.status_code != 200:
                    await response.aread()
                    raise _error(response)
                async for line in _lines(response):
                    message = _decode(line)
                    if message["type"] == "ERROR":
                        raise _status_error(message["object"], 500)
                    change = Change(message["type"], message["object"])
                    change.object["metadata"][
                        "resourceVersion"
                    ]  # a KeyError here: the watch could not be continued without it
                    if change.type != "BOOKMARK":
                        _check(change.object)
                    yield change

    async def get(self, kind: Kind, name: str, namespace: str = "") -> Object:
        return await self._call("GET", _path(kind, namespace, name))

    async def create(self, kind: Kind, new: Object) -> Object:
        return await self._call("POST", _path(kind, namespace_of(new)), body=new)

    async def replace(self, kind: Kind, changed: Object) -> Object:
        return await self._call("PUT", _path(kind, namespace_of(changed), name_of(changed)), body=changed)

    async def apply(self, kind: Kind, wanted: Object, manager: str, *, subresource: str = "") -> Object:
        return await self._call(
            "PATCH",
            _path(kind, namespace_of(wanted), name_of(wanted), subresource),
            {"fieldManager": manager, "force": "true"},
            wanted,
            "application/apply-patch+yaml",
        )

    async def patch(
        self,
        kind: Kind,
        name: str,
        changes: Mapping[str, Any],
        namespace: str = "",
        *,
        subresource: str = "",
    ) -> Object:
        path = _path(kind, namespace, name, subresource)
        return await self._call("PATCH", path, body=changes, content_type="application/merge-patch+json")

    async def delete(self, kind: Kind, name: str, namespace: str = "", *, uid: str = "") -> None:
        options: Object = {"propagationPolicy": "Background"}
        if uid:
            options["preconditions"] = {"uid": uid}
        try:
            await self._call("DELETE", _path(kind, namespace, name), body=options)
        except ApiError as error:
            if not error.is_not_found:
                raise

    async def logs(
        self,
        name: str,
        namespace: str,
        container: str = "",
        *,
        since: str = "",
        tail_lines: int | None = None,
    ) -> AsyncGenerator[LogLine, None]:
        query = {
            "container": container,
            "follow": "true",
            "timestamps": "true",
            "sinceTime": since,
            "tailLines": "" if tail_lines is None else str(tail_lines),
        }
        request = self._http.build_request(
            "GET",
            _path(PODS, namespace, name, "log"),
            params=_given(query),
            timeout=httpx2.Timeout(CALL_S, read=LOG_SILENCE_S),
        )
        with _mapped(f"the log of {name}"):
            response = await self._http.send(request, stream=True)
            async with contextlib.aclosing(response):
                if response.status_code != 200:
                    await response.aread()
                    raise _error(response)
                time = ""
                async for part, begins in _log_parts(response):
                    text = part.decode(errors="replace")
                    if begins:
                        time, _, text = text.partition(" ")
                    yield LogLine(time, text)

    async def close(self) -> None:
        await self._http.aclose()

    async def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] = {},
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> Object:
        content = None if body is None else msgspec.json.encode(body)
        headers = {} if body is None else {"Content-Type": content_type}
        with _mapped(f"{method} {path}"):
            async with asyncio.timeout(WHOLE_CALL_S):
                response = await self._http.request(
                    method, path, params=_given(query), content=content, headers=headers
                )
            if not response.is_success:
                raise _error(response)
            answer: Object = _decode(response.content)
            if not isinstance(answer, dict):
                raise TypeError(f"{type(answer).__name__} in place of an object")
            return answer


def _root(kind: Kind) -> str:
    return f"/apis/{kind.api_version}" if kind.group else f"/api/{kind.version}"


def _path(kind: Kind, namespace: str, name: str = "", subresource: str = "") -> str:
    parts = [_root(kind)]
    if kind.namespaced and namespace:
        parts += ["namespaces", quote(namespace, safe="")]
    parts += [kind.plural, quote(name, safe=""), subresource]
    return "/".join(part for part in parts if part)


def _check(item: Object) -> None:
    """Check that an object has the fields of every object. Raises errors that `_mapped` translates."""
    metadata = item["metadata"]
    metadata["name"], metadata["resourceVersion"]


def _given(query: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in query.items() if value}


async def _lines(response: httpx2.Response) -> AsyncIterator[bytes]:
    """The messages of a watch, one per line."""
    rest = bytearray()
    async for chunk in response.aiter_bytes():
        rest += chunk
        *whole, last = rest.split(b"\n")
        rest = last
        if len(rest) > LINE_BYTES_MAX:
            raise ApiError(f"a message of a watch is longer than {LINE_BYTES_MAX} bytes")
        for line in whole:
            if line:
                yield bytes(line)


async def _log_parts(response: httpx2.Response) -> AsyncIterator[tuple[bytes, bool]]:
    """The lines of a log. A line that is too long is split."""
    rest = bytearray()
    begins = True
    async for chunk in response.aiter_bytes():
        rest += chunk
        start = 0
        while True:
            end = rest.find(b"\n", start, start + LOG_LINE_BYTES_MAX)
            if end < 0 and len(rest) - start < LOG_LINE_BYTES_MAX:
                break
            cut = end if end >= 0 else start + LOG_LINE_BYTES_MAX
            yield bytes(rest[start:cut]), begins
            begins = end >= 0
            start = cut + 1 if begins else cut
        del rest[:start]
    if rest:
        yield bytes(rest), begins


@contextlib.contextmanager
def _mapped(what: str) -> Iterator[None]:
    """Translate errors of libraries into ApiError."""
    try:
        yield
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        raise ApiError(f"{what}: {str(error) or type(error).__name__}") from error
    except LightkubeConfigError as error:
        raise ApiError(f"{what}: {error}") from error
    except (msgspec.DecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ApiError(f"{what}: the answer is not a Kubernetes API server's: {error}") from error


def _error(response: httpx2.Response) -> ApiError:
    try:
        status = _decode(response.content)
    except msgspec.DecodeError:
        status = None
    if isinstance(status, dict) and "message" in status:
        return _status_error(status, response.status_code)
    request = response.request
    text = " ".join(response.text.split())[:_TEXT_MAX]
    return ApiError(f"{request.method} {request.url.path}: {text}", response.status_code)


def _status_error(status: Mapping[str, Any], code: int) -> ApiError:
    message = " ".join(str(status.get("message", "")).split())
    reason, causes = str(status.get("reason", "")), []
    with contextlib.suppress(AttributeError, TypeError):  # the reply of a proxy may have another structure
        for cause in (status.get("details") or {}).get("causes") or ():
            causes.append((str(cause.get("field", "")), " ".join(str(cause.get("message", "")).split())))
            if cause.get("reason") == NAMESPACE_ENDS:
                reason = NAMESPACE_ENDS
    given = status.get("code")
    return ApiError(message, given if isinstance(given, int) and given else code, reason, tuple(causes))
