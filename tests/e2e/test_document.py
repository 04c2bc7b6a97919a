"""The user's document, call by call, against the shipped local graph."""

from __future__ import annotations

import json
import re
import subprocess

from tests.e2e.conftest import MODEL, Graph

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


def test_logs_show_routing_and_transfers(local_graph: Graph) -> None:
    salt = "a conversation of its own, so that nothing of it is cached"
    local_graph.client().chat.completions.create(
        model=MODEL, messages=ALICE, max_tokens=50, extra_body={"cache_salt": salt}
    )
    frontend = local_graph.command("logs", "frontend").stdout
    decisions = [
        line for line in frontend.splitlines() if re.search("routing|overlap", line, re.IGNORECASE)
    ]
    assert any("path=remote" in line and "overlap" in line for line in decisions)
    workers = local_graph.command("logs", "decode").stdout
    transfers = [line for line in workers.splitlines() if re.search("nixl|transfer", line, re.IGNORECASE)]
    assert any(re.search(r"bytes=\d+", line) and re.search(r"ms=[\d.]+", line) for line in transfers)


def test_prefill_and_decode_are_different_processes(local_graph: Graph) -> None:
    before = local_graph.metric("penstock_decisions_total", path="remote")
    moved = local_graph.metric("penstock_transferred_blocks_total")
    answer = local_graph.client().chat.completions.create(
        model=MODEL, messages=ALICE, max_tokens=50, extra_body={"cache_salt": "processes"}
    )
    assert answer.choices[0].message.content == "Your name is Alice."
    assert local_graph.metric("penstock_decisions_total", path="remote") == before + 1
    assert local_graph.metric("penstock_transferred_blocks_total") > moved
    assert len({replica["pid"] for replica in local_graph.replicas()}) == 5
