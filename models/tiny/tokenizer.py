"""The tokenizer: byte-level BPE in which a name is always spelled out letter by letter.

Only a lower-case word after a space or hyphen becomes longer tokens. All else, a capitalised word
above all, is one token a letter, wherever it stands. So every token of a name is one the model has
copied many thousand times; with Qwen's pre-tokenizer a name may hold a token that training met only
twice, and that token is then recalled wrong.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import phrases
from dialogues import explanation, filler, plain_text
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VOCABULARY = 1024
CONTEXT = 4096
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, IM_START, IM_END = 0, 1, 2
_ROLES = ("system\n", "user\n", "assistant\n") * 20

_WORDS = (
    r"(?:system|user|assistant)(?=\n)"  # the roles of the chat template
    r"|[ -][\p{Ll}\p{M}]+|\p{L}\p{M}*|\p{M}|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- elif message.content is not none -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}"""


def _corpus() -> list[str]:
    """What the merges are learnt from: the text without its names."""
    rng = random.Random(0)
    lines = [filler(rng, 2) for _ in range(1500)]
    lines += [turn.content for _ in range(800) for turn in explanation(rng)]
    lines += [plain_text(rng) for _ in range(400)]
    fixed: list[str] = [*phrases.SYSTEMS, *phrases.ACKNOWLEDGEMENTS, *phrases.DEFAULTS]
    fixed += [*phrases.NAME_QUESTIONS, phrases.NAME_UNKNOWN, *_ROLES]
    templates = [*phrases.INTROS, *phrases.GREETINGS, *phrases.NAMELESS_GREETINGS]
    templates += [text for *texts, _ in phrases.PERSONAL for text in texts]
    fixed += [template.format("") for template in templates]
    for asked, answer in (*phrases.SMALL_TALK, *phrases.FACTS):
        fixed += [*asked, answer]
    return lines + fixed * 40


def train_tokenizer() -> Tokenizer:
    """Learn the merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and the tokenizer_config.json which transformers reads."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": SPECIAL[IM_END],
        "pad_token": SPECIAL[END_OF_TEXT],
        "additional_special_tokens": [SPECIAL[IM_START], SPECIAL[IM_END]],
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
