"""Policies: which workers of a pool may serve a request.

A policy is a function that shortlists the workers of one pool; the cheapest plan among those wins
(core/policy.py). `kv`, the default, shortlists all of them, and so is nothing but the costs of
core/costs.py. The others are what other routers do, to compare with. Most give each worker a figure and
shortlist those with the least. With, for a worker:

    n    prompt tokens of the request that the worker would have to compute
    m    the prompt's tokens, cached or not
    q    prompt tokens that it has still to compute for others
    b    requests that it has, running and waiting
    S    tokens with KV of the running ones
    k    tokens in a block

    policy            worker with the least         source
    ----------------  ----------------------------  ------------------------------------------------------
    kv                (all)                         core/costs.py
    round-robin       (the next one)
    random            (any one)
    least-loaded      b, then q
    power-of-two      the same, of two random ones  Mitzenmacher, IEEE TPDS 12(10), 2001
    least-prefill     q + n, then b                 llm-d-inference-scheduler: token load
    lmetric           (q + n) * (b + 1)             LMetric, arXiv 2603.15202
    dynamo            (q + n) / k + S / k           NVIDIA Dynamo 1.6: KV router with its defaults
    dynamo-tuned      16 * (q + n) / k + S / k      the same with a prefill load scale of 16
    predicted-ttft    queue_ms + prefill_ms         Mooncake, FAST 2025, algorithm 1
    inflicted-delay   the same, and w / N           see `inflicted_delay`; N workers
    sticky            q + n, see `sticky`           llm-d: sticky until saturated
    session-affinity  (that of its session)         rendezvous hashing: Thaler and Ravishankar, 1998

Where a pool only decodes and prefill workers compute the prompts, no n distinguishes its workers. There
the policies from least-prefill to sticky shortlist those with the fewest requests, as llm-d does.

A user's own policy is such a function, published as an entry point of the group `penstock.policies`; its
name there is the one to select it by. examples/policy is one.

Pure: no state, no side effects; equal arguments and an equally seeded generator give an equal shortlist.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from random import Random
from typing import Any

from xxhash import xxh3_64_intdigest

from penstock.core.costs import STEP_TOKENS, Candidate, Query, costs
from penstock.errors import ConfigError
from penstock.shapes import Role

Policy = Callable[[Query, Sequence[Candidate], Random], Sequence[Candidate]]
"""Takes the request, the workers of a pool, at least one, and a generator for what is left to chance.
Returns at least one of these workers."""

ENTRY_POINTS = "penstock.policies"

TUNED_SCALE = 16
"""Of Dynamo's prefill load: the best of those tried in simulations of the conversation trace."""

STICKY_HIT = 0.8
"""Share of a prompt that a worker must have cached for `sticky` to prefer it."""

STICKY_S = 14.0
"""Seconds of prompts by which the least busy of those may be busier than the least busy of all. In llm-d,
286,720 tokens at 20,480 tokens a second."""


def kv(query: Query, pool: Sequence[Candidate], rng: Random) -> Sequence[Candidate]:
    """All: the costs decide."""
    return pool


def round_robin(query: Query, pool: Sequence[Candidate], rng: Random) -> Sequence[Candidate]:
    """The next one, in order of instance ids."""
    in_order = sorted(pool, key=lambda candidate: candidate.instance_id)
    return [in_order[query.ordinal % len(in_order)]]


def any_one(query: Query, pool: Sequence[Candidate], rng: Random) -> Sequence[Candidate]:
    """One at random."""
    return [rng.choice(pool)]


def least_loaded(query: Query, pool: Sequence[Candidate], rng: Random) -> Sequence[Candidate]:
    """Those with the fewest requests, then the fewest prompt tokens to compute; one of them at random."""
    return [rng.choice(_least(pool, lambda it: (it.requests, it.load.prefill_tokens)))]


def power_of_two(query: Query, pool: Sequence[Candidate], rng: Random) -> Sequence[Candidate]:
    """The less loaded of two random ones."""
    return least_loaded(query, rng.sample(pool, min(2, len(pool))), rng)


def _for_prompts(policy: Policy) -> Policy:
    """The policy where prompts are computed; elsewhere, those with the fewest requests."""

    def shortlist(query: Query, pool: Sequence[Candidate], rng: Random) -> Sequence[Candidate]:
        if query.computed_elsewhere and all(candidate.role is Role.DECODE for candidate in pool):
            return _least(pool, lambda it: it.requests)
        return policy(query, pool, rng)

    shortlist.__doc__ = policy.__doc__
    return shortlist


@_for_prompts
def least_prefill(query: Query, pool: Sequence[Candidate], rng: Random) -> Sequence[Candidate]:
    """Those that will have computed this prompt after the fewest tokens; then the fewest requests."""
    return _least(pool, lambda it: (_backlog(query, it), it.requests))


@_for_prompts
def lmetric(query: Query, pool: Sequence[Candidate], rng: Random) -> Sequence[Candidate]:
    """The least product of prompt tokens to compute and of requests that wait for that meanwhile."""
    return _least(pool, lambda it: _backlog(query, it) * (it.requests + 1))


def _dynamo(scale: float) -> Policy:
    @_for_prompts
    def shortlist(query: Query, pool: Sequence[Candidate], rng: Random) -> Sequence[Candidate]:
        """The fewest blocks to compute, each counted `scale` times, and blocks in use."""
        return _least(
            pool, lambda it: (scale * _backlog(query, it) + it.load.context_tokens) / it.block_size
        )

    return shortlist


@_for_prompts
def predicted_ttft(query: Query, pool: Sequence[Candidate], rng: Random) -> Sequence[Candidate]:
    """The least time until the prompt is computed, queue included."""
    return _least(pool, lambda it: costs(query, it).ready_ms)


@_for_prompts
def inflicted_delay(query: Query, pool: Sequence[Candidate], rng: Random) -> Sequence[Candidate]:
    """The same, and over the number of workers: what others there wait for its prompt and for the larger
    steps of its output, and what its own output waits for theirs. With n tokens of prompt and o of output:

        w = b * prefill_ms + o * (a1 + a2 * (n + o / 2)) * b + o * (a1 * b + a2 * S)

    where a1 and a2 are what a request and a token with KV add to a step."""
    output = query.expected_output_tokens

    def total_ms(candidate: Candidate) -> float:
        here, load, requests = costs(query, candidate), candidate.load, candidate.requests
        request_ms, token_ms = load.rates.decode_request_ms, load.rates.decode_context_ms
        larger_ms = output * (request_ms + token_ms * (query.prompt_tokens + output / 2))
        theirs_ms = output * (request_ms * requests + token_ms * load.context_tokens)
        return here.ready_ms + (requests * (here.prefill_ms + larger_ms) + theirs_ms) / len(pool)

    return _least(pool, total_ms)


@_for_prompts
def sticky(query: Query, pool: Sequence[Candidate], rng: Random) -> Sequence[Candidate]:
    """Of the workers that have STICKY_HIT of the prompt, those with the fewest prompt tokens to compute; of
    all, where none has, or where those have STICKY_S more of prompts to compute."""
    warm = [it for it in pool if it.cached_tokens >= STICKY_HIT * query.prompt_tokens]
    if warm:
        first = min(warm, key=lambda it: it.load.prefill_tokens)
        peak_per_s = STEP_TOKENS / (
            (first.load.rates.step_ms + first.load.rates.prefill_token_ms * STEP_TOKENS) / 1e3
        )
        more = first.load.prefill_tokens - min(it.load.prefill_tokens for it in pool)
        if more > STICKY_S * peak_per_s:
            warm = []
    return _least(warm or pool, lambda it: (_backlog(query, it), it.requests))


def session_affinity(query: Query, pool: Sequence[Candidate], rng: Random) -> Sequence[Candidate]:
    """The worker that its session hashes to (frontend/sessions.py says what names one). When a worker is
    added, only the sessions that it gets move; when one leaves, only its own. A request without a session:
    any of those with the fewest requests."""
    if not query.session:
        return _least(pool, lambda it: it.requests)
    key = query.session.encode()
    return [max(pool, key=lambda it: xxh3_64_intdigest(key + b"\0" + it.instance_id.encode()))]


POLICIES: Mapping[str, Policy] = {
    "kv": kv,
    "round-robin": round_robin,
    "random": any_one,
    "least-loaded": least_loaded,
    "power-of-two": power_of_two,
    "least-prefill": least_prefill,
    "lmetric": lmetric,
    "dynamo": _dynamo(1),
    "dynamo-tuned": _dynamo(TUNED_SCALE),
    "predicted-ttft": predicted_ttft,
    "inflicted-delay": inflicted_delay,
    "sticky": sticky,
    "session-affinity": session_affinity,
}


@cache
def policy_named(name: str) -> Policy:
    """One of POLICIES, or a user's own. Raises ConfigError with the names there are."""
    if name in POLICIES:
        return POLICIES[name]
    found = entry_points(group=ENTRY_POINTS)
    if name not in found.names:
        names = ", ".join([*POLICIES, *sorted(found.names)])
        raise ConfigError(f"router-mode: unknown policy {name!r}; there are: {names}")
    policy: Policy = found[name].load()
    return policy


def _least(pool: Sequence[Candidate], figure: Callable[[Candidate], Any]) -> list[Candidate]:
    """Those with the least figure."""
    figures = [figure(candidate) for candidate in pool]
    least = min(figures)
    return [candidate for candidate, its in zip(pool, figures, strict=True) if its == least]


def _backlog(query: Query, candidate: Candidate) -> int:
    """Prompt tokens that it would have to compute, with those of this request."""
    return candidate.load.prefill_tokens + candidate.uncached_tokens(query)
