"""`penstock plan`: how many GPUs a load needs, and how to divide them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Annotated

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from penstock.bench.measurements import Percentiles
from penstock.bench.traces import read_trace
from penstock.core.policies import policy_named
from penstock.errors import ConfigError, PenstockError
from penstock.plan.candidates import BATCH_TOKENS, PlannedGraph, forms, layouts
from penstock.plan.kinds import worker_kinds
from penstock.plan.manifest import manifest
from penstock.plan.objective import Objective
from penstock.plan.runner import Processes
from penstock.plan.search import Advice, Search
from penstock.plan.standing import LEAST_SCALE, MOST_SCALE
from penstock.simulate.load_flags import LoadFlags, with_load_flags
from penstock.simulate.report import Estimate
from penstock.simulate.run import SimulatedGraph, WorkloadSettings
from penstock.simulate.workload import ClientSession

Option = typer.Option
SloText = Annotated[
    str, Option("--slo", help="Limits, and the share of requests to meet them: ttft=2s,itl=25ms,share=90%.")
]
Gpus = Annotated[int | None, Option(min=1, help="GPUs to divide; if not given, the fewest are found.")]
Costs = Annotated[
    str, Option("--cost-model", help="Model, GPU and tensor parallel size, or only the first of them.")
]
Policies = Annotated[str, Option(help="Routing policies to try with the best graph.")]
CpuS = Annotated[float, Option(min=1.0, help="CPU time to search for, in seconds.")]
Seed = Annotated[int, Option(min=0, help="Same seed, same loads.")]
Jobs = Annotated[int, Option(min=0, help="Processes; 0: one for each core.")]
WriteFile = Annotated[Path | None, Option("--write", help="Write the best graph's manifest here.")]
JsonFile = Annotated[Path | None, Option(help="Write all figures here.")]

TRANSFER_GB_S = SimulatedGraph().gigabytes_per_s

SESSIONS_LOOKED_AT = 2_000
"""Of a load that is made up, for its longest request."""

BUDGET_ENDED = "the budget of CPU time ended before (--cpu-s)"

SHOWN = 5
REPORT_COLUMNS = 108
"""Rows of the table; its width where it is not shown in a terminal."""


@with_load_flags
def plan(
    flags: LoadFlags,
    slo: SloText = "ttft=2s,itl=25ms",
    gpus: Gpus = None,
    costs: Costs = "qwen3-32b/h200",
    policy: Policies = "kv,lmetric,sticky",
    cpu_s: CpuS = 300.0,
    seed: Seed = 0,
    jobs: Jobs = 0,
    write: WriteFile = None,
    json: JsonFile = None,
) -> None:
    """Find the graph that serves a load best with so many GPUs, or with the fewest."""
    objective, kinds = Objective.parse(slo), worker_kinds(costs)
    load = flags.workload()
    if load.trace is not None:
        rows = len(read_trace(load.trace))
        load = msgspec.structs.replace(load, requests=min(load.requests, rows) if load.requests else rows)
    policies = [name.strip() for name in policy.split(",") if name.strip()]
    for name in policies:
        policy_named(name)
    with Processes(jobs or os.cpu_count() or 1, cpu_s) as run:
        search = Search(load, objective, run, cpu_s, seed)
        if gpus is None:
            advice = search.fewest(forms(kinds), policies)
        else:
            candidates = layouts(kinds, gpus)
            if not candidates:
                fewest = min(kind.gpus for kind in kinds)
                raise ConfigError(f"gpus: {gpus} are too few; a worker takes {fewest} or more")
            advice = search.best(candidates, policies)
    if not advice:
        raise PenstockError(
            f"no graph meets {objective}: too many single requests are slower than that on idle workers"
        )
    remarks = list(_remarks(advice, objective, load))
    _show(advice, objective, search, remarks, cpu_s)
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(advice), indent=2) + b"\n")
    if write is not None:
        write.write_text(manifest(advice[0].candidate, _longest_request(load), remarks), encoding="utf-8")


def _longest_request(load: WorkloadSettings) -> int:
    """In tokens, prompt and answer together."""
    sessions = load.load(1.0, 0).sessions
    sessions = sessions if load.trace is not None else islice(sessions, SESSIONS_LOOKED_AT)
    return max(max(_contexts(session)) for session in sessions)


def _contexts(session: ClientSession) -> Iterator[int]:
    """How long each request of a session is, with its answer."""
    tokens = 0
    for turn in session.turns:
        if turn.kept_tokens is not None:
            tokens = min(tokens, turn.kept_tokens)
        tokens += sum(length for _, length in turn.new) + turn.output_tokens
        yield tokens


def _remarks(advice: Sequence[Advice], objective: Objective, load: WorkloadSettings) -> Iterator[str]:
    """What was planned for, and what was assumed."""
    best, *others = advice
    candidate, kind = best.candidate, best.candidate.kind
    source = load.trace.name if load.trace is not None else f"the load {load.generator}"
    share = Estimate.of([it.good_share for it in best.reports]).times(100).format(1)
    yield f"Planned for {source} and {objective}: {candidate.name}, {candidate.gpus} GPUs."
    yield f"{share} % of the requests meet the limits."
    if best.margin is None and best.fails_at == LEAST_SCALE:
        yield f"Even at {LEAST_SCALE:g} times the load, too many do not: they are too slow on idle workers."
    elif best.margin is None:
        yield f"How much less it would bear is not known: {BUDGET_ENDED}."
    elif best.fails_at is None and best.margin.mean < MOST_SCALE:
        borne = f"{best.margin.mean:g} times the load"
        yield f"How much more it bears than {borne} is not known: {BUDGET_ENDED}."
    elif best.fails_at is None:
        yield f"It bears {MOST_SCALE:g} times the load and more: fewer GPUs may do."
    else:
        yield f"It bears {best.margin.format(2)} times the load; then {best.breaks} breaks first."
        if best.meets and best.margin.least < 1:
            yield "That may be less than the load: chance decides so much."
    if alike := [_description(it.candidate, ", ") for it in others if _as_good(it, best)]:
        yield f"By all that was simulated, as good: {'; '.join(alike)}."
    measured = kind.cost_model.endswith(".json")
    yield f"Assumed: the step times of {kind.cost_model}; {kind.cache_tokens:,} tokens of KV in each worker"
    source = "as measured" if measured else "bf16, at 90 % of the GPUs' memory"
    yield f"({source}); KV transfers of {TRANSFER_GB_S:g} GB/s."
    if not measured:
        yield "Real GPUs were measured to be 8 to 17 % slower: a margin below 1.2 is none."


def _show(
    advice: Sequence[Advice],
    objective: Objective,
    search: Search,
    remarks: Sequence[str],
    budget_cpu_s: float,
) -> None:
    console = Console(width=None if sys.stdout.isatty() else REPORT_COLUMNS)
    seeds = f"{search.seeds} seeds" if search.seeds > 1 else "1 seed"
    table = Table(
        title=f"{objective}, on {search.piece:.0%} of the load, {seeds}",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    table.add_column("graph", no_wrap=True)
    for heading in ("GPUs", "good %", "good/s", "TTFT ms", "ITL ms", "cached %", "margin"):
        table.add_column(heading, justify="right", no_wrap=True)
    for it in advice[:SHOWN]:
        reports = it.reports
        table.add_row(
            _description(it.candidate),
            str(it.candidate.gpus),
            Estimate.of([report.good_share for report in reports]).times(100).format(1),
            f"{fmean(report.goodput_per_s for report in reports):.2f}",
            _percentiles([report.ttft_ms for report in reports], 0),
            _percentiles([report.itl_ms for report in reports], 1),
            f"{100 * fmean(report.cached_share for report in reports):.1f}",
            _margin(it),
        )
    console.print(table)
    for line in [
        "TTFT and ITL (mean time per token): 50th, 90th and 99th percentile. Margin: times the load that",
        "the graph bears; then, what is missed first.",
        "",
        *remarks,
        f"{search.spent_cpu_s:.0f} of {budget_cpu_s:.0f} s of CPU time were used.",
    ]:
        console.print(line, highlight=False)


def _as_good(other: Advice, best: Advice) -> bool:
    """Whether one with no more GPUs may bear as much, going by the differences of margins, seed by seed."""
    if not other.meets or other.candidate.gpus > best.candidate.gpus or len(best.margins) < 2:
        return False
    pairs = zip(best.margins, other.margins, strict=True)
    return Estimate.of([its - theirs for its, theirs in pairs]).least <= 0


def _description(candidate: PlannedGraph, between: str = "\n") -> str:
    lines = [candidate.name, candidate.kind.cost_model]
    if candidate.policy != "kv":
        lines.append(f"policy {candidate.policy}")
    if candidate.max_batch_tokens != BATCH_TOKENS:
        lines.append(f"steps of {candidate.max_batch_tokens:,} tokens")
    return between.join(lines)


def _margin(advice: Advice) -> str:
    if advice.margin is None:
        return f"< {advice.fails_at:g} {advice.breaks}"
    return f"{advice.margin.format(2)} {advice.breaks}" if advice.breaks else f"> {advice.margin.mean:g}"


def _percentiles(measured: Sequence[Percentiles], digits: int) -> str:
    """Their means over seeds."""
    figures = [
        fmean(value for it in measured if (value := getattr(it, name)) is not None)
        for name in ("p50", "p90", "p99")
        if any(getattr(it, name) is not None for it in measured)
    ]
    return "/".join(f"{figure:.{digits}f}" for figure in figures)
