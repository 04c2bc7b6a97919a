"""What a request would cost on a worker, in milliseconds predicted from the worker's measured rates.

For a worker with rates r, b = running + waiting requests and q prompt tokens still to compute:

    step_ms(b)   = r.step_ms + r.decode_request_ms * b
    compute(n)   = r.prefill_token_ms * n + ceil(n / STEP_TOKENS) * step_ms(b)
    queue_ms     = compute(q), plus the wait for a place when all are taken, or for blocks
    prefill_ms   = compute(uncached),  uncached = max(1, prompt - overlap), the last token at least
    inflicted_ms = max(1, b) * r.prefill_token_ms * (uncached + QUEUE_SHARE * q)
    decode_ms    = expected_output_tokens * step_ms(b + 1)
    transfer_ms  = r.transfer_ms + r.transfer_block_ms * blocks that are not there yet

`inflicted_ms` is what prompts cost the requests that decode there: while one is computed, all of them
stall. One is assumed even on an idle worker: by the end of a long prompt another may have come. A
millisecond of another request's delay counts as much as one of its own.

Every term is a time because the parts differ by orders of magnitude: on Qwen3-32B (2 x H200) computing
an uncached prompt token takes 46 us once, keeping it resident 0.03 us a step. A cost that counts blocks
of both kinds alike, however it weighs them, gives up cached prefixes for balance that nobody feels.
"""

from __future__ import annotations

import msgspec

from penstock.core.pairing import KvFormat
from penstock.shapes import Load, Role

STEP_TOKENS = 8192
"""Prompt tokens that an engine is assumed to compute in one step (`max_num_batched_tokens` of vLLM on a
large GPU). It only sets how many steps a prompt rides on; where it is too large that errs by less than
where it is too small."""

QUEUE_SHARE = 0.3
"""How much of a worker's queue counts as stalling its requests on account of this one. Strictly nothing
does, since it is there already, and that is best for conversations while every turn fits in the caches.
All of it, as in LMetric (arXiv 2603.15202), spreads better when most prompts are new. Simulated on both
kinds of load, 0.3 stays within 5 % of the better one's mean time to first token."""

EXPECTED_OUTPUT_TOKENS = 256
"""Output length until some were seen: between the means of two public conversation traces, 211 (Azure 2023)
and 343 (Mooncake)."""

GROWTH_SHARE = 0.25
"""Of the mean output: blocks kept free of newcomers for each running request. Half of an output is still to
come on average, but others end meanwhile. On one simulated Qwen3-32B (2 x H200) that is short of blocks,
with outputs of 1,150 tokens after prompts of 125, it takes away 6 of 7 preemptions and half of the time
between tokens, for 7 % of the throughput; with outputs of 225 tokens, for 2 %."""

LENGTHS_FORGETTING = 0.99
LENGTHS_PRIOR = 8.0
"""Weight of an output's length relative to the next one's, so that the last 100 or so count, and of what is
expected before any was seen, in outputs."""


class Query(msgspec.Struct, frozen=True):
    """The request to place. `ordinal` counts this router's requests, for round-robin. `handed`: the
    prompt's KV, of this format, waits on a prefill worker; a decode worker that reads it computes none of
    it. `max_itl_ms`: the longest mean time between tokens that a worker should be brought to; 0: any."""

    prompt_tokens: int
    ordinal: int = 0
    expected_output_tokens: float = EXPECTED_OUTPUT_TOKENS
    handed: KvFormat | None = None
    max_itl_ms: float = 0.0


class Candidate(msgspec.Struct, frozen=True):
    """A worker that may take the request: its load as the router assumes it, with its rates, and how
    many of the prompt's first blocks it has."""

    instance_id: str
    role: Role
    load: Load
    block_size: int
    overlap_blocks: int = 0
    max_running: int = 0  # requests that it serves at one time; 0: not known
    prompt_tokens: float = 0.0  # that a request gives it to compute, on average
    output_tokens: float = 0.0  # the same for its output; 0: not known
    kv_format: KvFormat = KvFormat()  # a prefill worker goes first for a decode worker with the same one


class Costs(msgspec.Struct, frozen=True, gc=False):
    """The terms for one candidate, in milliseconds."""

    candidate: Candidate
    uncached_tokens: int
    queue_ms: float
    prefill_ms: float
    inflicted_ms: float
    transfer_ms: float
    decode_ms: float

    @property
    def ready_ms(self) -> float:
        """Until it has computed the prompt."""
        return self.queue_ms + self.prefill_ms


def costs(query: Query, candidate: Candidate) -> Costs:
    """Score one candidate."""
    load, rates = candidate.load, candidate.load.rates
    requests = load.running + load.waiting
    step_ms = rates.step_ms + rates.decode_request_ms * requests
    token_ms = rates.prefill_token_ms
    # At least one: the logits of the last prompt token give the first output token.
    uncached = max(1, query.prompt_tokens - candidate.overlap_blocks * candidate.block_size)
    missing = max(0, -(-query.prompt_tokens // candidate.block_size) - candidate.overlap_blocks)
    queued = load.prefill_tokens
    return Costs(
        candidate=candidate,
        uncached_tokens=uncached,
        queue_ms=token_ms * queued + _steps(queued) * step_ms + _blocked_ms(query, candidate, missing),
        prefill_ms=token_ms * uncached + _steps(uncached) * step_ms,
        inflicted_ms=max(1, requests) * token_ms * (uncached + QUEUE_SHARE * queued),
        transfer_ms=rates.transfer_ms + rates.transfer_block_ms * missing,
        decode_ms=query.expected_output_tokens * (step_ms + rates.decode_request_ms),
    )


def _steps(tokens: int) -> int:
    return -(-tokens // STEP_TOKENS)


def _blocked_ms(query: Query, candidate: Candidate, needed_blocks: int) -> float:
    """How long until there are a place and blocks for it; 0 while there are enough.

    Requests that each keep theirs for `stay_ms` give back those of one every stay_ms / running; the
    waiting ones are served first. On a prefill worker a stay lasts until the decode worker has pulled; on
    the others, for the whole output.
    """
    stay_tokens = _stay_tokens(query, candidate)
    load, rates = candidate.load, candidate.load.rates
    ahead = 0  # how many must end, or be served, before it can begin
    if candidate.max_running:
        ahead = max(0, load.running + load.waiting + 1 - candidate.max_running)
    free = load.total_blocks - load.used_blocks
    if candidate.role.decodes and load.running:
        free -= int(GROWTH_SHARE * stay_tokens * load.running / candidate.block_size)
    if load.total_blocks and free < needed_blocks:
        ahead = max(ahead, load.waiting + 1)
    if not ahead:
        return 0.0
    if candidate.role is Role.PREFILL:
        stay_ms = rates.transfer_ms + rates.transfer_block_ms * needed_blocks
    else:
        stay_ms = stay_tokens * (rates.step_ms + rates.decode_request_ms * load.running)
        # The prompts of those that begin meanwhile.
        stay_ms += load.running * rates.prefill_token_ms * candidate.prompt_tokens
    return ahead * stay_ms / max(1, load.running + load.held_handoffs)


def _stay_tokens(query: Query, candidate: Candidate) -> float:
    """How long the outputs are of requests that have a place there already, as far as that is known."""
    return max(1.0, candidate.output_tokens or query.expected_output_tokens)


def crowded(query: Query, candidate: Candidate) -> bool:
    """Whether one request more would bring the time between tokens there beyond `max_itl_ms`.

    With b of them, each step takes step_ms + b * decode_request_ms. While one of them gets its n tokens, b
    others begin, each with p prompt tokens to compute, and all wait for that: the mean time between tokens
    is step_ms + b * (decode_request_ms + prefill_token_ms * p / n). A single one is never too many.
    """
    if not query.max_itl_ms:
        return False
    rates, requests = candidate.load.rates, candidate.load.running + candidate.load.waiting
    prompt_ms = rates.prefill_token_ms * candidate.prompt_tokens / _stay_tokens(query, candidate)
    itl_ms = rates.step_ms + (requests + 1) * (rates.decode_request_ms + prompt_ms)
    return requests > 0 and itl_ms > query.max_itl_ms


class OutputLengths:
    """How long outputs are, on average, by model and tenant."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], tuple[float, float]] = {}  # of tokens, and of weights

    def ended(self, model: str, tenant: str, tokens: int, prior: float) -> None:
        """An output ended after so many tokens; `prior`: what was expected before any had."""
        total, weight = self._sums.get((model, tenant), (prior * LENGTHS_PRIOR, LENGTHS_PRIOR))
        self._sums[model, tenant] = total * LENGTHS_FORGETTING + tokens, weight * LENGTHS_FORGETTING + 1.0

    def forget(self, model: str) -> None:
        self._sums = {key: sums for key, sums in self._sums.items() if key[0] != model}

    def mean(self, model: str, tenant: str) -> float | None:
        """In tokens; at least 1. None: none has ended."""
        total, weight = self._sums.get((model, tenant), (0.0, 0.0))
        return max(1.0, total / weight) if weight else None
