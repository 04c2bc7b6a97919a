"""What simulated engines draw. Unless a load says what an answer has in common with later prompts, its
tokens are all the same one, which no other request has: so prompts have in common what texts would have.
"""

from __future__ import annotations

from penstock.engines.batch import BatchRow, Sampled, Sequence


class OwnTokens:
    """A runner whose tokens are the request's seed, or what `answers` has for this seed."""

    def __init__(self) -> None:
        self.answers: dict[int, list[int]] = {}

    def run(self, batch: list[BatchRow]) -> list[Sampled | None]:
        """As Runner.run."""
        return [Sampled(self.following(row.sequence, 1)[0]) if row.sample else None for row in batch]

    def following(self, sequence: Sequence, count: int) -> list[int]:
        """The next tokens of a sequence."""
        seed = sequence.sampling.seed
        answer = self.answers.get(seed)
        if answer is None:
            return [seed] * count
        begin = len(sequence.token_ids) - sequence.prompt_len
        return answer[begin : begin + count]
