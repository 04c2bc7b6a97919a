"""`penstock key`: makes an API key, and its line for a frontend's keys file."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("key")(key)


def key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is, in logs and metrics.")],
    hash_stdin: Annotated[
        bool, typer.Option("--hash", help="Hash a key from standard input instead of making one.")
    ] = False,
) -> None:
    """Make an API key. Its line for --api-keys-file goes to standard output, the key to standard error."""
    from penstock.frontend.http.api_keys import key_line, new_key

    if hash_stdin:
        print(key_line(name, sys.stdin.readline().strip()))
        return
    made = new_key()
    line = key_line(name, made)
    print(f"key of {name}, shown this once: {made}", file=sys.stderr)
    print(line)
