"""The CRDs: whose they are, and the webhook that converts versions of graphs."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from penstock.clock import VirtualClock
from penstock.errors import ConfigError
from penstock.graph.crds import graph_crd, scaling_adapter_crd
from penstock.kubernetes.api import Object
from penstock.kubernetes.kinds import DEFINITIONS, GRAPHS, SECRETS, SERVICES
from penstock.operator.certificates import is_signed_by
from penstock.operator.definitions import SECRET, Webhook, check_definitions, webhook_secret
from tests.kubernetes_double import KubernetesDouble

NOW = datetime(2026, 11, 29, tzinfo=UTC)


async def with_crds(**metadata: Any) -> KubernetesDouble:
    api = KubernetesDouble()
    for crd in (graph_crd(), scaling_adapter_crd()):
        crd["metadata"] |= metadata
        await api.create(DEFINITIONS, crd)
    return api


async def test_penstocks_own_crds_are_taken() -> None:
    await check_definitions(await with_crds())


async def test_missing_crds_are_named_with_the_command_that_installs_them() -> None:
    with pytest.raises(ConfigError, match=r"no CRD dynamographdeployments\.nvidia\.com: kubectl apply"):
        await check_definitions(KubernetesDouble())


async def test_crds_of_another_release_are_refused_by_its_name() -> None:
    annotations = {
        "meta.helm.sh/release-name": "dynamo-platform",
        "meta.helm.sh/release-namespace": "dynamo-system",
    }
    api = await with_crds(labels={}, annotations=annotations)
    with pytest.raises(ConfigError, match="belongs to Helm release dynamo-platform in dynamo-system"):
        await check_definitions(api)


class Operator:
    """A webhook's keeper, which may lead."""

    def __init__(self, api: KubernetesDouble, namespace: str = "ns") -> None:
        self.leads = True
        self.clock = VirtualClock()
        self.now = NOW
        self.webhook = Webhook(
            api, namespace, "penstock-operator", lambda: self.leads, self.clock, lambda: self.now
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.webhook.run())
        await self.clock.advance(0.1)
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def conversion(api: KubernetesDouble) -> Object:
    found = api.stored(DEFINITIONS, str(GRAPHS))
    assert found is not None
    return found["spec"].get("conversion") or {}


def served(api: KubernetesDouble) -> list[str]:
    found = api.stored(DEFINITIONS, str(GRAPHS))
    assert found is not None
    return [version["name"] for version in found["spec"]["versions"] if version["served"]]


async def test_the_leader_makes_a_certificate_and_has_all_versions_served_by_it() -> None:
    api = await with_crds()
    operator = Operator(api)
    assert served(api) == ["v1alpha1"]
    async with operator.running():
        assert operator.webhook.has_certificate.is_set()
        assert sorted(served(api)) == ["v1alpha1", "v1beta1"]
        client = conversion(api)["webhook"]["clientConfig"]
        assert client["service"]["namespace"] == "ns"
        secret = api.stored(SECRETS, SECRET, "ns")
        assert secret is not None
        assert client["caBundle"] == secret["data"]["ca.crt"]
        signed, authority = (base64.b64decode(secret["data"][key]) for key in ("tls.crt", "ca.crt"))
        assert is_signed_by(signed, authority)
        writes = len(api.writes)
        await operator.clock.advance(600)
        assert len(api.writes) == writes


async def test_one_that_stands_by_serves_the_leaders_certificate() -> None:
    api = await with_crds()
    standby = Operator(api)
    standby.leads = False
    async with standby.running():
        assert not standby.webhook.has_certificate.is_set()
        async with Operator(api).running():
            await standby.clock.advance(5)
            assert standby.webhook.has_certificate.is_set()


async def test_the_webhook_of_another_operator_is_left_alone_while_it_is_there() -> None:
    api = await with_crds()
    metadata = {"name": "penstock-operator", "namespace": "first"}
    service = {"apiVersion": "v1", "kind": "Service", "metadata": metadata}
    await api.create(SERVICES, {**service, "spec": {}})
    async with Operator(api, "first").running():
        before = conversion(api)
    second = Operator(api, "second")
    async with second.running():
        await second.clock.advance(120)
        assert conversion(api) == before
        await api.delete(SERVICES, "penstock-operator", "first")
        await second.clock.advance(60)
        assert conversion(api)["webhook"]["clientConfig"]["service"]["namespace"] == "second"


async def test_what_an_applied_crd_took_away_is_given_back() -> None:
    api = await with_crds()
    operator = Operator(api)
    async with operator.running():
        versions = graph_crd()["spec"]["versions"]
        await api.patch(DEFINITIONS, str(GRAPHS), {"spec": {"versions": versions}})
        assert served(api) == ["v1alpha1"]
        await operator.clock.advance(31)
        assert sorted(served(api)) == ["v1alpha1", "v1beta1"]


async def test_a_certificate_that_somebody_spoilt_is_made_anew() -> None:
    api = await with_crds()
    operator = Operator(api)
    async with operator.running():
        await api.patch(SECRETS, SECRET, {"data": {"tls.crt": "%%%", "ca.key": None}}, "ns")
        await operator.clock.advance(31)
        found = api.stored(SECRETS, SECRET, "ns")
        assert found is not None
        signed, authority = (base64.b64decode(found["data"][key]) for key in ("tls.crt", "ca.crt"))
        assert is_signed_by(signed, authority)
        assert conversion(api)["webhook"]["clientConfig"]["caBundle"] == found["data"]["ca.crt"]


def test_a_certificate_is_kept_until_it_is_due_and_its_authority_longer() -> None:
    first = webhook_secret(None, "ns", "penstock-operator", NOW)
    assert webhook_secret(first, "ns", "penstock-operator", NOW + timedelta(days=50)) == first
    renewed = webhook_secret(first, "ns", "penstock-operator", NOW + timedelta(days=70))
    assert renewed["data"]["ca.crt"] == first["data"]["ca.crt"]
    assert renewed["data"]["tls.crt"] != first["data"]["tls.crt"]
