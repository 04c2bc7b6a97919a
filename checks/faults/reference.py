"""Questions to the tiny model, with the answers that it gives in peace."""

from __future__ import annotations

import asyncio
import dataclasses

from checks.faults.clients import Client, Question
from checks.faults.processes import Graph

_NAMES = ("Alice", "Bob", "Carol", "Dave", "Erin", "Frank", "Grace", "Henry")
_TOKENS = 200


async def questions(graph: Graph) -> list[Question]:
    """Greedy and seeded ones of several lengths. Each is asked of every frontend now: they agree."""
    plain = []
    for number, name in enumerate(_NAMES):
        text = f"My name is {name}. " * (2 + 3 * number)
        question = Question(text, _TOKENS, model="tiny", to_the_end=True)
        plain.append(dataclasses.replace(question, greedy=True, stream=number % 4 != 3))
        plain.append(dataclasses.replace(question, seed=number + 1, chat=number % 2 == 0, n=1 + number % 2))
    return [await _answered(graph, question) for question in plain]


async def _answered(graph: Graph, question: Question) -> Question:
    clients = [Client(question, [url], 0) for url in graph.urls]
    outcomes = await asyncio.gather(*(client.run() for client in clients))
    texts = {tuple(outcome.texts) for outcome in outcomes}
    assert all(outcome.kind == "ok" for outcome in outcomes), outcomes
    assert len(texts) == 1, f"frontends disagree: {outcomes}"
    return dataclasses.replace(question, expected=texts.pop())
