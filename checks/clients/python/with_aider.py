"""Aider: whole turns of `aider --message`, with the two formats in which it asks for edits."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

COMMAND_S = 200


@pytest.mark.parametrize(
    "options",
    [["--edit-format", "whole"], ["--edit-format", "diff", "--no-stream"]],
    ids=["whole file, streamed", "diff, at once"],
)
def test_message_ends_its_turn_with_an_answer_and_its_usage(
    options: list[str], tmp_path: Path, model: str
) -> None:
    (tmp_path / "sums.py").write_text("def add(a, b):\n    return a - b\n")
    # What is said here of the model Aider would look up in the internet.
    known = {"litellm_provider": "openai", "mode": "chat", "max_input_tokens": 32768}
    (tmp_path / "models.json").write_text(json.dumps({f"openai/{model}": known}))
    settings = ["--model", f"openai/{model}", "--model-metadata-file", "models.json", "--no-git"]
    quiet = ["--no-check-update", "--no-show-release-notes", "--analytics-disable", "--no-pretty"]
    command = ["aider", *settings, *quiet, *options, "--yes-always", "--message", "Fix add.", "sums.py"]
    ended = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "OPENAI_API_BASE": os.environ["OPENAI_BASE_URL"]},
    )
    # What it answers is not looked at: the rules for edits are too much for the shipped model.
    assert re.search(r"Tokens: [\d.]+k? sent, [1-9]\d* received", ended.stdout), ended.stdout
