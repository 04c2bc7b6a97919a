"""Whether a planned graph does what the plan says.

    python benchmarks/planned.py TRACE [--requests 150] [--gpus 8] [--slo ttft=2s,itl=25ms] [--slowness 4]

Plans for the first requests of a trace, starts the written manifest with the sim engine, and sends it the
same requests over HTTP. Printed are the planned figures beside those that the client measured. What
messages, the frontend and Python's own steps take is not planned, and a machine with few cores adds much of
it: with `--slowness 4` everything takes four times as long as the cost model says, and figures are divided
by that.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from penstock.plan.objective import Objective

BENCH_TIMEOUT_S = 3600.0


def penstock(env: dict[str, str], *arguments: str) -> None:
    """Run a command to its end. Its output goes to this one's."""
    command = [sys.executable, "-m", "penstock", *arguments]
    subprocess.run(command, env=env, check=True, timeout=BENCH_TIMEOUT_S)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ran(graph: Path, options: argparse.Namespace, env: dict[str, str]) -> dict[str, Any]:
    """The benchmark's report of this graph, on real processes."""
    slow, objective, port = options.slowness, Objective.parse(options.slo), free_port()
    text = graph.read_text().replace("--sim-cost-model,", f'--sim-speedup, "{1 / slow}", --sim-cost-model,')
    graph.write_text(text.replace("--router-mode,", f'--max-wait-ms, "{10_000 * slow}", --router-mode,'))
    report = graph.with_suffix(".json")
    penstock(env, "up", str(graph), "--engine", "sim", "--port", str(port), "--detach")
    try:
        load = ["--trace", options.trace, "--requests", str(options.requests), "--speedup", str(1 / slow)]
        limits = {"--slo-ttft-ms": objective.slo.ttft_ms, "--slo-itl-ms": objective.slo.itl_ms}
        slo = [word for flag, ms in limits.items() if ms is not None for word in (flag, str(ms * slow))]
        url = f"http://127.0.0.1:{port}"
        penstock(env, "bench", "--url", url, *load, *slo, "--json", str(report))
    finally:
        penstock(env, "down", "--graph", "planned")
    return json.loads(report.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trace")
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--slo", default="ttft=2s,itl=25ms")
    parser.add_argument("--slowness", type=float, default=4.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        graph, plan = Path(folder) / "graph.yaml", Path(folder) / "plan.json"
        env = {**os.environ, "PENSTOCK_STATE_DIR": f"{folder}/state"}
        load = ["--trace", options.trace, "--requests", str(options.requests)]
        files = ["--write", str(graph), "--json", str(plan)]
        penstock(env, "plan", *load, "--gpus", str(options.gpus), "--slo", options.slo, *files)
        planned = json.loads(plan.read_bytes())[0]["reports"][0]
        measured = ran(graph, options, env)
    print(f"{'':24}{'planned':>10}{'measured':>10}")
    print(f"{'good share':24}{planned['good_share']:10.3f}{measured['good_share']:10.3f}")
    print(f"{'cached share':24}{planned['cached_share']:10.3f}{measured['cached_share']:10.3f}")
    for name in ("ttft_ms", "e2e_ms"):
        for part in ("mean", "p50", "p90"):
            ms = measured[name][part] / options.slowness
            print(f"{name + ' ' + part:24}{planned[name][part]:10.1f}{ms:10.1f}")


if __name__ == "__main__":
    main()
