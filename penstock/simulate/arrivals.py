"""When the sessions of an open load begin."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from random import Random

import msgspec

from penstock.errors import ConfigError
from penstock.simulate.workload import ClientSession

PATTERNS = ("poisson", "constant", "bursts")

BURST_EVERY_S = 60.0
BURST_S = 10.0
BURST_FACTOR = 4.0
"""Of `bursts`: every minute, ten seconds at four times the rate of the rest."""

_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_RATE = re.compile(rf"(?P<first>{_NUMBER})(?:\.\.(?P<last>{_NUMBER}))?(?:/(?P<unit>[smh]))?")
_UNIT_S = {None: 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


class RateRange(msgspec.Struct, frozen=True):
    """Sessions that begin per second, at the beginning and at the end of a run."""

    first_per_s: float
    last_per_s: float

    @classmethod
    def parse(cls, text: str) -> RateRange:
        """`10`, `10/s`, `600/m`, or `5..20/s` for one that grows (or falls) evenly. Raises ConfigError."""
        match = _RATE.fullmatch(text)
        try:
            assert match is not None
            seconds = _UNIT_S[match["unit"]]
            first = float(match["first"]) / seconds
            last = float(match["last"]) / seconds if match["last"] else first
        except (AssertionError, ValueError):
            raise ConfigError(f"rate: `{text}` is not like `10/s`, `600/m` or `5..20/s`") from None
        if first <= 0 or last <= 0:
            raise ConfigError(f"rate: `{text}` must be above 0")
        return cls(first, last)


def begin(
    sessions: Iterable[ClientSession], rate: RateRange, pattern: str, duration_s: float, seed: int
) -> Iterator[ClientSession]:
    """The sessions with the times at which they begin, from 0 to `duration_s`.

    Args:
        pattern: one of PATTERNS.
    """
    rng = Random(f"{seed}/arrivals")
    at_s = 0.0
    for session in sessions:
        if at_s >= duration_s:
            return
        yield msgspec.structs.replace(session, at_s=at_s)
        per_s = rate.first_per_s + (rate.last_per_s - rate.first_per_s) * at_s / duration_s
        if pattern == "bursts":
            quiet = 1 / (1 + (BURST_FACTOR - 1) * BURST_S / BURST_EVERY_S)  # so that the mean is the rate
            per_s *= quiet * (BURST_FACTOR if at_s % BURST_EVERY_S < BURST_S else 1.0)
        at_s += 1 / per_s if pattern == "constant" else rng.expovariate(per_s)
