"""The rates that decisions go by: workers that are about equally fast have the same ones.

Each worker fits five rates to the steps that it happened to take. The fit is right for such steps, and less
so for others: equal machines differ by a quarter in what it says of them, and one that only ever had short
prompts may take long ones for three times as slow, is given none, and never learns better. Differences that
are not there also make some workers busier than others.

So decisions go by the medians of the workers of one model and role. Where a worker's own rates say that the
steps it takes now cost over SAME times more, or less, than by the medians, it is slower or faster indeed,
and all its rates of that kind are the medians times that factor.

A worker that has had few attempts yet has hardly measured anything, and reports little else than what every
worker begins with: a guess that may be ten times off. It is taken for as fast as the others, and does not
count in the medians. By the guess it would get most prompts at first where the model is slower than that;
where it is faster, none as long as others are idle, so that it would never measure itself.

Until one of a role has had so many, each goes by what it reports, but for what is still that guess: there
it is taken for as fast as the workers of this model that have measured anything, whatever their role. By
the guess a prefill worker that has had no prompt looks twice as fast as decode workers that know better, on
slow engines 50 times, and gets prompts that they have cached. Workers of another role may be other
machines, so what a worker has measured of itself goes before what others have.

Pure: no IO, no clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

import msgspec

from penstock.core.costs import compute_ms, step_ms
from penstock.core.worker_load import WorkerLoad
from penstock.shapes import Card, Rates, Role

REPORTS = 32
"""Of a worker, from one look at its rates to the next: a second or less while it is busy. At first, when
they change most, there are more looks."""

SAME = 1.25
"""By how many times equal machines may differ in what their rates say of the same step."""

MEASURED_ATTEMPTS = 32
"""Attempts after which a worker's rates tell of itself."""

USUAL_PROMPT_TOKENS = 1000.0
"""Computed of a prompt, where a worker has had none yet."""

GUESSED = 0.01
"""How near to what every worker begins with a rate is not measured yet, relatively: a prompt that comes
computed moves it a little, as one token of it is computed again."""

_GUESSES = Rates()

_OF_ANY_ROLE = ("step_ms", "prefill_token_ms", "prefill_context_ms")  # prefill workers never decode

_MEASURED = (
    "step_ms",
    "prefill_token_ms",
    "decode_request_ms",
    "prefill_context_ms",
    "decode_context_ms",
)


@dataclass(slots=True, eq=False)
class _ModelWorkers:
    """The workers of one model."""

    pools: dict[Role, _AlikeWorkers] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)  # medians of the rates that some have measured

    def look(self) -> None:
        """See what they have measured by now."""
        reported = [load.reported.rates for pool in self.pools.values() for load in pool.loads.values()]
        for name in _OF_ANY_ROLE:
            known = [getattr(rates, name) for rates in reported if not _is_guessed(rates, name)]
            if known:
                self.measured[name] = median(known)

    def set_rates(self) -> list[str]:
        """Of all of them. Returns their names."""
        for pool in self.pools.values():
            for load in pool.loads.values():
                pool.set_rates(load)
        return [instance_id for pool in self.pools.values() for instance_id in pool.loads]

    def completed(self, rates: Rates) -> Rates:
        """With what others have measured, where these are still guessed."""
        others = {name: ms for name, ms in self.measured.items() if _is_guessed(rates, name)}
        return msgspec.structs.replace(rates, **others) if others else rates


@dataclass(slots=True, eq=False)
class _AlikeWorkers:
    """The workers of one model and role."""

    key: tuple[str, Role]
    model: _ModelWorkers
    loads: dict[str, WorkerLoad] = field(default_factory=dict)  # by instance
    medians: Rates | None = None  # of those that have measured themselves; None: none has
    reports: int = 0

    def look(self) -> None:
        """See what they have measured by now."""
        measured = [load.reported.rates for load in self.loads.values() if _has_measured(load)]
        if measured:
            self.medians = _medians(measured)

    def set_rates(self, load: WorkerLoad) -> None:
        """Of one of them, once some are known."""
        if self.medians is not None:
            load.rates = self.model.completed(_rates(load, self.medians))
        elif self.model.measured:
            load.rates = self.model.completed(load.reported.rates)


class PoolRates:
    """Sets `WorkerLoad.rates` of connected workers."""

    def __init__(self) -> None:
        self._models: dict[str, _ModelWorkers] = {}
        self._pools_of: dict[str, _AlikeWorkers] = {}  # by instance

    def up(self, card: Card, load: WorkerLoad) -> None:
        """A worker is connected."""
        self.down(card.instance_id)
        key = card.model.name, card.role
        model = self._models.setdefault(card.model.name, _ModelWorkers())
        pool = model.pools.setdefault(card.role, _AlikeWorkers(key, model))
        self._pools_of[card.instance_id] = pool
        pool.loads[card.instance_id] = load
        pool.set_rates(load)

    def down(self, instance_id: str) -> None:
        """A worker is gone. Unknown ones are ignored."""
        pool = self._pools_of.pop(instance_id, None)
        if pool is not None:
            del pool.loads[instance_id]
            if not pool.loads:
                name, role = pool.key
                del pool.model.pools[role]
                if not pool.model.pools:
                    del self._models[name]

    def reported(self, instance_id: str) -> Iterable[str]:
        """A worker's load arrived. Returns those whose rates it has set."""
        pool = self._pools_of[instance_id]
        pool.reports += 1
        if _due(pool.reports, REPORTS * len(pool.loads)):
            all_measured = all(it.medians is not None for it in pool.model.pools.values())
            pool.look()
            pool.model.look()
            if not all_measured:
                return pool.model.set_rates()
        load = pool.loads[instance_id]
        if pool.medians is None or _due(load.reports, REPORTS):
            pool.set_rates(load)
        return (instance_id,)


def _due(reports: int, every: int) -> bool:
    """Whether it is time for a look: at powers of two, and then regularly."""
    return not reports % every or not reports & (reports - 1)


def _is_guessed(rates: Rates, name: str) -> bool:
    return math.isclose(getattr(rates, name), getattr(_GUESSES, name), rel_tol=GUESSED)


def _has_measured(load: WorkerLoad) -> bool:
    return load.reported.submitted >= MEASURED_ATTEMPTS


def _medians(own: list[Rates]) -> Rates:
    return Rates(**{name: median([getattr(rates, name) for rates in own]) for name in _MEASURED})


def _rates(load: WorkerLoad, medians: Rates) -> Rates:
    """The medians, times how much slower this worker is where that is more than chance. What concerns its
    transfers is its own."""
    own, requests = load.reported.rates, max(1, load.reported.running)
    tokens = load.prompt_tokens or USUAL_PROMPT_TOKENS
    context = load.reported.context_tokens
    before = load.prompt_context_tokens if load.prompt_tokens else tokens * tokens / 2
    decodes = computes = 1.0
    if _has_measured(load):
        decodes = _factor(step_ms(own, requests, context), step_ms(medians, requests, context))
        computes = _factor(compute_ms(own, tokens, before), compute_ms(medians, tokens, before))
    return msgspec.structs.replace(
        own,
        step_ms=decodes * medians.step_ms,
        decode_request_ms=decodes * medians.decode_request_ms,
        decode_context_ms=decodes * medians.decode_context_ms,
        prefill_token_ms=computes * medians.prefill_token_ms,
        prefill_context_ms=computes * medians.prefill_context_ms,
    )


def _factor(own_ms: float, medians_ms: float) -> float:
    """How many times slower; 1 for a difference that says nothing."""
    factor = own_ms / medians_ms if medians_ms else 1.0
    return 1.0 if 1 / SAME <= factor <= SAME else factor
