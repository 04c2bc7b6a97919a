"""`python -m simulator`: seeds, one or many, and what came of them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import msgspec

from simulator.faults import FAULTS
from simulator.report import SimulationReport, report_of, run_seeds, simulate
from simulator.scenario import Options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the seeds that the command line asks for. Returns 1 when one of them broke an invariant. A wrong
    command line ends the process with 2."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.faults == "list":
        print("\n".join(f"{kind:16} {fault.__doc__}" for kind, fault in FAULTS.items()))
        return 0
    kinds = [kind.strip() for kind in given.faults.split(",") if kind.strip()]
    unknown = [kind for kind in kinds if kind not in FAULTS]
    if unknown:
        parser.error(f"--faults: unknown fault {unknown[0]!r}; there are: {', '.join(FAULTS)}")
    if (given.seed is None) == (given.seeds is None):
        parser.error("give either --seed N or --seeds A..B")
    if given.trace and given.seed is None:
        parser.error("--trace is for one seed; give --seed")
    options = Options(given.workers, given.frontends, kinds)
    total = SimulationReport()
    if given.trace:
        total.add(report_of(simulate(given.seed, options, print), options))
    else:
        seeds = given.seeds or range(given.seed, given.seed + 1)
        for part in run_seeds(seeds, options, given.jobs):
            total.add(part)
            _print_failures(part)
    if given.report == "json":
        print(msgspec.json.encode(total).decode())
    else:
        _print_summary(total)
    return 1 if total.failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m simulator",
        description="Run workers and frontends on virtual time, with faults from a seed.",
    )
    parser.add_argument("--seed", type=int, help="the one seed to run")
    parser.add_argument("--seeds", type=_seeds, metavar="A..B", help="seeds to run, first and last")
    parser.add_argument("--workers", type=_positive, help="workers, instead of the seed's choice")
    parser.add_argument("--frontends", type=_positive, help="frontends, instead of the seed's choice")
    parser.add_argument("--faults", default="", help="kinds of faults to draw from; `list` shows them")
    parser.add_argument("--trace", action="store_true", help="print every event; with one seed")
    parser.add_argument("--report", choices=("text", "json"), default="text")
    parser.add_argument("--jobs", type=_positive, default=os.cpu_count() or 1, help="processes; 1 per CPU")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _seeds(text: str) -> range:
    first, dots, last = text.partition("..")
    if not (dots and first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"must be A..B with A <= B, not {text!r}")
    return range(int(first), int(last) + 1)


def _print_failures(report: SimulationReport) -> None:
    for failure in report.failures:
        print(f"seed {failure.seed} at {failure.at_s:.3f} s: {failure.invariant}", file=sys.stderr)
        print(f"  {failure.detail}", file=sys.stderr)
        print("  last events:", file=sys.stderr)
        for line in failure.last_events:
            print(f"    {line}", file=sys.stderr)
        print(f"  again, with every event: {failure.replay}", file=sys.stderr, flush=True)


def _print_summary(report: SimulationReport) -> None:
    print(
        f"seeds={report.seeds} violations={len(report.failures)} requests={report.requests} ok={report.ok} "
        f"gone={report.gone} errors={sum(report.errors.values())} virtual_s={report.virtual_s:.0f} "
        f"cpu_s={report.cpu_s:.1f}"
    )
    print("fault            injected requests      ok retried   gone  max s  errors")
    for kind, its in sorted(report.faults.items()):
        errors = " ".join(f"{code}={count}" for code, count in sorted(its.errors.items()))
        print(
            f"{kind:16} {its.injected:8} {its.requests:8} {its.ok:7} {its.ok_after_retry:7} {its.gone:6} "
            f"{its.max_s:6.1f}  {errors}"
        )


if __name__ == "__main__":
    sys.exit(main())
