"""Checks that the CRDs of the cluster are Penstock's, and sets up the webhook that converts graphs between
their versions.

A cluster stores graphs as v1alpha1. The API server calls the webhook for clients that write or read another
version. Every operator serves the webhook, leading or not. The leading operator makes and renews the
webhook's certificate, and writes its authority into the CRD. An operator that may not change CRDs, such as
one for a single namespace, does not do this; then only v1alpha1 is served.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import ssl
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from penstock.clock import Clock
from penstock.errors import ConfigError
from penstock.graph.crds import with_conversion
from penstock.kubernetes.api import Api, ApiError, Object, annotations_of, labels_of, name_of
from penstock.kubernetes.kinds import ADAPTERS, DEFINITIONS, GRAPHS, SECRETS, SERVICES
from penstock.operator import names
from penstock.operator.certificates import (
    Pair,
    bundle,
    is_due,
    is_signed_by,
    new_authority,
    new_certificate,
)
from penstock.operator.secret_data import data_of, pair_of, secret_of

log = logging.getLogger(__name__)

SECRET = "penstock-operator-webhook"
CHECK_S = 30.0
"""Interval between checks of the certificate and the CRD."""


async def check_definitions(api: Api) -> None:
    """Raises ConfigError if a CRD is missing, or belongs to another product, whose operator would manage
    the same graphs."""
    for kind in (GRAPHS, ADAPTERS):
        try:
            problem = definition_problem(await api.get(DEFINITIONS, str(kind)))
        except ApiError as error:
            if error.is_forbidden:  # an operator for a single namespace need not read CRDs
                continue
            if not error.is_not_found:
                raise
            problem = f"the cluster has no CRD {kind}: kubectl apply --server-side -k deploy/crds"
        if problem:
            raise ConfigError(problem)


def definition_problem(definition: Object) -> str:
    """Why Penstock must not manage this CRD; empty if it may."""
    if labels_of(definition).get("app.kubernetes.io/part-of") == "penstock":
        return ""
    annotations = annotations_of(definition)
    release = annotations.get("meta.helm.sh/release-name")
    if release:
        owner = f"Helm release {release} in {annotations.get('meta.helm.sh/release-namespace', 'default')}"
    else:
        owner = "something other than Penstock"
    return (
        f"CRD {name_of(definition)} belongs to {owner}, whose operator would manage the same graphs."
        " Remove that one, then: kubectl apply --server-side --force-conflicts -k deploy/crds"
    )


class Webhook:
    """Keeps the webhook's certificate, in the server and in the CRD.

    Args:
        namespace, service: the Service by which the API server reaches the webhook.
        leads: whether this operator may write now.
    """

    def __init__(
        self,
        api: Api,
        namespace: str,
        service: str,
        leads: Callable[[], bool],
        clock: Clock,
        utc: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.has_certificate = asyncio.Event()
        self._api = api
        self._namespace = namespace
        self._service = service
        self._leads = leads
        self._clock = clock
        self._utc = utc
        self._loaded = b""
        self._warned = ""

    async def run(self) -> None:
        """Keep the certificate and the CRD up to date until cancelled."""
        while True:
            try:
                await self._look()
            except ApiError as error:
                self._tell(str(error))
            await self._clock.sleep(CHECK_S if self.has_certificate.is_set() else 1.0)

    async def _look(self) -> None:
        secret = await self._secret()
        if self._leads():
            wanted = webhook_secret(secret, self._namespace, self._service, self._utc())
            if secret is None or wanted["data"] != secret.get("data"):
                secret = await self._api.apply(SECRETS, wanted, names.MANAGER)
        if secret is None:
            return
        data = data_of(secret)
        pair = pair_of(data, "tls.crt", "tls.key")
        if pair is None:  # the leader will make it anew
            return
        self._load(pair)
        if self._leads():
            await self._announce(base64.b64encode(data["ca.crt"]).decode())

    async def _secret(self) -> Object | None:
        try:
            return await self._api.get(SECRETS, SECRET, self._namespace)
        except ApiError as error:
            if error.is_not_found:
                return None
            raise

    def _load(self, pair: Pair) -> None:
        """Use this certificate for new connections."""
        if pair.certificate == self._loaded:
            return
        with tempfile.TemporaryDirectory() as folder:  # `ssl` reads certificates from files only
            file = Path(folder, "pair.pem")
            file.touch(mode=0o600)
            file.write_bytes(pair.certificate + pair.key)
            self.context.load_cert_chain(file)
        self._loaded = pair.certificate
        self.has_certificate.set()
        log.info("the conversion webhook has a certificate")

    async def _announce(self, authorities: str) -> None:
        """Have the API server use this webhook, so that it serves all versions of graphs."""
        live = await self._api.get(DEFINITIONS, str(GRAPHS))
        if other := await self._other_webhook(live):
            self._tell(f"Service {other}, which belongs to another operator, converts them")
            return
        wanted = with_conversion(live, self._namespace, self._service, authorities)
        if wanted["spec"] == live["spec"]:
            self._warned = ""
            return
        changes = {
            "metadata": {"resourceVersion": live["metadata"]["resourceVersion"]},
            "spec": {field: wanted["spec"][field] for field in ("versions", "conversion")},
        }
        try:
            await self._api.patch(DEFINITIONS, str(GRAPHS), changes)
        except ApiError as error:
            if not error.is_conflict:  # it was changed meanwhile; the next check will see the change
                raise
            return
        self._warned = ""
        log.info("%s is served in all its versions", GRAPHS)

    async def _other_webhook(self, definition: Object) -> str:
        """The Service of another operator that converts graphs, as NAMESPACE/NAME; empty if there is
        none."""
        webhook = (definition["spec"].get("conversion") or {}).get("webhook") or {}
        service = (webhook.get("clientConfig") or {}).get("service") or {}
        place = service.get("namespace", ""), service.get("name", "")
        if not all(place) or place == (self._namespace, self._service):
            return ""
        try:
            await self._api.get(SERVICES, place[1], place[0])
        except ApiError as error:
            if error.is_not_found:  # that operator is gone
                return ""
            if not error.is_forbidden:
                raise
        return "/".join(place)

    def _tell(self, trouble: str) -> None:
        if trouble and trouble != self._warned:
            log.warning("versions of graphs other than v1alpha1 may not be served: %s", trouble)
        self._warned = trouble


def webhook_secret(current: Object | None, namespace: str, service: str, now: datetime) -> Object:
    """The Secret with the webhook's certificate, as it should be now. Its data is unchanged if nothing is
    due."""
    host = f"{service}.{namespace}.svc"
    data = data_of(current)
    authority = pair_of(data, "ca.crt", "ca.key")
    if authority is None or is_due(authority.certificate, now):
        # The API server trusts the authority in the CRD within a second. So a new authority needs no
        # announcement.
        authority = new_authority(f"{service} webhook", now)
    pair = pair_of(data, "tls.crt", "tls.key")
    is_trusted = pair is not None and is_signed_by(pair.certificate, authority.certificate)
    if pair is None or not is_trusted or is_due(pair.certificate, now):
        pair = new_certificate(authority, host[:64], [host, f"{host}.cluster.local"], now)
    wanted = {
        "ca.crt": bundle([authority.certificate], now),
        "ca.key": authority.key,
        "tls.crt": pair.certificate,
        "tls.key": pair.key,
    }
    labels = {"app.kubernetes.io/name": "penstock-operator", "app.kubernetes.io/part-of": "penstock"}
    return secret_of({"name": SECRET, "namespace": namespace, "labels": labels}, wanted)
