"""Draws what policies made of several loads: goodput and time to first token, with confidence bands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from penstock.bench.measurements import Slo
from penstock.errors import ConfigError
from penstock.simulate.report import Comparison, Estimate

INCHES = (11.0, 4.5)
DOTS_PER_INCH = 150
BAND_OPACITY = 0.15


def check_plot(file: Path) -> None:
    """Raises ConfigError where no such file can be drawn."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ConfigError("plot: needs one more package: pip install 'penstock-llm[plot]'") from None
    kinds = FigureCanvasBase.get_supported_filetypes()
    if file.suffix.removeprefix(".") not in kinds:
        raise ConfigError(f"plot: `{file}` ends in none of .{', .'.join(sorted(kinds))}")


def draw(comparisons: Sequence[Comparison], slo: Slo, file: Path) -> None:
    """Write the file: two panels over the load, a line for each policy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    good, ttft = figure.subplots(1, 2)
    panels: Sequence[tuple[Any, str, Callable[[Comparison], Estimate]]] = (
        (good, "requests within the objectives, %", lambda it: it.good_share.times(100)),
        (ttft, "mean time to first token, ms", lambda it: it.ttft_ms),
    )
    policies = list(dict.fromkeys(it.policy for it in comparisons))
    for panel, label, estimate_of in panels:
        for policy in policies:
            points = [it for it in comparisons if it.policy == policy]
            points.sort(key=lambda it: it.scale)
            scales, estimates = [it.scale for it in points], list(map(estimate_of, points))
            means, widths = [it.mean for it in estimates], [it.half_width or 0.0 for it in estimates]
            (line,) = panel.plot(scales, means, marker="o", label=policy)
            if any(widths):
                low = [mean - width for mean, width in zip(means, widths, strict=True)]
                high = [mean + width for mean, width in zip(means, widths, strict=True)]
                panel.fill_between(scales, low, high, color=line.get_color(), alpha=BAND_OPACITY)
        panel.set_xlabel("times the load")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
        panel.set_ylim(bottom=0.0)
    good.legend()
    several = any(it.good_share.half_width is not None for it in comparisons)
    bands = "; bands: 95 % confidence over seeds" if several else ""
    figure.suptitle(f"objectives: first token in {slo.ttft_ms:g} ms, {slo.itl_ms:g} ms per token{bands}")
    figure.savefig(file)
