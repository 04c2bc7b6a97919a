"""What a request would cost on a worker, in milliseconds predicted from the worker's measured rates.

For a worker with rates r, b = running + waiting requests with D tokens of context, and q prompt tokens
still to compute with Q tokens before each, added up:

    step_ms(b, D)  = r.step_ms + r.decode_request_ms * b + r.decode_context_ms * D
    compute(n, P)  = r.prefill_token_ms * n + r.prefill_context_ms * P
    ride(n)        = ceil(n / STEP_TOKENS) * step_ms(b, D)
    queue_ms       = what is left of the step under way; for what it leaves of the prompts compute(q, Q)
                     and the steps that they and this one need more than this one alone; and the wait
                     for a place when all are taken, or for blocks
    prefill_ms     = compute(n, P) + ride(n),  n = max(1, prompt - overlap), the last token at least,
                     and P as in core/prompt_work.py
    inflicted_ms   = OUTPUT_SHARE * (b + 1) * compute(n, P); on a decode worker IDLE_SHARE of that at least
    decode_ms      = o * step_ms(b + 1, D + prompt + o / 2),  o = expected_output_tokens
    transfer_ms    = r.transfer_ms + r.transfer_block_ms * blocks that are not there yet
    itl_ms(b, D)   = step_ms(b, D) + (b - 1) * compute(u, U) / o
    kept(b, D)     = 1 / (1 + exp((itl_ms(b, D) / slo_itl_ms - 1) / ITL_SPREAD))
    missed(b, D)   = b * (kept(b, D) - kept(b + 1, D + prompt)) + 1 - kept(b + 1, D + prompt)
    missed_ms      = MISS_SHARE * compute(u, U) * missed(b, D),  u and U as above, of all workers together

`inflicted_ms` is what the prompt costs the requests that decode there: while it is computed, all of them
stall. It counts for one more than there are: by the end of a long prompt another may have come, and on a
decode worker, to which prompts come computed, several. Like this request's own `decode_ms`, it delays
outputs, which counts OUTPUT_SHARE of what delays a first token.

`itl_ms` is the mean time between tokens there with b requests: while one gets its o tokens, each of the
others ends and is followed by one with u prompt tokens to compute on average, and all wait for that.
`kept` is the chance that a request meets the objective for this time, and `missed` how many more will miss
it with this request than without. Below the objective this spreads requests evenly. Once not all workers
can meet it, it brings some to their limit and lets the rest pile up on others, instead of all missing it.
Each miss counts as a part of the time that the usual prompt takes to compute: a fixed time would be nothing
beside prompts of seconds, and outweigh all waiting beside prompts of milliseconds.

Every term is a time because the parts differ by orders of magnitude: on Qwen3-32B (2 x H200) computing
an uncached prompt token takes 46 us once, and as much again behind 28,000 others; keeping it resident
takes 0.03 us a step. A cost that counts blocks of both kinds alike, however it weighs them, gives up cached
prefixes for balance that nobody feels.
"""

from __future__ import annotations

from math import exp

import msgspec

from penstock.core.pairing import KvFormat
from penstock.core.prompt_work import NO_WORK, PromptWork, context_before, part_of
from penstock.core.worker_load import StepUnderWay
from penstock.shapes import Load, Rates, Role

STEP_TOKENS = 8192
"""Prompt tokens that an engine is assumed to compute in one step (`max_num_batched_tokens` of vLLM on a
large GPU). It only sets how many steps a prompt rides on; where it is too large that errs by less than
where it is too small."""

OUTPUT_SHARE = 0.15
"""How much a millisecond of an output, of this request or another, counts of one until the first token:
more gives better times between tokens in overload, less a better time to first token."""

IDLE_SHARE = 0.5
"""The least that computing a prompt on a decode worker counts, of its own time. So idle prefill workers get
prompts whose KV moves in less than half of the time that they take."""

MISS_SHARE = 0.5
"""What a request costs that misses the objective for its time between tokens, of computing the prompt that
requests have on average."""

ITL_SPREAD = 0.2
"""How far the times between tokens of a worker's requests are from what is predicted, relatively."""

OFF_OBJECTIVE = 50.0
"""Where exp() need not be computed any more."""

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
    it. `slo_itl_ms`: the mean time between tokens that requests should have at most; 0: any.
    `usual_prompt`: what a request of its model gives workers to compute, on average; nothing while that is
    not known. `waiting_for_prefill`: requests that wait in the frontend, for each prefill worker that there
    is; `waiting_for_decode`: for each of the others."""

    prompt_tokens: int
    ordinal: int = 0
    expected_output_tokens: float = EXPECTED_OUTPUT_TOKENS
    handed: KvFormat | None = None
    slo_itl_ms: float = 0.0
    usual_prompt: PromptWork = NO_WORK
    session: str = ""  # as in Request
    computed_elsewhere: bool = False  # prefill workers compute the prompts of decode workers
    waiting_for_prefill: float = 0.0
    waiting_for_decode: float = 0.0


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
    prompt_context_tokens: float = 0.0  # over these: how many are before each
    output_tokens: float = 0.0  # the same for its output; 0: not known
    kv_format: KvFormat = KvFormat()  # a prefill worker goes first for a decode worker with the same one
    distrusted: str = ""  # why its overlap is only what was sent to it; empty: its events tell it
    step_tokens: int = STEP_TOKENS  # most prompt tokens that its engine computes in a step
    step: StepUnderWay | None = None  # None: it computes nothing, or what is not known

    @property
    def requests(self) -> int:
        """That it has, running and waiting."""
        return self.load.running + self.load.waiting

    @property
    def cached_tokens(self) -> int:
        """Of the prompt, that it has in whole blocks."""
        return self.overlap_blocks * self.block_size

    def uncached_tokens(self, query: Query) -> int:
        """Prompt tokens that it would have to compute: at least one, as the logits of the last one give the
        first output token."""
        return max(1, query.prompt_tokens - self.overlap_blocks * self.block_size)


class Costs(msgspec.Struct, frozen=True, gc=False):
    """The terms for one candidate, in milliseconds."""

    candidate: Candidate
    uncached_tokens: int
    queue_ms: float
    prefill_ms: float
    inflicted_ms: float
    transfer_ms: float
    decode_ms: float
    missed_ms: float

    @property
    def ready_ms(self) -> float:
        """Until it has computed the prompt."""
        return self.queue_ms + self.prefill_ms


def costs(query: Query, candidate: Candidate) -> Costs:
    """Score one candidate."""
    load, output = candidate.load, query.expected_output_tokens
    rates, requests, context = load.rates, load.running + load.waiting, load.context_tokens
    uncached = candidate.uncached_tokens(query)
    missing = max(0, -(-query.prompt_tokens // candidate.block_size) - candidate.overlap_blocks)
    now_ms = step_ms(rates, requests, context)
    prompt_ms = compute_ms(rates, uncached, context_before(uncached, query.prompt_tokens))
    idle_share = IDLE_SHARE if candidate.role is Role.DECODE else 0.0
    return Costs(
        candidate=candidate,
        uncached_tokens=uncached,
        queue_ms=_queued_ms(candidate, uncached, now_ms) + _blocked_ms(query, candidate, missing),
        prefill_ms=prompt_ms + _steps(uncached) * now_ms,
        inflicted_ms=max(OUTPUT_SHARE * (requests + 1), idle_share) * prompt_ms,
        transfer_ms=rates.transfer_ms + rates.transfer_block_ms * missing,
        decode_ms=output * step_ms(rates, requests + 1, context + query.prompt_tokens + output / 2),
        missed_ms=_missed_ms(query, candidate, now_ms),
    )


def step_ms(rates: Rates, requests: float, context_tokens: float) -> float:
    """A step in which so many requests decode, and nothing else."""
    return rates.step_ms + rates.decode_request_ms * requests + rates.decode_context_ms * context_tokens


def compute_ms(rates: Rates, tokens: float, context_tokens: float) -> float:
    """What prompt tokens with so many before them, added up, add to the steps that they ride on."""
    return rates.prefill_token_ms * tokens + rates.prefill_context_ms * context_tokens


def _steps(tokens: int) -> int:
    return -(-tokens // STEP_TOKENS)


def _queued_ms(candidate: Candidate, uncached: int, now_ms: float) -> float:
    """How much later a prompt with so many tokens to compute is computed for those that are there now.
    `now_ms`: a step without it."""
    load, step, under_way_ms = candidate.load, candidate.step, 0.0
    if step is not None:
        under_way_ms = max(0.0, now_ms + compute_ms(load.rates, *step.prompts) - step.elapsed_ms)
    if not load.prefill_tokens and not load.prefill_context_tokens:
        return under_way_ms
    following = _following(candidate)
    more_steps = _steps(following.tokens + uncached) - _steps(uncached)
    return under_way_ms + compute_ms(load.rates, *following) + more_steps * now_ms


def _following(candidate: Candidate) -> PromptWork:
    """What its step under way leaves of the prompts there."""
    load, now = candidate.load, candidate.step.prompts if candidate.step is not None else NO_WORK
    return PromptWork(load.prefill_tokens - now.tokens, load.prefill_context_tokens - now.context_tokens)


def decode_step_ms(candidate: Candidate, more_tokens: int | None = None) -> float:
    """A step there in which nothing but decoding happens; of one request more, if it has so many tokens."""
    load, more = candidate.load, more_tokens is not None
    return step_ms(load.rates, candidate.requests + more, load.context_tokens + (more_tokens or 0))


def shared_ms(candidate: Candidate) -> float:
    """How much of `queue_ms` passes in the step in which one prompt more would begin: the last step that
    the prompts there need has room for it."""
    following = _following(candidate)
    last = part_of(following, following.tokens % candidate.step_tokens)
    return compute_ms(candidate.load.rates, *last)


def _blocked_ms(query: Query, candidate: Candidate, needed_blocks: int) -> float:
    """How long until there are a place and blocks for it; 0 while there are enough.

    Requests that each keep theirs for `stay_ms` give back those of one every stay_ms / running; the
    waiting ones are served first. On a prefill worker a stay lasts until the decode worker has pulled; on
    the others, for the whole output.
    """
    load, decodes = candidate.load, candidate.role.decodes
    running, total_blocks = load.running, load.total_blocks
    ahead = 0  # how many must end, or be served, before it can begin
    if candidate.max_running:
        ahead = max(0, running + load.waiting + 1 - candidate.max_running)
    free = total_blocks - load.used_blocks
    if running and decodes:
        free -= int(GROWTH_SHARE * _stay_tokens(query, candidate) * running / candidate.block_size)
    if total_blocks and free < needed_blocks:
        ahead = max(ahead, load.waiting + 1)
    if not ahead:
        return 0.0
    rates = load.rates
    if decodes:
        stay_ms = _stay_tokens(query, candidate) * step_ms(rates, running, load.context_tokens)
        # The prompts of those that begin meanwhile.
        stay_ms += running * _usual_prompt_ms(candidate)
    else:
        stay_ms = rates.transfer_ms + rates.transfer_block_ms * needed_blocks
    return ahead * stay_ms / max(1, running + load.held_handoffs)


def _usual_prompt_ms(candidate: Candidate) -> float:
    """What computing the prompt of a request there adds to steps, on average."""
    return compute_ms(candidate.load.rates, candidate.prompt_tokens, candidate.prompt_context_tokens)


def _stay_tokens(query: Query, candidate: Candidate) -> float:
    """How long the outputs are of requests that have a place there already, as far as that is known."""
    return max(1.0, candidate.output_tokens or query.expected_output_tokens)


def itl_ms(query: Query, candidate: Candidate) -> float:
    """The mean time between tokens there with this request.

    With b of them and their context, each step takes step_ms(b, D). While one of them gets its n tokens,
    each of the others ends and another begins, with its prompt to compute, for which all wait: the mean
    time between tokens is step_ms(b, D) + (b - 1) * compute(prompt) / n.
    """
    load, others = candidate.load, candidate.requests
    stall_ms = others * _usual_prompt_ms(candidate) / _stay_tokens(query, candidate)
    return step_ms(load.rates, others + 1, load.context_tokens + query.prompt_tokens) + stall_ms


def _missed_ms(query: Query, candidate: Candidate, now_ms: float) -> float:
    """What the requests cost that miss the objective for the time between tokens on account of this one.
    `now_ms`: a step without it."""
    if not query.slo_itl_ms or not candidate.role.decodes:
        return 0.0
    load = candidate.load
    requests, context = load.running + load.waiting, load.context_tokens + query.prompt_tokens
    then_ms = step_ms(load.rates, requests + 1, context)
    miss_ms = MISS_SHARE * compute_ms(load.rates, *query.usual_prompt)
    if not requests:
        return miss_ms * (1 - _kept(query, then_ms))
    usual_ms, stay_tokens = _usual_prompt_ms(candidate), _stay_tokens(query, candidate)
    then = _kept(query, then_ms + requests * usual_ms / stay_tokens)
    before = _kept(query, now_ms + (requests - 1) * usual_ms / stay_tokens)
    return miss_ms * (requests * (before - then) + 1 - then)


def _kept(query: Query, its_ms: float) -> float:
    """The chance to meet the objective where so long is predicted."""
    return 1 / (1 + exp(min((its_ms / query.slo_itl_ms - 1) / ITL_SPREAD, OFF_OBJECTIVE)))


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
