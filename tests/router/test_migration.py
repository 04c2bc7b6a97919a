"""What a client reads while workers fail under its request: the same bytes as in peace, by HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from penstock.core.progress import ProgressLimits
from penstock.core.settings import RouterSettings
from penstock.errors import RemoteError
from penstock.frontend.app import App
from penstock.frontend.http.server import serve
from penstock.frontend.settings import FrontendSettings
from penstock.shapes import JsonObject, Role
from tests.cluster import MODEL, WAIT_S, Cluster, cluster

SIM: JsonObject = {"cost_model": "qwen3-32b/h200/tp2", "speedup": 2.0, "vocab_size": None}  # 6 ms a step
SETTINGS = RouterSettings(
    disagg="always", tick_s=0.02, progress=ProgressLimits(stuck_s=0.3, first_s=0.0, measured_steps=0)
)
HURT = {"p0": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE}
TOKENS = 90
SEAM = 30  # tokens that have come when the worker fails


class Stream:
    """One answer as it comes, choice by choice."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}
        self.pieces: dict[int, list[str]] = {}  # tokens, where there are logprobs
        self.numbers: dict[int, list[float]] = {}
        self.finished: list[tuple[int, str]] = []
        self.usage: JsonObject | None = None
        self.ended = 0

    def take(self, line: str) -> None:
        if line == "data: [DONE]":
            self.ended += 1
        elif line.startswith("data: "):
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            self.usage = chunk.get("usage") or self.usage
            for choice in chunk["choices"]:
                self._take_choice(choice)

    def _take_choice(self, choice: JsonObject) -> None:
        index = choice["index"]
        text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
        self.texts[index] = self.texts.get(index, "") + text
        if choice.get("logprobs"):
            self.pieces.setdefault(index, []).extend(choice["logprobs"]["tokens"])
            self.numbers.setdefault(index, []).extend(choice["logprobs"]["token_logprobs"])
        if choice["finish_reason"] is not None:
            self.finished.append((index, choice["finish_reason"]))

    def result(self) -> tuple[Any, ...]:
        assert self.usage is not None
        assert self.ended == 1
        usage = {key: self.usage[key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")}
        return self.texts, self.pieces, self.numbers, sorted(self.finished), usage


class Service:
    def __init__(self, it: Cluster, http: httpx.AsyncClient) -> None:
        self.it = it
        self.http = http

    async def ask(self, path: str, body: JsonObject, stream: Stream | None = None) -> Stream:
        stream = stream or Stream()
        body = {"model": MODEL, "stream": True, "stream_options": {"include_usage": True}, **body}
        async with self.http.stream("POST", path, json=body) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                stream.take(line)
        return stream


@asynccontextmanager
async def service(folder: Path, roles: dict[str, Role]) -> AsyncIterator[Service]:
    async with AsyncExitStack() as around:
        it = await around.enter_async_context(cluster(folder, roles, SETTINGS, SIM))
        settings = FrontendSettings(port=0)
        app = App(it.router, settings, it.metrics)
        stop, listening = asyncio.Event(), asyncio.get_running_loop().create_future()
        serving = asyncio.create_task(
            serve(app, settings, stop=stop, grace_s=5.0, on_listening=lambda *at: listening.set_result(at))
        )
        try:
            host, port = await asyncio.wait_for(listening, WAIT_S)
            async with httpx.AsyncClient(
                base_url=f"http://{host}:{port}", timeout=WAIT_S, verify=False, trust_env=False
            ) as http:
                yield Service(it, http)
        finally:
            stop.set()
            await asyncio.wait_for(serving, WAIT_S)


def questions(stops: list[str]) -> list[tuple[str, JsonObject]]:
    """Sampled and greedy, several choices, logprobs, and stop strings around the seam."""
    base: JsonObject = {"max_tokens": TOKENS, "seed": 5, "temperature": 0.8}
    text, chat = "/v1/completions", "/v1/chat/completions"
    return [
        (text, base | {"prompt": "A" * 40}),
        (text, base | {"prompt": "B" * 40, "n": 3, "logprobs": 2}),
        (text, base | {"prompt": "C" * 40, "temperature": 0, "logprobs": 0}),
        (chat, base | {"messages": [{"role": "user", "content": "D" * 40}], "n": 2}),
        *((text, base | {"prompt": "E" * 40, "stop": [stop]}) for stop in stops),
    ]


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Stop strings, and all answers, of a worker in peace."""

    async def ask_all() -> tuple[list[str], list[tuple[Any, ...]]]:
        folder = tmp_path_factory.mktemp("calm")
        async with service(folder, {"a0": Role.AGGREGATED}) as calm:
            text = (await calm.ask(*questions([""])[0])).texts[0]
            plain = await calm.ask("/v1/completions", questions(["x"])[-1][1] | {"stop": None})
            assert len(text) == TOKENS
            stops = [plain.texts[0][at : at + 6] for at in range(SEAM - 4, SEAM + 12, 2)]
            streams = await asyncio.gather(*(calm.ask(*each) for each in questions(stops)))
            return stops, [stream.result() for stream in streams]

    return asyncio.run(ask_all())


async def killed(it: Cluster) -> None:
    worker = it.workers.pop("d0")
    await worker.die()


async def engine_died(it: Cluster) -> None:
    worker = it.workers.pop("d0")
    worker.dies_of(next(iter(worker.engine.scheduler._active.values())).token_ids[0])
    with pytest.raises(RemoteError):
        await asyncio.wait_for(worker.task, WAIT_S)


async def step_failed(it: Cluster) -> None:
    worker = it.workers["d0"]
    runner = worker.engine._cycle._runner
    worker.fails_at(next(iter(worker.engine.scheduler._active.values())).token_ids[0])
    async with asyncio.timeout(WAIT_S):
        while worker.engine._cycle.failed_steps == 0:
            await asyncio.sleep(0.001)
    worker.engine._cycle._runner = runner


async def link_cut(it: Cluster) -> None:
    it.router.fleet.link("d0").cut("cut by the test")  # type: ignore[union-attr]


async def left(it: Cluster) -> None:
    worker = it.workers.pop("d0")
    worker.worker._settings = msgspec.structs.replace(worker.worker._settings, drain_s=0.0)
    await worker.leave()


@pytest.mark.parametrize("fault", [killed, engine_died, step_failed, link_cut, left])
async def test_no_seam(
    tmp_path: Path, wanted: tuple[list[str], list[tuple[Any, ...]]], fault: Callable[[Cluster], Any]
) -> None:
    await under(tmp_path, wanted, fault)


async def test_no_seam_when_an_engine_stands_still(
    tmp_path: Path, wanted: tuple[list[str], list[tuple[Any, ...]]]
) -> None:
    with contextlib.ExitStack() as still:

        async def stuck(it: Cluster) -> None:
            still.enter_context(it.workers["d0"].stuck())

        await under(tmp_path, wanted, stuck, still.close)


async def under(
    folder: Path,
    wanted: tuple[list[str], list[tuple[Any, ...]]],
    fault: Callable[[Cluster], Any],
    after: Callable[[], None] = lambda: None,
) -> None:
    stops, expected = wanted
    async with service(folder, HURT) as hurt:
        asked = questions(stops)
        streams = [Stream() for _ in asked]
        asking = [
            asyncio.create_task(hurt.ask(*question, stream))
            for question, stream in zip(asked, streams, strict=True)
        ]
        first = streams[0]
        async with asyncio.timeout(WAIT_S):
            while len(first.texts.get(0, "")) < SEAM:
                await asyncio.sleep(0.002)
        await fault(hurt.it)
        await asyncio.wait_for(asyncio.gather(*asking), WAIT_S)
        after()
        for stream, answer in zip(streams, expected, strict=True):
            assert stream.result() == answer
        assert "penstock_retries_total 0.0" not in hurt.it.metrics.render().decode()
