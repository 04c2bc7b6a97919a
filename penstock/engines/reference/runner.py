"""The reference engine's runner: the model and the sampler behind one call."""

from __future__ import annotations

from collections.abc import Sequence as Items

from penstock.engines.batch import BatchRow, Sampled
from penstock.engines.reference.grammar import Grammars, InvalidGrammar
from penstock.engines.reference.model import Model
from penstock.engines.reference.sampler import Sampler, score_prompt
from penstock.engines.reference.thinking import ThinkingMarks
from penstock.shapes import Sampling


class ReferenceRunner:
    """Implements `penstock.engines.batch.Runner`."""

    def __init__(
        self,
        model: Model,
        eos_token_ids: Items[int],
        grammars: Grammars | None = None,
        thinking: ThinkingMarks | None = None,
    ) -> None:
        """`grammars`: None when the engine has no structured output; `thinking`: when it cannot limit
        reasoning."""
        self._model = model
        self._sampler = Sampler(eos_token_ids, grammars, thinking)
        self._grammars = grammars
        self._thinking = thinking

    def run(self, batch: list[BatchRow]) -> list[Sampled | None]:
        """As Runner.run."""
        logits = self._model.logits(batch, score_prompt)
        drawn = iter(self._sampler.sample(logits, [row.sequence for row in batch if row.sample]))
        return [next(drawn) if row.sample else None for row in batch]

    def refusal(self, sampling: Sampling) -> str | None:
        """As LoadedModel.refusal: whether what the answer must look like can be compiled, and its reasoning
        can be ended."""
        if sampling.thinking_budget is not None and self._thinking is None:
            return "thinking_token_budget: the model has no tokens that begin and end its reasoning"
        if sampling.structured is not None:
            if self._grammars is None:
                return "this engine has no structured output for the model's tokenizer"
            try:
                self._grammars.begin(sampling.structured)
            except InvalidGrammar as error:
                return f"what the answer must look like is not understood: {error}"
        return None
