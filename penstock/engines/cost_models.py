"""How long a step takes on real GPUs, as fitted formulas. The figures and their source are in
cost_models.json, and those of other workers in files that `penstock calibrate` writes.

Of a batch: n new tokens of prompts, each prompt's p tokens before them; B decoding requests with S tokens
of context together. In ms:

    prompts only      c0 + c1 * n + c2 * sum(n * (p + n / 2))
    decoding only     a0 + a1 * B + a2 * S
    both              max(a0, c0 + c1 * n) + c2 * sum(n * (p + n / 2)) + a1 * B + a2 * S

The weights are read once, whoever needs them: hence the maximum.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import msgspec

from penstock.engines.batch import BatchRow
from penstock.errors import ConfigError

ZERO = "zero"
"""The name of the model whose steps take no time."""


class CostModel(msgspec.Struct, frozen=True):
    """One model on one kind of GPU at one tensor parallel size; coefficients as above."""

    c0: float = 0.0
    c1: float = 0.0
    c2: float = 0.0
    a0: float = 0.0
    a1: float = 0.0
    a2: float = 0.0

    def step_ms(self, batch: Sequence[BatchRow]) -> float:
        """How long this batch takes."""
        new_tokens = requests = context_tokens = 0
        attended = 0.0
        for row in batch:
            if row.count == 1:
                requests += 1
                context_tokens += row.start + 1
            else:
                new_tokens += row.count
                attended += row.count * (row.start + row.count / 2)
        prompts_ms = self.c0 + self.c1 * new_tokens if new_tokens else 0.0
        weights_ms = max(self.a0 if requests else 0.0, prompts_ms)
        return weights_ms + self.c2 * attended + self.a1 * requests + self.a2 * context_tokens

    def steps_ms(self, batch: Sequence[BatchRow], steps: int) -> float:
        """How long so many steps take, of which the first computes this batch, and each of the others the
        next token of each row. Where there are several, all rows decode."""
        longer = self.a2 * len(batch) * steps * (steps - 1) / 2 if steps > 1 else 0.0
        return steps * self.step_ms(batch) + longer


class MeasuredCosts(msgspec.Struct):
    """What `penstock calibrate` writes: the costs of one worker, and what it is."""

    costs: CostModel
    model: str
    gpus: int  # of the worker
    cache_tokens: int
    ttft_error: float  # the median of |predicted / measured - 1|, of prompts that were alone
    itl_error: float  # the same, of the mean time per token of batches

    @classmethod
    def read(cls, path: Path) -> MeasuredCosts:
        """Raises ConfigError for a file that is none of these."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigError(f"cost model: {path}: {error}") from None


class _File(msgspec.Struct):
    models: dict[str, CostModel]


def cost_models() -> dict[str, CostModel]:
    """All models by name, such as `qwen3-32b/h200/tp2`."""
    content = resources.files(__package__).joinpath("cost_models.json").read_bytes()
    return {ZERO: CostModel(), **msgspec.json.decode(content, type=_File).models}


def cost_model(name: str) -> CostModel:
    """The model of this name, or of a file whose name ends with .json. Raises ConfigError with the names
    there are."""
    if name.endswith(".json"):
        return MeasuredCosts.read(Path(name)).costs
    models = cost_models()
    if name not in models:
        raise ConfigError(f"unknown cost model {name!r}; there are: {', '.join(sorted(models))}")
    return models[name]
