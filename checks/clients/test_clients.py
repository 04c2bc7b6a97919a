"""Each client program, in an environment of its own, against a running graph: `make test-clients` with the
reference engine, `make test-clients-vllm` with vLLM.

What a program must get is in its own file of tests: `python/with_NAME.py`, which pytest runs in a venv of
`python/NAME.requirements.txt`, and `node/with_NAME.mjs`, which Node's test runner runs with the packages
of `node/NAME.package.json`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from checks.clients.environments import client_of, node_environment, python_environment
from tests.e2e.conftest import MODEL, ROOT, Graph

HERE = Path(__file__).parent
TESTS_S = 300
PYTHON_CLIENTS = sorted(HERE.glob("python/*.requirements.txt"))
NODE_CLIENTS = sorted(HERE.glob("node/*.package.json"))


def surroundings(graph: Graph, programs: Path, home: Path) -> dict[str, str]:
    """What a client program may see: this server, an empty home, and nobody's keys or settings."""
    return {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "PENSTOCK_MODEL": MODEL,
        "PENSTOCK_MODEL_FOLDER": str(ROOT / "models" / MODEL),
        "OPENAI_BASE_URL": f"{graph.url}/v1",
        "OPENAI_API_KEY": "none",
        "ANTHROPIC_BASE_URL": graph.url,
        "ANTHROPIC_API_KEY": "none",
    }


@pytest.mark.parametrize("requirements", PYTHON_CLIENTS, ids=client_of)
def test_python_client_gets_what_it_asks_for(requirements: Path, graph: Graph, tmp_path: Path) -> None:
    programs = python_environment(requirements) / "bin"
    tests = HERE / "python" / f"with_{client_of(requirements)}.py"
    config = HERE / "python" / "pytest.ini"
    succeeds([programs / "python", "-m", "pytest", "-v", "-c", config, tests], graph, programs, tmp_path)


@pytest.mark.parametrize("package", NODE_CLIENTS, ids=client_of)
def test_node_client_gets_what_it_asks_for(package: Path, graph: Graph, tmp_path: Path) -> None:
    environment = node_environment(package)
    tests = f"with_{client_of(package)}.mjs"
    # Node.js looks for packages beside the file that imports them.
    shutil.copy(HERE / "node" / tests, tmp_path)
    (tmp_path / "node_modules").symlink_to(environment / "node_modules")
    programs = environment / "bin"
    succeeds([programs / "node", "--test", "--test-reporter=spec", tests], graph, programs, tmp_path)


def succeeds(command: list[str | Path], graph: Graph, programs: Path, home: Path) -> None:
    """The client's own tests pass. What they print is shown when they fail; `ARGS=-s` shows it at once."""
    environment = surroundings(graph, programs, home)
    result = subprocess.run(command, env=environment, cwd=home, timeout=TESTS_S, check=False)
    assert result.returncode == 0
