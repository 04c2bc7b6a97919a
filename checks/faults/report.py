"""What the lab found: a table for people, JSON for programs, and the table of docs/reliability.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from checks.faults.episode import Row
from checks.faults.faults import FAULTS
from checks.faults.processes import ROOT

DOCUMENT = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- the fault lab's table: begin -->", "<!-- the fault lab's table: end -->"

_COUNTS = ("requests", "in_flight", "ok", "migrated", "cut", "refused", "wrong", "lost", "hung")
_BAD = ("wrong", "lost", "hung")


def header() -> str:
    names = " ".join(f"{name[:8]:>8}" for name in _COUNTS)
    return f"{'fault':52} {'phase':9} {'engine':9} {names} {'stall s':>8} {'recov s':>8}  errors"


def line(row: Row) -> str:
    numbers = " ".join(f"{getattr(row, name):8}" for name in _COUNTS)
    times = f"{row.worst_stall_s:8.2f} {row.recovery_s:8.2f}"
    text = f"{row.fault[:52]:52} {row.phase:9} {row.engine:9} {numbers} {times}  {_errors([row])}"
    return text.rstrip()


def totals(rows: Sequence[Row]) -> str:
    return f"{len(rows)} episodes: " + ", ".join(f"{name} {_sum(rows, name)}" for name in _COUNTS)


def table(rows: Sequence[Row]) -> str:
    """As Markdown, a line for each fault of the catalogue that was tried."""
    lines = [
        "| fault | what a client sees | in flight | went on elsewhere | asked again | errors | "
        "wrong, lost, hung | longest wait for more, s | recovery, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for fault in FAULTS:
        found = [row for row in rows if row.fault == fault.name]
        if found:
            cells = [
                fault.name,
                fault.promise,
                _sum(found, "in_flight"),
                _sum(found, "migrated"),
                _sum(found, "cut") + _sum(found, "refused"),
                _errors(found) or "none",
                ", ".join(str(_sum(found, name)) for name in _BAD),
                _waits(found),
                f"{max(row.recovery_s for row in found):.1f}",
            ]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def document(text: str, rows: Sequence[Row], run: str) -> str:
    """The page with its table replaced; `run` says how it was made."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    summary = (
        f"{run}: {len(rows)} episodes, {_sum(rows, 'in_flight')} requests in flight when something "
        f"happened, {_sum(rows, 'ok')} of {_sum(rows, 'requests')} answered in full, "
        f"{_sum(rows, 'wrong')} wrong, {_sum(rows, 'lost')} lost, {_sum(rows, 'hung')} hung."
    )
    return f"{before}{BEGIN}\n{summary}\n\n{table(rows)}\n{END}{after}"


def write_document(rows: Sequence[Row], run: str, path: Path = DOCUMENT) -> None:
    path.write_text(document(path.read_text(encoding="utf-8"), rows, run), encoding="utf-8")


def _sum(rows: Sequence[Row], name: str) -> int:
    return sum(getattr(row, name) for row in rows)


def _errors(rows: Sequence[Row]) -> str:
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(row.errors)
    return ", ".join(f"{count} x {code}" for code, count in sorted(counts.items()))


def _waits(rows: Sequence[Row]) -> str:
    """The worst of each phase, in their order."""
    worst: dict[str, float] = {}
    for row in rows:
        worst[row.phase] = max(worst.get(row.phase, 0.0), row.worst_stall_s)
    return ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in worst.items())
