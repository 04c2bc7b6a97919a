"""The fault lab on a few seeds; `make sim` runs 2,000, `make sim-nightly` 100,000."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from simulator.draw import LARGE_EVERY, draw_scenario
from simulator.faults import FAULTS
from simulator.report import simulate
from simulator.scenario import Options

ANY = Options()


@pytest.mark.parametrize("first", range(0, 50, 10))
def test_no_seed_breaks_an_invariant(first: int) -> None:
    for seed in range(first, first + 10):
        outcome = simulate(seed, ANY)
        assert outcome.violation is None, (seed, outcome.violation, outcome.last_events)


@pytest.mark.parametrize("kind", FAULTS)
def test_no_fault_breaks_an_invariant(kind: str) -> None:
    injected = 0
    for seed in range(1000, 1002):
        outcome = simulate(seed, Options(faults=[kind]))
        assert outcome.violation is None, (seed, outcome.violation, outcome.last_events)
        injected += len(outcome.faults)
    assert injected


def test_a_trace_changes_nothing() -> None:
    lines: list[str] = []
    assert simulate(3, ANY, lines.append).digest == simulate(3, ANY).digest
    assert any("FAULT" in line for line in lines)


def test_a_seed_means_the_same_whatever_ran_before() -> None:
    seeds = (3, LARGE_EVERY - 1)
    before = [simulate(seed, ANY).digest for seed in seeds]
    for seed in range(1000, 1007):
        simulate(seed, ANY)
    assert [simulate(seed, ANY).digest for seed in seeds] == before


_DIGESTS = """
from simulator.report import simulate
from simulator.scenario import Options
print([simulate(seed, Options()).digest for seed in range(5)])
"""


def test_a_seed_means_the_same_in_every_process() -> None:
    """Sets of strings have another order in each of these."""
    seen = set()
    for hash_seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", _DIGESTS], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        seen.add(done.stdout)
    assert len(seen) == 1, seen


def test_some_seeds_have_hundreds_of_workers() -> None:
    scenario = draw_scenario(LARGE_EVERY - 1, ANY)
    assert len(scenario.roles) >= 100
