"""Finds the best graphs for a load by simulating candidates, within a budget of CPU time.

Successive halving (Jamieson and Talwalkar, 2016): all candidates get a short piece of the load, the best
quarter of them a longer one, the best few the whole load with several seeds. The pieces are as long as the
budget allows. At each stage candidates that meet the objective are compared by their margins (standing.py).

Where the number of GPUs is not given, the stages find for each form of graph the fewest workers that meet
the objective (sizing.py), each beginning with what the one before has found.

Nothing here runs anything by itself: `Runner` does, so that the search is the same in one process or in
several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from statistics import fmean
from typing import NamedTuple

import msgspec

from penstock.core.settings import RouterSettings
from penstock.plan.candidates import Form, PlannedGraph, variants
from penstock.plan.objective import Objective
from penstock.plan.sizing import MOST_GPUS, Sizing
from penstock.plan.standing import LEAST_SCALE, MOST_SCALE, Standing
from penstock.simulate.report import Estimate, SimulationReport
from penstock.simulate.run import Scenario, WorkloadSettings


class Ran(NamedTuple):
    """A simulation that was run."""

    report: SimulationReport
    cpu_s: float


Runner = Callable[[str, Sequence[Scenario]], list[Ran]]
"""Simulates, and returns what came of it, in order. The text says what for."""


class Stage(NamedTuple):
    """One round of the search."""

    spent_share: float  # of the budget, when it ends
    tolerance: float  # the factor to within which margins are known
    growth: float  # the factor by which the number of workers changes first
    keep: int  # so many candidates remain


FIRST = Stage(0.25, 1.4, 2.0, 4)
SECOND = Stage(0.5, 1.2, 1.2, 3)
FINAL = Stage(1.0, 1.1, 1.1, 3)

FIRST_WORKERS = 4
"""The number that is tried first where workers are counted."""

SEEDS = 3
PROBE_REQUESTS = 150
LEAST_REQUESTS = 300
"""Requests of what is simulated first, to see how long it takes; the fewest of any other piece."""

LEAST_PIECE_S = 60.0
"""The shortest piece of a load that is made up."""

RUNS_EACH = 5
"""About so many simulations tell a candidate's margin, or its number of workers."""

CACHE_FACTOR = 4.0
"""A candidate's cache is too small if with so many times of it, it meets what it misses."""


class Advice(msgspec.Struct, frozen=True):
    """A graph, and what it would make of the load."""

    candidate: PlannedGraph
    meets: bool
    margin: Estimate | None  # how many times the load it bears; None: it met the objective at none
    margins: Sequence[float]  # for each seed
    fails_at: float | None  # the least times the load that it was seen not to bear; None: it bore all
    breaks: str  # what is missed first when the load grows; empty: nothing was
    reports: Sequence[SimulationReport]  # at the load as given, one for each seed


class Search:
    """One search.

    Args:
        load: of a trace, `requests` says how many it has.
        budget_cpu_s: CPU time of all simulations together. What has begun then is ended.
        seed: the first of those with which loads are simulated.
    """

    def __init__(
        self, load: WorkloadSettings, objective: Objective, run: Runner, budget_cpu_s: float, seed: int = 0
    ) -> None:
        self._load = load
        self._objective = objective
        self._run = run
        self._budget_cpu_s = budget_cpu_s
        self._first_seed = seed
        self.spent_cpu_s = 0.0
        self.piece = 1.0
        """The part of the load that is simulated."""
        self.seeds = 1
        self._least_piece = 1.0
        self._whole_cpu_s = 0.0  # of one simulation of the whole load, as the latest ones tell

    # --- for a number of GPUs ---------------------------------------------------------------------

    def best(self, candidates: Sequence[PlannedGraph], policies: Iterable[str]) -> list[Advice]:
        """The best few for the load, best first; of the best one also variants, with these policies."""
        self._probe(candidates[0])
        quarter = math.ceil(len(candidates) / 4)
        chosen = self._screened(candidates, FIRST._replace(keep=max(FIRST.keep, quarter)))
        chosen = self._screened(chosen, SECOND)
        chosen = [*chosen, *variants(chosen[0], policies)]
        self._plan_final(len(chosen))
        standings = sorted(self._final(chosen), key=lambda it: it.rank, reverse=True)
        return [self._advice(it) for it in standings]

    def _screened(self, candidates: Sequence[PlannedGraph], stage: Stage) -> Sequence[PlannedGraph]:
        """Those that the stage keeps, best first."""
        if len(candidates) <= stage.keep:
            return candidates
        self._plan_piece(len(candidates), stage)
        standings = [Standing(it, self._objective.share) for it in candidates]
        what = f"{len(candidates)} graphs on {self.piece:.0%} of the load"
        self._extend(what, [(it, 1.0) for it in standings])
        self._find_margins(what, [it for it in standings if it.meets(1.0)], stage)
        standings.sort(key=lambda it: it.rank, reverse=True)
        return [it.candidate for it in standings[: stage.keep]]

    # --- for the fewest GPUs ----------------------------------------------------------------------

    def fewest(self, forms: Sequence[Form], policies: Iterable[str]) -> list[Advice]:
        """The smallest graphs that meet the objective, smallest first; empty if there are none."""
        self._probe(forms[0].of(forms[0].least + 3))
        self._plan_piece(len(forms), FIRST)
        sized = self._sized([(form, FIRST_WORKERS) for form in self._able(forms)], FIRST)
        self._plan_piece(len(sized), SECOND)
        sized = self._sized(sized, SECOND)
        self._plan_final(2 * len(sized) + 1)
        chosen = [form.of(workers) for form, workers in self._sized(sized, FINAL)]
        if not chosen:
            return []
        standings = self._final([*chosen, *variants(chosen[0], policies)])
        standings.sort(key=lambda it: it.rank, reverse=True)
        standings.sort(key=lambda it: (not it.meets(1.0), it.candidate.gpus))
        return [self._advice(it) for it in standings]

    def _able(self, forms: Sequence[Form]) -> list[Form]:
        """Those that meet the objective when hardly anything is to be done."""
        candidates = [form.of(form.least + 3) for form in forms]
        shares = self._good_shares("with hardly any load", [(it, LEAST_SCALE) for it in candidates])
        return [it for it, share in zip(forms, shares, strict=True) if share >= self._objective.share]

    def _sized(self, started: Iterable[tuple[Form, int]], stage: Stage) -> list[tuple[Form, int]]:
        """The forms with the fewest workers that suffice, fewest GPUs first, as many as the stage keeps.

        Args:
            started: with how many workers to begin.
        """
        sizings = [Sizing(form, workers, stage.growth) for form, workers in started]
        most_gpus = MOST_GPUS
        while tried := [(it, workers) for it in sizings if (workers := it.next(most_gpus)) is not None]:
            what = f"the size of {len(tried)} graphs on {self.piece:.0%} of the load"
            shares = self._good_shares(what, [(it.form.of(workers), 1.0) for it, workers in tried])
            for (sizing, workers), share in zip(tried, shares, strict=True):
                sizing.add(workers, share >= self._objective.share)
            fewest = [it.fewest * it.form.kind.gpus for it in sizings if it.fewest is not None]
            most_gpus = min(most_gpus, 2 * min(fewest, default=most_gpus))
        sized = [(it.form, it.fewest) for it in sizings if it.fewest is not None]
        return sorted(sized, key=lambda it: it[0].kind.gpus * it[1])[: stage.keep]

    # --- stages -----------------------------------------------------------------------------------

    def _probe(self, candidate: PlannedGraph) -> None:
        """Learn how long simulations take, and how many requests the load has."""
        if self._load.trace is not None:
            self.piece = min(1.0, PROBE_REQUESTS / self._load.requests)
        else:
            self.piece = min(1.0, LEAST_PIECE_S / self._load.duration_s)
        (report,) = self._simulate("how long it takes", [(candidate, 1.0, self._first_seed)])
        self._least_piece = min(1.0, self.piece * max(1.0, LEAST_REQUESTS / max(1, report.requests)))

    def _plan_piece(self, candidates: int, stage: Stage) -> None:
        """Simulate as much of the load as the stage's part of the budget allows."""
        left_s = stage.spent_share * self._budget_cpu_s - self.spent_cpu_s
        whole_s = max(1, candidates) * self._runs_each * self.seeds * self._whole_cpu_s
        self.piece = min(1.0, max(self._least_piece, left_s / whole_s))

    def _plan_final(self, candidates: int) -> None:
        """Several seeds before more of the load: without them nobody knows how far a margin is chance."""
        least_s = self._least_piece * candidates * self._runs_each * self._whole_cpu_s
        self.seeds = SEEDS if SEEDS * least_s <= self._budget_cpu_s - self.spent_cpu_s else 1
        self._plan_piece(candidates, FINAL)

    @property
    def _runs_each(self) -> float:
        """As many simulations of the load as given take about as long as what tells a margin."""
        return RUNS_EACH if self._load.trace is not None else RUNS_EACH * MOST_SCALE / 2

    def _final(self, candidates: Sequence[PlannedGraph]) -> list[Standing]:
        standings = [Standing(it, self._objective.share) for it in candidates]
        what = f"the best {len(candidates)} on {self.piece:.0%} of the load"
        self._extend(what, [(it, 1.0) for it in standings])
        self._find_margins(what, standings, FINAL)
        return standings

    def _find_margins(self, what: str, standings: Sequence[Standing], stage: Stage) -> None:
        while asked := [
            (it, scale) for it in standings if (scale := it.next_scale(stage.tolerance)) is not None
        ]:
            if self.spent_cpu_s > stage.spent_share * self._budget_cpu_s:
                return
            self._extend(what, asked)

    def _advice(self, standing: Standing) -> Advice:
        return Advice(
            candidate=standing.candidate,
            meets=standing.meets(1.0),
            margin=Estimate.of(standing.margins) if standing.margins else None,
            margins=standing.margins,
            fails_at=standing.high,
            breaks=self._breaks(standing),
            reports=standing.reports[1.0],
        )

    def _breaks(self, standing: Standing) -> str:
        """What most requests miss at the lowest load at which the objective is missed."""
        if standing.high is None:
            return ""
        (larger,) = self._simulate(
            "a larger cache", [(standing.candidate, standing.high, self._first_seed)], CACHE_FACTOR
        )
        if larger.good_share >= self._objective.share:
            return "KV cache"
        report = standing.reports[standing.high][0]
        refused = sum(report.errors.values()) / report.requests
        missed = {
            "admission": refused,
            "TTFT": 1 - report.ttft_met_share - refused,
            "ITL": 1 - report.itl_met_share - refused,
        }
        return max(missed, key=lambda it: missed[it])

    # --- simulations ------------------------------------------------------------------------------

    def _extend(self, what: str, asked: Sequence[tuple[Standing, float]]) -> None:
        """Simulate these at these scales, with each seed."""
        reports = self._with_seeds(what, [(it.candidate, scale) for it, scale in asked])
        for (standing, scale), its in zip(asked, reports, strict=True):
            standing.add(scale, its)

    def _good_shares(self, what: str, asked: Sequence[tuple[PlannedGraph, float]]) -> list[float]:
        """Of the requests of these candidates at these scales, over all seeds."""
        return [fmean(it.good_share for it in reports) for reports in self._with_seeds(what, asked)]

    def _with_seeds(
        self, what: str, asked: Sequence[tuple[PlannedGraph, float]]
    ) -> list[list[SimulationReport]]:
        seeds = range(self._first_seed, self._first_seed + self.seeds)
        reports = self._simulate(what, [(*it, seed) for it, seed in product(asked, seeds)])
        return [reports[at : at + self.seeds] for at in range(0, len(reports), self.seeds)]

    def _simulate(
        self, what: str, asked: Sequence[tuple[PlannedGraph, float, int]], cache_factor: float = 1.0
    ) -> list[SimulationReport]:
        """The reports of these candidates at these scales with these seeds, on the present piece."""
        load = part(self._load, self.piece)
        scenarios = [
            Scenario(
                load,
                candidate.graph(cache_factor),
                RouterSettings(policy=candidate.policy, slo_itl_ms=self._objective.slo.itl_ms or 0.0),
                self._objective.slo,
                scale,
                seed,
            )
            for candidate, scale, seed in asked
        ]
        ran = self._run(what, scenarios)
        cpu_s = sum(it.cpu_s for it in ran)
        self.spent_cpu_s += cpu_s
        # A trace has the same requests at each scale; of a load that is made up, there are more.
        wholes = sum(self.piece * (1.0 if load.trace is not None else scale) for _, scale, _ in asked)
        if wholes:
            self._whole_cpu_s = max(1e-3, cpu_s / wholes)
        return [it.report for it in ran]


def part(load: WorkloadSettings, share: float) -> WorkloadSettings:
    """The first part of a load."""
    if load.trace is not None:
        return msgspec.structs.replace(load, requests=max(1, round(share * load.requests)))
    duration_s = min(load.duration_s, max(LEAST_PIECE_S, share * load.duration_s))
    return msgspec.structs.replace(load, duration_s=duration_s)
