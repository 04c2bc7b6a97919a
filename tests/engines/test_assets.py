from __future__ import annotations

from pathlib import Path

import pytest

from penstock.engines.assets import MAX_ASSET_BYTES, assets_from
from penstock.errors import ConfigError


def test_takes_the_known_files_that_are_there(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ messages }}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert assets_from(tmp_path) == {"tokenizer.json": b"{}", "chat_template.jinja": b"{{ messages }}"}
    assert assets_from(str(tmp_path)) == assets_from(tmp_path)


def test_a_missing_folder(tmp_path: Path):
    with pytest.raises(ConfigError, match="none is not a folder"):
        assets_from(tmp_path / "none")


def test_a_file_that_is_too_large(tmp_path: Path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(MAX_ASSET_BYTES + 1)
    with pytest.raises(ConfigError, match=r"tokenizer.json is larger than"):
        assets_from(tmp_path)


def test_a_file_that_cannot_be_read(tmp_path: Path):
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(ConfigError, match=r"cannot read .*tokenizer.json"):
        assets_from(tmp_path)
