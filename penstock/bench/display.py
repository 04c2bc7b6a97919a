"""Shows a run in the terminal: a progress bar while it lasts, and tables at its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from penstock.bench.driver import Driver, Limits
from penstock.bench.measurements import BenchReport, Percentiles

REFRESH_S = 0.5
"""Interval between updates of the bar: short enough to follow, too long to disturb the measurement."""


@asynccontextmanager
async def progress(driver: Driver, limits: Limits, rows: int, console: Console) -> AsyncIterator[None]:
    """Show a progress bar while the block runs: by requests if their number is known (`rows` is a trace's),
    otherwise by time. Nothing is shown if the console is not a terminal."""
    total: float | None = limits.requests or rows or limits.duration_s
    by_time = not (limits.requests or rows)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal) as bar:
        task = bar.add_task("bench", total=total, state="")

        def update() -> None:
            counts = driver.measurements
            ended = counts.ok + counts.failed
            bar.update(
                task,
                completed=time.perf_counter() - driver.started_at if by_time else ended,
                state=f"{counts.ok} ok  {counts.failed} failed  {driver.in_flight} in flight",
            )
            bar.refresh()

        async def refresh() -> None:
            while True:
                update()
                await asyncio.sleep(REFRESH_S)

        refreshing = asyncio.create_task(refresh())
        try:
            yield
        finally:
            refreshing.cancel()
            await asyncio.wait([refreshing])
            update()


def report_table(report: BenchReport) -> Group:
    """The report as tables for a terminal."""
    latencies = Table("latency, ms", "mean", "p50", "p90", "p99")
    for name, row in (
        ("time to first token", report.ttft_ms),
        ("between chunks", report.itl_ms),
        ("whole request", report.e2e_ms),
    ):
        latencies.add_row(name, *_cells(row))
    totals = Table(show_header=False)
    totals.add_row("requests", f"{report.ok} ok, {report.failed} failed in {report.duration_s:.1f} s")
    for kind, number in report.errors.items():
        example = report.examples.get(kind, "")
        totals.add_row(f"  {kind}", f"{number}" + (f"  ({example[:80]})" if example else ""))
    totals.add_row("requests/s", f"{report.requests_per_s:.2f}")
    totals.add_row("output tokens/s", f"{report.output_tokens_per_s:.1f}")
    totals.add_row("prompt tokens/s", f"{report.prompt_tokens_per_s:.1f}")
    if report.cached_share is not None:
        totals.add_row("prompt tokens cached", f"{report.cached_share:.1%}")
    if report.goodput_per_s is not None and report.good_share is not None:
        totals.add_row("goodput", f"{report.goodput_per_s:.2f} requests/s ({report.good_share:.1%})")
    totals.add_row("this client", f"{report.client_cpu_share:.0%} of a core")
    return Group(latencies, totals)


def _cells(row: Percentiles) -> list[str]:
    values = (row.mean, row.p50, row.p90, row.p99)
    return ["-" if value is None else f"{value:.1f}" for value in values]
