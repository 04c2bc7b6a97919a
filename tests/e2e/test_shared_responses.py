"""Two frontends of one worker, as processes, with one Redis for their stored responses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.conftest import START_S, STOP_S, Process
from tests.redis_server import RedisServer, running_redis
from tests.waiting import wait_until

PASSWORD = "s3cret-word"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path, "--requirepass", PASSWORD) as server:
        yield server


@pytest.fixture
def frontends(tmp_path: Path, redis: RedisServer) -> Iterator[list[Process]]:
    """They get the address as a variable, as on Kubernetes from a Secret."""
    discovery = f"file:{tmp_path}/discovery"
    store = f"redis://:{PASSWORD}@127.0.0.1:{redis.port}"
    processes = [Process(tmp_path, discovery, "worker", "worker", "--model", "models/tiny")]
    processes += [
        Process(tmp_path, discovery, f"frontend-{number}", "frontend", PENSTOCK_RESPONSE_STORE=store)
        for number in range(2)
    ]
    try:
        for frontend in processes[1:]:
            wait_until(lambda frontend=frontend: frontend.ready_workers() == 1, frontend.name, START_S)
        yield processes[1:]
    finally:
        for process in processes:
            process.stop()
        codes = {process.name: process.process.wait(timeout=STOP_S) for process in processes}
    assert set(codes.values()) == {0}, codes


def test_conversation_goes_on_at_another_frontend_and_outlives_a_lost_store(
    frontends: list[Process], redis: RedisServer
) -> None:
    one, two = (frontend.client() for frontend in frontends)
    first = one.responses.create(model="tiny", input="My name is Alice.", temperature=0)
    second = two.responses.create(
        model="tiny", input="What is my name?", temperature=0, previous_response_id=first.id
    )
    assert "Alice" in second.output_text
    assert one.responses.retrieve(second.id).previous_response_id == first.id
    one.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        two.responses.retrieve(second.id)
    redis.kill()
    alone = two.responses.create(model="tiny", input="My name is Alice.", temperature=0)
    assert (alone.store, alone.output_text) == (False, first.output_text)
    with pytest.raises(openai.InternalServerError) as raised:
        two.responses.create(model="tiny", input="What is my name?", previous_response_id=first.id)
    assert (raised.value.status_code, raised.value.code) == (503, "response_store_unavailable")
    assert frontends[1].metric("penstock_response_store_failures_total") >= 2
    for frontend in frontends:
        log = frontend.log.read_text()
        assert f"responses are stored in redis://127.0.0.1:{redis.port}/0" in log
        assert PASSWORD not in log
