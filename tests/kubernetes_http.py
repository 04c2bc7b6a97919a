"""An API server's HTTP around the double (kubernetes_double.py), so that whole processes can talk to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from penstock.kubernetes import kinds
from penstock.kubernetes.api import ApiError, Kind
from tests.kubernetes_double import KubernetesDouble

KINDS = {(kind.api_version, kind.plural): kind for kind in vars(kinds).values() if isinstance(kind, Kind)}


@contextlib.asynccontextmanager
async def served(double: KubernetesDouble, folder: Path) -> AsyncIterator[Path]:
    """The kubeconfig of a server that runs meanwhile."""
    config = uvicorn.Config(_app(double), port=0, log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield kubeconfig(folder, f"http://127.0.0.1:{port}")
    finally:
        server.should_exit = True
        double.end_watches()
        await running


def kubeconfig(folder: Path, server: str) -> Path:
    """A file that names this server, and the namespace `test`."""
    file = folder / "kubeconfig"
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "double", "cluster": {"server": server}}],
        "users": [{"name": "tester", "user": {"token": "none"}}],
        "contexts": [
            {"name": "double", "context": {"cluster": "double", "user": "tester", "namespace": "test"}}
        ],
        "current-context": "double",
    }
    file.write_text(json.dumps(content))
    return file


def _app(double: KubernetesDouble) -> Starlette:
    async def answer(request: Request) -> Response:
        try:
            return await _answer(double, request)
        except ApiError as error:
            return JSONResponse(_status(error), error.status or 503)

    methods = ["GET", "POST", "PUT", "PATCH", "DELETE"]
    return Starlette(routes=[Route("/{path:path}", answer, methods=methods)])


def _parts(path: str) -> tuple[str, str, str, str, str]:
    """API version, namespace, plural, name and subresource; empty where the path has none."""
    parts = path.split("/")
    length = 2 if parts[0] == "api" else 3
    version, rest = "/".join(parts[1:length]), parts[length:]
    namespace = ""
    if rest[:1] == ["namespaces"] and len(rest) > 2:
        namespace, rest = rest[1], rest[2:]
    plural, name, subresource = (*rest, "", "", "")[:3]
    return version, namespace, plural, name, subresource


async def _answer(double: KubernetesDouble, request: Request) -> Response:
    query = request.query_params
    version, namespace, plural, name, subresource = _parts(request.path_params["path"])
    if not plural:
        served = [kind for kind in KINDS.values() if kind.api_version == version]
        resources = [{"name": kind.plural} for kind in served if await double.serves(kind)]
        return JSONResponse({"resources": resources}, 200 if served else 404)
    kind = KINDS.get((version, plural))
    if kind is None:
        raise ApiError("the server could not find the requested resource", 404, "NotFound")
    body = json.loads(await request.body() or "null")
    match request.method, bool(name):
        case "GET", False if query.get("watch"):
            watch = double.watch(
                kind,
                query["resourceVersion"],
                namespace,
                query.get("labelSelector", ""),
                int(query["timeoutSeconds"]),
            )
            return _stream({"type": change.type, "object": change.object} async for change in watch)
        case "GET", False:
            listed = await double.list(kind, namespace, query.get("labelSelector", ""))
            metadata = {"resourceVersion": listed.resource_version}
            return JSONResponse({"kind": "List", "metadata": metadata, "items": listed.items})
        case "GET", True if subresource == "log":
            await double.get(kind, name, namespace)
            tail = query.get("tailLines")
            lines = double.logs(
                name,
                namespace,
                query.get("container", ""),
                since=query.get("sinceTime", ""),
                tail_lines=int(tail) if tail else None,
            )
            return _stream(f"{line.time} {line.text}" async for line in lines)
        case "GET", True:
            return JSONResponse(await double.get(kind, name, namespace))
        case "POST", _:
            body["metadata"]["namespace"] = namespace
            return JSONResponse(await double.create(kind, body), 201)
        case "PUT", _:
            return JSONResponse(await double.replace(kind, body))
        case "PATCH", _ if request.headers["content-type"] == "application/apply-patch+yaml":
            manager = query["fieldManager"]
            return JSONResponse(await double.apply(kind, body, manager, subresource=subresource))
        case "PATCH", _:
            patched = await double.patch(kind, name, body, namespace, subresource=subresource)
            return JSONResponse(patched)
    uid = (body.get("preconditions") or {}).get("uid", "")
    if double.stored(kind, name, namespace) is None:
        raise ApiError(f'{kind} "{name}" not found', 404, "NotFound")
    await double.delete(kind, name, namespace, uid=uid)
    return JSONResponse({"kind": "Status", "status": "Success"})


def _stream(parts: AsyncIterator[Any]) -> StreamingResponse:
    """Each part as a line; what then fails as an ERROR message."""

    async def lines() -> AsyncIterator[str]:
        try:
            async for part in parts:
                yield (part if isinstance(part, str) else json.dumps(part)) + "\n"
        except ApiError as error:
            if not error.status:
                raise ConnectionResetError from error
            yield json.dumps({"type": "ERROR", "object": _status(error)}) + "\n"

    return StreamingResponse(lines())


def _status(error: ApiError) -> dict[str, Any]:
    return {"kind": "Status", "message": str(error), "reason": error.reason, "code": error.status}


class ApiServer:
    """The double and its HTTP, in a thread of their own: for tests that do not run on an event loop."""

    def __init__(self, folder: Path) -> None:
        self.double = KubernetesDouble()
        self._folder = folder
        self._loop = asyncio.new_event_loop()
        self._started: Future[Path] = Future()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> ApiServer:
        self._thread.start()
        self.kubeconfig = self._started.result(timeout=20)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def do(self, call: Coroutine[Any, Any, Any] | Callable[[], Any]) -> Any:
        """Await or call something of the double's, in its thread."""

        async def called() -> Any:
            return call() if callable(call) else await call

        return asyncio.run_coroutine_threadsafe(called(), self._loop).result(timeout=20)

    def _run(self) -> None:
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        async with served(self.double, self._folder) as kubeconfig:
            self._started.set_result(kubeconfig)
            await self._stop.wait()
