"""Every input that once broke something, and the seeds: each ends as its target says, within its time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
INPUTS = sorted(path for path in CORPUS.glob("*/*") if path.is_file())

MAX_INPUT_S = 5.0
"""CPU time; the dearest input takes a tenth of it on a slow machine."""

MAX_CORPUS_BYTES = 256 * 1024


def test_the_corpus_is_whole_and_small() -> None:
    assert {path.parent.name for path in INPUTS} == set(TARGETS)
    assert sum(path.stat().st_size for path in INPUTS) < MAX_CORPUS_BYTES


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_an_input(path: Path) -> None:
    began = time.process_time()
    TARGETS[path.parent.name](path.read_bytes())
    assert time.process_time() - began < MAX_INPUT_S
