"""lm-eval: a task of each kind, multiple choice by log-likelihoods and text that is generated."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

COMMAND_S = 280
QUESTIONS = [
    {"question": f"My name is {name}. What is my name?", "answer": f"Your name is {name}."}
    for name in ("Alice", "Bob", "Clara")
]
CHOICES = [question["answer"] for question in QUESTIONS]

DATA = """
task: names
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
MULTIPLE_CHOICE = """
output_type: multiple_choice
doc_to_choice: {choices}
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
GENERATE_UNTIL = """
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 20}
metric_list: [{metric: exact_match}]
"""


def evaluate(folder: Path, task: str, kind: str, *options: str) -> dict[str, float]:
    """The task's metrics, as `lm_eval` writes them."""
    (folder / "names.jsonl").write_text("".join(json.dumps(it) + "\n" for it in QUESTIONS))
    (folder / "names.yaml").write_text(DATA.format(file=folder / "names.jsonl") + task)
    path = {"local-completions": "completions", "local-chat-completions": "chat/completions"}[kind]
    arguments = f"model={os.environ['PENSTOCK_MODEL']},base_url={os.environ['OPENAI_BASE_URL']}/{path}"
    tokenizer = f"tokenizer={os.environ['PENSTOCK_MODEL_FOLDER']}"
    command = ["lm_eval", "--model", kind, "--model_args", f"{arguments},{tokenizer}", "--tasks", "names"]
    where = ["--include_path", str(folder), "--output_path", str(folder / "results")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    subprocess.run([*command, *where, *options], check=True, env=environment, timeout=COMMAND_S)
    (results,) = (folder / "results").rglob("results_*.json")
    return json.loads(results.read_text())["results"]["names"]


def test_multiple_choice_by_completions_gives_its_accuracy(tmp_path: Path) -> None:
    task = MULTIPLE_CHOICE.format(choices=json.dumps(CHOICES))
    assert evaluate(tmp_path, task, "local-completions")["acc,none"] == 1


def test_generate_until_by_chats_finds_every_answer(tmp_path: Path) -> None:
    found = evaluate(tmp_path, GENERATE_UNTIL, "local-chat-completions", "--apply_chat_template")
    assert found["exact_match,none"] == 1
