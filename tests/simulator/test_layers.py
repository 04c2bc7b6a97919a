"""Which modules of the simulation may import which."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "simulator"

# What happens in the world is decided by the scenario and by these, which look at the world or change it.
ABOVE_THE_WORLD = {
    "faults",
    "injector",
    "lies",
    "watch",
    "monitor",
    "sending",
    "settled",
    "draw",
    "lab",
    "report",
}


def imported() -> dict[str, set[str]]:
    """The modules of the simulation that each of them imports, those that are only for types included."""
    found = {}
    for path in FOLDER.glob("*.py"):
        names = [
            branch.module or ""
            for branch in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(branch, ast.ImportFrom)
        ]
        parts = [name.split(".") for name in names]
        found[path.stem] = {part[-1] for part in parts if part[0] == "simulator" and len(part) > 1}
    return found


def documented() -> list[str]:
    """The modules in the order of the structure page."""
    page = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8").partition("### The simulation")[2]
    return re.findall(r"\| `simulator/(\w+)\.py` \|", page)


def test_structure_page_names_every_module_once() -> None:
    assert sorted(documented()) == sorted(set(imported()) - {"__init__"})


def test_modules_import_only_modules_above_them_on_the_structure_page() -> None:
    order = documented()
    wrong = [
        f"{name} imports {other}"
        for name, others in imported().items()
        for other in others
        if order.index(other) >= order.index(name)
    ]
    assert wrong == []


def test_world_and_all_below_it_import_no_fault_and_no_check() -> None:
    imports = imported()
    below, left = set[str](), {"world"}
    while left:
        name = left.pop()
        below.add(name)
        left |= imports[name] - below
    assert below & ABOVE_THE_WORLD == set()


def test_only_reports_import_the_lab() -> None:
    assert {name for name, its in imported().items() if "lab" in its} == {"report"}
