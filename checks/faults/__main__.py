"""Run the lab: see the package."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import uvloop

from checks.faults import report
from checks.faults.episode import REFERENCE_PHASES, Lab, Row
from checks.faults.faults import FAULTS, Fault
from checks.faults.processes import ROOT, Graph
from checks.faults.reference import questions
from penstock import __version__
from tests.discovery.etcd_server import running_etcd

ENGINES = {
    "sim": ["--engine", "sim", "--model", "sim", "--sim-speedup", "0.4", "--transfer", "tcp"],
    "reference": ["--model", str(ROOT / "models" / "tiny"), "--transfer", "tcp"],
}

DISCOVERY = {"sim": "file", "reference": "etcd"}
"""Where the processes of each find each other."""


def chosen(options: argparse.Namespace, engine: str) -> list[tuple[Fault, str]]:
    """Every fault at every phase of it that this run wants."""
    found = []
    for fault in FAULTS:
        if options.only and not any(word in fault.name for word in options.only):
            continue
        if fault.discovery not in ("", DISCOVERY[engine]):
            continue
        if engine == "reference" and not (fault.reference or fault.discovery):
            continue
        if options.quick and not fault.quick:
            continue
        phases = fault.quick if options.quick else fault.phases
        if engine == "reference":
            phases = tuple(REFERENCE_PHASES)
        found += [(fault, phase) for phase in phases if options.phase in ("", phase)]
    return found


async def run_engine(engine: str, options: argparse.Namespace, folder: Path, until: float) -> list[Row]:
    """All of it once, then again in another order until the time is over."""
    folder.mkdir()
    with contextlib.ExitStack() as around:
        etcd = around.enter_context(running_etcd(folder)) if DISCOVERY[engine] == "etcd" else None
        graph = Graph(folder, ENGINES[engine], etcd=etcd)
        try:
            await graph.start()
            lab = Lab(graph, engine, await questions(graph) if engine == "reference" else [])
            return [row async for row in episodes(lab, options, until)]
        finally:
            await graph.stop()


async def episodes(lab: Lab, options: argparse.Namespace, until: float) -> AsyncIterator[Row]:
    """In the catalogue's order first, then in random order while there is time."""
    rng = random.Random(options.seed)
    first = True
    while first or time.monotonic() < until:
        wanted = chosen(options, lab.engine)
        if not wanted:
            return
        if not first:
            rng.shuffle(wanted)
        for fault, phase in wanted:
            if not first and time.monotonic() >= until:
                return
            row = await lab.episode(fault, phase)
            print(report.line(row), flush=True)
            for note in row.notes[:5]:
                print(f"    {note}", flush=True)
            yield row
        first = False


async def main(options: argparse.Namespace) -> int:
    began = time.monotonic()
    rows: list[Row] = []
    folder = Path(options.logs or tempfile.mkdtemp(prefix="penstock-faults-"))
    folder.mkdir(exist_ok=True)
    print(report.header(), flush=True)
    engines = list(ENGINES) if options.engine == "both" else [options.engine]
    for number, engine in enumerate(engines, 1):
        until = began + options.duration * number / len(engines)
        rows += await run_engine(engine, options, folder / engine, until)
    print(report.totals(rows))
    passed = bool(rows) and all(row.passed for row in rows)
    if options.json:
        rows = _merged(Path(options.json), rows)
        Path(options.json).write_bytes(msgspec.json.format(msgspec.json.encode(rows)))
    if options.write_docs:
        report.write_document(rows, f"Penstock {__version__}, {os.cpu_count()} cores")
    print("OK: nothing hung, nothing lost, nothing wrong" if passed else f"FAILED; logs are in {folder}")
    return not passed


def _merged(path: Path, rows: list[Row]) -> list[Row]:
    """What an earlier run of other faults, phases or engines has left there, and these."""
    if not path.exists():
        return rows
    new = {(row.fault, row.phase, row.engine) for row in rows}
    old = msgspec.json.decode(path.read_bytes(), type=list[Row])
    return [*(row for row in old if (row.fault, row.phase, row.engine) not in new), *rows]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m checks.faults")
    parser.add_argument("--engine", choices=[*ENGINES, "both"], default="both")
    parser.add_argument("--quick", action="store_true", help="a part of it, in a minute or two")
    parser.add_argument("--duration", type=float, default=0.0, help="seconds; all of it once, at least")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORDS", help="faults with this in their name"
    )
    parser.add_argument("--phase", default="", help="only this one")
    parser.add_argument("--seed", type=int, default=0, help="of the order after the first round")
    parser.add_argument("--json", default="", metavar="FILE", help="all rows; those of earlier runs stay")
    parser.add_argument("--logs", default="", metavar="FOLDER", help="of the processes' logs")
    parser.add_argument("--write-docs", action="store_true", help=f"renew the table in {report.DOCUMENT}")
    return parser


if __name__ == "__main__":
    sys.exit(uvloop.run(main(_parser().parse_args())))
