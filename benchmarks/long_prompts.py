"""What one API key's long prompts do to another key's requests, at the tokenizer of one frontend.

A real `penstock frontend` and a sim worker that takes no time. The first key posts many long prompts at
once, of words that were never seen; the second asks one after the other, short and long in turn.

    python benchmarks/long_prompts.py --prompts 30 --chars 400000
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

from english import model_folder
from processes import start, stop, wait_ready

from penstock.bench.answers import StreamedAnswer
from penstock.bench.http_client import HttpClient
from penstock.frontend.http.api_keys import key_line

TIMEOUT_S = 300.0
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SHORT_CHARS, LONG_CHARS = 300, 20_000  # of the second key's prompts


def text(chars: int, seed: int) -> str:
    """Words that no cache has seen."""
    rng = random.Random(seed)
    return " ".join("".join(rng.choices(LETTERS, k=7)) for _ in range(chars // 8))


class Key:
    """A client with a key of its own."""

    def __init__(self, url: str, name: str) -> None:
        self.outcomes: Counter[str] = Counter()
        self._client = HttpClient(url, {"Authorization": f"Bearer {secret(name)}"})

    async def ask(self, prompt: str) -> float:
        """Seconds to the end of the answer."""
        body = {"model": "bench", "prompt": prompt, "max_tokens": 1, "stream": True}
        answer, began = StreamedAnswer(), time.perf_counter()
        await self._client.request("POST", "/v1/completions", json.dumps(body).encode(), answer)
        self.outcomes[str(answer.failure[0] if answer.failure else "answered")] += 1
        return time.perf_counter() - began


def secret(name: str) -> str:
    """A key long enough to be one."""
    return f"{name}-key-of-many-letters"


async def measure(url: str, prompts: int, chars: int) -> None:
    """Both keys at the same time, until the first one has all its answers."""
    greedy, modest = Key(url, "greedy"), Key(url, "modest")
    await modest.ask("warm up")
    bodies = [text(chars, seed) for seed in range(prompts)]
    waits: dict[int, list[float]] = {SHORT_CHARS: [], LONG_CHARS: []}
    async with asyncio.timeout(TIMEOUT_S):
        flood = asyncio.gather(*map(greedy.ask, bodies))
        while not flood.done():
            for length, times in waits.items():
                times.append(await modest.ask(text(length, 1000 + len(times))))
        last_s = max(await flood)
    print(f"{prompts} prompts of {chars} characters: {dict(greedy.outcomes)}, last {last_s:.2f} s")
    for length, times in waits.items():
        print(f"beside them, {len(times)} of {length}: ", end="")
        print(f"median {statistics.median(times):.3f} s, longest {max(times):.3f} s")
    print(f"the second key in all: {dict(modest.outcomes)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--prompts", type=int, default=30)
    parser.add_argument("--chars", type=int, default=400_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        keys, log_path = Path(folder) / "keys", Path(folder) / "log"
        keys.write_text("".join(f"{key_line(name, secret(name))}\n" for name in ("greedy", "modest")))
        common = ["--discovery", f"file:{folder}/discovery"]
        worker = ["worker", "--engine", "sim", "--model", str(model_folder())]
        worker += ["--served-model-name", "bench", "--sim-cost-model", "zero"]
        processes = [start([*worker, "--max-model-len", "262144", *common])]
        try:
            with log_path.open("w") as log_file:
                frontend = ["frontend", "--http-port", "0", "--api-keys-file", str(keys), *common]
                processes.append(start(frontend, log_file))
            asyncio.run(measure(wait_ready(log_path, 1), options.prompts, options.chars))
        finally:
            stop(processes)


if __name__ == "__main__":
    main()
