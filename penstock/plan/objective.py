"""What a plan must reach."""

from __future__ import annotations

import re

import msgspec

from penstock.bench.measurements import Slo
from penstock.errors import ConfigError

SHARE = 0.9
"""Of the requests that must meet the limits, where nothing is said: published comparisons use it."""

_TIME = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)(?P<unit>ms|s)", re.ASCII)
_PERCENT = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)%", re.ASCII)
_UNIT_MS = {"ms": 1.0, "s": 1e3}


class Objective(msgspec.Struct, frozen=True):
    """Limits on latency, and the share of requests that must meet them."""

    slo: Slo
    share: float = SHARE

    @classmethod
    def parse(cls, text: str) -> Objective:
        """`ttft=2s,itl=25ms`, with `share=95%` for another share than SHARE. Raises ConfigError."""
        given: dict[str, str] = {}
        for part in text.split(","):
            name, equals, value = part.strip().partition("=")
            if not equals or name not in ("ttft", "itl", "share") or name in given:
                raise ConfigError(f"slo: `{text}` is not like ttft=2s,itl=25ms,share=95%")
            given[name] = value.strip()
        limits = {name: _ms(name, given[name]) for name in ("ttft", "itl") if name in given}
        if not limits:
            raise ConfigError(f"slo: `{text}` limits neither ttft nor itl")
        return cls(Slo(limits.get("ttft"), limits.get("itl")), _share(given.get("share", f"{SHARE:%}")))

    def __str__(self) -> str:
        limits = {"ttft": self.slo.ttft_ms, "itl": self.slo.itl_ms}
        parts = [f"{name}={ms:g}ms" for name, ms in limits.items() if ms is not None]
        return ",".join([*parts, f"share={100 * self.share:g}%"])


def _ms(name: str, text: str) -> float:
    match = _TIME.fullmatch(text)
    if match is None or not float(match["number"]):
        raise ConfigError(f"slo: {name}: expected a time such as 2s or 25ms, got `{text}`")
    return float(match["number"]) * _UNIT_MS[match["unit"]]


def _share(text: str) -> float:
    match = _PERCENT.fullmatch(text)
    share = float(match["number"]) / 100 if match is not None else 0.0
    if not 0 < share <= 1:
        raise ConfigError(f"slo: share: expected more than 0% and at most 100%, got `{text}`")
    return share
