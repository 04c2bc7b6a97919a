"""A realistic tokenizer and realistic prompts, from text that every machine has.

The shipped model's vocabulary of 1,024 tokens cuts a word into many tokens, where models in use take about
1.3. So this trains a byte-level BPE of 32,768 tokens on the standard library's docstrings and comments,
once per machine (some seconds), and writes it as a model folder for `penstock worker --engine sim`.
"""

from __future__ import annotations

import ast
import json
import random
import sys
import sysconfig
import tempfile
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 32_768
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# Qwen's (Qwen2 and Qwen3's tokenizer.json).
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

FOLDER = (
    Path(tempfile.gettempdir()) / f"penstock-bench-tokenizer-{sys.version_info[0]}.{sys.version_info[1]}"
)


class English:
    """Prompts of the language's reference manual: running words, at random places."""

    def __init__(self) -> None:
        from pydoc_data import topics

        self._words = [word for topic in topics.topics.values() for word in topic.split() if word.isascii()]

    def prompt(self, words: int, seed: int) -> str:
        """Pieces of running text that no cache has seen together: each is a few words long."""
        rng = random.Random(seed)
        taken: list[str] = []
        while len(taken) < words:
            start = rng.randrange(len(self._words))
            taken += self._words[start : start + rng.randrange(3, 12)]
        return " ".join(taken[:words])


def model_folder() -> Path:
    """The folder, made when it is not there yet."""
    if not (FOLDER / "config.json").exists():
        FOLDER.mkdir(exist_ok=True)
        _train().save(str(FOLDER / "tokenizer.json"))
        settings = {"eos_token": SPECIAL_TOKENS[2], "chat_template": CHAT_TEMPLATE}
        (FOLDER / "tokenizer_config.json").write_text(json.dumps(settings))
        (FOLDER / "config.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE}))  # last: all is there
    return FOLDER


def _train() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"the text gives only {tokenizer.get_vocab_size()} tokens")
    return tokenizer


def _texts() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts:
            yield from _prose(path)


def _prose(path: Path) -> Iterator[str]:
    """A source's docstrings and other strings."""
    try:
        with tokenize.open(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some of the library's tests are about warnings
            tree = ast.parse(file.read())
    except (SyntaxError, UnicodeDecodeError):
        return  # some of the library's tests are not meant to be read
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.value.encode(errors="replace").decode()
