"""The programs in examples/, as a reader of the documents starts them."""

import os
import subprocess
import sys

import pytest

from tests.e2e.conftest import ROOT


@pytest.mark.parametrize(
    ("name", "question", "answer"),
    [
        ("chat", "My name is Alice.", "Hello Alice! Nice to meet you."),
        ("conversation", None, "assistant: Your name is Alice."),
        (
            "tools",
            "What is the weather in Paris?",
            'get_weather({"city": "Paris"}) -> sunny, 21 degrees\n'
            "According to get_weather: sunny, 21 degrees",
        ),
        ("tools", "What is 20 plus 22?", 'add({"a": 20, "b": 22}) -> 42\nAccording to add: 42'),
    ],
)
def test_example_prints_the_models_answer(local_graph, name, question, answer):
    environment = os.environ | {"PENSTOCK_URL": local_graph.url}
    command = [sys.executable, ROOT / "examples" / f"{name}.py", *([question] if question else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert answer in done.stdout
