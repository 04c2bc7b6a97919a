"""The commands around a graph on this machine: up, status, scale, restart, logs, down."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.errors import ConfigError

if TYPE_CHECKING:
    from penstock.launcher.control import LocalGraphStatus
    from penstock.launcher.state import StateFolder

GraphOption = Annotated[str, typer.Option("--graph", "-g", metavar="NAME", help="Which, if several run.")]

_PIPED_WIDTH = 160  # of the table when no terminal says how wide it is
_STATE_COLOURS = {
    "ready": "green",
    "starting": "yellow",
    "waiting": "red",
    "failed": "red",
    "stopping": "dim",
}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("up")(up)
    app.command("status")(status)
    app.command("scale")(scale)
    app.command("restart")(restart)
    app.command("logs")(logs)
    app.command("down")(down)


def up(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A DynamoGraphDeployment, e.g. deploy/local.yaml.")
    ],
    engine: Annotated[str, typer.Option(metavar="reference|vllm|sim", help="Engine of all workers.")] = "",
    model: Annotated[str, typer.Option(metavar="FOLDER|NAME", help="Model of all workers.")] = "",
    port: Annotated[
        int | None,
        typer.Option(metavar="N", help="HTTP port, 0 for a free one. [the manifest's]"),
    ] = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen for HTTP.")] = "127.0.0.1",
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return once it is ready, and leave it running.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Do not print what instances log.")] = False,
) -> None:
    """Run a graph on this machine until Ctrl-C."""
    from penstock.graph import Overrides, load_graph
    from penstock.launcher.settings import LauncherSettings
    from penstock.launcher.state import StateFolder, own_command, state_root
    from penstock.launcher.up import run_graph, start_detached
    from penstock.net.address import PORT_MAX

    if port is not None and not 0 <= port <= PORT_MAX:
        raise ConfigError(f"--port: expected an integer from 0 to {PORT_MAX}, got {port}")
    graph = load_graph(file, Overrides(engine, model))
    folder = StateFolder(state_root(os.environ), graph.name)
    if detach:
        arguments = [str(file), "--quiet", "--engine", engine, "--model", model, "--host", host]
        arguments += ["--port", str(port)] if port is not None else []
        state = start_detached(folder, arguments)
        for note in state.notes:
            print(f"note: {note}")
        print(f"Ready: {', '.join(state.health) or 'no frontend'}  (after {state.uptime_s:.1f} s)")
        print(f"stop it: {own_command()} down --graph {graph.name}")
    else:
        settings = LauncherSettings(http_host=host, http_port=port)
        run_graph(graph, folder, os.environ, settings, quiet=quiet)


def status(
    graph: GraphOption = "",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show services, replicas and the frontends' health, of all graphs that run here."""
    from penstock.launcher.control import ControlRequest, call
    from penstock.launcher.state import running_states, state_root

    every = running_states(state_root(os.environ)) if not (graph or as_json) else []
    for number, folder in enumerate(every or [_running(graph)]):
        state = call(folder, ControlRequest(op="status")).status
        if state is None:
            raise ConfigError("the supervisor gave no status")
        if as_json:
            import msgspec

            print(msgspec.json.format(msgspec.json.encode(state), indent=2).decode())
            continue
        print("\n" * bool(number), end="")
        print_status(state)


def scale(
    targets: Annotated[list[str], typer.Argument(metavar="SERVICE=N...", help="E.g. PrefillWorker=3.")],
    graph: GraphOption = "",
) -> None:
    """Start or stop replicas. A leaving worker finishes its requests."""
    from penstock.launcher.control import ControlRequest, call

    replicas = dict(_parse_target(target) for target in targets)
    scaled = call(_running(graph), ControlRequest(op="scale", replicas=replicas)).scaled
    for service, (before, now) in scaled.items():
        print(
            f"{service}: {before} -> {now} replicas"
            if before != now
            else f"{service}: {now} replicas already"
        )


def restart(
    services: Annotated[
        list[str] | None, typer.Argument(metavar="[SERVICE...]", help="E.g. DecodeWorker. [all]")
    ] = None,
    graph: GraphOption = "",
) -> None:
    """Replace replicas one by one, each by a new one that is ready before the old one leaves."""
    from penstock.launcher.control import ControlRequest, call
    from penstock.launcher.up import follow_restart

    folder = _running(graph)
    names = call(folder, ControlRequest(op="restart", services=services or [])).restarting
    for name, successor in follow_restart(folder, names):
        print(f"{name} -> {successor}" if successor else f"{name}: gone", flush=True)


def logs(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME...]", help="Services, roles or instances. [all]")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what is written next.")
    ] = False,
    lines: Annotated[
        int, typer.Option("--lines", "-n", metavar="N", help="Of each instance's past.")
    ] = 100,
    graph: GraphOption = "",
) -> None:
    """Print what instances logged, also after the graph has stopped."""
    from penstock.launcher.output import prefixed
    from penstock.launcher.state import find_state, state_root
    from penstock.launcher.tail import follow_logs, last_lines, select_logs

    folder = find_state(state_root(os.environ), graph, running=False)
    selected = select_logs(folder, names or [])
    width = max(map(len, selected), default=0)
    for name, path in selected.items():
        for line in last_lines(path, lines):
            print(prefixed(name, line, width))
    if follow:
        for name, line in follow_logs(folder, names or []):
            print(prefixed(name, line, width), flush=True)


def down(graph: GraphOption = "") -> None:
    """Stop a graph; its running requests end first."""
    from penstock.launcher.up import stop_graph

    folder = _running(graph)
    print(f"stopping {folder.graph}", flush=True)
    stop_graph(folder)
    print("stopped")


def _running(graph: str) -> StateFolder:
    from penstock.launcher.state import find_state, state_root

    return find_state(state_root(os.environ), graph)


def _parse_target(target: str) -> tuple[str, int]:
    name, equals, count = target.partition("=")
    if not (name and equals and count.isascii() and count.isdigit()):
        raise ConfigError(f"expected SERVICE=N, e.g. PrefillWorker=3, got {target!r}")
    return name, int(count)


def print_status(state: LocalGraphStatus) -> None:
    """The status as a table, for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPED_WIDTH)
    word = "ready" if state.ready else "not ready"
    console.print(f"{state.graph}: {word}, up {_duration(state.uptime_s)}, supervisor pid {state.pid}")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("SERVICE", "INSTANCE", "STATE", "PID", "UP", "RESTARTS", "ADDRESS", "LAST EXIT"):
        table.add_column(title, no_wrap=True)
    for service in state.services:
        for replica in service.replicas:
            colour = _STATE_COLOURS.get(replica.state, "")
            table.add_row(
                service.name,
                replica.name,
                f"[{colour}]{replica.state.value}[/]" if colour else replica.state.value,
                str(replica.pid or "-"),
                _duration(replica.uptime_s) if replica.pid else "-",
                str(replica.restarts),
                replica.address or "-",
                replica.last_exit,
            )
        if not service.replicas:
            table.add_row(service.name, "-", "no replicas")
    console.print(table)
    for url, health in state.health.items():
        console.print(f"{url}/health: {_health_words(health)}")


def _health_words(health: dict[str, Any]) -> str:
    reason = health.get("error") or health.get("message") or health.get("reason")
    return f"{health.get('status', 'unknown')}" + (f" ({reason})" if isinstance(reason, str) else "")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 100 else f"{hours:.0f} h"
