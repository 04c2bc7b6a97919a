"""The user's document, call by call, against the shipped local graph."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import MODEL, Graph, Process, another_frontend

ALICE = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "My name is Alice."},
    {"role": "assistant", "content": "Hello Alice! Nice to meet you."},
    {"role": "user", "content": "What is my name?"},
]


def curl(graph: Graph, body: dict) -> str:
    result = subprocess.run(
        ["curl", "-sSN", f"{graph.url}/v1/chat/completions", "--json", json.dumps(body)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return result.stdout


def test_health_names_the_instances(local_graph: Graph) -> None:
    status, body = local_graph.get("/health")
    health = json.loads(body)
    assert status == 200
    assert health["status"] == "healthy"
    assert sorted(instance["role"] for instance in health["instances"]) == ["decode"] * 2 + ["prefill"] * 2


def test_explains_disaggregated_serving(local_graph: Graph) -> None:
    answer = json.loads(
        curl(
            local_graph,
            {
                "model": MODEL,
                "messages": [
                    ALICE[0],
                    {"role": "user", "content": "Explain disaggregated serving benefits"},
                ],
                "max_tokens": 200,
                "temperature": 0.7,
            },
        )
    )
    text = answer["choices"][0]["message"]["content"].lower()
    assert "prefill" in text
    assert "decode" in text
    assert answer["usage"]["completion_tokens"] > 20


def test_remembers_alice(local_graph: Graph) -> None:
    answer = json.loads(curl(local_graph, {"model": MODEL, "messages": ALICE, "max_tokens": 50}))
    assert answer["choices"][0]["message"]["content"] == "Your name is Alice."
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_remembers_alice_streamed(local_graph: Graph) -> None:
    stream = curl(local_graph, {"model": MODEL, "messages": ALICE, "max_tokens": 50, "stream": True})
    events = [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1]]
    assert "".join(deltas) == "Your name is Alice."


@pytest.fixture(scope="module")
def always(local_graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A frontend of this graph by which every prompt is computed by a prefill worker."""
    with another_frontend(
        local_graph.state / "local", tmp_path_factory.mktemp("always"), "always"
    ) as found:
        yield found


def test_logs_show_routing_and_transfers(local_graph: Graph, always: Process) -> None:
    salt = "a conversation of its own, so that nothing of it is cached"
    always.client().chat.completions.create(
        model=MODEL, messages=ALICE, max_tokens=50, extra_body={"cache_salt": salt}
    )

    def decided(lines: str) -> bool:
        found = [line for line in lines.splitlines() if re.search("routing|overlap", line, re.IGNORECASE)]
        return any("path=remote" in line and "overlap" in line for line in found)

    def moved(lines: str) -> bool:
        found = [line for line in lines.splitlines() if re.search("nixl|transfer", line, re.IGNORECASE)]
        return any(re.search(r"bytes=\d+", line) and re.search(r"ms=[\d.]+", line) for line in found)

    assert decided(always.log.read_text())
    local_graph.wait_for_log("decode", moved)


def test_prefill_and_decode_are_different_processes(local_graph: Graph, always: Process) -> None:
    before = always.metric("penstock_decisions_total", path="remote")
    moved = always.metric("penstock_transferred_blocks_total")
    answer = always.client().chat.completions.create(
        model=MODEL, messages=ALICE, max_tokens=50, extra_body={"cache_salt": "processes"}
    )
    assert answer.choices[0].message.content == "Your name is Alice."
    assert always.metric("penstock_decisions_total", path="remote") == before + 1
    assert always.metric("penstock_transferred_blocks_total") > moved
    assert len({replica["pid"] for replica in local_graph.replicas()}) == 5
