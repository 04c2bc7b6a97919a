"""A streamed answer from OpenAI's own client.

pip install openai
penstock up deploy/local.yaml          # in another terminal
python examples/chat.py "Explain disaggregated serving benefits"
"""

from __future__ import annotations

import os
import sys

from openai import OpenAI

URL = os.environ.get("PENSTOCK_URL", "http://localhost:8000")
TIMEOUT_S = 60.0


def main() -> None:
    question = " ".join(sys.argv[1:]) or "Explain disaggregated serving benefits"
    client = OpenAI(
        base_url=f"{URL}/v1", api_key=os.environ.get("PENSTOCK_API_KEY", "none"), timeout=TIMEOUT_S
    )
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        for choice in chunk.choices:  # the last chunk has the usage, and no choices
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage:
            print(
                f"\n[{chunk.usage.prompt_tokens} prompt tokens, {chunk.usage.completion_tokens} generated]"
            )


if __name__ == "__main__":
    main()
