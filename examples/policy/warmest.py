"""A routing policy: the workers that have most of the prompt cached, unless they are busy."""

from collections.abc import Sequence
from random import Random

from penstock.core.costs import Candidate, Query

MOST_REQUESTS = 32


def warmest(query: Query, pool: Sequence[Candidate], rng: Random) -> Sequence[Candidate]:
    """Of the workers with fewer than MOST_REQUESTS requests, those that have most of the prompt cached. The
    cheapest of what is returned gets the request (docs/design.md)."""
    free = [worker for worker in pool if worker.requests < MOST_REQUESTS] or pool
    most = max(worker.cached_tokens for worker in free)
    return [worker for worker in free if worker.cached_tokens == most]
