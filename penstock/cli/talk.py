"""`penstock chat`: a conversation in the terminal with a running frontend; and which one that is."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from penstock.errors import ConfigError, PenstockError

DEFAULT_URL = "http://localhost:8000"

_GREETING = "Chat with {model} at {url}. /reset forgets, /exit (or Ctrl-D) ends, Ctrl-C stops an answer."


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("chat")(chat)


def chat(
    message: Annotated[
        str | None, typer.Argument(metavar="[MESSAGE]", help="Ask this and end; without it, converse.")
    ] = None,
    url: Annotated[
        str, typer.Option(metavar="URL", help="The frontend, or unix:/PATH. [the running graph's]")
    ] = "",
    model: Annotated[str, typer.Option(metavar="NAME", help="Which model. [the first one served]")] = "",
    system: Annotated[str, typer.Option(metavar="TEXT", help="System message.")] = "",
    max_tokens: Annotated[int | None, typer.Option(metavar="N", help="Most tokens of an answer.")] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="X", help="0 is greedy. [the model's]")
    ] = None,
    api_key: Annotated[
        str,
        typer.Option(
            metavar="KEY", envvar="PENSTOCK_API_KEY", show_envvar=False, help="Key of the frontend."
        ),
    ] = "",
) -> None:
    """Chat with a model in the terminal."""
    from penstock.cli.chat import ChatClient, Conversation, converse

    client = ChatClient(url or running_url(), api_key)
    options = {"max_tokens": max_tokens, "temperature": temperature}
    conversation = Conversation(
        client, model or client.first_model(), system, {k: v for k, v in options.items() if v is not None}
    )
    if message is not None:
        conversation.say(message, sys.stdout)
        return
    prompt = ""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives input() editing and history

        print(_GREETING.format(model=conversation.model, url=client.url))
        prompt = "> "
    converse(conversation, lambda: input(prompt), sys.stdout, sys.stderr)


def at_running_graph(command: Callable[..., None]) -> Callable[..., None]:
    """The same command, with the running graph's frontend for a `url` that is not given."""

    @functools.wraps(command)
    def run(**options: Any) -> None:
        command(**options | {"url": options["url"] or running_url()})

    return run


def running_url() -> str:
    """The first frontend of the graph that runs here, if one does. Raises ConfigError when several do."""
    from penstock.launcher.control import ControlRequest, call
    from penstock.launcher.state import running_states, state_root

    running = running_states(state_root(os.environ))
    if len(running) > 1:
        names = ", ".join(folder.graph for folder in running)
        raise ConfigError(
            f"several graphs run here ({names}): choose one's --url, as `penstock status` shows it"
        )
    try:
        status = call(running[0], ControlRequest(op="status")).status if running else None
    except PenstockError:
        return DEFAULT_URL
    return next(iter(status.health), DEFAULT_URL) if status else DEFAULT_URL
