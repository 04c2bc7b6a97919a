"""The same load on real processes and in `penstock simulate`, side by side.

Real processes: a frontend over HTTP, and sim workers that take the time of a cost model. The simulation
takes the same cost model on virtual time; both are asked the same, by the same sessions. Printed are the
figures of each and their ratios: 1.00 where the simulation foretells what processes do.

What messages, the frontend and Python's own steps take is not simulated. On a small or busy machine it can
be much; with --slowness 5, everything on real processes takes 5 times as long as the cost model says, so
that it weighs a fifth. Figures are given in the cost model's time.

    python benchmarks/simulated.py                        all loads, 7 minutes
    python benchmarks/simulated.py chat --slowness 5      one load, 10 minutes
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from random import Random

from msgspec.structs import replace

from benchmarks.processes import start, stop, wait_ready
from penstock.bench.answers import StreamedAnswer
from penstock.bench.http_client import HttpClient, RequestFailed
from penstock.bench.measurements import Percentiles, RequestOutcome, Slo
from penstock.core.admission import AdmissionSettings
from penstock.core.settings import RouterSettings
from penstock.engines.settings import SchedulerSettings
from penstock.engines.sim import SimSettings
from penstock.simulate.arrivals import RateRange
from penstock.simulate.report import Results, SimulationReport
from penstock.simulate.run import Scenario, SimulatedGraph, WorkloadSettings
from penstock.simulate.workload import ClientSession, Piece, Workload

LOADS: Mapping[str, WorkloadSettings] = {
    "prompts": WorkloadSettings(
        generator="prompts", rate=RateRange(6.0, 6.0), lengths={"prompt_tokens": 4000, "output_tokens": 100}
    ),
    "shared-prefix": WorkloadSettings(
        generator="shared-prefix", rate=RateRange(3.0, 3.0), lengths={"output_tokens": 200}
    ),
    "chat": WorkloadSettings(generator="chat", users=60, lengths={"prompt_tokens": 600}),
}
WORKERS = 4
SEED = 1
SIM = SimSettings()
ADMISSION = AdmissionSettings()
SLO = Slo(2000.0, 25.0)
REQUEST_TIMEOUT_S = 600.0
LETTERS = "abcdefghijklmnopqrstuvwxyz ,.:"


def simulated(load: WorkloadSettings, options: argparse.Namespace) -> SimulationReport:
    """The load on virtual time."""
    graph = SimulatedGraph(
        aggregated=WORKERS,
        cost_model=options.cost_model,
        cache_tokens=SIM.total_blocks * SIM.block_size,
        block_size=SIM.block_size,
        max_model_len=SIM.max_model_len,
        scheduler=SchedulerSettings(),
    )
    return Scenario(load, graph, RouterSettings(options.policy), SLO, 1.0, SEED).run()


@contextmanager
def frontend(options: argparse.Namespace) -> Iterator[str]:
    """The URL of a graph of processes, as long as they run."""
    with tempfile.TemporaryDirectory() as folder:
        discovery = ["--discovery", f"file:{folder}/discovery"]
        wait_ms = ADMISSION.max_wait_ms * options.slowness
        worker = ["worker", "--engine", "sim", "--model", "bench", "--sim-cost-model", options.cost_model]
        worker += ["--sim-speedup", str(1 / options.slowness), *discovery]
        processes = [start(worker) for _ in range(WORKERS)]
        log = Path(folder) / "log"
        arguments = ["frontend", "--http-port", "0", "--router-mode", options.policy]
        arguments += ["--max-wait-ms", str(wait_ms), *discovery]
        try:
            with log.open("w") as log_file:
                processes.append(start(arguments, log_file))
            yield wait_ready(log, WORKERS)
        finally:
            stop(processes)


class Clients:
    """Plays the sessions of a load over HTTP."""

    def __init__(self, url: str, slowness: float, slo: Slo = SLO) -> None:
        self._client = HttpClient(url)
        self._slowness = slowness
        self._results = Results(slo)
        self._began = 0.0
        self._until_s = 0.0
        self.late_s = 0.0  # the most by which a session began late

    async def play(self, load: Workload) -> SimulationReport:
        """All of it, until its last answer has come."""
        self._began, self._until_s = time.perf_counter(), load.until_s
        sessions = iter(load.sessions)
        async with asyncio.TaskGroup() as tasks:
            if load.users is not None:
                for _ in range(load.users):
                    tasks.create_task(self._user(sessions))
            else:
                for session in sessions:
                    await self._pause(session.at_s - self._now_s())
                    self.late_s = max(self.late_s, self._now_s() - session.at_s)
                    tasks.create_task(self._session(session))
        await self._client.close()
        return self._results.report(
            policy="", scale=1.0, seed=SEED, virtual_s=self._now_s(), cpu_s=0.0, computing_share=0.0
        )

    def _now_s(self) -> float:
        """In the cost model's time."""
        return (time.perf_counter() - self._began) / self._slowness

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(max(0.0, seconds) * self._slowness)

    async def _user(self, sessions: Iterator[ClientSession]) -> None:
        while self._now_s() < self._until_s:
            await self._session(next(sessions))

    async def _session(self, session: ClientSession) -> None:
        said = ""
        for number, turn in enumerate(session.turns):
            if number:
                if self._now_s() >= self._until_s:
                    return
                await self._pause(turn.think_s)
            prompt = said + "".join(map(text_of, turn.new))
            answer = await self._ask(prompt, turn.output_tokens)
            if answer is None:
                return
            said = prompt + answer

    async def _ask(self, prompt: str, output_tokens: int) -> str | None:
        """The text of an answer; None when there was none."""
        body = {
            "model": "bench",
            "prompt": prompt,
            "max_tokens": output_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        answer, began = StreamedAnswer(keep_text=True), time.perf_counter()
        outcome = RequestOutcome(prompt_tokens=len(prompt))
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                await self._client.request("POST", "/v1/completions", json.dumps(body).encode(), answer)
        except (TimeoutError, RequestFailed) as error:
            outcome.error = type(error).__name__
        if answer.status != 200 or answer.first_at is None or answer.usage is None:
            outcome.error = outcome.error or f"status {answer.status}"
        else:
            assert answer.usage.prompt_tokens == len(prompt), "a character is not a token"
            outcome.output_tokens = answer.usage.completion_tokens
            outcome.cached_tokens = answer.usage.cached_tokens
            outcome.ttft_s = (answer.first_at - began) / self._slowness
            outcome.e2e_s = (answer.last_at - began) / self._slowness
            outcome.itl_s = (outcome.e2e_s - outcome.ttft_s) / max(1, outcome.output_tokens - 1)
        self._results.add(outcome)
        return None if outcome.error is not None else answer.text


@lru_cache(maxsize=1000)
def text_of(piece: Piece) -> str:
    """A character for each token; equal pieces are equal texts."""
    key, tokens = piece
    return "".join(Random(key).choices(LETTERS, k=tokens))


def figures(report: SimulationReport) -> dict[str, float]:
    """What is compared."""

    def of(name: str, it: Percentiles) -> dict[str, float]:
        return {f"{name} mean": it.mean or 0.0, f"{name} p50": it.p50 or 0.0, f"{name} p90": it.p90 or 0.0}

    return {
        "requests": report.requests,
        "errors": sum(report.errors.values()),
        "good %": 100 * report.good_share,
        "cached %": 100 * report.cached_share,
        **of("TTFT ms", report.ttft_ms),
        "ms per token": report.itl_ms.mean or 0.0,
        "e2e ms mean": report.e2e_ms.mean or 0.0,
    }


async def measured(load: WorkloadSettings, options: argparse.Namespace) -> tuple[SimulationReport, float]:
    """The load on processes, and by how much a session began late."""
    with frontend(options) as url:
        clients = Clients(url, options.slowness)
        return await clients.play(load.load(1.0, SEED)), clients.late_s


def main(options: argparse.Namespace) -> None:
    for name, load in LOADS.items():
        if options.load not in ("all", name):
            continue
        load = replace(load, duration_s=options.duration)
        report, late_s = asyncio.run(measured(load, options))
        real, foretold = figures(report), figures(simulated(load, options))
        print(f"--- {name}: {options.duration:g} s, processes {options.slowness:g} times slower;", end=" ")
        print(f"sessions began up to {late_s * 1e3:.0f} ms late there")
        print(f"{'':14} {'processes':>10} {'simulated':>10}  ratio")
        for figure, value in real.items():
            ratio = f"{foretold[figure] / value:6.2f}" if value else ""
            print(f"{figure:14} {value:10.1f} {foretold[figure]:10.1f} {ratio}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("load", nargs="?", choices=("all", *LOADS), default="all")
    parser.add_argument("--duration", type=float, default=120.0, help="of a load, in seconds")
    parser.add_argument("--slowness", type=float, default=1.0, help="of the real processes")
    parser.add_argument("--cost-model", default="qwen3-32b/h200/tp2")
    parser.add_argument("--policy", default="kv")
    os.environ.setdefault("PENSTOCK_LOG", "info")
    main(parser.parse_args())
