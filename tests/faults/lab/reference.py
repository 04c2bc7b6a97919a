"""Questions to the tiny model, with the answers that it gives in peace."""

from __future__ import annotations

import asyncio
import dataclasses

from tests.faults.lab.clients import Client, Question
from tests.faults.lab.processes import Graph

_NAMES = ("Alice", "Bob", "Carol", "Dave", "Erin", "Frank", "Grace", "Henry")
_TOKENS = 96


async def questions(graph: Graph) -> list[Question]:
    """Greedy and seeded ones, all to be answered as now. Each is asked of both frontends: they agree."""
    plain = []
    for number, name in enumerate(_NAMES):
        prompt = f"My name is {name}. " * (4 + number)
        plain.append(Question(prompt, _TOKENS, model="tiny", greedy=True, finish=""))
        plain.append(
            Question(prompt, _TOKENS, seed=number + 1, model="tiny", finish="", chat=number % 2 == 0)
        )
    return [await _answered(graph, question) for question in plain]


async def _answered(graph: Graph, question: Question) -> Question:
    clients = [Client(question, [url], 0) for url in graph.urls]
    outcomes = await asyncio.gather(*(client.run() for client in clients))
    texts = {tuple(outcome.texts) for outcome in outcomes}
    assert len(texts) == 1, f"frontends disagree: {outcomes}"
    assert all(outcome.kind == "ok" for outcome in outcomes), outcomes
    return dataclasses.replace(question, expected=texts.pop())
