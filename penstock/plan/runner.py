"""Runs simulations in several processes, and shows how far they are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from penstock.plan.search import Ran
from penstock.simulate.run import Scenario


class Processes:
    """A Runner, within `with`. The progress is shown on standard error where that is a terminal."""

    def __init__(self, jobs: int, budget_cpu_s: float) -> None:
        self._jobs = jobs
        self._budget_cpu_s = budget_cpu_s
        self._spent_cpu_s = 0.0
        self._pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) if jobs > 1 else None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[spent]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task("", spent="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __call__(self, what: str, scenarios: Sequence[Scenario]) -> list[Ran]:
        """As Runner."""
        self._progress.reset(self._task, total=len(scenarios), description=what, spent=self._spent())
        if self._pool is None:
            return [self._ended(_run(scenario)) for scenario in scenarios]
        futures = [self._pool.submit(_run, scenario) for scenario in scenarios]
        for future in as_completed(futures):
            self._ended(future.result())
        return [future.result() for future in futures]

    def _ended(self, ran: Ran) -> Ran:
        self._spent_cpu_s += ran.cpu_s
        self._progress.update(self._task, advance=1, spent=self._spent())
        return ran

    def _spent(self) -> str:
        return f"{self._spent_cpu_s:.0f} of {self._budget_cpu_s:.0f} CPU s"


def _run(scenario: Scenario) -> Ran:
    began = time.process_time()
    return Ran(scenario.run(), time.process_time() - began)
