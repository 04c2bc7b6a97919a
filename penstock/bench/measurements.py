"""Collects the measurements of a run, and makes the report."""

from __future__ import annotations

import math
from collections import Counter

import msgspec

HISTOGRAM_MIN_S = 1e-6
HISTOGRAM_STEP = 1.01
"""Buckets are 1 % apart, so a percentile is at most 1 % wrong, and there are at most 2,500 buckets."""

_PER_LOG = 1 / math.log(HISTOGRAM_STEP)


class Histogram:
    """Durations in seconds, in buckets of equal relative width."""

    def __init__(self) -> None:
        self._buckets: Counter[int] = Counter()
        self._sum = 0.0
        self.count = 0

    def add(self, seconds: float) -> None:
        self._buckets[int(math.log(max(seconds, HISTOGRAM_MIN_S) / HISTOGRAM_MIN_S) * _PER_LOG)] += 1
        self._sum += seconds
        self.count += 1

    @property
    def mean(self) -> float:
        """Seconds; nan when empty."""
        return self._sum / self.count if self.count else math.nan

    def percentile(self, percent: float) -> float:
        """The nearest-rank percentile in seconds (the middle of its bucket); nan when empty."""
        rank = math.ceil(self.count * percent / 100)
        for bucket in sorted(self._buckets):
            rank -= self._buckets[bucket]
            if rank <= 0:
                return HISTOGRAM_MIN_S * float(HISTOGRAM_STEP ** (bucket + 0.5))
        return math.nan


class Percentiles(msgspec.Struct):
    """Percentiles in milliseconds; None if nothing was measured."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None

    @classmethod
    def of(cls, histogram: Histogram) -> Percentiles:
        if not histogram.count:
            return cls(None, None, None, None)
        seconds = (histogram.mean, *(histogram.percentile(percent) for percent in (50, 90, 99)))
        return cls(*(round(value * 1e3, 3) for value in seconds))


class RequestOutcome(msgspec.Struct):
    """The outcome of a request. The times are set if there is no `error`."""

    error: str | None = None  # a kind of failure, e.g. `http 429`, `timeout`, `disconnected`
    ttft_s: float = 0.0  # from sending to the first text
    itl_s: float = 0.0  # mean time per output token after the first
    e2e_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    output_tokens: int = 0


class Slo(msgspec.Struct, frozen=True):
    """The latency limits, in milliseconds. A request is good if it meets all limits that are set."""

    ttft_ms: float | None = None
    itl_ms: float | None = None

    def met_by(self, outcome: RequestOutcome) -> bool:
        return (
            outcome.error is None
            and (self.ttft_ms is None or outcome.ttft_s * 1e3 <= self.ttft_ms)
            and (self.itl_ms is None or outcome.itl_s * 1e3 <= self.itl_ms)
        )


class BenchReport(msgspec.Struct):
    """The report of a run. Rates are per second, from the start of the run to its last answer."""

    duration_s: float
    ok: int
    failed: int
    errors: dict[str, int]
    examples: dict[str, str]  # one message per kind of error
    ttft_ms: Percentiles
    itl_ms: Percentiles  # between chunks of text
    e2e_ms: Percentiles
    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    output_tokens: int
    prompt_tokens: int
    cached_share: float | None  # of prompt tokens; None if the server never reported cached tokens
    good_share: float | None  # of all requests; None without limits
    goodput_per_s: float | None
    client_cpu_share: float  # of one core
    client_lag_p99_ms: float | None  # how late the client's own event loop ran
    warnings: list[str]


CLIENT_CPU_LIMIT = 0.7
"""Share of a core above which the client's own delays affect the percentiles."""

CLIENT_LAG_LIMIT_MS = 20.0
"""Limit of the p99 of the event loop's lateness, which is part of every measured time."""


class Measurements:
    """The measurements of a run."""

    def __init__(self, slo: Slo | None = None) -> None:
        self.ok = 0
        self.failed = 0
        self.output_tokens = 0
        self.gaps = Histogram()
        self.lag = Histogram()
        self._slo = slo or Slo()
        self._good = 0
        self._errors: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._ttft = Histogram()
        self._e2e = Histogram()
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._prompt_tokens_with_cached = 0

    def add(self, outcome: RequestOutcome, message: str = "") -> None:
        """Add the outcome of a request. `message` describes its error."""
        if outcome.error is not None:
            self.failed += 1
            self._errors[outcome.error] += 1
            if message:
                self._examples.setdefault(outcome.error, message[:300])
            return
        self.ok += 1
        self._ttft.add(outcome.ttft_s)
        self._e2e.add(outcome.e2e_s)
        self.output_tokens += outcome.output_tokens
        self._prompt_tokens += outcome.prompt_tokens
        if outcome.cached_tokens is not None:
            self._cached_tokens += outcome.cached_tokens
            self._prompt_tokens_with_cached += outcome.prompt_tokens
        self._good += self._slo.met_by(outcome)

    def report(self, duration_s: float, client_cpu_share: float) -> BenchReport:
        duration_s = max(duration_s, HISTOGRAM_MIN_S)
        total = self.ok + self.failed
        limited = self._slo != Slo()
        with_cached = self._prompt_tokens_with_cached
        lag_ms = self.lag.percentile(99) * 1e3 if self.lag.count else None
        return BenchReport(
            duration_s=round(duration_s, 3),
            ok=self.ok,
            failed=self.failed,
            errors=dict(self._errors.most_common()),
            examples=self._examples,
            ttft_ms=Percentiles.of(self._ttft),
            itl_ms=Percentiles.of(self.gaps),
            e2e_ms=Percentiles.of(self._e2e),
            requests_per_s=self.ok / duration_s,
            output_tokens_per_s=self.output_tokens / duration_s,
            prompt_tokens_per_s=self._prompt_tokens / duration_s,
            output_tokens=self.output_tokens,
            prompt_tokens=self._prompt_tokens,
            cached_share=self._cached_tokens / with_cached if with_cached else None,
            good_share=self._good / total if limited and total else None,
            goodput_per_s=self._good / duration_s if limited else None,
            client_cpu_share=round(client_cpu_share, 3),
            client_lag_p99_ms=round(lag_ms, 3) if lag_ms is not None else None,
            warnings=_warnings(client_cpu_share, lag_ms),
        )


def _warnings(client_cpu_share: float, lag_ms: float | None) -> list[str]:
    warnings = []
    if client_cpu_share > CLIENT_CPU_LIMIT:
        warnings.append(
            f"this client used {client_cpu_share:.0%} of a core: it may be the bottleneck; "
            "run several side by side"
        )
    if lag_ms is not None and lag_ms > CLIENT_LAG_LIMIT_MS:
        warnings.append(f"this client ran up to {lag_ms:.0f} ms late (p99); times include that")
    return warnings
