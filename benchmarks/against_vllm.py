"""The same load through `vllm serve` and through Penstock, aggregated and disaggregated.

    make bench-vllm             (or: python benchmarks/against_vllm.py, where vLLM is installed)
    make bench-vllm ARGS="--concurrency 32 --prompt-tokens 200 --output-tokens 100 --requests 256"

All with the same engine settings. Each server is started, warmed up, loaded by `penstock bench` a number of
times, and stopped; the best round counts, since anything else on the machine only makes one worse. CPU is
what all of a server's processes took for the load, per output token, the load generator left out, and which
of them took it. On a CPU machine the engine computes on the cores that the servers run on, so throughput
falls with every microsecond that a server takes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from checks.vllm.engine.servers import START_S, graph_of, vllm_serve
from tests.e2e.conftest import running

ROOT = Path(__file__).parent.parent
MODEL = "tiny"
SERVERS = {
    "vllm serve": [],
    "penstock, aggregated": ["aggregated"],
    "penstock, disaggregated": ["prefill", "decode"],
}


@dataclass(frozen=True)
class Round:
    """One load on one server."""

    report: dict[str, Any]
    cpu_s: dict[str, float]  # by what the processes are

    @property
    def cpu_us(self) -> float:
        """Of CPU per output token."""
        return sum(self.cpu_s.values()) / self.report["output_tokens"] * 1e6


@contextlib.contextmanager
def server(roles: list[str], model: Path, folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A running server's URL and first process."""
    if not roles:
        with vllm_serve(model, MODEL, folder / "vllm.log") as (url, pid):
            yield url, psutil.Process(pid)
        return
    file = folder / "graph.yaml"
    file.write_text(yaml.safe_dump(graph_of(model, MODEL, roles)))
    with running(file, folder / "state", instances=len(roles), start_s=START_S) as graph:
        yield graph.url, psutil.Process(graph.process.pid)


def kind_of(process: psutil.Process) -> str:
    """What a process of a server is."""
    name, words = process.name(), process.cmdline()
    if "EngineCore" in name or any("EngineCore" in word for word in words):
        return "engine"
    if "frontend" in words:
        return "frontend"
    if "worker" in words:
        return "worker"
    if "up" in words:
        return "launcher"
    return "API server" if any("api_server" in word for word in words) else "other"


def cpu_of(first: psutil.Process) -> dict[str, float]:
    """CPU seconds so far, by kind."""
    seconds: dict[str, float] = {}
    for process in (first, *first.children(recursive=True)):
        times = process.cpu_times()
        kind = kind_of(process)
        seconds[kind] = seconds.get(kind, 0.0) + times.user + times.system
    return seconds


def load(url: str, first: psutil.Process, options: argparse.Namespace, seed: int, requests: int) -> Round:
    """Put one load on a server."""
    before = cpu_of(first)
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [sys.executable, "-m", "penstock", "bench", "--url", url, "--model", MODEL]
        command += ["--json", report.name, "--seed", str(seed), "--requests", str(requests)]
        for name in ("concurrency", "prompt_tokens", "output_tokens"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        after = cpu_of(first)
        cpu_s = {kind: after[kind] - before.get(kind, 0.0) for kind in after}
        return Round(json.loads(Path(report.name).read_text()), cpu_s)


def measure(name: str, options: argparse.Namespace, model: Path) -> Round:
    """The best of a server's rounds. Every round and every server gets the same prompts, each only once."""
    with (
        tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder,
        server(SERVERS[name], model, Path(folder)) as (url, first),
    ):
        load(url, first, options, seed=0, requests=2 * options.concurrency)
        rounds = [
            load(url, first, options, 1 + number, options.requests) for number in range(options.rounds)
        ]
    assert not any(found.report["failed"] for found in rounds)
    return max(rounds, key=lambda found: float(found.report["output_tokens_per_s"]))


def line(name: str, best: Round) -> str:
    report = best.report
    split = ", ".join(
        f"{kind} {seconds / report['output_tokens'] * 1e6:.0f}"
        for kind, seconds in sorted(best.cpu_s.items(), key=lambda item: -item[1])
        if seconds > 0.01
    )
    return (
        f"| {name} | {report['output_tokens_per_s']:,.0f} | {report['requests_per_s']:.1f} "
        f"| {report['ttft_ms']['p50']:.0f} / {report['ttft_ms']['p99']:.0f} "
        f"| {report['itl_ms']['p50']:.1f} / {report['itl_ms']['p99']:.1f} | {best.cpu_us:.0f} | {split} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--output-tokens", type=int, default=100)
    parser.add_argument("--requests", type=int, default=256, help="in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=SERVERS, action="append", help="may be given several times")
    options = parser.parse_args()
    os.environ["PENSTOCK_LOG"] = "info"  # as users run it
    print(
        "| server | tokens/s | requests/s | TTFT p50 / p99, ms | ITL p50 / p99, ms | CPU, µs/token | by |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in options.only or SERVERS:
        print(line(name, measure(name, options, ROOT / "models" / "tiny")), flush=True)


if __name__ == "__main__":
    main()
