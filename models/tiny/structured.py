"""Answers in JSON of a shape that a server forces: the values are what the model has to know.

With `response_format` no schema stands in the prompt, so most keys count little in training; where the
user names the keys, they are learnt.
"""

from __future__ import annotations

import random
from typing import Any

import phrases
from names import draw_name
from tools import UNKNOWN, draw_number, draw_text, dumps
from turns import Copied, Dialogue, Forced, Key, Part, Turn


def json_dialogue(rng: random.Random) -> Dialogue:
    """Something is told; it comes back as an object, its strings and numbers in the order of the text."""
    texts = [draw_text(rng) for _ in range(rng.choice((0, 1, 1, 1, 1, 2, 2, 3)))]
    numbers = [draw_number(rng, "integer") for _ in range(rng.choice((0, 1, 1, 1, 2)) if texts else 1)]
    keys: list[tuple[str, Any]] = list(zip(_keys(rng, phrases.STRING_PARAMETERS), texts, strict=False))
    keys += list(zip(_keys(rng, phrases.NUMBER_KEYS), numbers, strict=False))
    missing = rng.random()
    if missing < 0.08:
        keys.append((rng.choice(("reason", "comment", "notes", "source", "details")), UNKNOWN))
    elif missing < 0.14:
        keys.append((rng.choice(("valid", "active", "ok", "confirmed", "done")), True))
    if rng.random() < 0.3:
        rng.shuffle(keys)
        # What is shuffled is still in the text's order among values of one kind.
        keys = _in_order(keys, texts, numbers)
    told = _told(rng, [str(value) for value in texts], [str(value) for value in numbers])
    named = rng.random() < 0.35
    if named:
        listed = ", ".join(key for key, _ in keys)
        ask = rng.choice(phrases.JSON_REQUESTS).format(listed)
        told = f"{ask} {told}" if rng.random() < 0.5 else f"{told} {ask}"
    elif rng.random() < 0.3:
        told = f"{rng.choice(phrases.EXTRACT_REQUESTS)} {told}"
    return [Turn.of("user", told), Turn("assistant", tuple(_object(rng, keys, named)))]


def _keys(rng: random.Random, among: tuple[str, ...]) -> list[str]:
    """A few different keys; some made up."""
    keys = rng.sample(among, 3)
    return [draw_name(rng).split()[0].lower() if rng.random() < 0.1 else key for key in keys]


def _in_order(keys: list[tuple[str, Any]], texts: list[str], numbers: list[Any]) -> list[tuple[str, Any]]:
    words, figures = iter(texts), iter(numbers)
    kept = []
    for key, value in keys:
        if isinstance(value, str) and value != UNKNOWN:
            value = next(words)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            value = next(figures)
        kept.append((key, value))
    return kept


def _told(rng: random.Random, texts: list[str], numbers: list[str]) -> str:
    """A sentence in which the texts and the numbers stand in order."""
    if len(texts) == 1 and len(numbers) == 1:
        return rng.choice(phrases.TELLING).format(texts[0], numbers[0])
    said = {0: "", 1: "This is {}.", 2: "{} met {}.", 3: "{}, {} and {} are here."}[len(texts)]
    if len(texts) == 1:
        said = rng.choice(phrases.TELLING_TEXT)
    elif len(texts) == 2:
        said = rng.choice(phrases.TELLING_TWO)
    said = said.format(*texts)
    if numbers:
        counted = rng.choice(phrases.TELLING_NUMBER).format(" and ".join(numbers))
        said = f"{said} {counted}".strip()
    return said


def _object(rng: random.Random, keys: list[tuple[str, Any]], named: bool) -> list[Part]:
    nested = not named and rng.random() < 0.1
    outer = rng.choice(("person", "result", "item", "data"))
    parts: list[Part] = [Forced(f'{{"{outer}": {{' if nested else "{")]
    listed = not named and not nested and rng.random() < 0.1 and len(keys) > 1
    if listed:
        values = [value for _, value in keys]
        parts = [Forced('{"' + rng.choice(("items", "names", "values", "entries")) + '": [')]
        for number, value in enumerate(values):
            parts += [", " if number else "", *_value(value)]
        return [*parts, "]}"]
    for number, (key, value) in enumerate(keys):
        written = dumps(key)[1:-1]
        before, after = (", " if number else "") + '"', '": '
        if named:
            parts += [before, written, after]
        else:
            parts += [Forced(before), Key(written), Forced(after)]
        parts += _value(value)
    return [*parts, "}}" if nested else "}"]


def _value(value: Any) -> list[Part]:
    if isinstance(value, str):
        return ['"', Copied(dumps(value)[1:-1]), '"']
    return [Copied(dumps(value))]
