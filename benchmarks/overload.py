"""What a graph gives when more is asked of it than it can do.

Real processes: frontends over HTTP, and sim workers that take the time of real hardware. First the capacity
is measured, by a closed loop that keeps every place taken; then an open loop offers shares and multiples
of it. An answer is good when its first token, and the others on average, came within the objectives.
Beside that: how long a rejected client waits to hear so, what it is told, how two tenants share when one of
them asks for ten times as much, what priorities do, and what --max-itl-ms does.

    python benchmarks/overload.py                     all of it, about four minutes
    python benchmarks/overload.py load                load, shares, priorities or itl
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from processes import start, stop, wait_ready

from penstock.bench.answers import StreamedAnswer
from penstock.bench.http_client import HttpClient, RequestFailed

REQUEST_TIMEOUT_S = 60.0
PLACES = 32  # requests a worker serves at one time
MANY_PLACES = 256  # the same where the time between tokens is the limit
COST_MODEL = "qwen3-32b/h200/tp2"  # 11 to 12 ms a step with so few
PROMPT_CHARS = (200, 1000)  # a byte is a token
OUTPUT_TOKENS = (16, 96)
TTFT_MS = 2000.0  # the objectives
ITL_MS = 40.0
MAX_WAIT_MS = 1500.0  # the first, less what a prompt and the workers' queues take
MAX_ITL_MS = 32.0  # the second, less what lies between its mean and the longest
KEYS = {"modest": "modest-key-of-the-overload-benchmark", "greedy": "greedy-key-of-the-overload-benchmark"}


@dataclass(slots=True)
class Stream:
    """Requests of one kind, in an open loop."""

    rate: float  # per second
    tenant: str = ""
    priority: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 1.0  # in which they came


@dataclass(slots=True)
class Outcome:
    """One request that has ended."""

    ended_at: float  # perf_counter
    status: int
    ttft_ms: float
    e2e_ms: float
    itl_ms: float
    retry_after_s: float = 0.0

    @property
    def good(self) -> bool:
        return self.status == 200 and self.ttft_ms <= TTFT_MS and self.itl_ms <= ITL_MS


class Clients:
    """Whoever asks, of one or several frontends in turn."""

    def __init__(self, urls: Sequence[str], seed: int = 1) -> None:
        self._clients = {
            tenant: [HttpClient(url, _headers(tenant)) for url in urls] for tenant in ("", *KEYS)
        }
        self._rng = random.Random(seed)
        self._asked = 0

    async def ask(self, tenant: str = "", priority: int = 0) -> Outcome:
        """One request with a prompt of its own."""
        self._asked += 1
        rng = self._rng
        length = rng.randint(*PROMPT_CHARS)
        prompt = f"{self._asked} " + "".join(rng.choices("abcdefgh ", k=length))
        body = {
            "model": "bench",
            "prompt": prompt,
            "max_tokens": rng.randint(*OUTPUT_TOKENS),
            "stream": True,
            "ignore_eos": True,
            "priority": priority,
            "stream_options": {"include_usage": True},
        }
        clients = self._clients[tenant]
        client = clients[self._asked % len(clients)]
        answer, began = StreamedAnswer(), time.perf_counter()
        status = 0
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                await client.request("POST", "/v1/completions", json.dumps(body).encode(), answer)
            status = answer.status if answer.complete or answer.status != 200 else -1
        except (TimeoutError, RequestFailed):
            status = -2
        ended = time.perf_counter()
        first = answer.first_at or ended
        tokens = answer.usage.completion_tokens if answer.usage else 0
        itl_ms = (answer.last_at - first) * 1e3 / (tokens - 1) if tokens > 1 else 0.0
        return Outcome(
            ended, status, (first - began) * 1e3, (ended - began) * 1e3, itl_ms, answer.retry_after_s
        )

    async def open_loop(self, streams: Sequence[Stream], seconds: float) -> None:
        """Offer all streams at once, Poisson arrivals, and keep the outcomes that came while they lasted,
        but for the first quarter, in which queues build up."""

        async def one(stream: Stream) -> None:
            stream.outcomes.append(await self.ask(stream.tenant, stream.priority))

        async def offer(stream: Stream, tasks: asyncio.TaskGroup) -> None:
            at = began
            while (at := at + self._rng.expovariate(stream.rate)) < until:
                await asyncio.sleep(max(0.0, at - time.perf_counter()))
                tasks.create_task(one(stream))

        began = time.perf_counter()
        warm, until = began + seconds / 4, began + seconds
        async with asyncio.TaskGroup() as tasks:
            for stream in streams:
                tasks.create_task(offer(stream, tasks))
        for stream in streams:
            stream.outcomes = [it for it in stream.outcomes if warm < it.ended_at <= until]
            stream.seconds = until - warm

    async def closed_loop(self, users: int, seconds: float) -> float:
        """Keep so many requests under way. Returns how many were answered per second, once warm."""
        began = time.perf_counter()
        warm, until, answered = began + seconds / 4, began + seconds, 0

        async def user() -> None:
            nonlocal answered
            while time.perf_counter() < until:
                outcome = await self.ask()
                answered += outcome.status == 200 and warm < time.perf_counter() < until
                if outcome.status != 200:
                    await asyncio.sleep(0.1)

        await asyncio.gather(*(user() for _ in range(users)))
        return answered / (until - warm)

    async def close(self) -> None:
        for client in (client for clients in self._clients.values() for client in clients):
            await client.close()


def _headers(tenant: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[tenant]}"} if tenant else {}


# --- the graph ------------------------------------------------------------------------------------


@contextlib.contextmanager
def graph(
    options: argparse.Namespace, *, keys: bool = False, more: Sequence[str] = ()
) -> Iterator[list[str]]:
    """Frontends and sim workers; yields the frontends' URLs."""
    with tempfile.TemporaryDirectory() as folder:
        common = ["--discovery", f"file:{folder}/discovery"]
        if options.max_wait_ms:
            common += ["--max-wait-ms", str(options.max_wait_ms)]
        worker = ["worker", "--engine", "sim", "--model", "bench", "--sim-cost-model", COST_MODEL]
        worker += ["--max-running", str(PLACES if not more else MANY_PLACES), *common]
        frontend = ["frontend", "--http-port", "0", *common, *more]
        if keys:
            path = Path(folder) / "keys"
            path.write_text(
                "".join(f"{name} sha256:{sha256(key.encode()).hexdigest()}\n" for name, key in KEYS.items())
            )
            frontend += ["--api-keys-file", str(path)]
        logs = [Path(folder) / f"log{number}" for number in range(options.frontends)]
        roles = options.roles.split(",")
        processes = [start([*worker, "--role", role]) for role in roles]
        try:
            for log_path in logs:
                with log_path.open("w") as log_file:
                    processes.append(start(frontend, log_file))
            yield [wait_ready(log_path, len(roles)) for log_path in logs]
        finally:
            stop(processes)


# --- what is measured -----------------------------------------------------------------------------


def _percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else 0.0


HEADING = "ttft: p50, p99; 429 after: p50, p99, most"


def _row(name: str, stream: Stream) -> str:
    outcomes, seconds = stream.outcomes, stream.seconds
    done = [outcome for outcome in outcomes if outcome.status == 200]
    rejected = [outcome for outcome in outcomes if outcome.status == 429]
    other = len(outcomes) - len(done) - len(rejected)
    good = sum(outcome.good for outcome in outcomes)
    ttft, told = [it.ttft_ms for it in done], [it.e2e_ms for it in rejected]
    itl_ms = statistics.fmean([it.itl_ms for it in done] or [0.0])
    after = [it.retry_after_s for it in rejected]
    return (
        f"{name:15} offered {stream.rate:6.1f}/s  done {len(done) / seconds:5.1f}/s  "
        f"good {good / seconds:5.1f}/s  ttft {_percentile(ttft, 50):5.0f} {_percentile(ttft, 99):5.0f} ms"
        f"  itl {itl_ms:4.1f} ms  429 {len(rejected) / seconds:5.1f}/s after {_percentile(told, 50):5.1f} "
        f"{_percentile(told, 99):6.1f} {max(told, default=0.0):6.1f} ms"
        f"  retry-after {_percentile(after, 1):.0f}..{_percentile(after, 99):.0f} s  other {other}"
    )


async def load(clients: Clients, capacity: float, seconds: float) -> None:
    """Goodput at shares and multiples of the capacity."""
    goods = {}
    for times in (0.6, 0.8, 0.9, 1.0, 1.2, 2.0, 3.0):
        stream = Stream(rate=capacity * times)
        await clients.open_loop([stream], seconds)
        goods[times] = sum(outcome.good for outcome in stream.outcomes)
        print(_row(f"{times:.1f} x capacity", stream), flush=True)
    peak = max(goods.values())
    print("share of the peak:", {times: f"{good / peak:.0%}" for times, good in goods.items()}, flush=True)


async def shares(clients: Clients, capacity: float, seconds: float) -> None:
    """Two keys: one asks for 0.4 of the capacity, the other for ten times that."""
    streams = {
        "modest": Stream(rate=0.4 * capacity, tenant="modest"),
        "greedy": Stream(rate=4.0 * capacity, tenant="greedy"),
    }
    await clients.open_loop(list(streams.values()), seconds)
    for name, stream in streams.items():
        print(_row(name, stream), flush=True)


async def priorities(clients: Clients, capacity: float, seconds: float) -> None:
    """Three priorities, each asking for half of the capacity."""
    streams = {number: Stream(rate=0.5 * capacity, priority=number) for number in (-1, 0, 1)}
    await clients.open_loop(list(streams.values()), seconds)
    for number, stream in streams.items():
        print(_row(f"priority {number}", stream), flush=True)


async def itl(clients: Clients, capacity: float, seconds: float) -> None:
    """Three times the capacity, on workers that take far more at a time than their tokens' pace allows."""
    stream = Stream(rate=3.0 * capacity)
    await clients.open_loop([stream], seconds)
    print(_row("3.0 x capacity", stream), flush=True)


Part = Callable[[Clients, float, float], Awaitable[None]]
PARTS: list[tuple[str, Part, bool, tuple[str, ...]]] = [  # name, what, with keys, flags of frontends
    ("load", load, False, ()),
    ("shares", shares, True, ()),
    ("priorities", priorities, False, ()),
    ("itl", itl, False, ("--max-itl-ms", "0")),
    ("itl", itl, False, ("--max-itl-ms", str(MAX_ITL_MS))),
]


async def main(options: argparse.Namespace) -> None:
    print(HEADING)
    capacity = options.capacity
    if not capacity:
        with graph(options) as urls:
            clients = Clients(urls)
            users = sum(role != "prefill" for role in options.roles.split(",")) * PLACES * 5 // 4
            capacity = await clients.closed_loop(users, options.seconds)
            await clients.close()
    print(f"capacity {capacity:.1f} requests a second", flush=True)
    for name, run, keys, more in PARTS:
        if options.part not in ("all", name):
            continue
        print(f"--- {name}: --max-wait-ms {options.max_wait_ms or 'as built in'}", *more, flush=True)
        with graph(options, keys=keys, more=more) as urls:
            clients = Clients(urls)
            await run(clients, capacity, options.seconds)
            await clients.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "part", nargs="?", choices=("all", "load", "shares", "priorities", "itl"), default="all"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--frontends", type=int, default=1)
    parser.add_argument("--roles", default="aggregated,aggregated", help="of the workers")
    parser.add_argument("--capacity", type=float, default=0.0, help="requests a second; 0: measure it")
    parser.add_argument("--max-wait-ms", type=float, default=MAX_WAIT_MS, help="0: as built in")
    os.environ.setdefault("PENSTOCK_LOG", "info")
    asyncio.run(main(parser.parse_args()))
