"""`penstock log-relay`: the logs of all pods of one role, for `kubectl logs` of one pod."""

from __future__ import annotations

import asyncio
import sys
from importlib.util import find_spec
from typing import Annotated

import typer

from penstock.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("log-relay", help="On Kubernetes: print the logs of all pods of a role.")(log_relay)


def log_relay(
    graph: Annotated[str, typer.Option(help="Name of the graph.")],
    role: Annotated[str, typer.Option(help="prefill, decode, aggregated or frontend.")],
    kubernetes_namespace: Annotated[
        str, typer.Option(help="Where its pods are; where this runs when not given.")
    ] = "",
) -> None:
    """Until a signal."""
    if find_spec("lightkube") is None:
        raise ConfigError("penstock log-relay needs more packages: pip install 'penstock-llm[kubernetes]'")
    from penstock.kubernetes.client import connect, own_namespace
    from penstock.kubernetes.log_relay import LogRelay
    from penstock.observability import setup_logging
    from penstock.process import run

    for flag, value in (("--graph", graph), ("--role", role)):
        if not value.replace("-", "").replace(".", "").replace("_", "").isalnum():
            raise ConfigError(f"{flag}: expected the value of a label, got {value!r}")
    setup_logging("warning")
    api = connect()
    namespace = kubernetes_namespace or own_namespace()

    async def main(stop: asyncio.Event) -> None:
        relay = LogRelay(api, namespace, f"penstock.dev/graph={graph},role={role}", _write)
        running = asyncio.create_task(relay.run())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in (running, stopping):
            task.cancel()
        ended, _ = await asyncio.gather(running, stopping, return_exceptions=True)
        await api.close()
        if isinstance(ended, Exception):
            raise ended

    run(main)


def _write(pod: str, line: str) -> None:
    sys.stdout.write(f"{pod} | {line}\n")
    sys.stdout.flush()
