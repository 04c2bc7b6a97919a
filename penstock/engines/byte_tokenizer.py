"""A tokenizer for engines that have no model: one token per byte, and the ChatML template.

It makes a simulated model usable through the whole API. Bytes are spelled in tokenizer.json with the
printable stand-ins of GPT-2's byte-level BPE, which is what the `ByteLevel` parts of the `tokenizers`
library read.
"""

from __future__ import annotations

import json

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
PRINTABLE = range(ord(" "), ord("~") + 1)  # token ids of printable ASCII
EOS_TOKEN_ID = 256 + SPECIAL_TOKENS.index("<|im_end|>")

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def assets() -> dict[str, bytes]:
    """The files of a model folder that a frontend needs."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": 256 + index,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index, content in enumerate(SPECIAL_TOKENS)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": _byte_vocabulary(), "merges": []},
    }
    settings = {
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[0],
        "chat_template": _CHAT_TEMPLATE,
    }
    return {
        "tokenizer.json": json.dumps(tokenizer).encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }


def _byte_vocabulary() -> dict[str, int]:
    """Stand-in character -> byte: printable Latin-1 for itself, then code points from 256 up in order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)}
    stand_ins = {byte: byte for byte in printable}
    for byte in range(256):
        if byte not in stand_ins:
            stand_ins[byte] = 256 + len(stand_ins) - len(printable)
    return {chr(stand_ins[byte]): byte for byte in range(256)}
