"""The graph that all client programs ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, Graph, running

START_S = 600.0  # of vLLM's workers on a busy machine; 25 s on two idle cores


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--graph",
        type=Path,
        default=ROOT / "deploy" / "local.yaml",
        help="the graph that the client programs ask; its model is models/tiny [deploy/local.yaml]",
    )


@pytest.fixture(scope="session")
def graph(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graph]:
    state = tmp_path_factory.mktemp("graph") / "state"
    with running(pytestconfig.getoption("graph"), state, start_s=START_S) as graph:
        yield graph
