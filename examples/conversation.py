"""Two turns of a conversation, and how much of the second one's prompt was cached.

The second request repeats the first one's messages, so the router sends it to the worker that has their
KV, and only what is new is computed. `cached_tokens` counts in whole KV blocks, 16 tokens each.

    pip install openai
    penstock up deploy/local.yaml          # in another terminal
    python examples/conversation.py
"""

from __future__ import annotations

import os

from openai import OpenAI

URL = os.environ.get("PENSTOCK_URL", "http://localhost:8000")
TIMEOUT_S = 60.0
TURNS = ("Hello! My name is Alice.", "What is my name?")


def main() -> None:
    client = OpenAI(
        base_url=f"{URL}/v1", api_key=os.environ.get("PENSTOCK_API_KEY", "none"), timeout=TIMEOUT_S
    )
    model = client.models.list().data[0].id
    messages = [{"role": "system", "content": "You are a helpful assistant."}]
    for text in TURNS:
        messages.append({"role": "user", "content": text})
        # `messages` is a list of plain dicts, which the client's types do not accept.
        answer = client.chat.completions.create(model=model, messages=messages, temperature=0)  # type: ignore[arg-type]
        reply = answer.choices[0].message.content or ""
        messages.append({"role": "assistant", "content": reply})
        usage = answer.usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        cached = usage.prompt_tokens_details.cached_tokens
        print(f"user:      {text}")
        print(f"assistant: {reply}")
        print(f"           {usage.prompt_tokens} prompt tokens, {cached} of them cached\n")


if __name__ == "__main__":
    main()
