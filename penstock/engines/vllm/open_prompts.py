"""What is left to compute of the prompts that vLLM has not answered yet.

vLLM says how many tokens a step computed, and not of which prompt. But its KV events name each block that
it has cached: those that a prompt would find while it waits, and then, one after the other, those that it
computes. So the leading blocks of a prompt that are cached are what there is of it, in either case, and the
count stays right when some are evicted meanwhile. Without events a prompt counts in full until its first
token.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from penstock.core.hashing import root_hash, sequence_hashes
from penstock.core.prompt_work import PromptWork, prompt_work
from penstock.shapes import EngineCard


@dataclass(slots=True)
class _OpenPrompt:
    length: int
    hashes: list[int]  # of the blocks before its last token, which is always computed
    blocks: int = 0  # of these, the first so many are cached


class OpenPrompts:
    """Prompts that went to vLLM and whose first token has not come.

    Args:
        cached: the sequence hashes of the blocks that vLLM has cached now.
    """

    def __init__(self, card: EngineCard, cached: Container[int]) -> None:
        self._card = card
        self._cached = cached
        self._open: dict[str, _OpenPrompt] = {}  # by core id

    def cached_tokens(self, token_ids: list[int], cache_salt: str) -> int:
        """About how many of a prompt's first tokens vLLM would take from its cache now."""
        prompt = self._prompt(token_ids, cache_salt)
        self._follow(prompt)
        return prompt.blocks * self._card.block_size

    def begin(self, core_id: str, token_ids: list[int], cache_salt: str, *, scored: bool) -> int:
        """A prompt goes to vLLM; `scored`: all of it is computed, whatever is cached. Returns about how
        many of its tokens will be computed."""
        prompt = _OpenPrompt(len(token_ids), []) if scored else self._prompt(token_ids, cache_salt)
        self._follow(prompt)
        self._open[core_id] = prompt
        return self._work(prompt).tokens

    def end(self, core_id: str) -> None:
        """Its first token came, or it is gone. Unknown ones are ignored."""
        self._open.pop(core_id, None)

    def work(self) -> PromptWork:
        """What is left to compute of all of them, going by what is cached now."""
        tokens = context_tokens = 0
        for prompt in self._open.values():
            self._follow(prompt)
            work = self._work(prompt)
            tokens += work.tokens
            context_tokens += work.context_tokens
        return PromptWork(tokens, context_tokens)

    def _prompt(self, token_ids: list[int], cache_salt: str) -> _OpenPrompt:
        size = self._card.block_size
        whole = (len(token_ids) - 1) // size * size
        root = root_hash(self._card.model.name, cache_salt)
        return _OpenPrompt(len(token_ids), sequence_hashes(token_ids[:whole], size, root))

    def _follow(self, prompt: _OpenPrompt) -> None:
        blocks, hashes, cached = prompt.blocks, prompt.hashes, self._cached
        while blocks and hashes[blocks - 1] not in cached:  # vLLM evicts a prefix from its end, too
            blocks -= 1
        while blocks < len(hashes) and hashes[blocks] in cached:
            blocks += 1
        prompt.blocks = blocks

    def _work(self, prompt: _OpenPrompt) -> PromptWork:
        return prompt_work(prompt.blocks * self._card.block_size, prompt.length)
