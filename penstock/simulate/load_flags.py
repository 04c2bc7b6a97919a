"""The flags that describe a load, the same for every command that simulates one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from typer import Option

from penstock.errors import ConfigError
from penstock.simulate.arrivals import PATTERNS, RateRange
from penstock.simulate.generators import GENERATORS
from penstock.simulate.run import WorkloadSettings


@dataclass(frozen=True)
class LoadFlags:
    """What was given of them: a field for each."""

    trace: Annotated[Path | None, Option(help="Load: a Mooncake .jsonl[.gz] or Azure .csv[.gz] trace.")] = (
        None
    )
    generator: Annotated[str, Option("--load", help=f"Load, if no trace: {', '.join(GENERATORS)}.")] = (
        "chat"
    )
    rate: Annotated[str | None, Option(help="Open loop: sessions that begin, e.g. 5/s, or 2..20/s.")] = None
    arrival: Annotated[str, Option(help=f"With --rate: {', '.join(PATTERNS)}.")] = "poisson"
    users: Annotated[int | None, Option(min=1, help="Closed loop: users at once.")] = None
    duration: Annotated[float, Option(min=1.0, help="If no trace: virtual seconds to send for.")] = 600.0
    requests: Annotated[int, Option(min=0, help="Of a trace: only the first; 0: all.")] = 0
    prompt_tokens: Annotated[int | None, Option(min=1, help="New tokens of a request.")] = None
    output_tokens: Annotated[int | None, Option(min=1, help="Tokens of an answer.")] = None
    shared_tokens: Annotated[int, Option("--shared-prefix-tokens", min=0, help="System prompt of all.")] = 0

    def workload(self) -> WorkloadSettings:
        """The load that they describe. Raises ConfigError for one that makes no sense."""
        if self.trace is not None:
            if self.rate is not None or self.users is not None:
                raise ConfigError("trace: it has its own arrival times; leave out --rate and --users")
            return WorkloadSettings(trace=self.trace, requests=self.requests)
        if self.generator not in GENERATORS:
            raise ConfigError(f"load: `{self.generator}` is none of {', '.join(GENERATORS)}")
        if self.arrival not in PATTERNS:
            raise ConfigError(f"arrival: `{self.arrival}` is none of {', '.join(PATTERNS)}")
        if (self.rate is None) == (self.users is None):
            raise ConfigError("rate: give either --rate (sessions per second) or --users (at one time)")
        return WorkloadSettings(
            generator=self.generator,
            rate=RateRange.parse(self.rate) if self.rate is not None else None,
            pattern=self.arrival,
            users=self.users,
            duration_s=self.duration,
            lengths=self._lengths(),
        )

    def _lengths(self) -> dict[str, int]:
        """Arguments of the generator."""
        lengths = {
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "shared_tokens": self.shared_tokens,
        }
        given = {name: tokens for name, tokens in lengths.items() if tokens}
        for name in given.keys() - signature(GENERATORS[self.generator]).parameters.keys():
            flag = {"shared_tokens": "shared-prefix-tokens"}.get(name, name.replace("_", "-"))
            raise ConfigError(f"{flag}: the load `{self.generator}` has lengths of its own")
        return given


def with_load_flags(command: Callable[..., None]) -> Callable[..., None]:
    """A command with these flags before its own, of one that takes a LoadFlags as its first argument."""
    names = [field.name for field in fields(LoadFlags)]
    kinds = get_type_hints(LoadFlags, include_extras=True)
    flags = [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=kinds[field.name])
        for field in fields(LoadFlags)
    ]
    _, *own = signature(command, eval_str=True).parameters.values()
    own = [flag.replace(kind=Parameter.KEYWORD_ONLY) for flag in own]

    @wraps(command)
    def with_flags(**given: Any) -> None:
        load = LoadFlags(**{name: given.pop(name) for name in names})
        command(load, **given)

    # What Typer makes flags of.
    with_flags.__signature__ = signature(command).replace(parameters=[*flags, *own])  # type: ignore[attr-defined]
    with_flags.__annotations__ = {flag.name: flag.annotation for flag in [*flags, *own]}
    return with_flags
