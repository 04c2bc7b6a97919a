"""Commands that containers run before they are stopped, as a shell runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.kubernetes.kinds import LEADER_WORKER_SETS
from penstock.operator.settings import ClusterFacts
from tests.operator.test_desired_rules import DYNAMO, container, deployment, graph, render


def test_the_other_nodes_wait_for_their_leader_to_go(tmp_path: Path) -> None:
    """The script as a shell runs it: it ends soon after the leader no longer answers, and not before."""
    manifest = graph(container(DYNAMO) | {"multinode": {"nodeCount": 2}})
    found = render(manifest, ClusterFacts(frozenset({LEADER_WORKER_SETS})))
    group = next(item for item in found.objects if item["kind"] == "LeaderWorkerSet")
    (follower,) = group["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]["containers"]
    command = follower["lifecycle"]["preStop"]["exec"]["command"]
    asked = tmp_path / "asked"
    curl = tmp_path / "curl"
    # Answers, misses one, answers, and is silent from then on.
    curl.write_text(
        f'#!/bin/sh\necho "$@" >> {asked}\ncase $(wc -l < {asked}) in 1|3) exit 0;; *) exit 7;; esac\n'
    )
    curl.chmod(0o755)
    sleep = tmp_path / "sleep"
    sleep.write_text("#!/bin/sh\n")
    sleep.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LWS_LEADER_ADDRESS": "leader.svc"}
    subprocess.run(command, env=env, timeout=10, check=True)
    assert asked.read_text().splitlines() == ["-sf -m 2 -o /dev/null http://leader.svc:9090/live"] * 5


def test_a_worker_gets_sigterm_only_when_it_can_catch_it() -> None:
    """Here for a process that does not have number 1, and starts slowly."""
    (worker,) = deployment(render(graph()))["spec"]["template"]["spec"]["containers"]
    shell, option, script = worker["lifecycle"]["preStop"]["exec"]["command"]
    slow = "import signal, sys; sys.stdin.readline(); signal.signal(15, sys.exit); sys.stdin.readline()"
    with subprocess.Popen([sys.executable, "-c", slow], stdin=subprocess.PIPE) as first_process:
        assert first_process.stdin is not None
        command = [shell, option, script.replace("/proc/1/", f"/proc/{first_process.pid}/")]
        with subprocess.Popen(command) as hook:
            with pytest.raises(subprocess.TimeoutExpired):
                hook.wait(0.5)
            first_process.stdin.write(b"\n")
            first_process.stdin.flush()
            assert hook.wait(10) == 0
        first_process.stdin.close()
