"""How long each phase of a request will be, as its engines will report it (core/attempt_phases.py).

The costs of core/costs.py say what a request waits for; the phases say when that is. A prompt begins in the
step that has room for it, so that what others have left to compute in the same step is part of its
prefill. A decode worker takes over between two of its steps, and then computes the prompt's last token.
Between two tokens others' prompts are computed, which is no cost of the request's own.
"""

from __future__ import annotations

from penstock.core.attempt_phases import EngineTimes
from penstock.core.costs import Costs, Query, decode_step_ms, itl_ms, shared_ms
from penstock.core.disagg import Path, Plan


def predicted_phases(query: Query, plan: Plan) -> EngineTimes:
    """All attempts of the plan together, where each phase is expected to come once."""
    here, tokens = plan.here, max(0.0, query.expected_output_tokens - 1)
    if plan.path is not Path.REMOTE:
        queue_ms, prefill_ms = _prompt(here)
        return EngineTimes(queue_ms, 0.0, prefill_ms, tokens * itl_ms(query, here.candidate))
    half_ms = decode_step_ms(here.candidate) / 2 if here.candidate.requests else 0.0
    queue_ms = prefill_ms = 0.0
    ready_ms = 0.0
    if plan.first is not None:
        queue_ms, prefill_ms = _prompt(plan.first)
        ready_ms, tokens = plan.first.ready_ms, max(0.0, tokens - 1)
    return EngineTimes(
        queue_ms + max(here.queue_ms - ready_ms, half_ms),
        plan.transfer_ms,
        prefill_ms + half_ms + decode_step_ms(here.candidate, query.prompt_tokens),
        tokens * itl_ms(query, here.candidate),
    )


def _prompt(costs: Costs) -> tuple[float, float]:
    """Until the step begins that computes it, and from then on."""
    shared = min(shared_ms(costs.candidate), costs.queue_ms)
    return costs.queue_ms - shared, costs.prefill_ms + shared
