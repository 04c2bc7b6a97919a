"""/v1/explain and `penstock explain`, of a real router with sim workers that take their time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from penstock.core.settings import RouterSettings
from penstock.frontend.http.api_keys import key_line
from penstock.shapes import Role
from tests.cluster import Cluster, cluster
from tests.frontend.conftest import serving
from tests.waiting import until

PREFIX = "The history of dams. " * 300  # 6,300 bytes, which are as many tokens
SIM = {
    "vocab_size": None,
    "cost_model": "qwen3-32b/h200/tp2",
    "max_model_len": 40_000,
    "total_blocks": 8192,
}
QUICK = RouterSettings(tick_s=0.02, slo_itl_ms=0.0)  # which leaves times to first tokens to decide
KEYS = {"admin": "a" * 24, "team-a": "b" * 24, "team-b": "c" * 24}


@dataclass
class Explained:
    """A frontend over a cluster."""

    cluster: Cluster
    http: httpx.AsyncClient
    url: str

    async def complete(self, prompt: str, max_tokens: int = 2, **more: Any) -> httpx.Response:
        headers = more.pop("headers", {})
        body = {"model": "sim", "prompt": prompt, "max_tokens": max_tokens, **more}
        answer = await self.http.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer

    async def explain(self, name: str, **headers: str) -> dict[str, Any]:
        answer = await self.http.get(f"/v1/explain/{name}", headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()


@contextlib.asynccontextmanager
async def explaining(
    folder: Path, roles: dict[str, Role], router: RouterSettings = QUICK, **settings: Any
) -> AsyncIterator[Explained]:
    async with (
        cluster(folder, roles, router, SIM) as it,
        serving(it.router, **settings) as served,
    ):
        yield Explained(it, served.http, served.url)


AGGREGATED = {"w1": Role.AGGREGATED, "w2": Role.AGGREGATED}


async def command(*arguments: str, code: int = 0) -> str:
    """`penstock explain` as a process of its own; what it prints."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "penstock",
        "explain",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == code, errors.decode()
    return (out or errors).decode()


async def saturate(it: Explained) -> tuple[str, str, dict[str, Any]]:
    """Give one worker a prefix and then more with that prefix than it should compute by itself. Returns
    that worker's id, and the id and explanation of the first request that went to the other one."""
    first = (await it.complete(PREFIX)).json()["id"]
    holder = (await it.explain(first))["requests"][0]["decisions"][0]["decode"]
    prompts = [PREFIX + f"Chapter {number}. " + "So it was. " * 1200 for number in range(6)]
    answers = await asyncio.gather(*map(it.complete, prompts))
    for answer in answers:
        name = answer.json()["id"]
        told = (await it.explain(name))["requests"][0]
        if told["decisions"][0]["decode"] != holder:
            return holder, name, told
    raise AssertionError("all went to the holder")


async def test_a_request_that_left_its_cached_prefix_is_explained_by_the_queue_there(
    tmp_path: Path,
) -> None:
    async with explaining(tmp_path, AGGREGATED) as it:
        holder, name, told = await saturate(it)
        (decision,) = told["decisions"]
        other = ({"w1", "w2"} - {holder}).pop()
        assert decision["decode"] == other
        assert decision["holder"]["instance_id"] == holder
        held = decision["holder"]["cached_tokens"]
        assert held >= len(PREFIX) // 16 * 16
        assert decision["holder"]["passed_over"] == "costlier"
        had = f"{held:,} tokens of the prompt cached"
        assert told["summary"].startswith(
            f"went to {other} although {holder} had {had}, because {holder} had"
        )
        assert "of prompts in its queue: first token predicted after" in told["summary"]
        assert told["outcome"] == "complete"
        predicted, actual = decision["predicted"], decision["actual"]
        assert predicted["cached_tokens"] == actual["cached_tokens"] == 0
        assert actual["prefill_ms"] > 100
        assert actual["first_token_ms"] > actual["prefill_ms"] * 0.9

        shown = await command(name, "--url", it.url)
        assert told["summary"] in shown
        assert f"> {other}" in shown
        assert "waiting in the frontend" in shown


async def test_a_remote_prefill_is_told_with_both_workers_and_the_transfer(tmp_path: Path) -> None:
    roles = {"p0": Role.PREFILL, "d1": Role.DECODE}
    async with explaining(tmp_path, roles, RouterSettings(tick_s=0.02, disagg="always")) as it:
        answer = await it.complete(PREFIX, headers={"x-request-id": "mine/1"})
        (told,) = (await it.explain("mine%2F1"))["requests"]
        assert told["request_id"] == answer.json()["id"] + "-0"
        (decision,) = told["decisions"]
        assert (decision["path"], decision["prefill"], decision["decode"]) == ("remote", "p0", "d1")
        assert [it["instance_id"] for it in decision["attempts"]] == ["p0", "d1"]
        assert decision["attempts"][0]["prefill_ms"] > 100
        assert decision["actual"]["transfer_ms"] > 0
        assert decision["predicted"]["transfer_ms"] > 0
        assert told["summary"].startswith("p0 computed its prompt and d1 its output")


async def test_a_retry_is_told_with_its_reason(tmp_path: Path) -> None:
    async with explaining(tmp_path, AGGREGATED) as it:
        running = asyncio.create_task(it.complete(PREFIX, 300, headers={"x-request-id": "mine"}))
        await until(lambda: bool(it.cluster.router.dispatcher.attempts), "it is sent")
        first = (await it.explain("mine"))["requests"][0]
        assert first["outcome"] == "running"
        died = first["decisions"][0]["decode"]
        await it.cluster.workers[died].die()
        await running
        (told,) = (await it.explain("mine"))["requests"]
        assert [each["decode"] for each in told["decisions"]][-1] != died
        again = told["decisions"][-1]
        assert again["retried_because"].startswith(f"{died}: ")
        assert died in again["avoided"]
        assert "tried again" in told["summary"]


async def test_an_unknown_request_is_told_how_far_the_record_reaches(tmp_path: Path) -> None:
    async with explaining(tmp_path, AGGREGATED) as it:
        answer = await it.http.get("/v1/explain/chatcmpl-0")
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "request_not_found"
        assert "all since this frontend started" in answer.json()["error"]["message"]
        shown = await command("chatcmpl-0", "--url", it.url, code=1)
        assert shown.startswith("penstock: 404: This frontend keeps no request `chatcmpl-0`")


async def test_a_key_sees_its_own_requests_and_that_of_an_admin_all(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("".join(key_line(name, key) + "\n" for name, key in KEYS.items()))
    bearer = {name: {"authorization": f"Bearer {key}"} for name, key in KEYS.items()}
    async with explaining(tmp_path, AGGREGATED, api_keys_file=str(keys)) as it:
        name = (await it.complete("Hi", headers=bearer["team-a"])).json()["id"]
        path, statuses = f"/v1/explain/{name}", {}
        for who, headers in {**bearer, "nobody": {}}.items():
            statuses[who] = (await it.http.get(path, headers=headers)).status_code
        assert statuses == {"admin": 200, "team-a": 200, "team-b": 404, "nobody": 401}


async def test_no_text_of_prompts_or_answers_is_kept_or_told(tmp_path: Path) -> None:
    async with explaining(tmp_path, AGGREGATED) as it:
        answer = (await it.complete("Xylophones and marzipan", 20)).json()
        told = (await it.http.get(f"/v1/explain/{answer['id']}")).text
        assert "Xylophones" not in told
        assert answer["choices"][0]["text"][:8] not in told


@pytest.mark.parametrize("arguments", [(), ("--json",), ("chatcmpl-0", "--prompt", "Hi")])
async def test_the_command_without_a_request_says_what_it_needs(arguments: tuple[str, ...]) -> None:
    assert "expected one of REQUEST-ID, --prompt, --file and --misses" in await command(*arguments, code=2)


ASKING = {"x-penstock-explain": "true"}


@pytest.mark.parametrize("stream", [False, True])
async def test_the_header_of_an_answer_says_where_it_went_when_asked(tmp_path: Path, stream: bool) -> None:
    async with explaining(tmp_path, AGGREGATED) as it:
        answer = await it.complete("Hi", stream=stream, headers=ASKING)
        told = json.loads(answer.headers["x-penstock-explanation"])
        assert told["decode"] in AGGREGATED
        assert told["predicted"]["first_token_ms"] > 0
        assert told["summary"].startswith(f"went to {told['decode']}")
        kept = await it.explain(told["request_id"])
        assert kept["requests"][0]["decisions"][0]["decode"] == told["decode"]


async def test_an_answer_has_no_such_header_unasked_and_a_wrong_value_is_refused(tmp_path: Path) -> None:
    async with explaining(tmp_path, AGGREGATED) as it:
        for headers in ({}, {"x-penstock-explain": "false"}):
            assert "x-penstock-explanation" not in (await it.complete("Hi", headers=headers)).headers
        body = {"model": "sim", "prompt": "Hi"}
        wrong = await it.http.post("/v1/completions", json=body, headers={"x-penstock-explain": "maybe"})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "x-penstock-explain")


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_has_the_whole_explanation_with_its_times_when_asked(
    tmp_path: Path, stream: bool
) -> None:
    async with explaining(tmp_path, AGGREGATED) as it:
        asking = {"nvext": {"extra_fields": ["explanation"]}, "stream": stream}
        text = (await it.complete("Hi", 3, **asking)).text
        events = (
            [json.loads(part[6:]) for part in text.split("\n\n")[:-2]] if stream else [json.loads(text)]
        )
        (told,) = [event["nvext"]["explanation"] for event in events if "nvext" in event]
        assert told["outcome"] == "complete"
        assert told["decisions"][0]["actual"]["decode_ms"] > 0
        assert told["decisions"][0]["actual"]["output_tokens"] == 3


def state_of(it: Explained) -> tuple[Any, ...]:
    """All that a decision could change."""
    router = it.cluster.router
    placement, dispatcher = router.placement, router.dispatcher
    loads = {name: (load.assumed(), load.sent) for name, load in placement.loads.items()}
    return (
        placement._rng.getstate(),
        placement._ordinal,
        loads,
        placement.index.digests(),
        len(dispatcher.decisions),
        dict(dispatcher.records),
        len(dispatcher.queues),
    )


@pytest.mark.parametrize("policy", ["kv", "random", "round-robin"])
async def test_a_dry_run_says_where_the_next_request_goes_and_changes_nothing(
    tmp_path: Path, policy: str
) -> None:
    async with explaining(tmp_path, AGGREGATED, RouterSettings(tick_s=0.02, policy=policy)) as it:
        for number in range(3):
            await it.cluster.wait_idle()
            before = state_of(it)
            body = {"model": "sim", "prompt": f"{number} {PREFIX}", "max_tokens": 2}
            dry = await it.http.post("/v1/explain", json=body)
            assert dry.status_code == 200, dry.text
            assert state_of(it) == before
            (foreseen,) = dry.json()["requests"]
            name = (await it.complete(f"{number} {PREFIX}")).json()["id"]
            (made,) = (await it.explain(name))["requests"]
            assert foreseen["decisions"][0]["decode"] == made["decisions"][0]["decode"]
            assert foreseen["prompt_tokens"] == made["prompt_tokens"]
            assert (foreseen["outcome"], foreseen["created"]) == ("not_sent", None)
            assert foreseen["summary"] == made["summary"].replace("went to", "would go to")


async def test_a_dry_run_of_a_chat_finds_what_is_cached_of_it(tmp_path: Path) -> None:
    async with explaining(tmp_path, AGGREGATED) as it:
        body = {"model": "sim", "messages": [{"role": "user", "content": PREFIX}], "max_tokens": 2}
        answer = await it.http.post("/v1/chat/completions", json=body)
        (made,) = (await it.explain(answer.json()["id"]))["requests"]
        went_to = made["decisions"][0]["decode"]
        file = tmp_path / "body.json"
        file.write_text(json.dumps(body))
        told = json.loads(await command("--file", str(file), "--json", "--url", it.url))
        (decision,) = told["requests"][0]["decisions"]
        assert decision["decode"] == went_to
        assert decision["predicted"]["cached_tokens"] > len(PREFIX) - 16
        shown = await command("--prompt", PREFIX, "--url", it.url)
        assert f"would go to {went_to}, and nobody had more of it cached" in shown


async def test_a_dry_run_without_workers_that_could_take_it_says_so(tmp_path: Path) -> None:
    async with explaining(tmp_path, {"w1": Role.AGGREGATED}) as it:
        it.cluster.router.dispatcher.refused("w1", float("inf"))
        dry = await it.http.post("/v1/explain", json={"model": "sim", "prompt": "Hi"})
        assert dry.json()["requests"][0]["summary"] == "no worker could take it now"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"model": "sim", "prompt": ""}, "prompt"),
        ({"model": "sim", "messages": []}, "messages"),
        ({"model": "other", "prompt": "Hi"}, "model"),
    ],
)
async def test_a_dry_run_of_a_wrong_body_names_the_field(
    tmp_path: Path, body: dict[str, Any], field: str
) -> None:
    async with explaining(tmp_path, AGGREGATED) as it:
        answer = await it.http.post("/v1/explain", json=body)
        assert 400 <= answer.status_code < 500
        assert answer.json()["error"]["param"] == field


async def test_the_command_names_a_file_that_is_no_body(tmp_path: Path) -> None:
    file = tmp_path / "body.json"
    assert "body.json: No such file" in await command("--file", str(file), code=2)
    file.write_text("[1]")
    assert "expected a JSON object" in await command("--file", str(file), code=2)


async def test_misses_name_the_queue_of_the_holder_and_the_worst_request(tmp_path: Path) -> None:
    async with explaining(tmp_path, AGGREGATED) as it:
        holder, name, _ = await saturate(it)
        told = (await it.http.get("/v1/explain/misses", params={"minutes": 5})).json()
        (busy,) = [each for each in told["causes"] if each["cause"] == "costlier"]
        assert busy["worker"] == holder
        assert busy["tokens"] >= len(PREFIX) // 16 * 16
        assert busy["later_ms"] > 0
        assert name + "-0" in {each["request_id"] for each in told["worst"]}
        assert told["requests"] == 7

        shown = await command("--misses", "--minutes", "5", "--url", it.url)
        assert "the worker that had them was compared, and another was cheaper" in shown
        assert f"{name}-0: " in shown


async def test_misses_name_a_worker_that_restarted(tmp_path: Path) -> None:
    async with explaining(tmp_path, {"w1": Role.AGGREGATED}) as it:
        await it.complete(PREFIX)
        await it.cluster.workers["w1"].die()
        await until(lambda: not it.cluster.router.instances(), "it is gone")
        it.cluster.start("w1", Role.AGGREGATED, **SIM)
        await it.cluster.wait_ready("w1")
        await it.complete(PREFIX)
        told = (await it.http.get("/v1/explain/misses")).json()
        (lost,) = [each for each in told["causes"] if each["cause"] == "worker_lost"]
        assert lost["worker"] == "w1"
        assert lost["tokens"] >= len(PREFIX) * 7 / 8 - 16


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "soon", "1e9"])
async def test_misses_of_a_time_that_is_none_name_the_parameter(tmp_path: Path, minutes: str) -> None:
    async with explaining(tmp_path, {"w1": Role.AGGREGATED}) as it:
        answer = await it.http.get("/v1/explain/misses", params={"minutes": minutes})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "minutes")


async def test_a_key_sees_the_misses_of_its_own_requests(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("".join(key_line(name, key) + "\n" for name, key in KEYS.items()))
    bearer = {name: {"authorization": f"Bearer {key}"} for name, key in KEYS.items()}
    async with explaining(tmp_path, {"w1": Role.AGGREGATED}, api_keys_file=str(keys)) as it:
        await it.complete("Hi there, you", headers=bearer["team-a"])
        counts = {}
        for who, headers in bearer.items():
            told = await it.http.get("/v1/explain/misses", headers=headers)
            counts[who] = told.json()["requests"]
        assert counts == {"admin": 1, "team-a": 1, "team-b": 0}


async def test_an_answer_that_ends_at_a_stop_string_is_told_with_its_times(tmp_path: Path) -> None:
    async with explaining(tmp_path, {"w1": Role.AGGREGATED}) as it:
        answer = (await it.complete("Hi", 200, stop=[*"etaoinshr ETAOIN"])).json()
        assert answer["choices"][0]["finish_reason"] == "stop"
        await it.cluster.wait_idle()
        (told,) = (await it.explain(answer["id"]))["requests"]
        assert told["outcome"] == "complete"
        assert told["decisions"][0]["actual"]["decode_ms"] > 0
