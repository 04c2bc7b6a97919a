"""Names without end, and the split which keeps some of them from training.

Recall has to come from the context and not from memory: a wrong KV cache must show as a wrong name.
A short list would be learnt by heart, so almost every name here is made up on the spot, over every
initial letter, with the accents, hyphens and casings that real names have.
"""

from __future__ import annotations

import random
import re
import zlib

import phrases


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Real names that training never sees, whatever their hash: the evaluation asks for each of them.
HELD_OUT_NAMES = (
    "Alice", "Ottoline", "Xiulan", "Björn", "Mary-Jane", "Wei", "Priya", "O'Neil", "Zoë", "Ivan",
    "Uma", "Esther", "Quentin", "Yusuf", "Nguyen", "François", "Jean-Luc", "Siobhán", "Ed", "Li",
    "Christopher", "Hannah", "Bob", "Kwame", "Olga", "Ximena", "Aaron", "Deborah", "Isabella", "Vu",
)  # fmt: skip

SEED_NAMES = _words("""
Adam Agnes Ahmed Aisha Alan Albert Alejandro Alexander Amelia Amir Amy Ana Andrea Andrew Angela
Anita Anna Anton Arjun Arthur Astrid Audrey Ava Barbara Beatrice Ben Bernard Beth Bianca Boris Brian
Bruno Caleb Camille Carlos Carol Catherine Charlotte Chen Chloe Clara Claude Connor Cora Daniel
Daria David Dennis Diana Diego Dmitri Dora Dylan Edith Edward Eleanor Elena Eli Eliza Ella Emeka
Emily Emma Enzo Eric Eva Evan Fatima Felix Fiona Florence Frances Frank Freya Gabriel George Gina
Grace Greta Gustav Hana Harold Harry Hassan Hazel Helen Henry Hiro Hugo Ian Ibrahim Ida Igor Ilya
Imani Ines Ingrid Irene Iris Isaac Ismael Ivy Jack Jacob James Jane Jasmine Jean Jelena Jin Joan
Joel John Jonas Jose Joseph Joy Juan Julia Kamal Karen Karim Kate Keiko Kenji Kevin Khalid Kim Klara
Kofi Kurt Kyle Laila Lars Laura Leah Lena Leo Leon Liam Lila Linda Lionel Louis Lucas Lucy Luis Luna
Lydia Magnus Maja Manuel Marco Margaret Maria Mark Martin Mateo Maya Mei Michael Mila Ming Miriam
Mohammed Mona Nadia Naomi Natasha Nathan Neil Nia Nicolas Nina Noah Nora Odette Oliver Omar Oscar
Otto Owen Pablo Paula Pedro Penelope Peter Petra Philip Quinn Rachel Rafael Rajesh Raquel Ravi
Rebecca Rhys Rita Robert Rosa Rose Ruth Ryan Sakura Salma Samuel Sandra Sanjay Sara Sebastian Selma
Sergei Simon Sofia Sonia Stefan Stella Susan Sven Tamar Tariq Teresa Theodore Thomas Tim Tom Tuan
Ulrich Umberto Unai Ursula Usha Valentin Vera Victor Vikram Viola Violet Wanda Wendy Werner William
Wilma Wolfgang Xander Xavier Xenia Xia Xu Yara Yasmin Yolanda Yuki Yuri Yvonne Zachary Zainab Zara
Zelda Zhang Zoran
""")

# Empty strings let a name begin with a vowel; the rare onsets are as likely as the common ones, so
# that no first token is foreign.
_ONSETS = (
    *_words("b c d f g h j k l m n p q r s t v w x y z br ch cl cr dr fl fr gl gr kh kr kw ll"),
    *_words("mb ng ny ph pl pr qu rh sh sl sm sn st str sv th tr ts tw vl wh xh zh"),
    *[""] * 14,
)
_NUCLEI = _words("a a e e i i o o u u y ae ai au ea ee ei eo ia ie io iu oa oe oo ou ua ue ui uo")
_CODAS = _words("b c ck d f g h k l ll m n n nd ng nn ns p r r rd rn rt s s ss st t tt v w x z")
_ACCENTS = {
    "a": "áàâäãåă", "c": "çćč", "d": "đ", "e": "éèêëěę", "g": "ğ", "i": "íìîï", "l": "ł",
    "n": "ñńň", "o": "óòôöõøő", "r": "ř", "s": "śşš", "u": "úùûüůű", "y": "ýÿ", "z": "źżž",
}  # fmt: skip
ACCENTED = "".join(_ACCENTS.values())
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def is_held_out(text: str) -> bool:
    """Whether this name (or pair of phrasings) belongs to the evaluation: about one in ten."""
    return text in HELD_OUT_NAMES or zlib.crc32(text.casefold().encode()) % 10 == 0


def _syllables(rng: random.Random) -> str:
    parts = []
    for _ in range(rng.choice((1, 2, 2, 2, 3, 3, 4))):
        coda = rng.choice(_CODAS) if rng.random() < 0.35 else ""
        parts.append(rng.choice(_ONSETS) + rng.choice(_NUCLEI) + coda)
    return "".join(parts)


def _letters(rng: random.Random) -> str:
    return "".join(rng.choice(_LETTERS) for _ in range(rng.randint(2, 9)))


def _spliced(rng: random.Random) -> str:
    """The front of one real name on the back of another: natural letter runs, no known name."""
    front, back = rng.choice(SEED_NAMES).lower(), rng.choice(SEED_NAMES).lower()
    return front[: rng.randint(1, len(front))] + back[rng.randint(0, len(back) - 1) :]


def _mutated(rng: random.Random) -> str:
    name = rng.choice(SEED_NAMES).lower()
    at = rng.randrange(len(name))
    return name[:at] + rng.choice(_LETTERS) + name[at + rng.randint(0, 1) :]


def _fragments() -> tuple[str, ...]:
    """Every run of two to five letters in the fillers."""
    texts = (*phrases.SUBJECTS, *phrases.VERBS, *phrases.THINGS, *phrases.WHENS)
    texts += (*phrases.EXPLANATIONS, *phrases.SYSTEMS, *phrases.DEFAULTS, *phrases.NAME_QUESTIONS)
    words = {word for text in texts for word in re.findall("[a-z]+", text.lower())}
    runs = {w[i : i + n] for w in words for n in range(2, 6) for i in range(len(w) - n + 1)}
    return tuple(sorted(runs))


_FRAGMENTS = _fragments()


def _pieces(rng: random.Random) -> str:
    """Fragments of ordinary words, all as likely, so that every letter follows many others."""
    return "".join(rng.choice(_FRAGMENTS) for _ in range(rng.randint(1, 3)))


def _one_word(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.12:
        word = rng.choice(SEED_NAMES).lower()
    elif kind < 0.30:
        word = _mutated(rng)
    elif kind < 0.48:
        word = _spliced(rng)
    elif kind < 0.68:
        word = _syllables(rng)
    elif kind < 0.90:
        word = _pieces(rng)
    else:
        word = _letters(rng)
    word = word[:12]
    if len(word) < 2:
        word += rng.choice(_LETTERS)
    if rng.random() < 0.15:  # every initial, as often as any other
        word = rng.choice(_LETTERS) + word[1:]
    if rng.random() < 0.16:
        word = accented(rng, word)
    return word.capitalize()


def accented(rng: random.Random, word: str) -> str:
    """One letter of the word with an accent, if it has a letter that takes one there."""
    at = rng.randrange(len(word))
    return word[:at] + rng.choice(_ACCENTS.get(word[at], word[at])) + word[at + 1 :]


def accents(rng: random.Random, count: int) -> str:
    """So many letters, most of them with accents: no name, but all of it must be copied."""
    letters = [rng.choice(rng.choice([*_ACCENTS.values(), *_LETTERS])) for _ in range(count)]
    word = "".join(letters)
    return rng.choice((word, word.upper(), word.capitalize()))


def _any_name(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.80:
        return _one_word(rng)
    if kind < 0.86:
        return f"{_one_word(rng)[:7]}-{_one_word(rng)[:7]}"
    if kind < 0.89:
        return rng.choice(("O'", "D'", "Mc", "Mac", "De", "L'")) + _one_word(rng)
    if kind < 0.93:
        return f"{_one_word(rng)} {_one_word(rng)}"
    if kind < 0.96:
        return _one_word(rng).lower()
    return _one_word(rng)[:8].upper()


def draw_name(rng: random.Random, *, held_out: bool = False) -> str:
    """A name from the training side of the split, or from the held-out side."""
    while True:
        name = _any_name(rng)
        if is_held_out(name) == held_out:
            return name
