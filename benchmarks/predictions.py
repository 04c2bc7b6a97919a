"""What decisions predict, against what then happened.

Real processes: a frontend over HTTP and workers of one engine. Users have conversations of several turns;
afterwards the frontend is asked for each request's decision (/v1/explain), which has the phases as they
were predicted and as the engines reported them. Of each phase the median error is printed, relative to how
long the phase was. A last line says how long the workers waited for cores that others had, which nobody can
predict: where they waited longer than they computed, the errors are the machine's.

    python -m benchmarks.predictions                 sim workers with the step times of Qwen3-32B on 2 H200
    python -m benchmarks.predictions reference       models/tiny on the reference engine
    python -m benchmarks.predictions vllm            models/tiny on vLLM, where that is installed
    python -m benchmarks.predictions sim --roles prefill,decode --users 4
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import httpx

from benchmarks.processes import core_time, start, stop, wait_ready

MODEL = "predicted"
TINY = str(Path(__file__).parent.parent / "models" / "tiny")
ENGINES: Mapping[str, tuple[list[str], list[str]]] = {
    "sim": (["--model", MODEL, "--sim-cost-model", "qwen3-32b/h200/tp2"], []),
    "reference": (["--model", TINY, "--served-model-name", MODEL], []),
    "vllm": (
        ["--model", TINY, "--served-model-name", MODEL, "--block-size", "32", "--kv-cache-mib", "128"],
        ["--", "--enforce-eager", "--dtype", "float32", "--distributed-executor-backend", "uni"],
    ),
}
"""By engine: flags of its workers, and what vLLM itself gets."""

VLLM_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",
}
WORDS = ("river", "stone", "light", "paper", "window", "garden", "yellow", "number", "question", "morning")
CHARS_PER_TOKEN = {"sim": 1.0}  # of a prompt of such words; of models/tiny's tokenizer 4 or so

READY_TIMEOUT_S = 300.0  # of vLLM on a busy machine

LEAST_MS = 25.0
"""An error counts relative to this where a phase was shorter: about a step of a large engine. A request
comes at any moment of a step, and what that does to its wait on the next worker cannot be known before."""


# --- errors ---------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A phase of a request in milliseconds; what is predicted of decoding is the time for a token."""

    predicted: float
    actual: float

    @property
    def error(self) -> float:
        """Relative to what happened; below 0: it was longer than predicted."""
        return (self.predicted - self.actual) / max(self.actual, LEAST_MS)


class PhaseErrors(NamedTuple):
    """Of one phase over many requests."""

    requests: int
    predicted: float  # medians, in milliseconds
    actual: float
    error: float  # the median, whichever way
    bias: float  # the median, below 0: requests took longer than predicted


def phase_pairs(requests: Iterable[Mapping[str, Any]]) -> dict[str, list[Pair]]:
    """By phase. `requests`: as in the answers of /v1/explain; those that went as decided at first count."""
    found: dict[str, list[Pair]] = {}
    for request in requests:
        if request["outcome"] != "complete" or len(request["decisions"]) != 1:
            continue
        (decision,) = request["decisions"]
        predicted, actual = decision["predicted"], decision["actual"]
        phases = ["queue", "prefill", *(["transfer"] if decision["path"] == "remote" else [])]
        for name in (*phases, "first_token"):
            pair = Pair(predicted[f"{name}_ms"], actual[f"{name}_ms"])
            found.setdefault(name, []).append(pair)
        others = len(decision["attempts"])  # tokens that did not come while it decoded
        if actual["output_tokens"] > others and predicted["output_tokens"] > others:
            per_token = [it["decode_ms"] / (it["output_tokens"] - others) for it in (predicted, actual)]
            found.setdefault("decode", []).append(Pair(*per_token))
    return found


def phase_errors(requests: Iterable[Mapping[str, Any]]) -> dict[str, PhaseErrors]:
    """The same in a few figures."""
    return {
        name: PhaseErrors(
            len(pairs),
            median(it.predicted for it in pairs),
            median(it.actual for it in pairs),
            median(abs(it.error) for it in pairs),
            median(it.error for it in pairs),
        )
        for name, pairs in phase_pairs(requests).items()
    }


# --- the run --------------------------------------------------------------------------------------


@contextlib.contextmanager
def graph(engine: str, roles: list[str]) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A frontend and workers; yields the frontend's URL, and the workers."""
    flags, more = ENGINES[engine]
    with tempfile.TemporaryDirectory() as folder:
        common = ["--discovery", f"file:{folder}/discovery"]
        workers = [
            start(["worker", "--engine", engine, "--role", role, *common, *flags, *more]) for role in roles
        ]
        log_path = Path(folder) / "log"
        try:
            with log_path.open("w") as log_file:
                frontend = start(["frontend", "--http-port", "0", *common], log_file)
            try:
                yield wait_ready(log_path, len(roles), READY_TIMEOUT_S), workers
            finally:
                stop([frontend])
        finally:
            stop(workers)


class User:
    """Has one conversation after the other, with pauses."""

    def __init__(self, http: httpx.AsyncClient, options: argparse.Namespace, number: int) -> None:
        self._http = http
        self._options = options
        self._rng = random.Random(f"{options.seed}/{number}")
        self.asked: list[str] = []  # the ids of its answers

    async def talk(self, until: float) -> None:
        """Until then."""
        while time.monotonic() < until:
            said = f"{self._rng.random()} "
            for _ in range(self._rng.randint(1, self._options.turns)):
                await asyncio.sleep(self._rng.expovariate(1 / self._options.pause_s))
                if time.monotonic() >= until:
                    return
                said = await self._ask(said + self._words())

    def _words(self) -> str:
        """More of a prompt."""
        tokens = self._rng.lognormvariate(0.0, 0.5) * self._options.prompt_tokens
        chars = round(tokens * CHARS_PER_TOKEN.get(self._options.engine, 4.0))
        text = " ".join(self._rng.choices(WORDS, k=chars // 6 + 1))
        return text[: max(1, chars)]

    async def _ask(self, prompt: str) -> str:
        tokens = max(2, round(self._rng.lognormvariate(0.0, 0.5) * self._options.output_tokens))
        body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
        answer = await self._http.post("/v1/completions", json=body)
        if answer.status_code == 429:
            return ""
        answer.raise_for_status()
        told = answer.json()
        self.asked.append(told["id"])
        text: str = prompt + told["choices"][0]["text"]
        return text


async def measure(url: str, options: argparse.Namespace) -> list[Mapping[str, Any]]:
    """Put the load on, and return what was decided and what happened, without the beginning, in which
    workers have not measured anything yet."""
    async with httpx.AsyncClient(base_url=url, timeout=300.0) as http:
        users = [User(http, options, number) for number in range(options.users)]
        until = time.monotonic() + options.seconds
        async with asyncio.TaskGroup() as tasks:
            for user in users:
                tasks.create_task(user.talk(until))
        found = []
        for name in [name for user in users for name in user.asked]:
            found += (await http.get(f"/v1/explain/{name}")).json()["requests"]
    found.sort(key=lambda request: request["created"])
    return found[int(len(found) * options.warm_share) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("engine", nargs="?", choices=ENGINES, default="sim")
    parser.add_argument("--roles", default="aggregated,aggregated", help="of the workers")
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--turns", type=int, default=6, help="of a conversation, at most")
    parser.add_argument("--pause-s", type=float, default=1.0, help="mean time between turns")
    parser.add_argument("--prompt-tokens", type=int, default=1000, help="new ones of a turn, about")
    parser.add_argument("--output-tokens", type=int, default=60, help="about")
    parser.add_argument("--warm-share", type=float, default=0.2, help="of the requests, left out")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.engine == "vllm":
        os.environ.update(VLLM_ENVIRONMENT)
    with graph(options.engine, options.roles.split(",")) as (url, workers):
        before = core_time(workers)
        requests = asyncio.run(measure(url, options))
        cores = core_time(workers).since(before)
    print(f"{options.engine}, {options.roles}, {options.users} users: {len(requests)} requests")
    print("phase        requests  predicted, ms  actual, ms   error    bias")
    for name, its in phase_errors(requests).items():
        print(
            f"{name:12s} {its.requests:8d} {its.predicted:14.1f} {its.actual:11.1f}"
            f" {its.error:7.1%} {its.bias:+7.1%}"
        )
    print(f"the workers computed {cores.computed:.1f} s, and waited {cores.waited:.1f} s for a core")


if __name__ == "__main__":
    main()
