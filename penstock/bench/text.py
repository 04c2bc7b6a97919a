"""Generates prompts: questions, and filler of a given length, which depends only on a seed."""

from __future__ import annotations

from functools import lru_cache
from random import Random

QUESTIONS = (
    "What does a penstock do in a hydroelectric plant?",
    "Explain how a water turbine turns falling water into electricity.",
    "My name is Ottoline. What is my name?",
    "Which is older, the water wheel or the windmill? Say why you think so.",
    "Write four lines about a river that was dammed.",
    "Give me three reasons to store water behind a dam, and one not to.",
    "How would you explain a queue to a child who has never waited?",
    "Describe the sound of a turbine hall at night.",
    "Summarize what we have said so far in two sentences.",
    "What would you ask next if you were me?",
    "Plan a walk of two hours along a mountain stream.",
    "Why does a heavy lorry need longer to stop than a bicycle?",
    "List the steps to bake bread without an oven.",
    "Tell me a short story that begins in a lighthouse.",
    "Compare letters and telephone calls in one paragraph.",
    "What makes a good question?",
)

# Common words. In most vocabularies each is one token, together with the space before it.
_WORDS = """
the of and to in is that it was for on are as with his they at be this have from or one had by word
but not what all were we when your can said there use an each which she do how their if will up
other about out many then them these so some her would make like him into time has look two more
write go see number no way could people my than first water been call who oil its now find long down
day did get come made may part over new sound take only little work know place year live me back
give most very after thing our just name good sentence man think say great where help through much
before line right too mean old any same tell boy follow came want show also around form three small
set put end does another well large must big even such because turn here why ask went men read need
land
"""
WORDS = tuple(_WORDS.split())

CACHED_PIECES = 8192
"""Number of texts that are cached, since the blocks of traces repeat."""


@lru_cache(CACHED_PIECES)
def filler(seed: str, words: int) -> str:
    """`words` words, drawn from `seed`: equal arguments give equal text on every machine."""
    return " ".join(Random(seed).choices(WORDS, k=words))
