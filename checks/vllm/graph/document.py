"""The user's document, call by call, against the shipped graph of vLLM workers."""

from __future__ import annotations

import re

import pytest

from tests.e2e.conftest import MODEL, Frontend, Graph, Process
from tests.e2e.test_document import ALICE

LINE = re.compile(
    r"[a-z]+-\d+ +\| \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (DEBUG|INFO|WARNING|ERROR) +\S+ ."
)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_remembers_alice_across_workers(always: Frontend, stream: bool) -> None:
    """The name can only be answered from KV that was moved."""
    moved = always.metric("penstock_transferred_blocks_total")
    remote = always.metric("penstock_decisions_total", path="remote")
    answer = always.client().chat.completions.create(
        model=MODEL,
        messages=ALICE,
        max_tokens=50,
        stream=stream,
        extra_body={"cache_salt": f"stream {stream}"},
    )
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    else:
        text = answer.choices[0].message.content
    assert text == "Your name is Alice."
    assert always.metric("penstock_decisions_total", path="remote") == remote + 1
    assert always.metric("penstock_transferred_blocks_total") == moved + 3


def test_explains_disaggregated_serving(graph: Graph) -> None:
    answer = graph.client().chat.completions.create(
        model=MODEL,
        messages=[ALICE[0], {"role": "user", "content": "Explain disaggregated serving benefits"}],
        max_tokens=200,
        temperature=0.7,
    )
    text = (answer.choices[0].message.content or "").lower()
    assert "prefill" in text
    assert "decode" in text
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 20


def test_logs_show_routing_and_transfers(graph: Graph, always: Process) -> None:
    always.client().chat.completions.create(
        model=MODEL, messages=ALICE, max_tokens=50, extra_body={"cache_salt": "logs"}
    )
    assert "path=remote" in always.log.read_text()
    done = re.compile(
        r"KV transfer done: .*transport=vllm-nixl blocks=3 from=vllm-cpu-prefill-0 .*ms=[\d.]+"
    )
    graph.wait_for_log("decode", done.search)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_logs_have_one_format(graph: Graph, role: str) -> None:
    """vLLM's own lines included."""
    lines = graph.wait_for_log(role, lambda lines: " vllm." in lines).splitlines()
    assert [line for line in lines if not LINE.match(line)] == []


def test_cached_turn_needs_no_prefill_worker(always: Frontend, never: Frontend) -> None:
    """After a prompt whose KV was pulled, the decode worker has the conversation, its own answer included,
    and can go on by itself. (Whether the router lets it depends on what each worker's steps take here.)"""
    messages = [
        {"role": "system", "content": "You are a helpful assistant. " * 12},
        {"role": "user", "content": "My name is Alice."},
    ]

    def turn(frontend: Frontend) -> int:
        """Take a turn; how many of its prompt's tokens were cached."""
        answer = frontend.client().chat.completions.create(
            model=MODEL, messages=messages, max_tokens=30, temperature=0, extra_body={"cache_salt": "turns"}
        )
        messages.append({"role": "assistant", "content": answer.choices[0].message.content or ""})
        messages.append({"role": "user", "content": "What is my name?"})
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    moved = always.metric("penstock_transferred_blocks_total")
    assert turn(always) == 0
    assert always.metric("penstock_transferred_blocks_total") > moved
    assert turn(never) >= 96
    assert messages[-2]["content"] == "Your name is Alice."
    assert never.metric("penstock_attempts_total", role="prefill") == 0
    assert never.metric("penstock_transferred_blocks_total") == 0
