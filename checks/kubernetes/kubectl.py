"""kubectl, as tests use it: the real program, against the cluster that the tests run on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

COMMAND_S = 120.0
FORWARD_S = 30.0
POLL_S = 0.2


class Kubectl:
    """Runs kubectl with a KUBECONFIG (one or several files), in a namespace if one is given.

    `cache` is a folder where it remembers which kinds of objects there are: the user's own may be of
    another cluster at the same address.
    """

    def __init__(self, program: Path, kubeconfig: str, cache: Path, namespace: str = "default") -> None:
        self.program = program
        self.kubeconfig = kubeconfig
        self.cache = cache
        self.namespace = namespace

    def within(self, namespace: str) -> Kubectl:
        return Kubectl(self.program, self.kubeconfig, self.cache, namespace)

    def command(self, *arguments: str) -> list[str]:
        return [str(self.program), f"--cache-dir={self.cache}", f"--namespace={self.namespace}", *arguments]

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "KUBECONFIG": self.kubeconfig}

    def run(
        self, *arguments: str, stdin: str | None = None, timeout_s: float = COMMAND_S
    ) -> subprocess.CompletedProcess[str]:
        """Run it to its end, whatever that is."""
        return subprocess.run(
            self.command(*arguments),
            env=self.environment,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def __call__(self, *arguments: str, stdin: str | None = None, timeout_s: float = COMMAND_S) -> str:
        """What it printed. Fails the test with what it complained of when it fails."""
        done = self.run(*arguments, stdin=stdin, timeout_s=timeout_s)
        shown = " ".join(arguments)
        assert done.returncode == 0, (
            f"kubectl {shown} ended with {done.returncode}: {done.stderr}{done.stdout}"
        )
        return done.stdout

    def get(self, *arguments: str) -> Any:
        """An object, or a list of them, as JSON says it."""
        return json.loads(self("get", *arguments, "-o", "json"))

    def items(self, *arguments: str) -> list[dict[str, Any]]:
        """Objects of one kind. Those that are being deleted do not count."""
        return [
            item for item in self.get(*arguments)["items"] if "deletionTimestamp" not in item["metadata"]
        ]

    def apply(self, *objects: dict[str, Any]) -> str:
        return self(
            "apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
        )

    def apply_text(self, manifest: str) -> str:
        return self("apply", "-f", "-", stdin=manifest)

    def wait(self, *arguments: str, timeout_s: float = COMMAND_S) -> None:
        self("wait", *arguments, f"--timeout={timeout_s:.0f}s", timeout_s=timeout_s + 10)

    def rolled_out(self, *names: str, timeout_s: float = 120.0) -> None:
        """Until these workloads (deployment/x) have all their replicas, and those are ready."""
        for name in names:
            self("rollout", "status", name, f"--timeout={timeout_s:.0f}s", timeout_s=timeout_s + 10)

    def new_namespace(self, name: str) -> Kubectl:
        """kubectl in a new namespace. Waits for its ServiceAccount: a controller makes it a moment later,
        and until then the API server refuses pods there."""
        self("create", "namespace", name)
        own = self.within(name)
        eventually(
            lambda: own.run("get", "serviceaccount", "default").returncode == 0,
            f"namespace {name} has its ServiceAccount",
            COMMAND_S,
        )
        return own

    def exec(self, pod: str, *command: str, timeout_s: float = COMMAND_S) -> str:
        return self("exec", pod, "--", *command, timeout_s=timeout_s)

    @contextlib.contextmanager
    def port_forward(self, target: str, port: int | str) -> Iterator[str]:
        """The URL under which `target` (pod/x, service/x) is reached at that port."""
        process = subprocess.Popen(
            self.command("port-forward", target, f":{port}"),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        try:
            first = process.stdout.readline()  # printed once it listens
            match = re.match(r"Forwarding from 127\.0\.0\.1:(\d+)", first)
            assert match, f"kubectl port-forward {target}: {first}{process.stdout.read()}"
            yield f"http://127.0.0.1:{match[1]}"
        finally:
            process.terminate()
            process.communicate(timeout=FORWARD_S)

    # --- for people: why a test failed ----------------------------------------------------------------

    def story(self) -> str:
        """All that is in the namespace, what happened to it, and the end of each container's log."""
        parts = [
            self._told("get", "all", "-o", "wide"),
            self._told("get", "events", "--sort-by=.lastTimestamp"),
        ]
        pods = self.run("get", "pods", "-o", "name").stdout.split()
        parts += [self._told("logs", "--all-containers", "--tail=30", pod) for pod in pods]
        return "\n".join(parts)

    def _told(self, *arguments: str) -> str:
        try:
            done = self.run(*arguments, timeout_s=20)
        except subprocess.TimeoutExpired as error:
            return f"$ {error}"
        return f"$ kubectl {' '.join(arguments)}\n{done.stdout}{done.stderr}"


def eventually(
    condition: Callable[[], object], what: str, timeout_s: float, failures: Sequence[type[Exception]] = ()
) -> None:
    """Look again until `condition` holds. While it raises one of `failures`, it does not hold yet."""
    deadline = time.monotonic() + timeout_s
    while True:
        last = ""
        try:
            if condition():
                return
        except tuple(failures) as error:
            last = f": {error!r}"
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}{last}"
        time.sleep(POLL_S)


def is_ready(item: dict[str, Any]) -> bool:
    """Whether a node or a pod is Ready."""
    conditions = item["status"].get("conditions", ())
    return any(found["type"] == "Ready" and found["status"] == "True" for found in conditions)
