"""How clients name their sessions, and that session-affinity keeps each of them on one worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from penstock.core.settings import RouterSettings
from penstock.frontend.http.api_keys import key_line
from penstock.frontend.openai import MAX_SESSION_CHARS
from penstock.frontend.sessions import SESSION_HEADERS
from penstock.shapes import Role
from tests.cluster import cluster
from tests.frontend.conftest import serving

HI = [{"role": "user", "content": "Hi"}]
CHAT = "/v1/chat/completions", {"model": "tiny", "messages": HI}
TEXT = "/v1/completions", {"model": "tiny", "prompt": "Hi"}
RESPONSE = "/v1/responses", {"model": "tiny", "input": "Hi"}
MESSAGE = "/v1/messages", {"model": "tiny", "messages": HI, "max_tokens": 5}
BODIES = {
    "chat, prompt_cache_key": (*CHAT, {"prompt_cache_key": "s"}),
    "chat, session_id": (*CHAT, {"session_id": "s"}),
    "completion, prompt_cache_key": (*TEXT, {"prompt_cache_key": "s"}),
    "completion, session_id": (*TEXT, {"session_id": "s"}),
    "response, prompt_cache_key": (*RESPONSE, {"prompt_cache_key": "s"}),
    "response, session_id": (*RESPONSE, {"session_id": "s"}),
    "message, metadata": (*MESSAGE, {"metadata": {"user_id": "s"}}),
}


async def session_of(served: Any, path: str, body: dict[str, Any], **headers: str) -> str:
    answer = await served.http.post(
        path, json=body, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )
    assert answer.status_code == 200, answer.text
    session: str = served.completer.requests[-1].session
    return session


@pytest.mark.parametrize("name", BODIES)
async def test_a_session_named_in_a_body_is_the_one_that_a_header_names(served: Any, name: str) -> None:
    path, body, naming = BODIES[name]
    assert await session_of(served, path, body) == ""
    known = await session_of(served, path, body | naming)
    assert known
    assert "s" not in known.replace("0", ""), "a hash, not the name"
    assert await session_of(served, path, body, x_session_id="s") == known
    assert await session_of(served, path, body | naming, x_session_id="other") not in ("", known)


@pytest.mark.parametrize("header", SESSION_HEADERS)
async def test_every_session_header_names_the_same_session(served: Any, header: str) -> None:
    path, body = CHAT
    for value in ("s", ""):
        answer = await served.http.post(path, json=body, headers={header: value})
        assert answer.status_code == 200
    named, empty = [request.session for request in served.completer.requests]
    assert named == await session_of(served, path, body, x_session_id="s")
    assert empty == ""


async def test_a_name_that_is_too_long_is_refused_with_its_field(served: Any) -> None:
    long = "s" * (MAX_SESSION_CHARS + 1)
    for path, body, more, headers, field in (
        (*CHAT, {"prompt_cache_key": long}, {}, "prompt_cache_key"),
        (*RESPONSE, {"session_id": long}, {}, "session_id"),
        (*TEXT, {}, {"x-session-id": long}, "x-session-id"),
    ):
        answer = await served.http.post(path, json=body | more, headers=headers)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == field
    answer = await served.http.post(MESSAGE[0], json=MESSAGE[1] | {"metadata": {"user_id": long}})
    assert answer.status_code == 400
    assert "metadata.user_id" in answer.json()["error"]["message"]


async def test_sessions_of_one_name_under_two_keys_differ(serve_script: Any, tmp_path: Path) -> None:
    keys = {"a": "a" * 24, "b": "b" * 24}
    file = tmp_path / "keys"
    file.write_text("\n".join(key_line(name, key) for name, key in keys.items()))
    async with serve_script("Hello", api_keys_file=file) as served:
        path, body = CHAT
        found = {
            await session_of(served, path, body, authorization=f"Bearer {key}", x_session_id="s")
            for key in (*keys.values(), *keys.values())
        }
    assert len(found) == 2
    assert "" not in found


# --- with workers ---------------------------------------------------------------------------------

AFFINITY = RouterSettings(tick_s=0.02, policy="session-affinity")
SESSIONS = [f"session {number}" for number in range(24)]


async def workers_of(http: httpx.AsyncClient, sessions: list[str]) -> dict[str, str]:
    """Which worker served a turn of each."""
    found = {}
    for session in sessions:
        body = {"model": "sim", "prompt": f"A turn of {session}. ", "max_tokens": 2}
        headers = {"x-session-id": session, "x-penstock-explain": "true"}
        foreseen = (await http.post("/v1/explain", json=body, headers=headers)).json()
        answer = await http.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        told = (await http.get(f"/v1/explain/{answer.json()['id']}")).json()
        found[session] = told["requests"][0]["decisions"][0]["decode"]
        (dry,) = foreseen["requests"]
        assert dry["decisions"][0]["decode"] == found[session], "the dry run knows the session"
    return found


async def test_turns_of_a_session_stay_on_its_worker_and_added_workers_take_only_their_share(
    tmp_path: Path,
) -> None:
    roles = dict.fromkeys(("w1", "w2", "w3"), Role.AGGREGATED)
    async with cluster(tmp_path, roles, AFFINITY, {"vocab_size": None}) as it, serving(it.router) as served:
        first = await workers_of(served.http, SESSIONS)
        assert set(first.values()) == set(roles)
        assert await workers_of(served.http, SESSIONS) == first
        it.start("w4", Role.AGGREGATED, vocab_size=None)
        await it.wait_ready(*roles, "w4")
        moved = {
            name: now
            for name, now in (await workers_of(served.http, SESSIONS)).items()
            if now != first[name]
        }
    assert set(moved.values()) == {"w4"}
    assert 0 < len(moved) < len(SESSIONS) / 2
