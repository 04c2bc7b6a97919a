"""CPU time of the frontend process alone, per streamed token and per request.

A real `penstock frontend` process serves a real HTTP client over real links from two sim workers. Client,
workers and frontend are processes of their own; what is reported is the frontend's user and system time
from /proc, over the scenario only, as the median of several rounds. `paced` scenarios have the step times
of real hardware; in the others workers give tokens as fast as they can, and several steps may be read at
once. The tokenizer has 32,768 tokens, about 1.4 of them a word (benchmarks/english.py).

    python benchmarks/frontend_cpu.py            all scenarios
    python benchmarks/frontend_cpu.py paced      those whose name contains it
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from benchmarks.english import English, model_folder
from benchmarks.processes import start, stop, wait_ready
from penstock.bench.answers import JsonAnswer, StreamedAnswer, TokenCounts
from penstock.bench.http_client import HttpClient

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
REQUEST_TIMEOUT_S = 300.0  # of a whole round
CONCURRENT_REQUESTS = 4
CHAT = "/v1/chat/completions"
PACE = "qwen3-8b/h200/tp1"  # 5 to 6 ms a step

ENGLISH = English()


@dataclass(slots=True)
class Cost:
    """What a round took of the frontend's CPU, and what for."""

    user_s: float = 0.0
    system_s: float = 0.0
    wall_s: float = 0.0
    requests: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    chunks: int = 0  # that carry text: how many writes the tokens took


class Bench:
    """A frontend under measurement."""

    def __init__(self, url: str, pid: int) -> None:
        self.client = HttpClient(url)
        self.cost = Cost()
        self._pid = pid
        self._round = 0

    async def measure(self, scenario: Scenario) -> Cost:
        """One round of it."""
        self._round += 1
        self.cost = Cost()
        user_s, system_s, began = *self._cpu_s(), time.monotonic()
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            await scenario(self)
        user_after_s, system_after_s = self._cpu_s()
        self.cost.user_s = user_after_s - user_s
        self.cost.system_s = system_after_s - system_s
        self.cost.wall_s = time.monotonic() - began
        return self.cost

    def prompt(self, words: int, number: int) -> str:
        """Text of this round alone."""
        return ENGLISH.prompt(words, self._round * 1_000_000 + number)

    async def chat(self, texts: list[str], max_tokens: int, *, stream: bool = True) -> None:
        """One request. `texts` are the turns of user and assistant."""
        roles = ("user", "assistant")
        messages = [{"role": roles[k % 2], "content": text} for k, text in enumerate(texts)]
        body = {
            "model": "bench",
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        usage = await (self._streamed(body) if stream else self._whole(body))
        if usage.completion_tokens != max_tokens:
            raise SystemExit(f"a request got another answer: {usage}")
        self.cost.requests += 1
        self.cost.prompt_tokens += usage.prompt_tokens
        self.cost.tokens += max_tokens

    async def _streamed(self, body: dict[str, Any]) -> TokenCounts:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        answer = StreamedAnswer()
        await self.client.request("POST", CHAT, json.dumps(body).encode(), answer)
        if not answer.complete or answer.usage is None:
            raise SystemExit(f"a request failed: {answer.failure or answer.usage}")
        self.cost.chunks += answer.chunks
        return answer.usage

    async def _whole(self, body: dict[str, Any]) -> TokenCounts:
        answer = JsonAnswer()
        await self.client.request("POST", CHAT, json.dumps(body).encode(), answer)
        if answer.status != 200:
            raise SystemExit(f"a request failed: {answer.status} {answer.decode()}")
        self.cost.chunks += 1
        return msgspec.convert(answer.decode()["usage"], TokenCounts)

    def _cpu_s(self) -> tuple[float, float]:
        fields = Path(f"/proc/{self._pid}/stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) * TICK_S, int(fields[12]) * TICK_S


async def streams(bench: Bench, count: int, tokens: int, times: int) -> None:
    """`count` streams at a time of `tokens` tokens each, that many times."""
    for time_number in range(times):
        prompts = [bench.prompt(20, time_number * count + k) for k in range(count)]
        await asyncio.gather(*(bench.chat([prompt], tokens) for prompt in prompts))


async def whole_answers(bench: Bench, count: int, tokens: int, times: int) -> None:
    """`count` answers at a time that are not streamed, of `tokens` tokens each, that many times."""
    for time_number in range(times):
        prompts = [bench.prompt(20, time_number * count + k) for k in range(count)]
        await asyncio.gather(*(bench.chat([prompt], tokens, stream=False) for prompt in prompts))


async def requests(bench: Bench, words: int, count: int, history_words: int = 0) -> None:
    """`count` requests of `words` new words and one token, a few at a time; with a history, each is the
    next turn of the same conversation."""
    history = [bench.prompt(history_words // 2, number) for number in range(2)] if history_words else []
    if history:
        await bench.chat([*history, "and now?"], 1)
        bench.cost = Cost()  # too small beside the rest for the CPU time of it to matter
    gate = asyncio.Semaphore(CONCURRENT_REQUESTS)

    async def one(number: int) -> None:
        async with gate:
            await bench.chat([*history, bench.prompt(words, 100 + number)], 1)

    await asyncio.gather(*(one(number) for number in range(count)))


Scenario = Callable[[Bench], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Measured:
    """A scenario, and in what unit its cost is given."""

    run: Scenario
    unit: str  # token or request
    cost_model: str = "zero"


SCENARIOS = {
    "stream 64 x 400": Measured(lambda bench: streams(bench, 64, 400, 3), "token"),
    "stream 64 x 400, paced": Measured(lambda bench: streams(bench, 64, 400, 2), "token", PACE),
    "stream 32 x 100": Measured(lambda bench: streams(bench, 32, 100, 12), "token"),
    "stream 32 x 100, paced": Measured(lambda bench: streams(bench, 32, 100, 8), "token", PACE),
    "whole answers 32 x 100": Measured(lambda bench: whole_answers(bench, 32, 100, 8), "request"),
    "request 20 words": Measured(lambda bench: requests(bench, 20, 400), "request"),
    "request 500 words": Measured(lambda bench: requests(bench, 500, 300), "request"),
    "request 4000 words": Measured(lambda bench: requests(bench, 4000, 60), "request"),
    "request 4000 words, seen": Measured(lambda bench: requests(bench, 20, 200, 4000), "request"),
}


@contextlib.contextmanager
def graph(cost_model: str) -> Iterator[tuple[str, int]]:
    """A frontend and two sim workers; yields the frontend's URL and pid."""
    with tempfile.TemporaryDirectory() as folder:
        common = ["--discovery", f"file:{folder}"]
        worker = ["worker", "--engine", "sim", "--model", str(model_folder())]
        worker += ["--served-model-name", "bench", "--sim-cost-model", cost_model]
        worker += ["--max-model-len", "32768", *common]
        log_path = Path(folder) / "log"
        processes = [start(worker), start(worker)]
        try:
            with log_path.open("w") as log_file:
                processes.append(start(["frontend", "--http-port", "0", *common], log_file))
            yield wait_ready(log_path, 2), processes[-1].pid
        finally:
            stop(processes)


async def measure(name: str, measured: Measured, url: str, pid: int, rounds: int) -> None:
    bench = Bench(url, pid)
    await bench.chat(["warm up"], 50)
    costs = [await bench.measure(measured.run) for _ in range(rounds)]
    await bench.client.close()
    scale = 1e6 if measured.unit == "token" else 1e3

    def median(part: Callable[[Cost], float]) -> float:
        units = [cost.tokens if measured.unit == "token" else cost.requests for cost in costs]
        return scale * statistics.median(part(cost) / n for cost, n in zip(costs, units, strict=True))

    cost = costs[-1]
    busy = (cost.user_s + cost.system_s) / cost.wall_s
    print(
        f"{name:26} {median(lambda cost: cost.user_s + cost.system_s):7.2f} "
        f"{'us' if measured.unit == 'token' else 'ms'} per {measured.unit:8}"
        f"user {median(lambda cost: cost.user_s):6.2f}  system {median(lambda cost: cost.system_s):5.2f}   "
        f"{cost.requests} x ({cost.prompt_tokens // cost.requests} + "
        f"{cost.tokens // cost.requests}) tokens, "
        f"{cost.tokens / cost.chunks:.2f} a chunk, {busy:.0%} busy",
        flush=True,
    )


def print_tokenizer() -> None:
    """What `tokenizers` alone takes, on this machine and at this time: most of a new prompt's cost."""
    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    for words in (500, 4000):
        times_ms = []
        for seed in range(30):
            prompt = ENGLISH.prompt(words, seed)
            began = time.thread_time()
            tokenizer.encode_batch_fast([prompt], add_special_tokens=False)
            times_ms.append(1e3 * (time.thread_time() - began))
        print(f"{f'tokenizers, {words} words':26} {statistics.median(times_ms[10:]):7.2f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("only", nargs="?", default="", help="part of the names of the scenarios to run")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median is shown")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in the frontend
    print_tokenizer()
    for name, measured in SCENARIOS.items():
        if options.only in name:
            with graph(measured.cost_model) as (url, pid):
                asyncio.run(measure(name, measured, url, pid, options.rounds))


if __name__ == "__main__":
    main()
