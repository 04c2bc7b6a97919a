"""Tables and plots of what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.dynamo.frontend import CpuCost
from benchmarks.dynamo.service import LOADS, SLO, Served
from penstock.bench.measurements import Percentiles
from penstock.simulate.report import SimulationReport

SYSTEMS = ("Dynamo", "Penstock")
COLORS = {"Dynamo": "#5b8c2a", "Penstock": "#2b5f9e"}
INCHES = (10.0, 3.6)
LATE_S = 0.25
"""A run in which a session began so late says more of the machine than of what was measured."""

Figure = Callable[[SimulationReport], float]
FIGURES: Sequence[tuple[str, str, Figure]] = (
    ("good, %", "{:.1f}", lambda it: 100 * it.good_share),
    ("good/s", "{:.2f}", lambda it: it.goodput_per_s),
    ("cached, %", "{:.1f}", lambda it: 100 * it.cached_share),
    ("TTFT mean, ms", "{:.0f}", lambda it: it.ttft_ms.mean or 0.0),
    ("p50", "{:.0f}", lambda it: it.ttft_ms.p50 or 0.0),
    ("p90", "{:.0f}", lambda it: it.ttft_ms.p90 or 0.0),
    ("ms per token, mean", "{:.1f}", lambda it: it.itl_ms.mean or 0.0),
    ("p50", "{:.1f}", lambda it: it.itl_ms.p50 or 0.0),
    ("p90", "{:.1f}", lambda it: it.itl_ms.p90 or 0.0),
)


def tables(cpu: Sequence[CpuCost], service: Sequence[Served]) -> str:
    """In Markdown."""
    return "\n\n".join([_cpu_table(cpu), *(_service_table(name, service) for name in LOADS)])


def _cpu_table(cpu: Sequence[CpuCost]) -> str:
    lines = [
        "| scenario | Dynamo | Penstock | ratio | of each round | tokens a chunk |",
        "|---|---|---|---|---|---|",
    ]
    for its, ours in _pairs(cpu):
        ratios = [mine / other for mine, other in zip(ours.us, its.us, strict=True)]
        lines.append(
            f"| {its.scenario} | {_time(its)} | {_time(ours)} | {median(ratios):.2f} "
            f"| {min(ratios):.2f} to {max(ratios):.2f} "
            f"| {its.tokens_per_chunk:.1f}, {ours.tokens_per_chunk:.1f} |"
        )
    return "\n".join(lines)


def _pairs(cpu: Sequence[CpuCost]) -> list[tuple[CpuCost, CpuCost]]:
    of = {(it.scenario, it.system): it for it in cpu}
    names = dict.fromkeys(it.scenario for it in cpu)
    return [(of[name, "Dynamo"], of[name, "Penstock"]) for name in names if (name, "Penstock") in of]


def _time(cost: CpuCost) -> str:
    user, system = median(cost.user_us), median(cost.system_us)
    if cost.unit == "token":
        return f"{cost.median_us:.1f} µs ({user:.1f} + {system:.1f})"
    return f"{cost.median_us / 1e3:.2f} ms ({user / 1e3:.2f} + {system / 1e3:.2f})"


def _service_table(load: str, service: Sequence[Served]) -> str:
    names = [name for name, _, _ in FIGURES]
    lines = [
        f"| {load}, times {LOADS[load].unit} | | " + " | ".join(names) + " | frontend, ms a request |",
        "|---|---|" + "---|" * (len(names) + 1),
    ]
    for scale in LOADS[load].scales:
        for system in SYSTEMS:
            runs = _runs(service, load, system, scale)
            if not runs:
                continue
            for what, reports in (
                (system, [run.measured for run in runs]),
                (f"{system}, simulated", [run.simulated for run in runs]),
            ):
                values = [form.format(fmean(map(figure, reports))) for _, form, figure in FIGURES]
                cpu = f"{fmean(run.per_request_ms() for run in runs):.2f}" if what == system else ""
                lines.append(f"| {scale:g} | {what} | " + " | ".join(values) + f" | {cpu} |")
    return "\n".join(lines)


def _runs(service: Sequence[Served], load: str, system: str, scale: float) -> list[Served]:
    """Those of this, without seeds in which either system's run began late."""
    late = {it.measured.seed for it in service if _is(it, load, scale) and it.late_s > LATE_S}
    return [
        it
        for it in service
        if _is(it, load, scale) and it.system == system and it.measured.seed not in late
    ]


def _is(it: Served, load: str, scale: float) -> bool:
    return it.load == load and it.measured.scale == scale


def draw(cpu: Sequence[CpuCost], service: Sequence[Served], folder: Path) -> None:
    """Write the plots: of the frontends' CPU time, of what clients get, and of the simulation of it."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "penstock"  # equal figures give equal files
    folder.mkdir(parents=True, exist_ok=True)
    _draw_cpu(cpu, folder / "dynamo-cpu.svg")
    _draw_service(service, folder / "dynamo-service.svg")
    _draw_simulated(service, folder / "dynamo-simulated.svg")


def _draw_cpu(cpu: Sequence[CpuCost], file: Path) -> None:
    figure = _figure()
    panels = figure.subplots(1, 2)
    for panel, unit, label, divisor in (
        (panels[0], "token", "CPU time of the frontend, µs a token", 1.0),
        (panels[1], "request", "CPU time of the frontend, ms a request", 1e3),
    ):
        pairs = [(its, ours) for its, ours in _pairs(cpu) if its.unit == unit]
        for offset, which in ((0.2, 0), (-0.2, 1)):
            costs = [pair[which] for pair in pairs]
            places = [len(pairs) - k + offset for k in range(len(pairs))]
            values = [cost.median_us / divisor for cost in costs]
            low = [value - min(cost.us) / divisor for value, cost in zip(values, costs, strict=True)]
            high = [max(cost.us) / divisor - value for value, cost in zip(values, costs, strict=True)]
            name = SYSTEMS[which]
            panel.barh(places, values, 0.38, xerr=[low, high], label=name, color=COLORS[name])
        panel.set_yticks(
            [len(pairs) - k for k in range(len(pairs))], [its.scenario for its, _ in pairs], fontsize=8
        )
        panel.set_xlabel(label)
        panel.grid(axis="x", alpha=0.3)
    panels[0].legend()
    _save(figure, file)


def _draw_service(service: Sequence[Served], file: Path) -> None:
    figure = _figure()
    loads = [name for name, load in LOADS.items() if load.workers > 1]
    panels = figure.subplots(1, 2 * len(loads))
    for k, load in enumerate(loads):
        good, ttft = panels[2 * k], panels[2 * k + 1]
        for system in SYSTEMS:
            points = _points(service, load, system)
            scales = [scale for scale, _ in points]
            color = COLORS[system]
            shares = [100 * fmean(it.measured.good_share for it in runs) for _, runs in points]
            times = [fmean(it.measured.ttft_ms.mean or 0.0 for it in runs) for _, runs in points]
            good.plot(scales, shares, marker="o", label=system, color=color)
            ttft.plot(scales, times, marker="o", label=system, color=color)
        good.set_ylabel(f"within {SLO.ttft_ms:g} ms and {SLO.itl_ms:g} ms per token, %")
        ttft.set_ylabel("mean time to first token, ms")
        for panel in (good, ttft):
            panel.set_title(load, fontsize=9)
            panel.set_xlabel(f"times {LOADS[load].unit}")
            panel.set_ylim(bottom=0.0)
            panel.grid(alpha=0.3)
    panels[0].legend()
    _save(figure, file)


def _draw_simulated(service: Sequence[Served], file: Path) -> None:
    figure = _figure()
    panels = figure.subplots(1, 2)
    kinds: Sequence[tuple[Any, str, Callable[[SimulationReport], Percentiles]]] = (
        (panels[0], "time to first token, ms", lambda it: it.ttft_ms),
        (panels[1], "time per token of a request, ms", lambda it: it.itl_ms),
    )
    for panel, label, values_of in kinds:
        for system in (*SYSTEMS, "penstock simulate"):
            of = "Dynamo" if system not in SYSTEMS else system
            points = _points(service, "one worker", of)
            scales = [scale for scale, _ in points]
            for part, line in (("p50", "-"), ("p90", "--")):
                reports = [
                    [it.measured if system in SYSTEMS else it.simulated for it in runs]
                    for _, runs in points
                ]
                values = [fmean(getattr(values_of(it), part) or 0.0 for it in runs) for runs in reports]
                color = COLORS.get(system, "#b0413e")
                panel.plot(scales, values, line, marker="o", label=f"{system}, {part}", color=color)
        panel.set_xlabel(f"one worker, times {LOADS['one worker'].unit}")
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0.0)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    _save(figure, file)


def _points(service: Sequence[Served], load: str, system: str) -> list[tuple[float, list[Served]]]:
    runs = [(scale, _runs(service, load, system, scale)) for scale in LOADS[load].scales]
    return [(scale, its) for scale, its in runs if its]


def _figure() -> Any:
    from matplotlib.figure import Figure as Drawing

    return Drawing(figsize=INCHES, layout="constrained")


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, metadata={"Date": None})
