"""Loads that are made up, each after a published one. Endless; equal seeds give equal loads.

load           after
-------------  -----------------------------------------------------------------------------------
prompts        prompts of equal length with an optional prefix shared by all
shared-prefix  llm-d's benchmark of precise prefix routing: 150 system prompts of 6,000 tokens with
               five users each, who ask 1,200 tokens at a time
chat           conversations: a system prompt, then turns of a few hundred tokens
agents         576 recorded sessions of coding agents: long contexts, growing by little with each
               request, of which 14,500 tokens or so are the same for everybody
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from math import exp, log
from random import Random

from penstock.simulate.workload import ClientSession, Piece, SimulatedTurn

Lengths = tuple[tuple[float, float], ...]
"""Quantiles of a length: (share, value), ascending in both, beginning with share 0 and ending with 1."""

# Of the recorded agents' sessions; between two quantiles, logarithms are linear. The ends are guesses.
AGENT_REQUESTS: Lengths = ((0, 2), (0.25, 18), (0.5, 46), (0.75, 78), (0.9, 123), (0.99, 269), (1, 400))
AGENT_FIRST_TOKENS: Lengths = (
    (0, 14_000),
    (0.25, 18_200),
    (0.5, 20_700),
    (0.75, 64_700),
    (0.9, 97_400),
    (0.99, 128_000),
    (1, 130_000),
)
AGENT_NEW_TOKENS: Lengths = (
    (0, 40),
    (0.25, 360),
    (0.5, 680),
    (0.75, 1_640),
    (0.9, 4_080),
    (0.99, 52_800),
    (1, 90_000),
)
AGENT_OUTPUT_TOKENS: Lengths = (
    (0, 20),
    (0.25, 136),
    (0.5, 210),
    (0.75, 406),
    (0.9, 842),
    (0.99, 3_950),
    (1, 8_000),
)
AGENT_THINK_S: Lengths = ((0, 1), (0.25, 5), (0.5, 9), (0.75, 30), (0.9, 60), (1, 60))
AGENT_SHARED_TOKENS = 14_500
AGENT_CONTEXT_TOKENS = 131_072
AGENT_KEPT_SHARE = 0.3
"""Of its first prompt's length and what is shared: what a session keeps when its context is full."""


def drawn(lengths: Lengths, rng: Random) -> float:
    """A value of this distribution."""
    share = rng.random()
    place = min(bisect_right(lengths, share, key=lambda it: it[0]), len(lengths) - 1)
    (below, low), (above, high) = lengths[place - 1], lengths[place]
    return exp(log(low) + (log(high) - log(low)) * (share - below) / (above - below))


def prompts(
    seed: int, *, prompt_tokens: int = 2_000, output_tokens: int = 250, shared_tokens: int = 0
) -> Iterator[ClientSession]:
    """One request each."""
    shared: list[Piece] = [(0, shared_tokens)] if shared_tokens else []
    for key in count(1):
        yield ClientSession([SimulatedTurn([*shared, (key, prompt_tokens)], output_tokens)])


def shared_prefix(
    seed: int, *, prompt_tokens: int = 1_200, output_tokens: int = 1_000
) -> Iterator[ClientSession]:
    """One request each, of one of 150 groups at random."""
    rng = Random(f"{seed}/shared-prefix")
    for key in count(1_000):
        pieces = [(rng.randrange(150), 6_000), (key, prompt_tokens)]
        yield ClientSession([SimulatedTurn(pieces, output_tokens)])


def chat(
    seed: int, *, prompt_tokens: int = 300, output_tokens: int = 250, shared_tokens: int = 0
) -> Iterator[ClientSession]:
    """Conversations of one to twelve turns, each with around so many new and answered tokens, and pauses
    of ten seconds or so."""
    rng = Random(f"{seed}/chat")
    keys = count(1)
    while True:
        turns = []
        for number in range(rng.randint(1, 12)):
            new = [(next(keys), max(1, round(rng.lognormvariate(log(prompt_tokens), 0.7))))]
            if not number and shared_tokens:
                new.insert(0, (0, shared_tokens))
            output = max(1, round(rng.lognormvariate(log(output_tokens), 0.5)))
            turns.append(SimulatedTurn(new, output, think_s=rng.expovariate(1 / 10)))
        yield ClientSession(turns)


def agents(seed: int) -> Iterator[ClientSession]:
    """Sessions of coding agents. When a context is full, most of it is dropped, as agents do when they
    compact it."""
    rng = Random(f"{seed}/agents")
    keys = count(1)
    while True:
        first = round(drawn(AGENT_FIRST_TOKENS, rng))
        shared = min(first, AGENT_SHARED_TOKENS)
        context = first
        turns = [_agent_turn([(0, shared), (next(keys), first - shared + 1)], rng)]
        for _ in range(round(drawn(AGENT_REQUESTS, rng)) - 1):
            new = round(drawn(AGENT_NEW_TOKENS, rng))
            context += turns[-1].output_tokens
            turn = _agent_turn([(next(keys), new)], rng)
            if context + new + turn.output_tokens > AGENT_CONTEXT_TOKENS:
                context = round(shared + AGENT_KEPT_SHARE * (first - shared))
                new = min(new, AGENT_CONTEXT_TOKENS // 4)
                turn = SimulatedTurn([(next(keys), new)], turn.output_tokens, turn.think_s, context)
            context += new
            turns.append(turn)
        yield ClientSession(turns)


def _agent_turn(new: list[Piece], rng: Random) -> SimulatedTurn:
    output = round(drawn(AGENT_OUTPUT_TOKENS, rng))
    return SimulatedTurn(new, output, think_s=drawn(AGENT_THINK_S, rng))


GENERATORS: Mapping[str, Callable[..., Iterator[ClientSession]]] = {
    "prompts": prompts,
    "shared-prefix": shared_prefix,
    "chat": chat,
    "agents": agents,
}
