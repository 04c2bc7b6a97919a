"""`penstock log-relay`: the logs of all pods of one role, for `kubectl logs` of one pod."""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import sys
from importlib.util import find_spec
from typing import Annotated

import typer

from penstock.errors import ConfigError

_LABEL = re.compile(r"[A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?", re.ASCII)


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
    import asyncio

    from penstock.kubernetes.client import connect, own_namespace
    from penstock.kubernetes.log_relay import LogRelay

    for name, value in (("--graph", graph), ("--role", role)):
        if not _LABEL.fullmatch(value):
            raise ConfigError(f"{name}: expected the value of a label, got {value!r}")
    # Its own complaints, among the lines of others. Not Penstock's usual logging, which comes with all that
    # serving needs: a relay should be small.
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s log-relay %(message)s")
    api = connect()
    namespace = kubernetes_namespace or own_namespace()
    relay = LogRelay(api, namespace, f"penstock.dev/graph={graph},role={role}", _write)

    async def until_signal() -> None:
        running = asyncio.create_task(relay.run())
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, running.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await running
        await api.close()

    asyncio.run(until_signal())


def _write(pod: str, line: str) -> None:
    sys.stdout.write(f"{pod} | {line}\n")
    sys.stdout.flush()
