"""Discovery against a real API server. Kubelets take no part: the tests write what they would."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest

from checks.kubernetes.kubectl import Kubectl
from penstock.kubernetes.client import connect
from penstock.shapes import Registration
from tests.discovery.contract import DiscoveryContract
from tests.discovery.pods import PodMakingDiscovery, essence


class TestOnTheRealServer(DiscoveryContract):
    odd_id = "a.b-c"

    def essence(self, found: Registration) -> object:
        return essence(found)

    @pytest.fixture
    async def open_discovery(self, kubectl: Kubectl) -> AsyncIterator[Callable[[], PodMakingDiscovery]]:
        discoveries: list[PodMakingDiscovery] = []

        def open_one() -> PodMakingDiscovery:
            discoveries.append(PodMakingDiscovery(connect(kubectl.kubeconfig), kubectl.namespace))
            return discoveries[-1]

        yield open_one
        for discovery in discoveries:
            await discovery.close()
