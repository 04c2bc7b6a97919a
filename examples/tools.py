"""An agent's loop: the model asks for tools, this program runs them, the model answers.

pip install openai
penstock up deploy/local.yaml          # in another terminal
python examples/tools.py "What is the weather in Paris?"
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from openai import OpenAI

URL = os.environ.get("PENSTOCK_URL", "http://localhost:8000")
TIMEOUT_S = 60.0
MAX_TURNS = 8


def get_weather(city: str) -> str:
    return "sunny, 21 degrees" if city == "Paris" else "rain, 8 degrees"


def add(a: int, b: int) -> str:
    return str(a + b)


FUNCTIONS: dict[str, Callable[..., str]] = {"get_weather": get_weather, "add": add}


def tool(name: str, description: str, **parameters: str) -> dict[str, Any]:
    """A function as OpenAI's API describes it; of each parameter the type."""
    properties = {parameter: {"type": type_name} for parameter, type_name in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": schema},
    }


TOOLS = [
    tool("get_weather", "Get the current weather in a city.", city="string"),
    tool("add", "Add two numbers.", a="integer", b="integer"),
]


def main() -> None:
    question = " ".join(sys.argv[1:]) or "What is the weather in Paris?"
    client = OpenAI(
        base_url=f"{URL}/v1", api_key=os.environ.get("PENSTOCK_API_KEY", "none"), timeout=TIMEOUT_S
    )
    model = client.models.list().data[0].id
    messages: list[Any] = [{"role": "user", "content": question}]
    for _ in range(MAX_TURNS):
        answer = client.chat.completions.create(
            model=model,
            messages=messages,
            tools=TOOLS,  # type: ignore[arg-type]  # plain dicts
            temperature=0,
        )
        message = answer.choices[0].message
        if not message.tool_calls:
            print(message.content)
            return
        messages.append(message)
        for call in message.tool_calls:
            assert call.type == "function"
            result = FUNCTIONS[call.function.name](**json.loads(call.function.arguments))
            print(f"{call.function.name}({call.function.arguments}) -> {result}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    print(f"no answer after {MAX_TURNS} turns")


if __name__ == "__main__":
    main()
