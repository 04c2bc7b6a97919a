"""Prefill and decode workers are rolled to another block size while clients ask: real processes."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import MODEL, ROOT, START_S, Deployment, deployed
from tests.e2e.test_revisions import Clients
from tests.waiting import wait_until

OLD, NEW = ("--block-size", "16"), ("--block-size", "32")
CLIENTS = 4  # each asks again once it is answered


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    with deployed(tmp_path, "--disagg", "always") as deployment:
        yield deployment


def reasons(deployment: Deployment) -> dict[str, str]:
    instances = json.loads(deployment.get("/health")[1])["instances"]
    return {found["instance_id"]: found["reason"] for found in instances if found.get("reason")}


def wait_until_pulled(deployment: Deployment, *names: str) -> None:
    """These decode workers have pulled KV that was computed elsewhere."""
    for name in names:
        log = deployment.folder / f"{name}.log"
        wait_until(
            lambda log=log: "KV transfer done" in log.read_text(), f"{name} pulls", START_S, look_s=0.1
        )


def test_no_handoff_is_refused_while_two_block_sizes_serve_side_by_side(deployment: Deployment) -> None:
    model = ROOT / "models" / MODEL
    deployment.worker("p-old", "prefill", model, *OLD)
    deployment.worker("d-old", "decode", model, *OLD)
    deployment.wait_for(**{"p-old": "ready", "d-old": "ready"})
    with Clients(deployment, CLIENTS) as clients:
        wait_until_pulled(deployment, "d-old")
        deployment.worker("p-new", "prefill", model, *NEW)
        deployment.worker("d-new", "decode", model, *NEW)
        wait_until_pulled(deployment, "d-new")
        assert reasons(deployment) == {}
        deployment.end("d-old", signal.SIGTERM)
        deployment.wait_for(**{"p-old": "ready", "p-new": "ready", "d-new": "ready"})
        why = "no decode worker reads its KV: block_size is 16, theirs 32"
        assert reasons(deployment) == {"p-old": why}
        assert deployment.metric("penstock_worker_unpaired", instance="p-old", role="prefill") == 1
        assert deployment.metric("penstock_worker_unpaired") == 1
        transfers = deployment.metric("penstock_transfers_total")
        clients.wait_for_more(20)
        assert deployment.metric("penstock_transfers_total") > transfers

        deployment.end("p-new", signal.SIGTERM)  # now nobody has a partner
        deployment.wait_for(**{"p-old": "ready", "d-new": "ready"})
        assert deployment.metric("penstock_worker_unpaired") == 2
        local = deployment.metric("penstock_decisions_total", path="local")
        clients.wait_for_more(20 + CLIENTS)  # what was under way had its decision before
        assert deployment.metric("penstock_decisions_total", path="local") >= local + 20

        deployment.worker("p-next", "prefill", model, *NEW)
        deployment.wait_for(**{"p-old": "ready", "p-next": "ready", "d-new": "ready"})
        deployment.end("p-old", signal.SIGTERM)
        transfers = deployment.metric("penstock_transfers_total")
        clients.wait_for_more(20)
        assert deployment.metric("penstock_transfers_total") > transfers
        assert deployment.metric("penstock_worker_unpaired") == 0
    assert clients.errors == []
    assert [answer for answer in clients.answers if answer[1] != answer[2]] == []
    logs = {path.stem: path.read_text() for path in deployment.folder.glob("*.log")}
    assert {name: log for name, log in logs.items() if "KV transfer refused" in log} == {}
    frontend = logs["frontend"]
    assert frontend.count("prefill workers of tiny are not used: no decode worker reads its KV") == 1
    assert frontend.count("prefill workers of tiny are used again") == 1
    assert "Traceback" not in frontend
