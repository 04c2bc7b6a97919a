"""What a worker's steps and pulls cost, measured by the worker itself while it works.

Model. A step takes

    step_ms + prefill_token_ms * n + prefill_context_ms * P + decode_request_ms * b + decode_context_ms * D

where n prompt tokens are computed in it, with P tokens before each of them, added up (core/prompt_work.py),
and b requests decode, with D tokens of context together. A pull takes
`transfer_ms + transfer_block_ms * blocks`. In both, ms = c . f with coefficients c >= 0 and features f.
Attention has terms of its own because on large GPUs it costs as much as everything else once contexts are
tens of thousands of tokens long: without them, long prompts look like a slow machine.

Fit. Least squares with exponential forgetting (Ljung, System Identification, 1999, section 11.2), kept as
the sums of its normal equations. An observation is weighted by the inverse square of what it usually takes,
so that a decode step of 2 ms says as much as a prefill step of 400 ms. The fit minimizes

    sum(weight * (ms - c . f)^2) + ANCHOR * noise * sum((c_i / (level * reference_i) - 1)^2)

where `reference` is a slow average of earlier coefficients, `level` is the one factor by which the
reference fits all observations best (1 for a coefficient that the observations say nothing about), and
`noise` is the mean squared relative residual. So what the mix of work cannot tell apart keeps its ratio,
and in heavy noise no coefficient becomes 0 by chance. (A container with a tenth of a core runs five decode
steps and then stands still for 90 ms.) The fit aims at the mean and not at the median: regular stalls are
part of what a step takes. What was never exercised keeps its prior, which should be low rather than high:
what seems cheap is tried, and then known.

Outliers. An observation that took far longer than the others of the last blocks is cut, see OUTLIER.

Changes. Forgetting alone would need hundreds of steps to believe that a machine became 10 times slower. So
after every block of observations the latest 1, 2, 4 and 8 blocks are compared with what the settled part of
the fit, from observations older than 8 blocks, predicts for them. Let m be the mean ratio of the times of k
observations to these predictions, and s^2 its variance. The whole machine has changed by the factor m if m
is outside the dead band and

    (m - 1)^2 > SIGNIFICANT^2 * ((s^2 + noise) / k + noise * leverage)

This is Welch's t-test, with the uncertainty of the prediction added: `leverage` is g' M^-1 g for the mean
relative features g of those observations and the settled products M. Above MAX_LEVERAGE, observations like
these were hardly seen before: they tell something about their own coefficients and nothing about the
machine. After a change, everything older is taken as if it had been measured on a machine m times slower.
Where coefficients do not change alike, see MISFIT.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from heapq import nlargest
from operator import add, mul
from typing import NamedTuple

from penstock.shapes import Rates

FORGETTING = 0.9995
"""Weight of an observation relative to the next one: the last 2,000 count, a minute of decoding or many of
long prompts. They hold enough of every kind of work to tell what each part costs, so that equal workers
measure the same. Changes of the whole machine need no forgetting."""

BLOCK = 8
"""Observations between two solutions, and the least in which a change is seen."""

LEAST_BLOCK = 4
LONG_MS = 1000.0
"""A block of at least so many observations is closed when they have taken so long: a change need not wait
for eight steps of seconds."""

BLOCKS = 8
"""Blocks that are compared with what is older."""

SIGNIFICANT = 3.0
"""Standard errors by which recent observations must differ from their prediction to show a change."""

DEAD_BAND = 1.8
"""A change is a factor of more than this, and of more than 3 within a single block. What a step really
takes is not quite linear; where the mix of work changes, that alone makes factors of 1.3."""

UNREMARKABLE = 1.25
"""No change is looked for while the mean ratio of the latest block's times to their predictions is less
than this from 1."""

MAX_LEVERAGE = 1 / 8
"""Above this, the settled fit has seen fewer than 8 observations like these."""

MISFIT = 0.25
EXPLAINED = 1 / 8
"""If the mean squared relative residual of the blocks is more than MISFIT, and that of a fit to them alone
is less, and less than EXPLAINED of it, then some coefficients have changed and others have not: what is
older is dropped. Noise that no coefficients explain is none of this."""

KEPT_AFTER_CHANGE = 64.0
"""Observations for which everything before a change counts: few enough that
coefficients which did not change alike are learned soon."""

ALIKE = 0.5
"""Largest relative spread of a single block's times for which it shows a change by itself."""

LEAST = Rates(0.1, 0.0002, 0.0002, 0.2, 0.005, 1e-8, 1e-7)
"""What rates never fall below: nothing is free, and large GPUs take three times as long at least."""

ANCHOR = 3.0
"""How many observations the reference counts for where the noise is as large as the times themselves."""

UNUSUAL = 4.0
"""Factor by which what a step usually takes may differ from its prediction, in its weight."""

LEAST_SHARE = 0.3
"""Of a step, in which the reference of a coefficient is measured where it is less: one that seems to cost
nothing may turn out to."""

REFERENCE_GAIN = 1 / 64
"""Weight of the latest solution in the reference, once there were as many: it remembers
500 observations."""

NOISE_START = 0.25
NOISE_FLOOR = 0.0025
NOISE_GAIN = 0.08
"""The squared relative residual: at first, at least, and the weight of the latest block in it."""

RARE = 2
OUTLIER = 2.0
"""An observation counts for at most as much, relative to its prediction, as the largest of the last
BLOCK * BLOCKS ones but RARE, and is not cut below OUTLIER times its prediction: what comes rarely, such as
a prompt on a decode worker, is learned by and by."""

OUTPUTS = 100
"""Outputs that count in their mean length."""

_TINY_MS = 1e-6
_ROUNDING = 1e-9  # relative, on the diagonal: far above what rounding can take from it


class _Sums:
    """Of some observations: their number, and the weighted sum of each product of two numbers of
    `(ms, *features)`, row by row of the upper triangle. Their normal equations are in these."""

    __slots__ = ("count", "products", "size")

    def __init__(self, size: int) -> None:
        self.size = size  # number of features
        self.count = 0.0
        self.products = [0.0] * ((size + 1) * (size + 2) // 2)

    def add(self, observations: Sequence[Sequence[float]], weights: Sequence[float]) -> None:
        """More observations, each as `(ms, *features)`."""
        columns = list(zip(*observations, strict=True))
        weighted = [list(map(mul, weights, column)) for column in columns]
        products = [_dot(row, column) for i, row in enumerate(weighted) for column in columns[i:]]
        self.products = list(map(add, self.products, products))
        self.count += len(weights)

    def merge(self, other: _Sums, weight: float = 1.0) -> None:
        """All observations of another, each with `weight` times its own."""
        self.count += other.count
        self.products = [
            mine + weight * its for mine, its in zip(self.products, other.products, strict=True)
        ]

    def scale(self, *, weight: float = 1.0, ms: float = 1.0) -> None:
        """Multiply all weights and all times."""
        self.count *= weight
        self.products = [value * weight for value in self.products]
        self.products[0] *= ms * ms
        self.products[1 : self.size + 1] = [value * ms for value in self.targets]

    @property
    def squares(self) -> float:
        """The sum of weight * ms * ms."""
        return self.products[0]

    @property
    def targets(self) -> list[float]:
        """For each feature, the sum of weight * feature * ms."""
        return self.products[1 : self.size + 1]

    def matrix(self) -> list[list[float]]:
        """For each two features, the sum of weight * feature * feature."""
        rows: list[list[float]] = []
        start = self.size + 1
        for i in range(self.size):
            rows.append([row[i] for row in rows] + self.products[start : start + self.size - i])
            start += self.size - i
        return rows

    def evenness(self, predictions: Sequence[float]) -> float:
        """By how much to multiply weights so that they are relative to these predictions, as `_squared`
        makes them of coefficients."""
        predicted = _dot(self.products, predictions)
        return self.count / predicted if predicted > 0.0 else 1.0

    def residual(self, coefficients: Sequence[float]) -> float:
        """The mean squared residual, relative to these predictions."""
        squares = _dot(self.products, _squared(coefficients, -1.0))
        return max(0.0, squares) * self.evenness(_squared(coefficients)) / self.count


class Fit:
    """Coefficients of `ms = sum(coefficient * feature)`, estimated while observations arrive.

    Args:
        prior: the coefficients before any.
        least: what they never fall below.
    """

    def __init__(self, prior: Sequence[float], least: Sequence[float]) -> None:
        self.coefficients = list(prior)
        self._least = least
        self._reference = list(prior)
        self._solutions = 0
        self._settlements = 0
        self._noise = NOISE_START
        self._settled = _Sums(len(prior))  # observations older than the blocks
        self._blocks: deque[_Sums] = deque()
        self._latest: list[tuple[float, ...]] = []  # observations that are in no block yet: (ms, *features)
        self._latest_ms = 0.0  # sum of their times
        self._ratios: deque[float] = deque(
            maxlen=BLOCK * BLOCKS
        )  # of those in blocks, to their predictions

    def observe(self, features: Sequence[float], ms: float) -> None:
        """Something with these features took so long."""
        self._latest.append((ms, *features))
        self._latest_ms += ms
        count = len(self._latest)
        if count == BLOCK or (count >= LEAST_BLOCK and self._latest_ms >= LONG_MS):
            factor = self._close_block()
            if not 1.0 / UNREMARKABLE <= factor <= UNREMARKABLE:
                self._follow_change()
            self._follow_misfit()
            self._solve()
            if len(self._blocks) == BLOCKS:
                self._settle(self._blocks.popleft())

    def _close_block(self) -> float:
        """Make a block of the latest observations, what is far too long cut. Returns the mean ratio of
        their times to the predictions."""
        predicted = [_TINY_MS + _dot(self.coefficients, features) for _, *features in self._latest]
        ratios = [ms / it for (ms, *_), it in zip(self._latest, predicted, strict=True)]
        self._ratios.extend(ratios)
        longest = max(ratios)
        if longest > OUTLIER:
            longest = max(OUTLIER, nlargest(RARE + 1, self._ratios)[-1])
        observations, weights = [], []
        for (_, *features), it, ratio in zip(self._latest, predicted, ratios, strict=True):
            usual = min(max(_dot(self._reference, features), it / UNUSUAL), it * UNUSUAL)
            observations.append((min(ratio, longest) * it, *features))
            weights.append(1.0 / (usual * usual))
        block = _Sums(len(self._least))
        block.add(observations, weights)
        self._blocks.append(block)
        self._latest.clear()
        self._latest_ms = 0.0
        return sum(ratios) / len(ratios)

    def _solve(self) -> None:
        total = self._even(self.coefficients, self._settled, *self._blocks)
        noise = self._noise
        if self._settled.count < BLOCK * BLOCKS:  # too few to know the noise by
            noise = max(NOISE_FLOOR, total.residual(self.coefficients))
        self.coefficients = self._solved(*self._anchored(total, noise))
        self._solutions += 1
        gain = max(REFERENCE_GAIN, 1.0 / (self._solutions + 1))
        for i, coefficient in enumerate(self.coefficients):
            self._reference[i] += gain * (coefficient - self._reference[i])

    def _settle(self, block: _Sums) -> None:
        """This block is compared with what is older no more, but part of it."""
        self._settlements += 1
        gain = max(NOISE_GAIN, 1.0 / self._settlements)
        self._noise += gain * (block.residual(self.coefficients) - self._noise)
        self._noise = max(self._noise, NOISE_FLOOR)
        self._settled.scale(weight=FORGETTING**block.count)
        self._settled = self._even(self.coefficients, self._settled, block)

    def _even(self, coefficients: Sequence[float], *parts: _Sums) -> _Sums:
        """The parts together, with weights relative to the predictions of these coefficients."""
        total, predictions = _Sums(len(self._least)), _squared(coefficients)
        for part in parts:
            total.merge(part, part.evenness(predictions))
        return total

    def _anchored(self, sums: _Sums, noise: float) -> tuple[list[list[float]], list[float]]:
        """The normal equations with the reference's part."""
        reference, products, targets = self._reference, sums.matrix(), sums.targets
        own = _dot(sums.products, _squared(reference))
        level = _dot(reference, targets) / own if own > 0.0 else 1.0
        for i, value in enumerate(reference):
            seen = products[i][i] * value * value  # as many steps as would consist of nothing else
            value *= (1.0 + seen * level) / (1.0 + seen)
            whole = math.sqrt(sums.count / products[i][i]) if products[i][i] else 0.0
            weight = ANCHOR * noise / max(value, LEAST_SHARE * whole, _TINY_MS) ** 2
            products[i][i] += weight + _ROUNDING * products[i][i]
            targets[i] += weight * value
        return products, targets

    def _solved(self, products: list[list[float]], targets: list[float]) -> list[float]:
        """The coefficients that solve these equations, none of them below its least."""
        above = [target - _dot(row, self._least) for row, target in zip(products, targets, strict=True)]
        return [
            least + it for least, it in zip(self._least, _solve_non_negative(products, above), strict=True)
        ]

    # --- changes of the machine -------------------------------------------------------------------

    def _follow_change(self) -> None:
        """Take everything older for measured on a slower or faster machine, if the latest blocks say so."""
        if not self._settled.count:
            return
        products, targets = self._anchored(self._even(self.coefficients, self._settled), self._noise)
        settled = self._solved(products, targets)
        recent, predictions = _Sums(len(settled)), _squared(settled)
        for number, block in enumerate(reversed(self._blocks), start=1):
            recent.merge(block, block.evenness(predictions))
            if number & (number - 1) == 0:
                factor = self._changed(recent, settled, products)
                if factor != 1.0:
                    self._change(factor, number, settled)
                    return

    def _changed(self, recent: _Sums, settled: list[float], products: list[list[float]]) -> float:
        """How much slower than predicted recent observations were; 1 when that may be chance.

        Args:
            recent: their sums, with weights relative to the predictions of `settled`.
            settled: coefficients from what is older.
            products: the matrix of their equations.
        """
        count = recent.count
        factor = _dot(settled, recent.targets) / count
        band = max(DEAD_BAND, 1.0 + 2.0 * BLOCK / count)
        if 1.0 / band <= factor <= band:
            return 1.0
        features = [_dot(row, settled) / count for row in recent.matrix()]
        leverage = _dot(features, _solve([list(row) for row in products], list(features)))
        if leverage > MAX_LEVERAGE:
            return 1.0
        variance = max(0.0, recent.squares / count - factor * factor) * count / (count - 1.0)
        if count <= BLOCK and variance > (ALIKE * factor) ** 2:
            return 1.0  # it may have begun within this block
        error = (variance + self._noise) / count + self._noise * leverage
        return factor if (factor - 1.0) ** 2 > SIGNIFICANT**2 * error else 1.0

    def _change(self, factor: float, blocks: int, settled: list[float]) -> None:
        """The machine is slower by `factor`, since so many blocks."""
        self.coefficients = [value * factor for value in settled]
        self._reference = [value * factor for value in self._reference]
        self._settled.scale(weight=min(1.0, KEPT_AFTER_CHANGE / self._settled.count), ms=factor)
        older = [self._blocks.popleft() for _ in range(len(self._blocks) - blocks)]
        for block in older[:-1]:  # it may have begun within the last of them
            block.scale(ms=factor)
        self._blocks.extendleft(reversed(older[:-1]))
        self._ratios = deque((ratio / factor for ratio in self._ratios), self._ratios.maxlen)

    def _follow_misfit(self) -> None:
        """Drop what is older than the blocks if it keeps the fit from explaining them."""
        squares = sum((ratio - 1.0) ** 2 for ratio in self._ratios)
        if len(self._blocks) < BLOCKS or squares < EXPLAINED * MISFIT * len(self._ratios):
            return  # the usual case, and less work than to know it exactly
        recent = self._even(self.coefficients, *self._blocks)
        misfit = recent.residual(self.coefficients)
        if misfit < MISFIT:
            return
        alone = self._solved(*self._anchored(recent, NOISE_FLOOR))
        if recent.residual(alone) < min(MISFIT, EXPLAINED * misfit):
            self._settled = _Sums(len(self._least))
            self._settlements = 0


def _squared(coefficients: Sequence[float], ms: float = 0.0) -> list[float]:
    """What `_Sums.products` is to be multiplied with for the sum of
    weight * (ms * time + coefficients . features)^2."""
    all_of_them = (ms, *coefficients)
    return [
        left * right * (2.0 if j else 1.0)
        for i, left in enumerate(all_of_them)
        for j, right in enumerate(all_of_them[i:])
    ]


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(map(mul, left, right), 0.0)


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


class StepWork(NamedTuple):
    """What one engine step computes: n, P, b and D of the model."""

    prefill_tokens: int = 0
    prefill_context_tokens: float = 0.0
    decode_requests: int = 0
    decode_context_tokens: int = 0


class StepTimes:
    """Measures a worker's `Rates` from its own steps and pulls, and how long its outputs are."""

    def __init__(self, prior: Rates | None = None) -> None:
        prior = prior or Rates()
        self._steps = Fit(_steps(prior), _steps(LEAST))
        self._pulls = Fit(_pulls(prior), _pulls(LEAST))
        self._outputs = 0
        self.output_tokens = 0.0
        """Of an output, on average over the last OUTPUTS; 0 before any has ended."""

    def observe(self, work: StepWork, ms: float) -> None:
        """An engine step computed this and took `ms`."""
        if ms > 0.0 and work.prefill_tokens + work.decode_requests > 0:
            self._steps.observe((1.0, *work), ms)

    def observe_transfer(self, blocks: int, ms: float) -> None:
        """A pull of this many blocks took `ms`, from asking to the last byte."""
        if ms > 0.0:
            self._pulls.observe((1.0, blocks), ms)

    def observe_output(self, tokens: int) -> None:
        """An output ended after so many tokens."""
        self._outputs += 1
        self.output_tokens += (tokens - self.output_tokens) / min(OUTPUTS, self._outputs)

    def rates(self) -> Rates:
        """The estimate as of the latest solution."""
        step, prefill_token, prefill_context, decode_request, decode_context = self._steps.coefficients
        transfer, transfer_block = self._pulls.coefficients
        return Rates(
            step,
            prefill_token,
            decode_request,
            transfer,
            transfer_block,
            prefill_context,
            decode_context,
        )


def _steps(rates: Rates) -> tuple[float, ...]:
    return (
        rates.step_ms,
        rates.prefill_token_ms,
        rates.prefill_context_ms,
        rates.decode_request_ms,
        rates.decode_context_ms,
    )


def _pulls(rates: Rates) -> tuple[float, ...]:
    return rates.transfer_ms, rates.transfer_block_ms
