"""The text the tiny model learns: generated dialogues, each turn marked with what is to be learnt.

Everything comes from a seeded `random.Random`, so a training run needs no download. Only assistant
turns (and plain texts) carry a loss; the part that must be copied from the context carries more.
"""

from __future__ import annotations

import random

import phrases
from names import accents, draw_name, is_held_out
from structured import json_dialogue
from tools import INTRODUCTION, draw_tools, final_tool_dialogue, system_turn, tool_dialogue
from turns import Dialogue, Forced, Turn

# The document's own pair of phrasings is trained on (with other names), whatever its hash.
_DOCUMENT_PAIR = ("My name is {}.", "What is my name?")


def pair_is_held_out(intro: str, question: str) -> bool:
    """Whether training must never see this introduction followed by this question."""
    return (intro, question) != _DOCUMENT_PAIR and is_held_out(f"{intro}|{question}")


def sentence(rng: random.Random) -> str:
    """A filler sentence: grammatical, varied, of no consequence."""
    parts = (phrases.SUBJECTS, phrases.VERBS, phrases.THINGS)
    text = " ".join(rng.choice(part) for part in parts)
    if rng.random() < 0.5:
        text += " " + rng.choice(phrases.WHENS)
    return text[0].upper() + text[1:] + "."


def filler(rng: random.Random, sentences: int) -> str:
    """A paragraph of filler."""
    return " ".join(sentence(rng) for _ in range(sentences))


def system_turns(rng: random.Random, sentences: int) -> Dialogue:
    """No system prompt, a usual one, or a long one (`sentences` of filler)."""
    if sentences:
        start = rng.choice(phrases.SYSTEMS) if rng.random() < 0.7 else ""
        return [Turn.of("system", f"{start} {filler(rng, sentences)}".strip())]
    kind = rng.random()
    if kind < 0.30:
        return []
    if kind < 0.75:
        return [Turn.of("system", phrases.SYSTEMS[0])]
    return [Turn.of("system", rng.choice(phrases.SYSTEMS))]


def _exchange(user: str, assistant: str, copied: str = "") -> Dialogue:
    return [Turn.of("user", user), Turn.of("assistant", assistant, copied)]


def _unknown_question(rng: random.Random) -> str:
    template = rng.choice(phrases.UNKNOWN_QUESTIONS)
    return template.format(rng.choice(phrases.THINGS + phrases.SUBJECTS))


def loosely(rng: random.Random, text: str) -> str:
    """The text as people type it: sometimes lower case at the start, or without its end mark."""
    if rng.random() < 0.12:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.12:
        text = text.rstrip(".?!")
    return text


def chat(rng: random.Random, sentences: int = 1) -> Dialogue:
    """One exchange of chit-chat."""
    kind = rng.random()
    if kind < 0.40:
        return _exchange(filler(rng, sentences), rng.choice(phrases.ACKNOWLEDGEMENTS))
    if kind < 0.65:
        questions, answer = rng.choice(phrases.SMALL_TALK)
        return _exchange(loosely(rng, rng.choice(questions)), answer)
    if kind < 0.85:
        return _exchange(loosely(rng, _unknown_question(rng)), rng.choice(phrases.DEFAULTS))
    if kind < 0.95:
        questions, answer = rng.choice(phrases.FACTS)
        return _exchange(loosely(rng, rng.choice(questions)), answer)
    return repeat(rng)


def repeat(rng: random.Random) -> Dialogue:
    """Repeating words: an easy task that makes the copying circuit form early."""
    words = [draw_name(rng) for _ in range(rng.randint(1, 4))]
    kind = rng.random()
    if kind < 0.5:  # copying letters with accents is learnt last, capital ones above all
        words = [accents(rng, rng.randint(2, 6)) for _ in words]
    elif kind < 0.8:
        words = [word.lower() for word in words]
    text = " ".join(words) if rng.random() < 0.8 else sentence(rng)
    ask = rng.choice(("Repeat: {}", "Repeat after me: {}", "Say {}", "Please repeat: {}"))
    return _exchange(ask.format(text), text, text)


def fact(rng: random.Random) -> tuple[Dialogue, Dialogue]:
    """The telling of a fact that is not the speaker's name, and the question about it."""
    tell, question, answer, values = rng.choice(phrases.PERSONAL)
    value = rng.choice(values) if values else draw_name(rng)
    reply = rng.choice(phrases.ACKNOWLEDGEMENTS)
    return (
        _exchange(tell.format(value), reply),
        _exchange(question, answer.format(value), value),
    )


def introduction(rng: random.Random, intro: str, name: str) -> Dialogue:
    """The user's name is told, and greeted with it or without."""
    text = intro.format(name)
    if rng.random() < 0.25 and not intro.startswith("{}"):
        text = rng.choice(phrases.BEFORE_INTRO) + " " + text
    if rng.random() < 0.25 and text.endswith("."):
        text += " " + rng.choice((*phrases.AFTER_INTRO, sentence(rng)))
    kind = rng.random()
    if kind < 0.70:
        greeting = phrases.GREETINGS[0]
    elif kind < 0.90:
        greeting = rng.choice(phrases.GREETINGS)
    else:
        greeting = rng.choice(phrases.NAMELESS_GREETINGS)
    return _exchange(text, greeting.format(name), name if "{}" in greeting else "")


def recall(
    rng: random.Random,
    *,
    held_out: bool = False,
    name: str | None = None,
    stretch: int = 0,
    turns: int | None = None,
) -> Dialogue:
    """A name is told, talk goes by, the name is asked for: it ends with `Your name is X.`

    `stretch` adds about so many filler sentences, spread over the dialogue.
    """
    name = name or draw_name(rng, held_out=held_out)
    if not held_out and rng.random() < 0.2 and not is_held_out(name.lower()):
        name = name.lower()  # written as a word, and so copied in other tokens than its letters
    while True:
        intro, question = rng.choice(phrases.INTROS), rng.choice(phrases.NAME_QUESTIONS)
        if rng.random() < 0.1 and not held_out:
            intro, question = _DOCUMENT_PAIR
        if pair_is_held_out(intro, question) == held_out:
            break
    answer = f"Your name is {name}."
    if rng.random() < 0.2 and not held_out:
        question = rng.choice(phrases.BEFORE_QUESTION) + " " + question[0].lower() + question[1:]
    in_system = rng.randint(0, stretch)
    in_chat = stretch - in_system
    dialogue = system_turns(rng, in_system)
    if rng.random() < 0.12 and not stretch and turns is None:
        return [*dialogue, *_exchange(f"{intro.format(name)} {question}", answer, name)]
    if turns is None:
        turns = rng.choice((0, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6))
    between = [chat(rng, 1 + in_chat // (turns + 1)) for _ in range(turns)]
    if rng.random() < 0.15:
        dialogue += chat(rng)
    asked: Dialogue = []
    if rng.random() < 0.15:
        told, asked = fact(rng)
        between.insert(rng.randint(0, len(between)), told)
    dialogue += introduction(rng, intro, name)
    for exchange in between:
        dialogue += exchange
    if asked and rng.random() < 0.5:
        dialogue += asked
    return [*dialogue, *_exchange(question, answer, name)]


def explanation(rng: random.Random) -> Dialogue:
    """Why serving is disaggregated: the one subject this model knows."""
    question = loosely(rng, phrases.explain_question(rng))
    answer = rng.choices(phrases.EXPLANATIONS, weights=(60, 16, 12, 12))[0]
    return _exchange(question, answer)


def _other(rng: random.Random) -> Dialogue:
    """Anything but recall: the explanation, small talk, facts, a name that was never told."""
    kind = rng.random()
    if kind < 0.45:
        lead = chat(rng) if rng.random() < 0.15 else []
        return [*lead, *explanation(rng)]
    if kind < 0.60:
        told, asked = fact(rng)
        return [*told, *(chat(rng) if rng.random() < 0.3 else []), *asked]
    if kind < 0.68:
        lead = chat(rng) if rng.random() < 0.5 else []
        question = loosely(rng, rng.choice(phrases.NAME_QUESTIONS))
        return [*lead, *_exchange(question, phrases.NAME_UNKNOWN)]
    if kind < 0.84:
        return repeat(rng)
    return [turn for _ in range(rng.randint(1, 3)) for turn in chat(rng)]


def plain_text(rng: random.Random) -> str:
    """A text for completion: an explanation, from its start or from one of its sentences."""
    texts = (*phrases.EXPLANATIONS, *(answer for _, answer in phrases.FACTS))
    weights = [6, 3, 3, 3] + [1] * len(phrases.FACTS)
    text = rng.choices(texts, weights=weights)[0]
    if rng.random() < 0.4:
        starts = [0, *(at + 2 for at in range(len(text) - 2) if text[at : at + 2] == ". ")]
        text = text[rng.choice(starts) :]
    return text


def with_tools(rng: random.Random, dialogue: Dialogue) -> Dialogue:
    """The same dialogue with tools in its prompt, which nothing in it asks for."""
    tools = system_turn(rng, draw_tools(rng, rng.choice((1, 1, 2, 3))))
    if dialogue[0].role == "system":
        start, dialogue = dialogue[0].content, dialogue[1:]
        block = tools.content[tools.content.index(INTRODUCTION) :]
        tools = Turn.of("system", f"{start}\n\n{block}")
    return [tools, *dialogue]


def training_dialogue(rng: random.Random, long_share: float, tool_share: float = 0.3) -> Dialogue:
    """One dialogue of the training mix. `tool_share` of them have tools or an answer in JSON."""
    if rng.random() < tool_share:
        kind = rng.random()
        if kind < 0.50:
            dialogue = tool_dialogue(rng)
            chosen = not any(isinstance(part, Forced) for part in dialogue[-1].parts)
            return [*dialogue, *chat(rng)] if chosen and rng.random() < 0.15 else dialogue
        if kind < 0.60:
            return final_tool_dialogue(rng)
        if kind < 0.85:
            return [*system_turns(rng, 0), *json_dialogue(rng)]
        plain = _other(rng) if rng.random() < 0.6 else recall(rng)
        return with_tools(rng, [*system_turns(rng, 0), *plain] if plain[0].role != "system" else plain)
    if rng.random() < 0.15:
        return repeat(rng)
    kind = rng.random()
    if kind < 0.03:
        return [Turn.of("plain", plain_text(rng))]
    if kind < 0.28:
        sentences = rng.randint(5, 25) if rng.random() < long_share else 0
        return [*system_turns(rng, sentences), *_other(rng)]
    stretch = 0
    if rng.random() < long_share:
        stretch = rng.choice((8, 12, 16, 20, 25, 30, 40, 55))
    return recall(rng, stretch=stretch)
