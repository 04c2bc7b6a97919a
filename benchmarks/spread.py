"""Whether several frontends spread load over workers as one does.

    python benchmarks/spread.py [--frontends 1 3] [--workers 4] [--rounds 3] [--duration 30]

The same loads (Poisson arrivals) against one frontend and against several behind a TCP balancer that hands
out connections in turn; workers are sim engines at an H200's pace. For each worker: its share of requests
(answers have one length) and of the prompt tokens that were not cached, from the frontends' decisions.
`cv` is the standard deviation over the mean between workers, 0 when all are equal; `cv at once` that of the
requests that workers have at the same moment, in the mean over moments.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
START_S = 60.0
SAMPLE_S = 0.05

LOADS = {
    "independent": ("--rate", "40/s", "--prompt-tokens", "400", "--output-tokens", "60"),
    "conversations": (
        *("--rate", "8/s", "--multi-turn", "4", "--shared-prefix-tokens", "400"),
        *("--prompt-tokens", "300", "--output-tokens", "60"),
    ),
}

DECISION = re.compile(r"routing decision: request=\S+ path=\S+ decode=(\S+) (.*)")


class Balancer:
    """A TCP balancer: connections in turn, on a thread of its own."""

    def __init__(self, ports: list[int]) -> None:
        self._ports = ports
        self._next = 0
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(
            asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024)
        )
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        port = self._ports[self._next % len(self._ports)]
        self._next += 1
        there = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(self._copy(reader, there[1]), self._copy(there[0], writer))

    async def _copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        sink.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def health(port: int) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as response:
        return dict(json.loads(response.read()))


@contextlib.contextmanager
def cluster(folder: Path, frontends: int, workers: int) -> Iterator[list[int]]:
    """That many of each; the value is the frontends' ports."""
    env = {**os.environ, "PENSTOCK_DISCOVERY": f"file:{folder / 'discovery'}"}
    env |= {"PENSTOCK_LOG": "info,penstock.router=debug"}
    ports = [free_port() for _ in range(frontends)]
    commands = {
        f"worker-{number}": ["worker", "--engine", "sim", "--model", "sim", "--instance-id", f"w-{number}"]
        for number in range(workers)
    } | {f"frontend-{port}": ["frontend", "--http-port", str(port)] for port in ports}
    processes = []
    try:
        for name, command in commands.items():
            with (folder / f"{name}.log").open("w") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "penstock", *command],
                        env=env,
                        stderr=log,
                        stdout=log,
                        cwd=ROOT,
                    )
                )
        for port in ports:
            wait_ready(port, workers)
        yield ports
    finally:
        for process in processes:
            process.send_signal(signal.SIGINT)
        for process in processes:
            process.wait(timeout=60)


def wait_ready(port: int, workers: int) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if sum(found["state"] == "ready" for found in health(port)["instances"]) == workers:
                return
        time.sleep(0.1)
    raise SystemExit(f"the frontend on port {port} did not find {workers} workers")


def variation(values: list[float]) -> float:
    return statistics.pstdev(values) / statistics.fmean(values)


class Sampler(threading.Thread):
    """How unequal the workers are at one moment, again and again."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port
        self._ended = threading.Event()
        self.variations: list[float] = []

    def run(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            loads = [found["load"] for found in health(self._port)["instances"]]
            requests = [float(load["running"] + load["waiting"]) for load in loads]
            if sum(requests) >= len(requests):
                self.variations.append(variation(requests))

    def stop(self) -> float:
        self._ended.set()
        self.join()
        return statistics.fmean(self.variations)


def read_logs(folder: Path, workers: int) -> dict[str, list[float]]:
    """By worker: requests, and prompt tokens to be computed."""
    counts = {name: [0.0] * workers for name in ("requests", "computed")}
    for log in folder.glob("frontend-*.log"):
        for match in DECISION.finditer(log.read_text()):
            candidate = re.search(rf"\[{match[1]} \S+ overlap=\d+ uncached=(\d+) ", match[2])
            assert candidate is not None, match[0]
            worker = int(match[1].removeprefix("w-"))
            counts["requests"][worker] += 1
            counts["computed"][worker] += int(candidate[1])
    return counts


def measure(load: str, frontends: int, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        ports = stack.enter_context(cluster(Path(folder), frontends, options.workers))
        balancer = Balancer(ports)
        stack.callback(balancer.close)
        sampler = Sampler(ports[0])
        sampler.start()
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "penstock", "bench", "--url", balancer.url, *LOADS[load]]
        command += ["--duration", str(options.duration), "--seed", str(seed), "--json", str(report)]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        at_once = sampler.stop()
        return {
            "at_once": at_once,
            "report": json.loads(report.read_text()),
            **read_logs(Path(folder), options.workers),
        }


def row(load: str, frontends: int, rounds: list[dict[str, Any]]) -> str:
    cells = [load, str(frontends)]
    for name in ("requests", "computed"):
        by_worker = [sum(counts) for counts in zip(*(found[name] for found in rounds), strict=True)]
        shares = " ".join(f"{100 * count / sum(by_worker):.1f}" for count in by_worker)
        varied = " ".join(f"{100 * variation(found[name]):.1f}" for found in rounds)
        cells.append(f"{shares} (cv {varied})")
    cells.append(" ".join(f"{100 * found['at_once']:.0f}" for found in rounds))
    cells += [
        " ".join(f"{found['report']['ttft_ms'][quantile]:.0f}" for found in rounds)
        for quantile in ("p50", "p99")
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--frontends", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--duration", type=float, default=30.0, help="seconds of load in each round")
    options = parser.parse_args()
    print("| load | frontends | requests, % by worker | prompt tokens computed, % ", end="")
    print("| cv at once, % | TTFT p50, ms | p99 |\n|---|---|---|---|---|---|---|")
    for load in LOADS:
        found: dict[int, list[dict[str, Any]]] = {frontends: [] for frontends in options.frontends}
        for seed in range(options.rounds):
            for frontends in options.frontends:
                found[frontends].append(measure(load, frontends, seed, options))
        for frontends, rounds in found.items():
            print(row(load, frontends, rounds), flush=True)


if __name__ == "__main__":
    main()
