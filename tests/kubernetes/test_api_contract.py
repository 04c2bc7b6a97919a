"""The double of the API server is held to the same contract as this real one."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Iterator

import pytest

from penstock.kubernetes.client import HttpsApi, connect
from tests.kubernetes.kubectl import Kubectl
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
        cluster("create", "namespace", name)
        yield name
        cluster("delete", "namespace", name, "--wait=false")
