"""A model with tool calls and reasoning, made of models/tiny."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

TINY = Path(__file__).parents[3] / "models" / "tiny"
TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
EMBEDDING = "model.embed_tokens.weight"

END_OF_REASONING = " is"
"""The model writes `</think>` where it would have written this, so that its reasoning ends by itself."""


def with_tools(folder: Path) -> Path:
    """models/tiny with four more tokens and a chat template of Qwen3's kind, put into `folder`.

    As in Qwen3's tokenizer the tokens are added ones, but not special: they are part of the text. All but
    `</think>` have embeddings so small that the model never writes them by itself: a test has to make it,
    by a grammar.
    """
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(TINY / name, folder)
    first_id = _add_tokens(folder / "tokenizer.json")
    _add_rows(folder, first_id)
    config = json.loads((TINY / "tokenizer_config.json").read_text())
    template = Path(__file__).with_name("chat_template.jinja").read_text()
    _write(folder / "tokenizer_config.json", config | {"chat_template": template})
    return folder


def _add_tokens(file: Path) -> int:
    """Returns the id of the first one."""
    tokenizer = json.loads(file.read_text())
    first_id = len(tokenizer["model"]["vocab"])
    shared = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    tokenizer["added_tokens"] += [
        {"id": first_id + index, "content": token, **shared} for index, token in enumerate(TOKENS)
    ]
    _write(file, tokenizer)
    return first_id


def _add_rows(folder: Path, first_id: int) -> None:
    """One row of the embedding, which is the output layer too, for each token."""
    file, config_file = folder / "model.safetensors", folder / "config.json"
    weights = load_file(file)
    embedding = weights[EMBEDDING]
    assert len(embedding) == first_id, "the new ids must follow the last row"
    assert json.loads(config_file.read_text())["tie_word_embeddings"]
    (like_id,) = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(END_OF_REASONING).ids
    rows = torch.full((len(TOKENS), embedding.shape[1]), 1e-3, dtype=embedding.dtype)
    rows[TOKENS.index("</think>")] = embedding[like_id] * 1.125
    weights[EMBEDDING] = torch.cat((embedding, rows))
    save_file(weights, file, metadata={"format": "pt"})
    config = json.loads(config_file.read_text())
    _write(config_file, config | {"vocab_size": first_id + len(TOKENS)})


def _write(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False))
