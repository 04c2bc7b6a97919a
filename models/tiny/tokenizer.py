"""The tokenizer: byte-level BPE in which a name is always spelled out letter by letter. Running this file
makes it anew: `python models/tiny/tokenizer.py FOLDER`. Training reads the one beside it.

Only a lower-case word after a space or hyphen becomes longer tokens. All else, a capitalised word
above all, is one token a letter, wherever it stands. So every token of a name is one the model has
copied many thousand times; with Qwen's pre-tokenizer a name may hold a token that training met only
twice, and that token is then recalled wrong.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import phrases
from dialogues import explanation, filler, plain_text
from names import ACCENTED
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tools import INSTRUCTION, INTRODUCTION, tool_dialogue

VOCABULARY = 1024
CONTEXT = 32_768
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, IM_START, IM_END = 0, 1, 2
_ROLES = ("system\n", "user\n", "assistant\n") * 20

# What the chat template and JSON schemas are made of is words too, between their tags and quotes.
_JSON_WORDS = (
    "name|arguments|parameters|type|function|description|properties|required|object|string|integer|number"
    "|boolean|null|enum|title|default|anyOf|additionalProperties|strict"
)
_WORDS = (
    r"(?:system|user|assistant)(?=\n)"  # the roles of the chat template
    r"|(?<=[</])(?:tool_call|tool_response|tools)(?=>)"
    rf'|(?<=")(?:{_JSON_WORDS})(?=")'
    r"|[ -][\p{Ll}\p{M}]+|\p{L}\p{M}*|\p{M}|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}
{{- content -}}
{%- elif content is not none -%}
{%- for part in content -%}
{%- if part.type == 'text' -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set first = messages[0] -%}
{%- if tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if first.role == 'system' -%}{{- text(first.content) + '\\n\\n' -}}{%- endif -%}
{{- 'INTRODUCTION' -}}
{%- for tool in tools -%}
{%- set function = tool.function -%}
{%- set front = {'description': function.description} if 'description' in function else {} -%}
{{- '\\n' -}}{{- dict(tool, function=dict(front, **function)) | tojson -}}
{%- endfor -%}
{{- '\\nINSTRUCTION<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{%- if loop.first or loop.previtem.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
{{- '\\n<tool_response>\\n' -}}{{- text(message.content) -}}{{- '\\n</tool_response>' -}}
{%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
{%- elif not (tools and loop.first and message.role == 'system') -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- set content = text(message.content) -%}
{{- content -}}
{%- for call in message.tool_calls or [] -%}
{%- if content or not loop.first -%}{{- '\\n' -}}{%- endif -%}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
{%- if call.function.arguments is string -%}
{{- call.function.arguments -}}
{%- else -%}
{{- call.function.arguments | tojson -}}
{%- endif -%}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}"""
for _name, _text in (("INTRODUCTION", INTRODUCTION), ("INSTRUCTION", INSTRUCTION)):
    CHAT_TEMPLATE = CHAT_TEMPLATE.replace(_name, _text.replace("\n", "\\n"))


def _corpus() -> list[str]:
    """What the merges are learnt from: the text without its names."""
    rng = random.Random(0)
    lines = [filler(rng, 2) for _ in range(1500)]
    lines += [turn.content for _ in range(800) for turn in explanation(rng)]
    lines += [plain_text(rng) for _ in range(400)]
    lines += [turn.content for _ in range(400) for turn in tool_dialogue(rng)]
    fixed: list[str] = [*phrases.SYSTEMS, *phrases.ACKNOWLEDGEMENTS, *phrases.DEFAULTS]
    fixed += [*phrases.NAME_QUESTIONS, phrases.NAME_UNKNOWN, *_ROLES]
    templates = [*phrases.INTROS, *phrases.GREETINGS, *phrases.NAMELESS_GREETINGS]
    templates += [text for *texts, _ in phrases.PERSONAL for text in texts]
    fixed += [template.format("") for template in templates]
    fixed += [*phrases.AGENT_SYSTEMS, *phrases.AFTER_TOOL_QUESTION, *phrases.RESULT_WORDS]
    for asked, answer in (*phrases.SMALL_TALK, *phrases.FACTS):
        fixed += [*asked, answer]
    fixed += [ACCENTED, ACCENTED.upper()] * 20  # one token for each: bytes of letters are copied worse
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


if __name__ == "__main__":
    save_tokenizer(train_tokenizer(), Path(sys.argv[1]))
