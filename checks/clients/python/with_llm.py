"""The `llm` command line, with the model named in its extra-openai-models.yaml."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

COMMAND_S = 100


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    (tmp_path / "extra-openai-models.yaml").write_text(f"""
- model_id: penstock
  model_name: {model}
  api_base: {os.environ["OPENAI_BASE_URL"]}
  supports_tools: true
  supports_schema: true
""")


def llm(*arguments: str) -> str:
    command = ["llm", "-m", "penstock", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMMAND_S).stdout


@pytest.mark.parametrize("options", [[], ["--no-stream"]], ids=["streamed", "whole"])
def test_prompt_is_answered(options: list[str]) -> None:
    assert "Alice" in llm(*options, "My name is Alice. What is my name?")


def test_conversation_is_continued() -> None:
    llm("My name is Alice.")
    assert "Alice" in llm("--continue", "What is my name?")


def test_function_is_called_and_its_result_answered() -> None:
    function = """
def get_weather(city: str) -> int:
    "Get the weather in a city."
    return 21 if city == "Paris" else -1
"""
    assert "21" in llm("--functions", function, "What is the weather in Paris?")


def test_schema_gives_an_object_of_it() -> None:
    person = json.loads(llm("--schema", "name, age int", "Alice is 30 years old."))
    assert person.keys() == {"name", "age"}
    assert person["age"] == 30
