"""The files of a model folder that a frontend needs to render prompts, tokenize, detokenize and parse."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from penstock.errors import ConfigError

ASSET_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)

MAX_ASSET_BYTES = 32 * 1024 * 1024
"""Of one file. Tokenizers of 250,000 tokens take 10 to 20 MB; assets are kept in memory on both sides."""


class Assets:
    """Files by name, as a ModelCard lists them, and their content."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        self._contents = {self.digests[name]: content for name, content in files.items()}

    def get(self, sha256: str) -> bytes | None:
        """The content with this digest, in hex; None when no file has it."""
        return self._contents.get(sha256)


def assets_from(folder: Path | str) -> dict[str, bytes]:
    """File name -> content, of those in ASSET_NAMES that the folder has.

    Raises ConfigError when the folder does not exist, or a file is too large or cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder")
    return {name: _read(folder / name) for name in ASSET_NAMES if (folder / name).exists()}


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_ASSET_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > MAX_ASSET_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_ASSET_BYTES} bytes")
    return content
