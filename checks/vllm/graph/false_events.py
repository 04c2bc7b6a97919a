"""Cache events off on one vLLM worker, another block size than it says on a second one, while clients chat:
both are named, every request is served by what was sent to them, and what they tell counts again once it is
right. Then one that says itself that it tells nothing."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import MODEL, Deployment, deployed
from tests.e2e.test_false_events import Chats
from tests.waiting import wait_until

BLOCK = 32
CLAIMED = 64
START_S = 300.0  # three on a busy machine; 25 s for two on two idle cores
WITHIN_S = 120.0
CLIENTS = 6
NEW_CHARS = 1200  # numbers and spaces: 300 tokens or so, which is several blocks
OPTIONS = [
    *("--model", "models/tiny", "--served-model-name", MODEL, "--role", "aggregated", "--engine", "vllm"),
    *("--block-size", str(BLOCK), "--kv-cache-mib", "128", "--max-model-len", "16384"),
]
VLLM_OPTIONS = ["--", "--enforce-eager", "--dtype", "float32", "--distributed-executor-backend", "uni"]


def start(deployment: Deployment, name: str, *options: str, claimed: int = 0) -> None:
    arguments = ("worker", *OPTIONS, "--instance-id", name, *options, *VLLM_OPTIONS)
    deployment.start(name, "off", str(claimed), *arguments, module="tests.e2e.false_events_worker")


def cause(deployment: Deployment, name: str) -> str:
    """Why it is distrusted, as /health has it."""
    instances = json.loads(deployment.get("/health")[1])["instances"]
    (found,) = [it["distrusted"] for it in instances if it["instance_id"] == name]
    return str(found or "")


def wait_until_named(deployment: Deployment, name: str, expected: str) -> None:
    def named() -> bool:
        labels = {"instance": name, "cause": expected}
        return deployment.metric("penstock_worker_distrusted", **labels) == 1

    wait_until(named, f"{name}: {expected}", WITHIN_S, look_s=0.2)
    assert cause(deployment, name) == expected


def explained(deployment: Deployment) -> dict[str, str | None]:
    """Why a request's decision went by what was sent, by each worker that was compared."""
    answer = deployment.client().completions.create(model=MODEL, prompt="1 2 3 4 5 " * 40, max_tokens=2)
    (request,) = json.loads(deployment.get(f"/v1/explain/{answer.id}")[1])["requests"]
    compared = request["decisions"][0]["candidates"]
    return {it["instance_id"]: it["distrusted"] for it in compared}


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    with deployed(tmp_path) as deployment:
        yield deployment


def test_false_events_are_named_served_and_believed_again(deployment: Deployment) -> None:
    start(deployment, "w1")
    start(deployment, "w2", claimed=CLAIMED)
    deployment.wait_for(START_S, w1="ready", w2="ready")
    with Chats(deployment, CLIENTS, NEW_CHARS) as chats:
        wait_until_named(deployment, "w2", "block_size")
        assert cause(deployment, "w1") == "", "of the other nothing is wrong"
        deployment.signal("w1", signal.SIGUSR1)
        wait_until_named(deployment, "w1", "events_off")
        assert explained(deployment) == {"w1": "events_off", "w2": "block_size"}
        answers = chats.answers
        wait_until(lambda: chats.answers > answers + 20, "it is served", WITHIN_S, look_s=0.2)
        deployment.signal("w1", signal.SIGUSR1)
        wait_until(lambda: not cause(deployment, "w1"), "w1 is trusted", WITHIN_S, look_s=0.2)
        deployment.end("w2", signal.SIGTERM)
        start(deployment, "w2", "--kv-events", "off")
        deployment.wait_for(START_S, w1="ready", w2="ready")
        wait_until_named(deployment, "w2", "no_events")
        assert explained(deployment) == {"w1": None, "w2": "no_events"}
        answers = chats.answers
        wait_until(lambda: chats.answers > answers + 20, "it is served", WITHIN_S, look_s=0.2)
    assert chats.errors == []
    predicted = deployment.metric("penstock_predicted_cached_tokens_total")
    actual = deployment.metric("penstock_actual_cached_tokens_total")
    print(f"{chats.answers} answers, cached tokens: {predicted:.0f} foreseen, {actual:.0f} found")
    assert predicted == pytest.approx(actual, rel=0.2)
    log = (deployment.folder / "frontend.log").read_text()
    assert "w2: distrusted, block_size: its cache events are of blocks of another size than it said" in log
    assert f"said: {BLOCK} tokens" in log
    assert "kv overlap check: w1: distrusted, events_off: no cache events come from it" in log
    assert "kv overlap check: w1: trusted again" in log
