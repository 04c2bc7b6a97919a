"""64 clients for 5 minutes on the local graph: no error, and everything returns to where it began.

    python -m benchmarks.soak [--duration 300] [--concurrency 64] [--graph deploy/local.yaml]

Starts the graph, loads it with conversations of three turns, and compares before and after: blocks in use,
handoffs held; resident memory, threads and file descriptors of every process. "Before" is after a short
load of the same kind, so that caches that are meant to fill have filled. Exit code 1 when a request failed
or something grew. With `--churn`, processes come and go meanwhile: churn.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any, NoReturn

from benchmarks import churn

ROOT = Path(__file__).parent.parent
START_TIMEOUT_S = 90.0
SETTLE_TIMEOUT_S = 30.0
MEMORY_GROWTH_MIB = 24.0
"""Allowed per process: allocators keep what a burst needed. A leak of a kilobyte a request shows."""


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        return str(response.read().decode())


def penstock(*arguments: str, env: dict[str, str]) -> str:
    command = [sys.executable, "-m", "penstock", *arguments]
    return subprocess.run(command, env=env, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def wait_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            get(f"{url}/health")
            return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the graph did not become healthy")


def wait_idle(url: str) -> bool:
    """Whether every worker is back to nothing running, waiting, held or in use."""
    fields = ("penstock_worker_running", "penstock_worker_waiting", "penstock_worker_used_blocks")
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while time.monotonic() < deadline:
        lines = [line for line in get(f"{url}/metrics").splitlines() if line.startswith(fields)]
        if lines and all(float(line.rsplit(" ", 1)[1]) == 0 for line in lines):
            return True
        time.sleep(0.2)
    return False


def processes(env: dict[str, str]) -> dict[str, dict[str, float]]:
    """Resident MiB, threads and descriptors by replica."""
    found = {}
    for service in json.loads(penstock("status", "--json", env=env))["services"]:
        for replica in service["replicas"]:
            status = Path(f"/proc/{replica['pid']}/status").read_text()
            fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
            found[replica["name"]] = {
                "rss_mib": int(fields["VmRSS"].split()[0]) / 1024,
                "threads": int(fields["Threads"]),
                "descriptors": len(os.listdir(f"/proc/{replica['pid']}/fd")),
                "pid": replica["pid"],
            }
    return found


def bench(url: str, seconds: float, concurrency: int, seed: int, env: dict[str, str]) -> dict[str, Any]:
    """Load, and the generator's report."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        arguments = ["bench", "--url", url, "--concurrency", str(concurrency), "--duration", str(seconds)]
        arguments += ["--multi-turn", "3", "--seed", str(seed), "--json", report.name]
        penstock(*arguments, env=env)
        return dict(json.loads(Path(report.name).read_text()))


def compare(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> list[str]:
    wrong = []
    for name, then in before.items():
        now = after[name]
        print(
            f"{name:12} rss {then['rss_mib']:6.1f} -> {now['rss_mib']:6.1f} MiB   "
            f"threads {then['threads']:.0f} -> {now['threads']:.0f}   "
            f"descriptors {then['descriptors']:.0f} -> {now['descriptors']:.0f}"
        )
        if now["pid"] != then["pid"]:
            wrong.append(f"{name} was restarted")
        if now["rss_mib"] - then["rss_mib"] > MEMORY_GROWTH_MIB:
            wrong.append(f"{name} grew by {now['rss_mib'] - then['rss_mib']:.0f} MiB")
        if now["descriptors"] > then["descriptors"] + 4 or now["threads"] > then["threads"] + 4:
            wrong.append(f"{name} keeps threads or descriptors")
    return wrong


def soak(url: str, options: argparse.Namespace, env: dict[str, str]) -> list[str]:
    bench(url, options.warm, options.concurrency, 1, env)
    if not wait_idle(url):
        return ["not idle after the first load"]
    before = processes(env)
    report = bench(url, options.duration, options.concurrency, 2, env)
    print(json.dumps(report, indent=2))
    idle = wait_idle(url)
    wrong = compare(before, processes(env))
    if not idle:
        wrong.append("blocks or requests are left over")
    if report["failed"] or not report["ok"]:
        wrong.append(f"{report['failed']} requests failed, {report['ok']} succeeded")
    return wrong


def tell(wrong: list[str]) -> NoReturn:
    print("\n".join(["FAILED", *wrong]) if wrong else "OK: no request failed, nothing grew")
    sys.exit(bool(wrong))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--duration", type=float, default=300.0, help="seconds")
    parser.add_argument("--warm", type=float, default=30.0, help="seconds of load before the first look")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--graph", type=Path, default=ROOT / "deploy/local.yaml")
    parser.add_argument(
        "--churn", action="store_true", help="kill, drain, freeze, add and remove meanwhile"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the churn")
    options = parser.parse_args()
    if options.churn:
        tell(asyncio.run(churn.soak(options.duration, options.concurrency, options.seed)))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as state:
        env = {**os.environ, "PENSTOCK_STATE_DIR": state}
        command = [sys.executable, "-m", "penstock", "up", str(options.graph), "--port", str(port), "-q"]
        graph = subprocess.Popen(command, env=env, cwd=ROOT)
        try:
            wait_healthy(url, graph)
            wrong = soak(url, options, env)
        finally:
            graph.send_signal(signal.SIGINT)
            graph.wait(timeout=120)
    tell(wrong)


if __name__ == "__main__":
    main()
