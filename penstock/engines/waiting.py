"""The attempts that wait for blocks, and what is left to compute of them.

What is cached of a prompt changes while it waits: others compute a part that both share, or evict what it
would have found. So each waiting attempt keeps the prefix that it would begin with, and every step looks
again at some of them, in turn: at two blocks of each, where nothing has changed.
"""

from __future__ import annotations

from bisect import insort

from penstock.core.hashing import token_bytes
from penstock.core.prompt_work import NO_WORK, PromptWork, prompt_work
from penstock.engines.active import ActiveAttempt
from penstock.engines.block_pool import BlockPool, CachedPrefix

LOOKS_PER_STEP = 4
"""Attempts that are looked at again in a step. Routers keep queues in engines about as short as that."""


class WaitingAttempts:
    """Waiting attempts of one scheduler, in the order in which they are to begin."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._attempts: list[ActiveAttempt] = []  # sorted by rank
        self._turn = 0  # where to look next
        self._tokens = 0  # sums over the attempts' `work`
        self._context_tokens = 0

    def __len__(self) -> int:
        return len(self._attempts)

    @property
    def first(self) -> ActiveAttempt:
        """The one to begin next; there is one."""
        return self._attempts[0]

    def enter(self, active: ActiveAttempt) -> None:
        """It waits from now on."""
        # One that is to score its prompt begins at its first token, whatever is cached.
        whole = (len(active.token_ids) - 1) // self._pool.block_size
        limit = 0 if active.prompt_logprobs is not None else whole
        active.packed = token_bytes(active.token_ids)
        active.prefix = CachedPrefix(active.packed, active.cache_salt, limit)
        self._pool.follow(active.prefix)
        self._count(active, self._work(active, active.prefix))
        insort(self._attempts, active, key=rank)

    def leave(self, active: ActiveAttempt) -> None:
        """It begins, or has ended."""
        self._attempts.remove(active)
        active.prefix = None
        self._count(active, NO_WORK)

    def hits(self, active: ActiveAttempt) -> list[int]:
        """The cached blocks that it can begin with now."""
        return self._look(active).block_ids

    @property
    def work(self) -> PromptWork:
        """What is left to compute of all of them, going by what was cached when each was last looked at."""
        return PromptWork(self._tokens, self._context_tokens)

    def look_again(self) -> None:
        """See what has become of the prefixes of the next few of them."""
        for _ in range(min(LOOKS_PER_STEP, len(self._attempts))):
            self._turn = (self._turn + 1) % len(self._attempts)
            self._look(self._attempts[self._turn])

    def _look(self, active: ActiveAttempt) -> CachedPrefix:
        prefix = active.prefix
        assert prefix is not None, "only a waiting attempt has a prefix"
        if self._pool.follow(prefix):
            self._count(active, self._work(active, prefix))
        return prefix

    def _count(self, active: ActiveAttempt, work: PromptWork) -> None:
        self._tokens += work.tokens - active.work.tokens
        self._context_tokens += work.context_tokens - active.work.context_tokens
        active.work = work

    def _work(self, active: ActiveAttempt, prefix: CachedPrefix) -> PromptWork:
        there, length = len(prefix.block_ids) * self._pool.block_size, len(active.token_ids)
        if active.handoff is not None:
            there = max(there, active.handoff.num_tokens)
        return prompt_work(min(there, length - 1), length)


def rank(active: ActiveAttempt) -> tuple[int, int]:
    """Sorts attempts by who goes first."""
    return active.rank
