"""Many seeds, in several processes, and what came of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import msgspec

from simulator.clients import NOT_SERVED
from simulator.draw import draw_scenario
from simulator.lab import Lab, SimulationOutcome
from simulator.scenario import Options

CHUNK = 16
"""Seeds that a process gets at once."""


class Failure(msgspec.Struct):
    """A seed that broke an invariant."""

    seed: int
    invariant: str
    detail: str
    at_s: float
    last_events: list[str]
    replay: str  # the command that shows it again, with every event


class FaultReport(msgspec.Struct):
    """What one kind of fault did to the requests that were on their way where it happened."""

    injected: int = 0
    requests: int = 0
    ok: int = 0
    ok_after_retry: int = 0  # of `ok`: an attempt was lost
    gone: int = 0  # hung up, or lost with their frontend
    errors: dict[str, int] = {}  # by code
    max_s: float = 0.0  # from a request's start to its end, the longest


class SimulationReport(msgspec.Struct):
    """All seeds together. Times are virtual seconds, but for `cpu_s`."""

    seeds: int = 0
    requests: int = 0
    ok: int = 0
    errors: dict[str, int] = {}
    gone: int = 0
    virtual_s: float = 0.0
    cpu_s: float = 0.0
    callbacks: int = 0
    faults: dict[str, FaultReport] = {}
    failures: list[Failure] = []

    def add(self, other: SimulationReport) -> None:
        """Take the figures of other seeds."""
        for name in ("seeds", "requests", "ok", "gone", "virtual_s", "cpu_s", "callbacks"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        _add(self.errors, other.errors)
        self.failures += other.failures
        for kind, its in other.faults.items():
            mine = self.faults.setdefault(kind, FaultReport())
            for name in ("injected", "requests", "ok", "ok_after_retry", "gone"):
                setattr(mine, name, getattr(mine, name) + getattr(its, name))
            _add(mine.errors, its.errors)
            mine.max_s = max(mine.max_s, its.max_s)


def simulate(seed: int, options: Options, trace: Callable[[str], None] | None = None) -> SimulationOutcome:
    """One seed. `trace` gets every event as a line, as it happens."""
    return Lab(draw_scenario(seed, options), trace).run()


def run_seeds(seeds: Sequence[int], options: Options, jobs: int) -> Iterator[SimulationReport]:
    """Reports of a few seeds each, as they are ready, in the order of the seeds."""
    chunks = [seeds[start : start + CHUNK] for start in range(0, len(seeds), CHUNK)]
    if jobs == 1 or len(chunks) == 1:
        for chunk in chunks:
            yield _run(chunk, options)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as processes:
        yield from processes.map(_run, chunks, [options] * len(chunks))


def _run(seeds: Iterable[int], options: Options) -> SimulationReport:
    report = SimulationReport()
    for seed in seeds:
        report.add(report_of(simulate(seed, options), options))
    return report


def report_of(outcome: SimulationOutcome, options: Options) -> SimulationReport:
    """One seed's figures."""
    report = SimulationReport(
        seeds=1, virtual_s=outcome.virtual_s, cpu_s=outcome.cpu_s, callbacks=outcome.callbacks
    )
    for asked in outcome.asked:
        report.requests += 1
        _count(report, asked.ended)
    for fault in outcome.faults:
        its = report.faults.setdefault(fault.kind, FaultReport())
        its.injected += 1
        for asked in fault.asked:
            its.requests += 1
            _count(its, asked.ended)
            if asked.ended == "ok":
                its.ok_after_retry += asked.failures() > 0
                its.max_s = max(its.max_s, asked.ended_at - asked.at)
            elif asked.ended not in NOT_SERVED:
                its.max_s = max(its.max_s, asked.ended_at - asked.at)
    if outcome.violation is not None:
        report.failures.append(
            Failure(
                outcome.seed,
                outcome.violation.invariant,
                outcome.violation.detail,
                outcome.violation.at,
                outcome.last_events,
                replay(outcome.seed, options),
            )
        )
    return report


def replay(seed: int, options: Options) -> str:
    """The command that shows this seed again, with every event."""
    command = f"python -m simulator --seed {seed}"
    for name in ("workers", "frontends"):
        if getattr(options, name) is not None:
            command += f" --{name} {getattr(options, name)}"
    if options.faults:
        command += f" --faults {','.join(options.faults)}"
    return command + " --trace"


def _count(report: SimulationReport | FaultReport, ended: str) -> None:
    if ended == "ok":
        report.ok += 1
    elif ended in NOT_SERVED:
        report.gone += 1
    else:
        report.errors[ended or "no end"] = report.errors.get(ended or "no end", 0) + 1


def _add(mine: dict[str, int], others: dict[str, int]) -> None:
    for code, count in others.items():
        mine[code] = mine.get(code, 0) + count
