"""The `penstock` command.

Each command imports what it runs when it runs, so that help and typing errors are answered at once. Errors
are one line on standard error; the exit code is 2 for something wrong with what was asked, else 1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from penstock.checked import suggestion
from penstock.cli import explain, key, local, log_relay, record, serve, talk
from penstock.errors import ConfigError, PenstockError

# What a command line's parser raises has an ancestor in common with this one. Which it is, and in which
# module, differs between versions of typer, so all of them count but Python's own.
_USAGE_ERRORS = tuple(
    ancestor
    for ancestor in typer.BadParameter.__mro__
    if issubclass(ancestor, Exception) and ancestor.__module__ != "builtins"
)

# What people type who know other programs.
_OTHER_WORDS = {
    "apply": "up",
    "benchmark": "bench",
    "delete": "down",
    "deploy": "up",
    "get": "status",
    "kill": "down",
    "list": "status",
    "ps": "status",
    "run": "up",
    "serve": "up",
    "server": "up",
    "start": "up",
    "stop": "down",
}

_INTERRUPTED = 130  # what shells say of a command ended by Ctrl-C
_SIMULATE_HELP = "Compare routing policies on a load, without GPUs."
_PLAN_HELP = "Find how many GPUs a load needs, and how to divide them."
_CALIBRATE_HELP = "Measure what steps of a running worker cost, for plan and simulate."
_BENCH_HELP = "Measure a server: latency, throughput, cache use."


def main() -> None:
    """Run one command and exit."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command; its exit code."""
    try:
        app = build_app(arguments)
        _check_command(app, arguments)
        code = app(args=list(arguments) or ["--help"], prog_name="penstock", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except ConfigError as error:
        return _complain(str(error), 2)
    except PenstockError as error:
        return _complain(str(error), 1)
    except _USAGE_ERRORS as error:
        return _complain_of_usage(error)
    except (KeyboardInterrupt, typer.Abort):
        return _INTERRUPTED
    except BrokenPipeError:  # `penstock logs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def build_app(arguments: Sequence[str]) -> typer.Typer:
    """All commands. Options of `bench`, `simulate`, `plan` and `calibrate` are only loaded for these."""
    app = typer.Typer(
        help="Serve large language models across machines: disaggregated, KV-routed, without a broker.",
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    app.callback()(_common)
    local.register(app)
    talk.register(app)
    explain.register(app)
    record.register(app)
    serve.register(app)
    log_relay.register(app)
    key.register(app)
    if arguments[:1] in (["bench"], ["simulate"], ["plan"], ["calibrate"]):
        from penstock.bench.command import bench
        from penstock.plan.calibrate import calibrate
        from penstock.plan.command import plan
        from penstock.simulate.command import simulate

        app.command("bench", help=_BENCH_HELP)(talk.at_running_graph(bench))
        app.command("simulate", help=_SIMULATE_HELP)(simulate)
        app.command("plan", help=_PLAN_HELP)(plan)
        app.command("calibrate", help=_CALIBRATE_HELP)(talk.at_running_graph(calibrate))
    else:
        app.command("bench", help=_BENCH_HELP)(lambda: None)
        app.command("simulate", help=_SIMULATE_HELP)(lambda: None)
        app.command("plan", help=_PLAN_HELP)(lambda: None)
        app.command("calibrate", help=_CALIBRATE_HELP)(lambda: None)
    app.command("version", help="Print the version.")(lambda: _print_version())
    return app


def _print_version(wanted: bool = True) -> None:
    from penstock import __version__

    if wanted:
        print(__version__)
        raise typer.Exit


def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The options of `penstock` itself; its help is the app's."""


def _check_command(app: typer.Typer, arguments: Sequence[str]) -> None:
    """Raises ConfigError for a command that is not there, with the one that was probably meant."""
    named = next((word for word in arguments if not word.startswith("-")), None)
    names = [command.name for command in app.registered_commands if command.name]
    if named is None or named in names:
        return
    other = _OTHER_WORDS.get(named)
    hint = f" (did you mean {other}?)" if other else suggestion(named, names)
    raise ConfigError(f"no such command {named!r}{hint}; all of them: penstock --help")


def _complain(message: str, code: int) -> int:
    for line in message.splitlines():
        print(f"penstock: {line}", file=sys.stderr)
    return code


def _complain_of_usage(error: BaseException) -> int:
    """The parser's message on one line: no usage, no boxes."""
    describe = getattr(error, "format_message", None)
    message = describe() if describe else str(error)
    context = getattr(error, "ctx", None)
    place = (
        f"{context.command_path}: ".removeprefix("penstock: ").removeprefix("penstock ") if context else ""
    )
    first = " ".join(message.split())
    return _complain(f"{place}{first[:1].lower()}{first[1:].removesuffix('.')}", 2)
