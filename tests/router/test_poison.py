"""Requests that kill engines, among many that do not: it is the former that are stopped."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from penstock.core.settings import RouterSettings
from penstock.errors import Rejection, RemoteError, RequestRejected
from penstock.shapes import Role
from tests.cluster import Answer, Cluster, cluster

PREFILL, DECODE, AGGREGATED = Role.PREFILL, Role.DECODE, Role.AGGREGATED
POISON = 999
SLOW = {"cost_model": "qwen3-32b/h200/tp2", "speedup": 2.0}  # about 6 ms a step
FAST = {"cost_model": "qwen3-32b/h200/tp2", "speedup": 20.0}
QUICK = RouterSettings(tick_s=0.02)
TOKENS = 150


def bystanders(it: Cluster, tokens: int = TOKENS) -> list[Answer]:
    return [it.ask([n, *range(60)], max_tokens=tokens, seed=n)[0] for n in range(24)]


async def expected(folder: Path, tokens: int = TOKENS) -> list[list[int]]:
    async with cluster(folder, {"a0": AGGREGATED}) as calm:
        return [await answer.tokens() for answer in bystanders(calm, tokens)]


async def bury(it: Cluster) -> int:
    """The dead workers' tasks have ended with their engines. Returns how many there were."""
    dead = [worker for worker in it.workers.values() if worker.task.done()]
    for worker in dead:
        with pytest.raises(RemoteError, match="poison"):
            worker.task.result()
    return len(dead)


@pytest.mark.parametrize("roles", [(AGGREGATED,) * 4, (PREFILL, PREFILL, DECODE, DECODE, DECODE, DECODE)])
async def test_a_killer_is_stopped_at_its_third_worker_and_nobody_with_it(
    tmp_path: Path, roles: tuple[Role, ...], caplog: pytest.LogCaptureFixture
) -> None:
    wanted = await expected(tmp_path / "calm")
    workers = {f"w{number}": role for number, role in enumerate(roles)}
    async with cluster(tmp_path / "hurt", workers, QUICK, SLOW) as it:
        for worker in it.workers.values():
            worker.dies_of(POISON)
        answers = bystanders(it)
        await answers[0].wait_tokens(3)
        poison, _ = it.ask([POISON, *range(60)], max_tokens=TOKENS)
        with pytest.raises(RequestRejected, match="stopped: 3 workers died computing it") as caught:
            await poison.tokens()
        assert (caught.value.kind, caught.value.code) == (Rejection.WORKERS_FAILED, "kills_workers")
        for answer, tokens in zip(answers, wanted, strict=True):
            assert await answer.tokens() == tokens
        assert await bury(it) == 3
        (named,) = [record for record in caplog.records if "kills workers" in record.message]
        assert named.levelno == logging.ERROR
        assert all(word in named.getMessage() for word in ("request r24", "deaths=3", "prompt_tokens=61"))
        it.workers = {name: worker for name, worker in it.workers.items() if not worker.task.done()}


async def test_a_request_that_fails_steps_ends_alone(tmp_path: Path) -> None:
    wanted = await expected(tmp_path / "calm")
    workers = {f"w{number}": AGGREGATED for number in range(4)}
    async with cluster(tmp_path / "hurt", workers, QUICK, SLOW) as it:
        for worker in it.workers.values():
            worker.fails_at(POISON)
        answers = bystanders(it)
        await answers[0].wait_tokens(3)
        poison, _ = it.ask([POISON, *range(60)], max_tokens=TOKENS)
        with pytest.raises(RequestRejected, match=r"4 attempts failed: w\d: step failed") as caught:
            await poison.tokens()
        assert (caught.value.kind, caught.value.code) == (Rejection.WORKERS_FAILED, "attempts_failed")
        for answer, tokens in zip(answers, wanted, strict=True):
            assert await answer.tokens() == tokens
