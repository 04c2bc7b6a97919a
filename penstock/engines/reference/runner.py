"""The reference engine's runner: the model and the sampler behind one call."""

from __future__ import annotations

from collections.abc import Sequence as Items

from penstock.engines.batch import BatchRow, Sampled
from penstock.engines.reference.model import Model
from penstock.engines.reference.sampler import Sampler


class ReferenceRunner:
    """Implements `penstock.engines.batch.Runner`."""

    def __init__(self, model: Model, eos_token_ids: Items[int]) -> None:
        self._model = model
        self._sampler = Sampler(eos_token_ids)

    def run(self, batch: list[BatchRow]) -> list[Sampled | None]:
        """Compute all rows; one entry per row, None where `sample` is not set."""
        logits = self._model.logits(batch)
        drawn = iter(self._sampler.sample(logits, [row.sequence for row in batch if row.sample]))
        return [next(drawn) if row.sample else None for row in batch]
