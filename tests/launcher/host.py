"""Runs a manifest with the stub instead of Penstock's processes, as `penstock up` would."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from penstock.errors import ConfigError
from penstock.graph import Overrides, load_graph
from penstock.launcher.settings import LauncherSettings
from penstock.launcher.state import StateFolder
from penstock.launcher.up import run_graph

manifest, root = Path(sys.argv[1]), Path(sys.argv[2])
stub = (sys.executable, str(Path(__file__).with_name("stub.py")))
graph = load_graph(manifest, Overrides())
try:
    run_graph(graph, StateFolder(root, graph.name), os.environ, LauncherSettings(http_port=0), program=stub)
except ConfigError as error:
    sys.exit(f"penstock: {error}")
