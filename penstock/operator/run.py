"""The operator's process, made from its options."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import time

import msgspec

from penstock.assembly import run
from penstock.clock import MonotonicClock
from penstock.errors import ConfigError
from penstock.kubernetes.api import Api, ApiError
from penstock.kubernetes.client import connect, in_cluster, own_namespace
from penstock.logs.setup import setup_logging
from penstock.metrics import METRICS_CONTENT_TYPE
from penstock.operator.controller import Controller, ControllerSettings
from penstock.operator.conversion import convert_review
from penstock.operator.definitions import Webhook, check_definitions
from penstock.operator.election import Election, ElectionSettings
from penstock.operator.metrics import OperatorMetrics
from penstock.operator.server import Handler, HttpAnswer, as_json, served
from penstock.operator.settings import RenderSettings
from penstock.options.config import OperatorOptions

log = logging.getLogger("penstock.operator")

START_S = 120.0
"""How long a starting operator waits for an API server that does not answer."""


def run_operator(options: OperatorOptions) -> None:
    """Manage graphs until a signal. Raises ConfigError if the operator cannot start."""
    setup_logging(options.log_level, options.log_format)
    api = connect(options.kubeconfig)
    namespace = options.lease_namespace or own_namespace(options.kubeconfig)

    async def main(stop: asyncio.Event) -> None:
        try:
            await _Operator(options, api, namespace).run(stop)
        finally:
            await api.close()

    run(main)


class _Operator:
    def __init__(self, options: OperatorOptions, api: Api, namespace: str) -> None:
        self._options = options
        self._api = api
        self._host = os.environ.get("POD_NAME") or socket.gethostname()
        clock = MonotonicClock()
        election = ElectionSettings(
            namespace=namespace,
            name=options.lease_name,
            identity=f"{self._host}_{secrets.token_hex(4)}",
        )
        self._clock = clock
        self._election = Election(api, election, clock)
        self._metrics = OperatorMetrics()
        self._metrics.leads_from(lambda: self._election.leads)
        self._controller: Controller | None = None  # set while this operator leads
        self._webhook = Webhook(
            api, namespace, options.webhook_service, lambda: self._election.leads, clock
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Run until `stop`. Without the lease, the operator stands by; it serves the webhook all the
        time."""
        host = self._options.host or ("0.0.0.0" if in_cluster() else "127.0.0.1")
        async with served("--system-port", host, self._options.system_port, self._routes()):
            await self._check_definitions()
            async with asyncio.TaskGroup() as tasks:
                serving = [tasks.create_task(self._terms())]
                if self._options.webhook_port != -1:
                    serving.append(tasks.create_task(self._webhook.run()))
                    serving.append(tasks.create_task(self._serve_webhook(host)))
                await stop.wait()
                for task in serving:
                    task.cancel()
            await self._election.resign()

    async def _terms(self) -> None:
        """Repeatedly: stand by until elected, then act until the lease is lost."""
        while True:
            async with asyncio.TaskGroup() as tasks:
                acting = tasks.create_task(self._act())
                await self._election.run()
                acting.cancel()

    async def _check_definitions(self) -> None:
        deadline = time.monotonic() + START_S
        while True:
            try:
                await check_definitions(self._api)
                return
            except ApiError as error:
                if time.monotonic() > deadline:
                    raise ConfigError(f"Kubernetes: no answer in {START_S:.0f} s: {error}") from error
                log.warning("the API server does not answer yet: %s", error)
            await asyncio.sleep(1.0)

    async def _act(self) -> None:
        """Act once elected, with empty caches. If the API server does not answer, try again."""
        await self._election.elected.wait()
        while True:
            self._controller = Controller(
                self._api,
                ControllerSettings(namespace=self._options.watch_namespace),
                render_settings(self._options),
                self._metrics,
                self._clock,
                self._host,
                leads=lambda: self._election.leads,
            )
            try:
                await self._controller.run()
            except ApiError as error:
                log.warning("cannot start managing graphs yet: %s", error)
            finally:
                self._controller = None
            await asyncio.sleep(2.0)

    async def _serve_webhook(self, host: str) -> None:
        await self._webhook.has_certificate.wait()
        routes: dict[tuple[str, str], Handler] = {("POST", "/convert"): _convert}
        port = self._options.webhook_port
        async with served("--webhook-port", host, port, routes, self._webhook.context):
            await asyncio.Event().wait()

    def _routes(self) -> dict[tuple[str, str], Handler]:
        async def live(_: bytes) -> HttpAnswer:
            return as_json(200, {"status": "live"})

        async def health(_: bytes) -> HttpAnswer:
            leads = self._election.leads
            trouble = self._controller.trouble() if self._controller is not None else ""
            body = {"status": "healthy", "leads": leads, "trouble": trouble}
            return as_json(200, body)

        async def metrics(_: bytes) -> HttpAnswer:
            return HttpAnswer(200, self._metrics.render(), METRICS_CONTENT_TYPE)

        return {("GET", "/live"): live, ("GET", "/health"): health, ("GET", "/metrics"): metrics}


async def _convert(body: bytes) -> HttpAnswer:
    try:
        return as_json(200, convert_review(msgspec.json.decode(body)))
    except (ConfigError, msgspec.DecodeError, AttributeError) as error:
        return as_json(400, {"status": str(error)})


def render_settings(options: OperatorOptions) -> RenderSettings:
    """The options that affect the objects of graphs."""
    secrets_named = [name.strip() for name in options.image_pull_secrets.split(",")]
    return RenderSettings(
        image=options.image,
        image_pull_policy=options.image_pull_policy,
        image_pull_secrets=tuple(name for name in secrets_named if name),
        drain_s=options.drain_s,
        topology_key=options.topology_key,
    )
