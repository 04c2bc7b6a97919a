"""`penstock sim`: the fault lab."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from penstock.errors import ConfigError

if TYPE_CHECKING:
    from penstock.simulator.report import Report


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("sim", help="Run workers and frontends on virtual time, with faults from a seed.")(sim)


def sim(
    seed: Annotated[int | None, typer.Option(help="The one seed to run.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds to run, as FIRST..LAST.", metavar="A..B")] = "",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Workers, instead of the seed's choice.")
    ] = None,
    frontends: Annotated[
        int | None, typer.Option(min=1, help="Frontends, instead of the seed's choice.")
    ] = None,
    faults: Annotated[
        str, typer.Option(help="Kinds of faults to draw from, with commas; `list` shows them.")
    ] = "",
    trace: Annotated[bool, typer.Option("--trace", help="Print every event. With one seed.")] = False,
    report: Annotated[str, typer.Option(help="`text` or `json`.", metavar="FORMAT")] = "text",
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes; as many as there are CPUs when not given.")
    ] = None,
) -> int:
    from penstock.simulator.faults import FAULTS
    from penstock.simulator.report import Report, report_of, run_seeds, simulate
    from penstock.simulator.scenario import Options

    if faults == "list":
        print("\n".join(f"{kind:16} {fault.__doc__}" for kind, fault in FAULTS.items()))
        return 0
    kinds = [kind.strip() for kind in faults.split(",") if kind.strip()]
    for kind in kinds:
        if kind not in FAULTS:
            raise ConfigError(f"--faults: unknown fault {kind!r}; there are: {', '.join(FAULTS)}")
    if report not in ("text", "json"):
        raise ConfigError(f"--report must be text or json, not {report!r}")
    wanted = _seeds(seed, seeds)
    if trace and len(wanted) > 1:
        raise ConfigError("--trace is for one seed; give --seed")
    options = Options(workers, frontends, kinds)
    total = Report()
    if trace:
        total.add(report_of(simulate(wanted[0], options, print), options))
    else:
        for part in run_seeds(wanted, options, jobs or os.cpu_count() or 1):
            total.add(part)
            _print_failures(part)
    if report == "json":
        print(msgspec.json.encode(total).decode())
    else:
        _print_summary(total)
    return 1 if total.failures else 0


def _seeds(seed: int | None, seeds: str) -> range:
    if (seed is None) == (not seeds):
        raise ConfigError("give either --seed N or --seeds A..B")
    if seed is not None:
        return range(seed, seed + 1)
    first, dots, last = seeds.partition("..")
    if not (dots and first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise ConfigError(f"--seeds must be A..B with A <= B, not {seeds!r}")
    return range(int(first), int(last) + 1)


def _print_failures(report: Report) -> None:
    for failure in report.failures:
        print(f"seed {failure.seed} at {failure.at_s:.3f} s: {failure.invariant}", file=sys.stderr)
        print(f"  {failure.detail}", file=sys.stderr)
        print("  last events:", file=sys.stderr)
        for line in failure.last_events:
            print(f"    {line}", file=sys.stderr)
        print(f"  again, with every event: {failure.replay}", file=sys.stderr, flush=True)


def _print_summary(report: Report) -> None:
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
