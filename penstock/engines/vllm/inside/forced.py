"""A logits processor, in vLLM's own process, that holds the beginning of an output to known tokens.

A forced token takes part in everything: it advances the seed's draws, the penalties and the grammar, just
as if it had been drawn. So an output that was begun elsewhere goes on exactly as it would have there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

if TYPE_CHECKING:
    from vllm.config import VllmConfig

REPLAY_ARG = "penstock_replay"
"""Key in SamplingParams.extra_args: a list of token ids."""


class ForcedTokens(LogitsProcessor):  # type: ignore[misc]
    """Leaves one finite logit in each row whose output is shorter than its replay."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._device = device
        # Row of the batch -> what is forced, and vLLM's own list of the tokens put out, which grows.
        self._replays: dict[int, tuple[list[int], list[int]]] = {}
        self._forced: tuple[torch.Tensor, torch.Tensor] | None = None  # rows, and their tokens: (n), (n)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Called once a step, while the lists still have the length that they had before it."""
        process_dict_updates(self._replays, batch_update, _state)
        ended = [row for row, (replay, output) in self._replays.items() if len(output) >= len(replay)]
        for row in ended:
            del self._replays[row]
        self._forced = None
        if self._replays:
            rows = list(self._replays)
            token_ids = [replay[len(output)] for replay, output in self._replays.values()]
            self._forced = (
                torch.tensor(rows, device=self._device),
                torch.tensor(token_ids, device=self._device),
            )

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """`logits` has shape (rows, vocabulary)."""
        if self._forced is not None:
            rows, token_ids = self._forced
            logits[rows] = -float("inf")
            logits[rows, token_ids] = 0.0
        return logits


def _state(
    params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]
) -> tuple[list[int], list[int]] | None:
    replay = (params.extra_args or {}).get(REPLAY_ARG)
    return (replay, output_ids) if replay and len(output_ids) < len(replay) else None
