"""POST /v1/recordings: whose requests it tells of, how many may be read, and how one ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from penstock.core.recording import MAX_RECORDINGS
from penstock.frontend.http.api_keys import key_line
from penstock.shapes import Role
from tests.cluster import cluster
from tests.frontend.conftest import Served, serving
from tests.waiting import until

WANTED = {"salt": "ab" * 32, "block_tokens": 16}
KEYS = {"admin": "a" * 24, "team-a": "b" * 24, "team-b": "c" * 24}
BEARER = {name: {"authorization": f"Bearer {key}"} for name, key in KEYS.items()}
TEXT = "Xylophones and marzipan. " * 4


@contextlib.asynccontextmanager
async def frontend(folder: Path, **settings: Any) -> AsyncIterator[Served]:
    async with (
        cluster(folder, {"w": Role.AGGREGATED}, sim={"vocab_size": None}) as it,
        serving(it.router, **settings) as served,
    ):
        yield served


@contextlib.asynccontextmanager
async def recording(served: Served, **headers: str) -> AsyncIterator[httpx.Response]:
    async with served.http.stream("POST", "/v1/recordings", json=WANTED, headers=headers) as answer:
        assert answer.status_code == 200
        yield answer


async def complete(served: Served, **headers: str) -> str:
    body = {"model": "sim", "prompt": TEXT, "max_tokens": 3, "ignore_eos": True}
    answer = await served.http.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.text


async def recorded(answer: httpx.Response, count: int) -> list[dict[str, Any]]:
    """The next so many events."""
    found: list[dict[str, Any]] = []
    async for line in answer.aiter_lines():
        if line.startswith("data:"):
            assert "marzipan" not in line
            found.append(json.loads(line.removeprefix("data:")))
        if len(found) == count:
            break
    return found


async def test_requests_are_told_as_they_end(tmp_path: Path) -> None:
    async with frontend(tmp_path) as served, recording(served) as answer:
        await complete(served)
        await complete(served)
        first, second = await asyncio.wait_for(recorded(answer, 2), 10)
        assert first["hash_ids"] == second["hash_ids"]
        assert (first["output_length"], len(first["hash_ids"])) == (3, -(-first["input_length"] // 16))
        assert first["timestamp"] < second["timestamp"]


async def test_a_key_records_its_own_requests_and_that_of_an_admin_all(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("".join(key_line(name, key) + "\n" for name, key in KEYS.items()))
    async with frontend(tmp_path, api_keys_file=str(keys)) as served:
        assert (await served.http.post("/v1/recordings", json=WANTED)).status_code == 401
        async with (
            recording(served, **BEARER["admin"]) as everybody,
            recording(served, **BEARER["team-a"]) as own,
        ):
            await complete(served, **BEARER["team-b"])
            await complete(served, **BEARER["team-a"])
            await complete(served, **BEARER["team-a"])
            assert len(await asyncio.wait_for(recorded(everybody, 3), 10)) == 3
            mine = await asyncio.wait_for(recorded(own, 2), 10)
            assert len(mine) == 2


async def test_only_so_many_recordings_go_on_at_one_time_and_one_ends_with_its_reader(
    tmp_path: Path,
) -> None:
    async with frontend(tmp_path) as served:
        going_on = served.completer.dispatcher.recordings
        async with contextlib.AsyncExitStack() as readers:
            for _ in range(MAX_RECORDINGS):
                await readers.enter_async_context(recording(served))
            refused = await served.http.post("/v1/recordings", json=WANTED)
            assert refused.status_code == 429
            assert f"{MAX_RECORDINGS} recordings are going on" in refused.text
            assert len(going_on) == MAX_RECORDINGS
        await until(lambda: not going_on)
        async with recording(served) as answer:
            await complete(served)
            assert await asyncio.wait_for(recorded(answer, 1), 10)


async def test_a_recording_ends_when_the_frontend_leaves(tmp_path: Path) -> None:
    async with frontend(tmp_path) as served, recording(served) as answer:
        await complete(served)
        served.stop.set()
        assert len(await asyncio.wait_for(recorded(answer, 100), 10)) == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"salt": "short"}, "`salt`"),
        ({"salt": None}, "`salt`"),
        ({"block_tokens": 1}, "`block_tokens`"),
        ({"model": 3}, "`model`"),
    ],
)
async def test_what_cannot_be_recorded_is_refused_by_name(
    tmp_path: Path, wrong: dict[str, Any], said: str
) -> None:
    async with frontend(tmp_path) as served:
        answer = await served.http.post("/v1/recordings", json=WANTED | wrong)
        assert answer.status_code == 400
        assert said in answer.json()["error"]["message"]


async def test_only_a_model_that_is_served_is_recorded(tmp_path: Path) -> None:
    async with frontend(tmp_path) as served:
        answer = await served.http.post("/v1/recordings", json=WANTED | {"model": "sin"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")


async def test_a_model_is_recorded_under_its_alias_too(tmp_path: Path) -> None:
    sim = {"vocab_size": None, "aliases": ("chat",)}
    async with (
        cluster(tmp_path, {"w": Role.AGGREGATED}, sim=sim) as it,
        serving(it.router) as served,
        served.http.stream("POST", "/v1/recordings", json=WANTED | {"model": "chat"}) as answer,
    ):
        await complete(served)
        (only,) = await asyncio.wait_for(recorded(answer, 1), 10)
    assert only["model"] == "sim"
