"""`penstock frontend`, `penstock worker` and `penstock operator`: one process each, their flags from
config.py."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar

import typer

from penstock.errors import ConfigError
from penstock.options.config import FrontendOptions, OperatorOptions, WorkerOptions
from penstock.options.flags import Flag, build_options, flags_of

Options = TypeVar("Options", FrontendOptions, WorkerOptions, OperatorOptions)


def register(app: typer.Typer) -> None:
    """Add the three commands."""
    app.command("frontend", help="Run one frontend: the HTTP API and the router.")(
        _with_flags(FrontendOptions, _run_frontend)
    )
    app.command("worker", help="Run one worker. What follows -- goes to vLLM.")(
        _with_flags(WorkerOptions, _run_worker)
    )
    app.command("operator", help="Run the graphs of a Kubernetes cluster.")(
        _with_flags(OperatorOptions, _run_operator)
    )


def _run_frontend(options: FrontendOptions) -> None:
    from penstock.assembly import run_frontend

    run_frontend(options)


def _run_worker(options: WorkerOptions) -> None:
    from penstock.assembly import run_worker

    run_worker(options)


def _run_operator(options: OperatorOptions) -> None:
    if find_spec("lightkube") is None or find_spec("cryptography") is None:
        raise ConfigError("penstock operator needs more packages: pip install 'penstock-llm[kubernetes]'")
    from penstock.operator.run import run_operator

    run_operator(options)


def _with_flags(struct: type[Options], run: Callable[[Options], None]) -> Callable[..., None]:
    """A typer command with one option for each flag of `struct`.

    Values stay text up to `build_options`, so that a command line, a manifest and an environment variable
    are checked by the same code and complained of in the same words.
    """
    flags = flags_of(struct)

    def command(engine_args: list[str] | None = None, **given: str | None) -> None:
        from penstock.launcher.parent_death import die_with_supervisor

        die_with_supervisor()
        texts = {flag.name: text for flag in flags.values() if (text := given[flag.field]) is not None}
        run(build_options(struct, texts, os.environ, engine_args or ()))

    parameters = [_parameter(flag) for flag in flags.values()]
    if struct is WorkerOptions:
        argument = typer.Argument(default=None, metavar="[-- ENGINE_ARGS]", show_default=False)
        parameters.append(_keyword("engine_args", list[str] | None, argument))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameter(flag: Flag) -> inspect.Parameter:
    default = "" if flag.default in (None, "") else f" [{flag.default}]"
    option = typer.Option(
        None,
        f"--{flag.name}",
        metavar=flag.value_shown,
        help=f"{flag.help}{' [required]' if flag.required else default}",
        show_default=False,
    )
    return _keyword(flag.field, str | None, option)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
