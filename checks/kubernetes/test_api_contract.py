"""The double of the API server is held to the same contract as this real one."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Iterator

import pytest

from checks.kubernetes import faults
from checks.kubernetes.kubectl import Kubectl, eventually
from penstock.kubernetes.api import Api
from penstock.kubernetes.client import HttpsApi, connect
from tests.kubernetes_contract import ApiContract


class TestTheRealServer(ApiContract):
    @pytest.fixture
    async def api(self, cluster: Kubectl) -> AsyncIterator[HttpsApi]:
        api = connect(cluster.kubeconfig.split(os.pathsep)[0])
        yield api
        await api.close()

    @pytest.fixture
    def namespace(self, cluster: Kubectl) -> Iterator[str]:
        name = f"api-{secrets.token_hex(4)}"
        cluster.new_namespace(name)
        yield name
        cluster("delete", "namespace", name, "--wait=false")

    @pytest.fixture
    def forgetful(self, cluster: Kubectl) -> None:
        """An API server remembers changes since it was started. This one is started anew."""
        faults.kill("control", "kube-apiserver")
        eventually(lambda: cluster.run("get", "--raw", "/readyz").stdout == "ok", "it is ready", 120)

    @pytest.mark.own_cluster
    @pytest.mark.usefixtures("forgetful")
    async def test_a_watch_from_long_ago_must_list_again(self, api: Api, namespace: str) -> None:
        await super().test_a_watch_from_long_ago_must_list_again(api, namespace)
