"""Log-probabilities in both of the API's shapes."""

import json
import math

from penstock.frontend.text.logprobs import ChatLogprobs, CompletionLogprobs
from penstock.shapes import TokenLogprob

PIECES = {1: b"Hi", 2: "你".encode()[:2], 3: "你".encode()[2:], 4: b"<|end|>"}
TOKENS = [
    TokenLogprob(1, -0.25, [(1, -0.25), (4, -2.0), (2, -3.0)]),
    TokenLogprob(2, -math.inf, [(4, -0.5)]),
    TokenLogprob(3, -1.0),
]


def test_chat():
    entries = ChatLogprobs(PIECES.__getitem__, 2).render(TOKENS)["content"]
    assert entries[0]["token"] == "Hi"
    assert entries[0]["bytes"] == [72, 105]
    assert [top["token"] for top in entries[0]["top_logprobs"]] == ["Hi", "<|end|>"]
    assert entries[1]["logprob"] == -9999.0
    assert bytes(entries[1]["bytes"] + entries[2]["bytes"]).decode() == "你"
    assert "\ufffd" in entries[1]["token"]
    json.dumps(entries, allow_nan=False)


def test_completions_across_chunks():
    formatted = CompletionLogprobs(PIECES.__getitem__, 1)
    first, second = formatted.render(TOKENS[:1]), formatted.render(TOKENS[1:])
    assert first["tokens"] == ["Hi"]
    assert first["top_logprobs"] == [{"Hi": -0.25}]
    assert second["tokens"] == ["bytes:\\xe4\\xbd", "bytes:\\xa0"]
    assert second["text_offset"] == [2, 2]
    top = second["top_logprobs"][0]
    assert list(top.items()) == [("bytes:\\xe4\\xbd", -9999.0), ("<|end|>", -0.5)], (
        "itself first, as in vLLM"
    )
    assert second["token_logprobs"] == [-9999.0, -1.0]
