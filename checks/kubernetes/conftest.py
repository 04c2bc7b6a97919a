"""The cluster that these tests run on, and kubectl for it.

PENSTOCK_TEST_KUBECONFIG or KUBECONFIG names a cluster; it must be able to run the images that
PENSTOCK_TEST_IMAGE and PENSTOCK_TEST_ETCD_IMAGE name. Without either, it is the project's own (cluster/):
one that runs goes on running; otherwise one is started now, and ended after the tests.

What tests do to the machines of a cluster, they only do to the project's own: such tests are marked
`own_cluster`, and left out with another.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from checks.kubernetes.cluster import binaries, lifecycle, places
from checks.kubernetes.cluster.command import ClusterError
from checks.kubernetes.graphs import DEPLOY, Images, script, wait_gone
from checks.kubernetes.kubectl import Kubectl

NODES = 2
REPORT = pytest.StashKey[pytest.TestReport]()


def given_kubeconfig() -> str | None:
    """That of another cluster than the project's own."""
    given = os.environ.get("PENSTOCK_TEST_KUBECONFIG") or os.environ.get("KUBECONFIG")
    return None if given == str(places.KUBECONFIG) else given or None


def cluster_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "checks.kubernetes.cluster", *arguments]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "own_cluster: does things to the machines of the cluster")
    config.addinivalue_line("markers", "no_cluster_before: starts and ends the project's own cluster")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out: set[str] = set()
    if given_kubeconfig() is not None:
        left_out = {"own_cluster", "no_cluster_before"}
    else:
        try:
            lifecycle.check_machine()
            if (found := lifecycle.running()) is not None:
                if not found.is_us:
                    raise ClusterError(found.refusal())
                left_out = {"no_cluster_before"}  # it goes on running
        except ClusterError as error:
            pytest.exit(str(error), returncode=1)
    deselected = [item for item in items if any(item.get_closest_marker(name) for name in left_out)]
    config.hook.pytest_deselected(items=deselected)
    kept = [item for item in items if item not in deselected]
    items[:] = sorted(kept, key=lambda item: item.get_closest_marker("no_cluster_before") is None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        item.stash[REPORT] = report
    return report


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Kubectl]:
    """kubectl for a cluster that is ready."""
    cache = tmp_path_factory.mktemp("kubectl")
    given = given_kubeconfig()
    if given is not None:
        program = shutil.which("kubectl")
        assert program, "kubectl is not on PATH"
        yield Kubectl(Path(program), given, cache)
        return
    ran_before = lifecycle.running() is not None
    shown = pytestconfig.pluginmanager.getplugin("capturemanager")
    with shown.global_and_fixture_disabled():  # it says what it does: building takes minutes
        up = cluster_command("up", "--nodes", str(NODES))
        if subprocess.run(up, cwd=places.CHECKOUT, check=False).returncode != 0:
            pytest.exit("the cluster does not start: see above", returncode=1)
    yield Kubectl(binaries.kubernetes("kubectl"), str(places.KUBECONFIG), cache)
    if not ran_before:
        subprocess.run(cluster_command("down"), cwd=places.CHECKOUT, check=True)


@pytest.fixture(scope="session")
def images() -> Images:
    return Images(
        penstock=os.environ.get("PENSTOCK_TEST_IMAGE", "penstock:dev"),
        etcd=os.environ.get("PENSTOCK_TEST_ETCD_IMAGE", "etcd:3.4"),
    )


@pytest.fixture
def kubectl(cluster: Kubectl, request: pytest.FixtureRequest) -> Iterator[Kubectl]:
    """kubectl in a namespace of the test's own. When the test fails, what happened there is printed."""
    slug = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower().removeprefix("test_"))[:40].strip("-")
    own = cluster.new_namespace(f"{slug}-{secrets.token_hex(3)}")
    yield own
    report = request.node.stash.get(REPORT, None)
    if report is not None and report.failed:
        print(own.story())
    # A namespace that still has pods waits for the longest of their grace periods.
    own("delete", "deployments,statefulsets,daemonsets,jobs", "--all", "--wait=false")
    own("delete", "pods", "--all", "--wait=false", "--grace-period=1")
    cluster("delete", "namespace", own.namespace, "--wait=false")


@pytest.fixture(scope="session")
def platform(cluster: Kubectl, images: Images) -> Iterator[Kubectl]:
    """kubectl in the namespace dynamo-cloud, with the operator installed for all namespaces as deploy.sh
    does it. Afterwards all of it is removed, as cleanup.sh does it, and nothing must be left."""
    kubectl = cluster.within("dynamo-cloud")
    before = cluster_wide(cluster)
    install = [
        "./deploy.sh",
        "--cluster-wide",
        "--upgrade",
        *("--engine", "reference", "--model", "/models/tiny", "--no-wait"),
        str(DEPLOY / "multinode-vllm.yaml"),
    ]
    script(
        kubectl,
        *install,
        PENSTOCK_OPERATOR_IMAGE=images.penstock,
        PENSTOCK_IMAGE=images.penstock,
        HF_TOKEN="",
    )
    kubectl("delete", "dynamographdeployments", "--all")
    wait_gone(kubectl)
    yield kubectl
    script(kubectl, "./cleanup.sh", "--all", "--other-namespaces", "--yes")
    assert cluster_wide(cluster) - before == set()


def cluster_wide(kubectl: Kubectl) -> set[str]:
    """What an uninstalled operator may have left behind."""
    kinds = "crd,clusterroles,clusterrolebindings,namespaces"
    found = set(kubectl("get", kinds, "-o", "name").split())
    return {name for name in found if "penstock" in name or "nvidia" in name or "dynamo" in name}


@pytest.fixture
def node_names(cluster: Kubectl) -> list[str]:
    """Nodes on which pods may run."""
    nodes = cluster.items("nodes")
    return [node["metadata"]["name"] for node in nodes if not node["spec"].get("taints")]
