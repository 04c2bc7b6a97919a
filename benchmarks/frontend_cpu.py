"""CPU time of the frontend process alone, per streamed token and per request.

A real `penstock frontend` process serves a real HTTP client over real links from sim workers whose steps
take no time of their own (or, with --step-ms, a steady pace). Client, workers and frontend are processes
of their own; what is reported is the frontend's user + system time from /proc, over the scenario only.

    python benchmarks/frontend_cpu.py            all scenarios
    python benchmarks/frontend_cpu.py stream     those whose name contains it
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from penstock.bench.answers import StreamedAnswer
from penstock.bench.client import HttpClient

ROOT = Path(__file__).parent.parent
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
READY_TIMEOUT_S = 60.0

WORDS = (ROOT / "README.md").read_text().split()


class Bench:
    """A frontend under measurement."""

    def __init__(self, url: str, pid: int) -> None:
        self.client = HttpClient(url)
        self.pid = pid

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) * TICK_S

    async def chat(self, text: str, max_tokens: int, stream: bool = True, history: str = "") -> int:
        """One request; returns the tokens it was given."""
        messages = [{"role": "user", "content": text}]
        if history:
            messages = [
                {"role": "user", "content": history},
                {"role": "assistant", "content": "ok"},
                *messages,
            ]
        body = {
            "model": "bench",
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": stream,
            "ignore_eos": True,
        }
        answer = StreamedAnswer()
        await self.client.request("POST", "/v1/chat/completions", json.dumps(body).encode(), answer)
        return max_tokens


def prompt(words: int, seed: int) -> str:
    """Text that no cache has seen: every word takes part of a random number."""
    rng = random.Random(seed)
    return " ".join(f"{rng.choice(WORDS)}{rng.randrange(10)}" for _ in range(words))


async def streams(bench: Bench, count: int, tokens: int, rounds: int) -> tuple[int, str]:
    """`count` streams at a time of `tokens` tokens each."""
    total = 0
    for number in range(rounds):
        calls = (bench.chat(prompt(20, number * count + k), tokens) for k in range(count))
        total += sum(await asyncio.gather(*calls))
    return total, "token"


async def requests(
    bench: Bench, words: int, count: int, new: bool = True, history_words: int = 0
) -> tuple[int, str]:
    """`count` requests of `words` words and one token, four at a time, each new or all the same."""
    history = prompt(history_words, 10**6) if history_words else ""
    if history:
        await bench.chat("warm", 1, stream=False, history=history)
    gate = asyncio.Semaphore(4)

    async def one(number: int) -> None:
        async with gate:
            text = prompt(words, number if new else 1)
            await bench.chat(text, 1, stream=False, history=history)

    await asyncio.gather(*(one(number) for number in range(count)))
    return count, "request"


Scenario = Callable[[Bench], Awaitable[tuple[int, str]]]
SCENARIOS: dict[str, Scenario] = {
    "stream 64 x 400 tokens": lambda bench: streams(bench, 64, 400, rounds=3),
    "stream 32 x 100 tokens": lambda bench: streams(bench, 32, 100, rounds=16),
    "request 500 words, new": lambda bench: requests(bench, 500, 400),
    "request 4000 words, new": lambda bench: requests(bench, 4000, 80),
    "request 4000 words, seen": lambda bench: requests(bench, 20, 200, history_words=4000),
}


@contextlib.contextmanager
def graph(speedup: float, cost_model: str) -> Iterator[tuple[str, int]]:
    """A frontend and two sim workers; yields the frontend's URL and pid."""
    with tempfile.TemporaryDirectory() as folder:
        common = ["--discovery", f"file:{folder}"]
        worker = ["worker", "--engine", "sim", "--model", str(ROOT / "models/tiny")]
        worker += ["--served-model-name", "bench", "--sim-cost-model", cost_model]
        worker += ["--sim-speedup", str(speedup), "--max-model-len", "32768", *common]
        port_file = Path(folder) / "log"
        processes = [start(worker), start(worker)]
        with port_file.open("w") as log_file:
            processes.append(start(["frontend", "--http-port", "0", *common], log_file))
        try:
            yield wait_ready(port_file), processes[-1].pid
        finally:
            for process in processes:
                process.send_signal(signal.SIGTERM)
            for process in processes:
                process.wait(timeout=60)


def start(arguments: list[str], output: object = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "penstock", *arguments], stdout=subprocess.DEVNULL, stderr=output
    )


def wait_ready(log_file: Path) -> str:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        text = log_file.read_text()
        if "listening on " in text and text.count("instance ready") == 2:
            return text.split("listening on ")[1].split()[0]
        time.sleep(0.1)
    raise SystemExit(f"the frontend did not get ready:\n{log_file.read_text()}")


async def measure(name: str, scenario: Scenario, url: str, pid: int) -> None:
    bench = Bench(url, pid)
    await bench.chat("warm up", 50)
    cpu_before, wall_before = bench.cpu_s(), time.monotonic()
    units, unit = await scenario(bench)
    cpu_s, wall_s = bench.cpu_s() - cpu_before, time.monotonic() - wall_before
    await bench.client.close()
    each = cpu_s / units
    shown = f"{each * 1e6:8.1f} us" if unit == "token" else f"{each * 1e3:8.2f} ms"
    print(
        f"{name:28} {shown} of CPU per {unit}   ({units} in {wall_s:.1f} s, {cpu_s:.2f} s CPU)", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("only", nargs="?", default="", help="part of the names of the scenarios to run")
    parser.add_argument(
        "--cost-model", default="zero", help="of the sim workers (engines/cost_models.json)"
    )
    parser.add_argument("--speedup", type=float, default=1.0)
    options = parser.parse_args()
    for name, scenario in SCENARIOS.items():
        if options.only in name:
            with graph(options.speedup, options.cost_model) as (url, pid):
                asyncio.run(measure(name, scenario, url, pid))


if __name__ == "__main__":
    main()
