"""`penstock simulate`: what routing policies would do to a load, without any GPU."""

from __future__ import annotations

import csv
import sys
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from msgspec.structs import replace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from penstock.bench.measurements import Percentiles, Slo
from penstock.core.admission import AdmissionSettings
from penstock.core.disagg import Disagg
from penstock.core.settings import RouterSettings
from penstock.engines.settings import SchedulerSettings
from penstock.errors import ConfigError
from penstock.simulate.load_flags import LoadFlags, with_load_flags
from penstock.simulate.plot import check_plot, draw
from penstock.simulate.report import Comparison, SimulationReport, compare
from penstock.simulate.run import Scenario, SimulatedGraph

GRAPH = SimulatedGraph()
ADMISSION = AdmissionSettings()

Option = typer.Option
Scales = Annotated[str, Option(help="Times the load, e.g. 0.5,1,2.")]
Workers = Annotated[int, Option(min=0, help="Aggregated workers.")]
Prefill = Annotated[int, Option(min=0, help="Prefill workers; then --workers is 0.")]
Decode = Annotated[int, Option(min=0, help="Decode workers; then --workers is 0.")]
Costs = Annotated[str, Option("--cost-model", help="Model, GPU and tensor parallel size.")]
CacheTokens = Annotated[int, Option(min=1024, help="KV cache of a worker.")]
BlockSize = Annotated[int, Option(min=1, help="Tokens in a block of it.")]
BatchTokens = Annotated[int, Option("--max-batch-tokens", min=256, help="Tokens of a step.")]
TransferGbS = Annotated[float, Option(min=0.001, help="KV transfer of a worker, in GB/s.")]
Policies = Annotated[str, Option(help="Routing policies to compare, e.g. kv,lmetric.")]
DisaggText = Annotated[str, Option(help="auto, always or never.")]
MaxWaitMs = Annotated[float, Option(min=0.0, help="Longest predicted wait of what is let in.")]
TtftMs = Annotated[float, Option(help="Goodput: time to first token.")]
ItlMs = Annotated[float, Option(help="Goodput: mean time per token.")]
Seeds = Annotated[int, Option(min=1, help="Runs of each, with other arrivals.")]
Jobs = Annotated[int, Option(min=1, help="Runs at one time.")]
JsonFile = Annotated[Path | None, Option(help="Write all reports here, too.")]
CsvFile = Annotated[Path | None, Option("--csv", help="The same, a line for each run.")]


GraphFile = Annotated[Path | None, Option("--graph", help="Manifest: workers and routing as it says.")]
PlotFile = Annotated[Path | None, Option("--plot", help="Draw goodput and TTFT over the load, as PNG.")]


@with_load_flags
def simulate(
    load: LoadFlags,
    context: typer.Context,
    scale: Scales = "1",
    graph_file: GraphFile = None,
    workers: Workers = 8,
    prefill: Prefill = 0,
    decode: Decode = 0,
    costs: Costs = GRAPH.cost_model,
    cache_tokens: CacheTokens = GRAPH.cache_tokens,
    block_size: BlockSize = GRAPH.block_size,
    batch_tokens: BatchTokens = GRAPH.scheduler.max_batch_tokens,
    transfer_gb_s: TransferGbS = GRAPH.gigabytes_per_s,
    policy: Policies = "kv",
    disagg: DisaggText = "auto",
    max_wait_ms: MaxWaitMs = ADMISSION.max_wait_ms,
    slo_ttft_ms: TtftMs = 2000.0,
    slo_itl_ms: ItlMs = 25.0,
    seeds: Seeds = 1,
    jobs: Jobs = 1,
    json: JsonFile = None,
    csv_file: CsvFile = None,
    plot: PlotFile = None,
) -> None:
    """Simulate a load on a graph, and compare routing policies."""
    workload = load.workload()
    graph = SimulatedGraph(
        aggregated=0 if prefill or decode else workers,
        prefill=prefill,
        decode=decode,
        cost_model=costs,
        cache_tokens=cache_tokens,
        block_size=block_size,
        scheduler=SchedulerSettings(max_batch_tokens=batch_tokens),
        gigabytes_per_s=transfer_gb_s,
    )
    if disagg not in list(Disagg):
        raise ConfigError(f"disagg: `{disagg}` is none of {', '.join(Disagg)}")
    policies = _list("policy", policy)
    admission = AdmissionSettings(max_wait_ms=max_wait_ms)
    router = RouterSettings(policies[0], disagg, slo_itl_ms=slo_itl_ms, admission=admission)
    if graph_file is not None:
        given = {name for name in context.params if _is_given(context, name)}
        graph, router = _described(graph_file, graph, router, given)
        policies = policies if "policy" in given else [router.policy]
    graph.check()
    scenarios = [
        Scenario(workload, graph, replace(router, policy=name), Slo(slo_ttft_ms, slo_itl_ms), times, seed)
        for times, name, seed in product(_scales(scale), policies, range(seeds))
    ]
    _compare(scenarios, jobs, json, csv_file, plot)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _described(
    path: Path, graph: SimulatedGraph, router: RouterSettings, given: Collection[str]
) -> tuple[SimulatedGraph, RouterSettings]:
    """What a manifest says, and of `graph` and `router` what is `given` as a flag."""
    from penstock.simulate.manifest import described_graph

    flags = {
        "cost_model": ("costs", graph.cost_model),
        "cache_tokens": ("cache_tokens", graph.cache_tokens),
        "block_size": ("block_size", graph.block_size),
        "max_batch_tokens": ("batch_tokens", graph.scheduler.max_batch_tokens),
    }
    found = described_graph(path, {field: value for field, (name, value) in flags.items() if name in given})
    if found.frontends > 1:
        print(f"penstock: {path} has {found.frontends} frontends; one is simulated", file=sys.stderr)
    described, routing = found.graph, found.router
    if not {"workers", "prefill", "decode"}.isdisjoint(given):
        counts = {"aggregated": graph.aggregated, "prefill": graph.prefill, "decode": graph.decode}
        described = replace(described, **counts)
    described = replace(described, gigabytes_per_s=graph.gigabytes_per_s)
    if "disagg" in given:
        routing = replace(routing, disagg=router.disagg)
    if "max_wait_ms" in given:
        routing = replace(routing, admission=router.admission)
    if "slo_itl_ms" in given:
        routing = replace(routing, slo_itl_ms=router.slo_itl_ms)
    return described, routing


def _compare(
    scenarios: Sequence[Scenario], jobs: int, json: Path | None, csv_file: Path | None, plot: Path | None
) -> None:
    if plot is not None:
        check_plot(plot)
    reports = list(_run(scenarios, jobs))
    compared = compare(reports)
    console = Console()
    console.print(_table(compared))
    for report in reports:
        if report.errors:
            console.print(f"{report.policy}, scale {report.scale:g}, seed {report.seed}: {report.errors}")
    _write(reports, json, csv_file)
    if plot is not None:
        draw(compared, scenarios[0].slo, plot)


def _list(name: str, text: str) -> list[str]:
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise ConfigError(f"{name}: nothing is given")
    if len(set(items)) < len(items):
        raise ConfigError(f"{name}: `{text}` names one twice")
    return items


def _scales(text: str) -> list[float]:
    try:
        scales = [float(item) for item in _list("scale", text)]
    except ValueError:
        raise ConfigError(f"scale: `{text}` is not like 0.5,1,2") from None
    if not all(0 < scale < 1e6 for scale in scales):
        raise ConfigError(f"scale: `{text}` must be above 0")
    return scales


def _run(scenarios: Sequence[Scenario], jobs: int) -> Iterator[SimulationReport]:
    """The reports, in the order of the scenarios."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("runs"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("simulating", total=len(scenarios))
        if jobs == 1:
            for scenario in scenarios:
                yield scenario.run()
                progress.advance(task)
            return
        with ProcessPoolExecutor(min(jobs, len(scenarios)), mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(Scenario.run, scenario) for scenario in scenarios]
            for _ in as_completed(futures):
                progress.advance(task)
            yield from (future.result() for future in futures)


def _table(comparisons: Sequence[Comparison]) -> Table:
    table = Table(title="95 % confidence over seeds; differences to the first policy, seed by seed")
    for heading in ("scale", "policy"):
        table.add_column(heading, no_wrap=True)
    for heading in ("good %", "diff.", "TTFT ms", "diff.", "ms per token", "cached %"):
        table.add_column(heading, justify="right")
    for it in comparisons:
        good, ttft = it.good_share_difference, it.ttft_ms_difference
        table.add_row(
            f"{it.scale:g}",
            it.policy,
            it.good_share.times(100).format(1),
            good.times(100).format(1) if good is not None else "",
            it.ttft_ms.format(0),
            ttft.format(0) if ttft is not None else "",
            it.itl_ms.format(1),
            it.cached_share.times(100).format(1),
        )
    return table


def _write(reports: Sequence[SimulationReport], json: Path | None, csv_file: Path | None) -> None:
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(reports), indent=2) + b"\n")
    if csv_file is not None:
        with csv_file.open("w", newline="") as lines:
            rows = [_flat(report) for report in reports]
            writer = csv.DictWriter(lines, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def _flat(report: SimulationReport) -> dict[str, object]:
    row: dict[str, object] = {}
    for name in report.__struct_fields__:
        value = getattr(report, name)
        if isinstance(value, Percentiles):
            row |= {
                f"{name.removesuffix('_ms')}_{part}_ms": getattr(value, part)
                for part in value.__struct_fields__
            }
        else:
            row[name] = sum(value.values()) if isinstance(value, dict) else value
    return row
