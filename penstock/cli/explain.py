"""`penstock explain`: why a request went to the workers that served it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from penstock.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("explain")(explain)


def explain(
    request_id: Annotated[
        str | None,
        typer.Argument(metavar="[REQUEST-ID]", help="The answer's id (chatcmpl-...), or its x-request-id."),
    ] = None,
    url: Annotated[str, typer.Option(metavar="URL", help="The frontend. [the running graph's]")] = "",
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Where a chat with this message would go now.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The same for a body of a chat or completion, JSON.")
    ] = None,
    model: Annotated[str, typer.Option(metavar="NAME", help="With --prompt. [the first one served]")] = "",
    misses: Annotated[
        bool, typer.Option("--misses", help="Where cached prompts were lost lately, and why.")
    ] = False,
    minutes: Annotated[float, typer.Option(metavar="N", help="With --misses: how far back.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    api_key: Annotated[
        str,
        typer.Option(
            metavar="KEY", envvar="PENSTOCK_API_KEY", show_envvar=False, help="Key of the frontend."
        ),
    ] = "",
) -> None:
    """Say why a request went where it did, where one would go, or where cached prompts were lost."""
    from penstock.cli.chat import ChatClient
    from penstock.cli.explain_tables import print_explanation, print_misses
    from penstock.cli.talk import running_url

    asked = [*(it is not None for it in (request_id, prompt, file)), misses]
    if sum(asked) != 1:
        raise ConfigError("explain: expected one of REQUEST-ID, --prompt, --file and --misses")
    body = _read_body(file) if file is not None else None
    client = ChatClient(url or running_url(), api_key)
    if prompt is not None:
        messages = [{"role": "user", "content": prompt}]
        body = {"model": model or client.first_model(), "messages": messages}
    if misses:
        answer = client.ask("GET", f"/v1/explain/misses?minutes={minutes:g}")
    elif body is not None:
        answer = client.ask("POST", "/v1/explain", body)
    else:
        answer = client.ask("GET", f"/v1/explain/{quote(request_id or '', safe='')}")
    if as_json:
        _print_json(answer)
    else:
        (print_misses if misses else print_explanation)(answer)


def _read_body(file: Path) -> dict[str, Any]:
    try:
        body = json.loads(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"--file: {file}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"--file: {file} is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise ConfigError(f"--file: {file}: expected a JSON object, the body of a request")
    return body


def _print_json(answer: dict[str, Any]) -> None:
    json.dump(answer, sys.stdout, indent=2)
    print()
