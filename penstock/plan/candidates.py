"""The graphs that a plan chooses from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from penstock.engines.settings import SchedulerSettings
from penstock.plan.kinds import WorkerKind
from penstock.simulate.run import SimulatedGraph

RATIOS = 8
"""Most ratios of prefill to decode workers that are tried of one kind."""

BATCH_TOKENS = 8192
SMALL_BATCH_TOKENS = 2048
"""Most tokens of an engine step: vLLM's default for a server on large GPUs, and fewer, with which prompts
delay the tokens of others less."""


class PlannedGraph(msgspec.Struct, frozen=True):
    """A graph of equal workers."""

    kind: WorkerKind
    aggregated: int = 0
    prefill: int = 0
    decode: int = 0
    policy: str = "kv"
    max_batch_tokens: int = BATCH_TOKENS

    @property
    def workers(self) -> int:
        return self.aggregated + self.prefill + self.decode

    @property
    def gpus(self) -> int:
        return self.workers * self.kind.gpus

    @property
    def name(self) -> str:
        """For people, such as `6 prefill + 2 decode`."""
        if self.aggregated:
            return f"{self.aggregated} aggregated"
        return f"{self.prefill} prefill + {self.decode} decode"

    def graph(self, cache_factor: float = 1.0) -> SimulatedGraph:
        """It, for a simulation; with another size of the workers' caches where a factor is given."""
        return SimulatedGraph(
            aggregated=self.aggregated,
            prefill=self.prefill,
            decode=self.decode,
            cost_model=self.kind.cost_model,
            cache_tokens=int(cache_factor * self.kind.cache_tokens),
            scheduler=SchedulerSettings(max_batch_tokens=self.max_batch_tokens),
            kv_bytes_per_token=self.kind.kv_bytes_per_token,
        )


class Form(msgspec.Struct, frozen=True):
    """Graphs of one kind of worker that differ in their number of workers only."""

    kind: WorkerKind
    prefill_share: float = 0.0  # of the workers; 0: all are aggregated

    @property
    def least(self) -> int:
        """The fewest workers that it can have."""
        return 2 if self.prefill_share else 1

    def of(self, workers: int) -> PlannedGraph:
        """With so many workers."""
        if not self.prefill_share:
            return PlannedGraph(self.kind, aggregated=workers)
        prefill = min(max(1, round(self.prefill_share * workers)), workers - 1)
        return PlannedGraph(self.kind, prefill=prefill, decode=workers - prefill)


def forms(kinds: Iterable[WorkerKind]) -> list[Form]:
    """Those from which the smallest graph is chosen."""
    return [Form(kind, share) for kind in kinds for share in (0.0, 0.25, 0.5, 0.75)]


def layouts(kinds: Iterable[WorkerKind], gpus: int) -> list[PlannedGraph]:
    """All ways to divide so many GPUs among workers of one kind, as many as there is room for."""
    return [candidate for kind in kinds for candidate in _layouts(kind, gpus // kind.gpus)]


def _layouts(kind: WorkerKind, workers: int) -> Iterator[PlannedGraph]:
    if workers:
        yield PlannedGraph(kind, aggregated=workers)
    ratios = min(RATIOS, workers - 1)
    prefill = {round(workers * (number + 1) / (ratios + 1)) for number in range(ratios)}
    for count in sorted(prefill):
        yield PlannedGraph(kind, prefill=count, decode=workers - count)


def variants(candidate: PlannedGraph, policies: Iterable[str]) -> list[PlannedGraph]:
    """The same graph with other settings."""
    replace = msgspec.structs.replace
    return [
        replace(candidate, max_batch_tokens=SMALL_BATCH_TOKENS),
        *(replace(candidate, policy=policy) for policy in policies if policy != candidate.policy),
    ]
