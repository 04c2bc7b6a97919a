"""Plans the conversations of a run and their start times. Pure; equal seeds give equal plans."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count
from random import Random

import msgspec

from penstock.bench.text import QUESTIONS, filler
from penstock.errors import ConfigError


class PlannedTurn(msgspec.Struct, frozen=True):
    """A message of the user, and the length of the answer to it."""

    text: str
    output_tokens: int


class PlannedConversation(msgspec.Struct, frozen=True):
    """Turns that are sent one after the other, each with all earlier messages."""

    turns: list[PlannedTurn]
    system: str = ""


class Arrival(msgspec.Struct, frozen=True):
    """A conversation and its start time, in seconds from the start of the run."""

    at_s: float
    conversation: PlannedConversation


class Shape(msgspec.Struct, frozen=True):
    """The shape of synthetic conversations. `words_per_token` was measured for the server's tokenizer."""

    turns: int = 1
    prompt_tokens: int | None = None  # per turn; None: built-in questions
    output_tokens: int = 64
    shared_prefix_tokens: int = 0  # length of the system prompt of all conversations
    words_per_token: float = 1.0


def words(tokens: int, words_per_token: float) -> int:
    """The number of filler words for about this many tokens; at least one."""
    return max(1, round(tokens * words_per_token))


def synthetic(shape: Shape, seed: int) -> Iterator[PlannedConversation]:
    """An endless sequence of different conversations."""
    system = ""
    if shape.shared_prefix_tokens:
        system = filler(f"{seed}/system", words(shape.shared_prefix_tokens, shape.words_per_token))
    for number in count():
        yield PlannedConversation([_turn(shape, seed, number, turn) for turn in range(shape.turns)], system)


def _turn(shape: Shape, seed: int, number: int, turn: int) -> PlannedTurn:
    if shape.prompt_tokens is None:
        return PlannedTurn(QUESTIONS[(number + turn) % len(QUESTIONS)], shape.output_tokens)
    # Without the cache of `filler`, since each text is used once.
    text = filler.__wrapped__(f"{seed}/{number}/{turn}", words(shape.prompt_tokens, shape.words_per_token))
    return PlannedTurn(text, shape.output_tokens)


def arrivals(conversations: Iterator[PlannedConversation], rate: Rate, seed: int) -> Iterator[Arrival]:
    """Give conversations start times at a rate, for an open loop."""
    rng = Random(f"{seed}/arrivals")
    at_s = 0.0
    for conversation in conversations:
        yield Arrival(at_s, conversation)
        at_s += rng.expovariate(rate.per_s) if rate.poisson else 1 / rate.per_s


class Rate(msgspec.Struct, frozen=True):
    """The rate at which conversations begin."""

    per_s: float
    poisson: bool = True

    @classmethod
    def parse(cls, text: str, *, poisson: bool = True) -> Rate:
        """`10`, `10/s` or `600/m`. Raises ConfigError."""
        number, _, unit = text.partition("/")
        try:
            per_s = float(number) / {"": 1, "s": 1, "m": 60, "h": 3600}[unit.strip()]
        except (ValueError, KeyError):
            raise ConfigError(f"rate: `{text}` is not like `10/s` or `600/m`") from None
        if not 0 < per_s < math.inf:
            raise ConfigError(f"rate: `{text}` must be above 0")
        return cls(per_s, poisson)
