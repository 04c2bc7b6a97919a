"""Load: what a worker's steps cost (StepTimes), and what a frontend may assume it has to do (LoadBook)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from penstock.structs import Load, Rates

FORGETTING = 0.995
"""Weight of an observation relative to the next one: the last 200 or so count. A worker's mix of work
and its neighbours on the machine change within minutes, at tens of steps a second."""

SOLVE_EVERY = 16
"""Observations between two solutions, to keep observing cheap."""

PRIOR_WEIGHT = 1.0
"""How many observations the previous estimate counts for, so that what is not exercised at the moment
(say prefill, for an hour of decoding only) stays as it was measured last."""

OUTLIER_SPREADS = 4.0
"""A residual beyond this many times the usual one counts only as this much (Huber's weights)."""

SPREAD_START = 0.5
SPREAD_FLOOR = 0.05
SPREAD_GAIN = 0.05
"""The usual relative residual: its start, its least value and how fast it follows. With residuals
clipped at OUTLIER_SPREADS it grows by at most 15 % an observation: one pause of the process changes
nothing, but a lasting change of speed by 10 is believed after 20 steps or so."""

PROMPT_GAIN = 0.02
"""Weight of the latest attempt in the mean number of prompt tokens that they bring."""

_TINY_MS = 1e-6


class _Fit:
    """Coefficients of `ms = sum(coefficient * feature)`, estimated while observations arrive.

    Recursive least squares with forgetting, in the form of normal equations. Residuals are relative to
    the prediction, so that a 2 ms decode step says as much as a 400 ms prefill step. Coefficients are
    never negative.
    """

    def __init__(self, prior: Sequence[float]) -> None:
        self.coefficients = list(prior)
        self._prior = tuple(prior)
        size = len(prior)
        self._products = [[0.0] * size for _ in range(size)]  # sums of weight * feature * feature
        self._targets = [0.0] * size  # sums of weight * feature * ms
        self._recent = [0.0] * size  # sums of features since the last solution
        self._unsolved = 0
        self._spread = SPREAD_START

    def observe(self, features: Sequence[float], ms: float) -> None:
        predicted = _TINY_MS + _dot(self.coefficients, features)
        residual = abs(ms - predicted) / predicted
        limit = OUTLIER_SPREADS * self._spread
        weight = 1.0 if residual <= limit else limit / residual
        self._spread += SPREAD_GAIN * (min(residual, limit) - self._spread)
        self._spread = max(self._spread, SPREAD_FLOOR)
        weight /= predicted * predicted
        for i, feature in enumerate(features):
            weighted = weight * feature
            row = self._products[i]
            for j, other in enumerate(features):
                row[j] = row[j] * FORGETTING + weighted * other
            self._targets[i] = self._targets[i] * FORGETTING + weighted * ms
            self._recent[i] += feature
        self._unsolved += 1
        if self._unsolved >= SOLVE_EVERY:
            self._solve()

    def _solve(self) -> None:
        anchors = [
            PRIOR_WEIGHT / max(now, first, _TINY_MS) ** 2
            for now, first in zip(self.coefficients, self._prior, strict=True)
        ]
        matrix = [list(row) for row in self._products]
        right = list(self._targets)
        for i, anchor in enumerate(anchors):
            matrix[i][i] += anchor
            right[i] += anchor * self.coefficients[i]
        before = _TINY_MS + _dot(self.coefficients, self._recent)
        self.coefficients = _solve_non_negative(matrix, right)
        after = _TINY_MS + _dot(self.coefficients, self._recent)
        self._rescale((before / after) ** 2)
        self._recent = [0.0] * len(right)
        self._unsolved = 0

    def _rescale(self, factor: float) -> None:
        """Weigh the past as if its residuals had been relative to the present prediction: otherwise the
        steps before a slowdown by 10 would count 100 times as much as those after it."""
        self._products = [[value * factor for value in row] for row in self._products]
        self._targets = [value * factor for value in self._targets]


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def _solve_non_negative(matrix: list[list[float]], right: list[float]) -> list[float]:
    """The solution of a positive definite system with its negative parts, most negative first, held at
    zero. Shapes: matrix (n, n), right (n)."""
    free = list(range(len(right)))
    while free:
        solved = _solve([[matrix[i][j] for j in free] for i in free], [right[i] for i in free])
        least = min(solved)
        if least >= 0.0:
            result = [0.0] * len(right)
            for i, value in zip(free, solved, strict=True):
                result[i] = value
            return result
        del free[solved.index(least)]
    return [0.0] * len(right)


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gaussian elimination, in place; a positive definite matrix needs no pivoting."""
    size = len(right)
    for i in range(size):
        for k in range(i + 1, size):
            factor = matrix[k][i] / matrix[i][i]
            for j in range(i, size):
                matrix[k][j] -= factor * matrix[i][j]
            right[k] -= factor * right[i]
    for i in reversed(range(size)):
        for j in range(i + 1, size):
            right[i] -= matrix[i][j] * right[j]
        right[i] /= matrix[i][i]
    return right


class StepTimes:
    """Measures a worker's `Rates` from its own steps and pulls."""

    def __init__(self, prior: Rates | None = None) -> None:
        prior = prior or Rates()
        self._steps = _Fit((prior.step_ms, prior.prefill_token_ms, prior.decode_request_ms))
        self._pulls = _Fit((prior.transfer_ms, prior.transfer_block_ms))

    def observe(self, prefill_tokens: int, decode_requests: int, ms: float) -> None:
        """An engine step computed these and took `ms`."""
        if ms > 0.0 and prefill_tokens + decode_requests > 0:
            self._steps.observe((1.0, prefill_tokens, decode_requests), ms)

    def observe_transfer(self, blocks: int, ms: float) -> None:
        """A pull of this many blocks took `ms`, from asking to the last byte."""
        if ms > 0.0:
            self._pulls.observe((1.0, blocks), ms)

    def rates(self) -> Rates:
        """The estimate as of the latest solution."""
        return Rates(*self._steps.coefficients, *self._pulls.coefficients)


class _Sent(msgspec.Struct):
    """An attempt on its way: the worker's load does not include it yet."""

    seq: int
    uncached_tokens: int
    context_tokens: int


@dataclass(slots=True)
class _Account:
    """One instance's load, as reported and as it must be by now."""

    load: Load = field(default_factory=Load)
    on_the_way: deque[_Sent] = field(default_factory=deque)  # at most what one link has in flight
    uncached_tokens: int = 0  # sums over on_the_way and booked
    context_tokens: int = 0
    booked: dict[str, int] = field(default_factory=dict)  # request id -> context tokens
    sent: int = 0  # attempts
    prompt_tokens: float = 0.0  # uncached, of an attempt: the mean of the last 50 or so


class LoadBook:
    """Every instance's load as one frontend may assume it: what the worker last reported, plus what
    this frontend sent that the report does not include, plus what it has promised to send (a request
    whose prompt is still on a prefill worker). Without the last two, a burst between two reports would
    all go to the same worker.

    Instances appear with their first use and stay until `forget`.
    """

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}

    def sent(self, instance_id: str, seq: int, uncached_tokens: int, context_tokens: int) -> None:
        """A Generate left. `seq` as in wire/messages.py; tokens of its prompt that are to be computed
        there, and all that it will have KV for."""
        account = self._account(instance_id)
        account.on_the_way.append(_Sent(seq, uncached_tokens, context_tokens))
        account.uncached_tokens += uncached_tokens
        account.context_tokens += context_tokens
        account.sent += 1
        gain = max(PROMPT_GAIN, 1 / account.sent)
        account.prompt_tokens += gain * (uncached_tokens - account.prompt_tokens)

    def prompt_tokens(self, instance_id: str) -> float:
        """How many prompt tokens an attempt sent there gives it to compute, on average."""
        account = self._accounts.get(instance_id)
        return account.prompt_tokens if account is not None else 0.0

    def reported(self, instance_id: str, seen: int, load: Load) -> None:
        """The worker's load arrived; it includes every Generate up to `seen`."""
        account = self._account(instance_id)
        account.load = load
        on_the_way = account.on_the_way
        while on_the_way and on_the_way[0].seq <= seen:
            arrived = on_the_way.popleft()
            account.uncached_tokens -= arrived.uncached_tokens
            account.context_tokens -= arrived.context_tokens

    def book(self, instance_id: str, request_id: str, context_tokens: int) -> None:
        """A request will decode there once its prefill is done. Booking again replaces the booking."""
        self.release(instance_id, request_id)
        account = self._account(instance_id)
        account.booked[request_id] = context_tokens
        account.context_tokens += context_tokens

    def release(self, instance_id: str, request_id: str) -> None:
        """The booking was used (its Generate left) or is no longer wanted. Without one: ignored."""
        account = self._accounts.get(instance_id)
        if account is not None:
            account.context_tokens -= account.booked.pop(request_id, 0)

    def forget(self, instance_id: str) -> None:
        """The link is down: nothing is known of this instance any more."""
        self._accounts.pop(instance_id, None)

    def reported_load(self, instance_id: str) -> Load:
        """What the worker itself said last."""
        account = self._accounts.get(instance_id)
        return account.load if account is not None else Load()

    def view(self, instance_id: str) -> Load:
        """The load to decide with. What is on its way or booked counts as waiting."""
        account = self._accounts.get(instance_id)
        if account is None:
            return Load()
        load = account.load
        extra = len(account.on_the_way) + len(account.booked)
        if not extra:
            return load
        return msgspec.structs.replace(
            load,
            waiting=load.waiting + extra,
            prefill_tokens=load.prefill_tokens + account.uncached_tokens,
            context_tokens=load.context_tokens + account.context_tokens,
        )

    def _account(self, instance_id: str) -> _Account:
        account = self._accounts.get(instance_id)
        if account is None:
            account = self._accounts[instance_id] = _Account()
        return account
