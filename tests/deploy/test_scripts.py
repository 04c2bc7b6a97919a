"""deploy.sh, test.sh and cleanup.sh, as far as they get without a cluster."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.deploy.manifests import DEPLOY, SCOPES

SCRIPTS = ("deploy.sh", "test.sh", "cleanup.sh")
NO_CLUSTER = "#!/bin/sh\necho 'The connection to the server localhost:8080 was refused' >&2\nexit 1\n"


def run(*command: str, path: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{path}:{os.environ['PATH']}", "HOME": "/nonexistent", **variables}
    return subprocess.run(
        [str(DEPLOY / command[0]), *command[1:]],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.fixture
def no_cluster(tmp_path: Path) -> str:
    """A folder with a kubectl that reaches no cluster."""
    (tmp_path / "kubectl").write_text(NO_CLUSTER)
    (tmp_path / "kubectl").chmod(0o755)
    return str(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_tells_of_every_option(script: str) -> None:
    done = run(script, "--help")
    assert done.returncode == 0
    body = (DEPLOY / script).read_text()
    options = [line.strip().split(")")[0] for line in body.splitlines() if line.startswith("      -")]
    names = {name for option in options if option != "-*" for name in option.split(" | ")}
    assert "--namespace" in names
    assert all(name in done.stdout for name in names)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["deploy.sh"], "which graph? One of: local multinode-vllm vllm-cpu"),
        (["deploy.sh", "--bogus"], "--bogus: no such option"),
        (["deploy.sh", "--namespace"], "--namespace takes a value"),
        (["deploy.sh", "-n", "a|b", "local"], "--namespace: 'a|b' is no name for that: a-z, 0-9 and -"),
        (["deploy.sh", "--image", "a b", "local"], "--image: 'a b' is no name of an image"),
        (["deploy.sh", "--timeout", "soon", "local"], "--timeout: 'soon' is no number of seconds"),
        (["deploy.sh", "local", "vllm-cpu"], "one graph at a time: local, vllm-cpu"),
        (["test.sh", "--model"], "--model takes a value"),
        (["cleanup.sh", "--all", "local"], "--all is for all graphs: name none"),
    ],
)
def test_wrong_usage_is_one_line(command: list[str], told: str) -> None:
    done = run(*command)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{command[0]}: {told}")
    assert done.stderr.endswith(" (--help tells what there is)\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [["deploy.sh", "local"], ["test.sh", "local"], ["cleanup.sh", "--all"]])
def test_no_cluster_is_told_with_what_kubectl_says(command: list[str], no_cluster: str) -> None:
    done = run(*command, path=no_cluster)
    assert done.returncode == 1
    assert "FAILED: no cluster answers." in done.stderr
    assert "The connection to the server localhost:8080 was refused" in done.stderr


def test_an_unknown_graph_is_told_which_there_are(no_cluster: str) -> None:
    done = run("deploy.sh", "absent", path=no_cluster)
    assert (done.returncode, "there is no graph 'absent'" in done.stderr) == (1, True)
    assert "local multinode-vllm vllm-cpu" in done.stderr


def test_the_namespace_and_images_that_deploy_sh_replaces_are_in_the_manifests() -> None:
    script = (DEPLOY / "deploy.sh").read_text()
    for scope in SCOPES:
        lines = (DEPLOY / f"kubernetes/{scope}/operator.yaml").read_text().splitlines()
        for written in ("image: penstock:latest", "value: penstock-vllm:latest"):
            assert f"s|{written}|" in script
            assert [line.strip() for line in lines].count(written) == 1
        # sed replaces the first one of a line.
        assert all(line.count("dynamo-cloud") <= 1 for line in lines)
