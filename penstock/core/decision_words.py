"""A decision in words: where a request went, and why not to the worker that had most of its prompt cached.

Only what the decision itself was made of is said. Where costs decided, the sentence names the one in which
the passed-over worker was worse by most.
"""

from __future__ import annotations

from collections.abc import Sequence

from penstock.core.costs import OUTPUT_SHARE, Candidate, Costs
from penstock.core.decision_record import Holder, PassedOver, Placing, RequestFacts, RoutedRequest
from penstock.core.disagg import Path, Plan
from penstock.core.overlap_check import CAUSE_WORDS, Cause
from penstock.core.policy import Decision

COSTS_POLICY = "kv"  # the policy that compares all workers by their costs

_NOT_ASKED = {
    PassedOver.AVOIDED: "an attempt of this request had failed there",
    PassedOver.FULL: "{holder} had just refused an attempt, being full",
    PassedOver.SUSPECT: "it was kept apart from requests that may be ending engines",
    PassedOver.OTHER_FORMAT: "no decode worker reads the KV of {holder}",
    PassedOver.NO_PREFILL: "prefill workers are not to be used",
    PassedOver.NOT_READY: "{holder} took no new requests of this model",
}


def decision_words(facts: RequestFacts, placing: Placing, policy: str, *, made: bool = True) -> str:
    """The decision in one sentence. Not `made`: what it would be."""
    decision, holder = placing.decision, placing.holder
    again = f"tried again ({placing.retried_because}): " if placing.retried_because else ""
    if decision.prefill is not None:
        verb = "computed" if made else "would compute"
        where = f"{decision.prefill} {verb} its prompt and {decision.decode} its output"
    else:
        where = f"{'went' if made else 'would go'} to {decision.decode}"
    if holder is not None:
        had = f"although {holder.instance_id} had {holder.tokens:,} tokens of the prompt cached"
        why = f" {had}, because {_passed_over(decision, holder, policy)}"
    else:
        why = f", {_chosen(facts, placing, policy)}"
    return f"{again}{where}{why}{_path(decision)}{_by_history(decision, holder)}"


def request_words(routed: RoutedRequest, decisions: Sequence[str], *, made: bool = True) -> str:
    """All decisions of a request."""
    if len(decisions) > 1:
        return "; ".join(f"{number}. {words}" for number, words in enumerate(decisions, 1))
    if decisions:
        return decisions[0]
    if not made:
        return "no worker could take it now"
    return "waits for a worker" if routed.ended_at is None else "ended before a worker was chosen"


def first_token_ms(plan: Plan) -> float:
    """When the plan would give the first token, in milliseconds after the decision."""
    if plan.first is not None:  # the prefill worker gives it, before the KV moves
        return plan.first.ready_ms
    return plan.queue_ms + plan.prefill_ms + plan.transfer_ms


def plan_costs_ms(plan: Plan) -> dict[str, float]:
    """The costs that a plan was compared by, by their names, as much as they counted: their sum is
    `total_ms`."""
    fields = (*plan.__struct_fields__, *plan.here.__struct_fields__)
    names = [name for name in dict.fromkeys(fields) if name.endswith("_ms") and name != "other_start_ms"]
    costs = {
        name.removesuffix("_ms"): getattr(plan if hasattr(plan, name) else plan.here, name)
        for name in names
    }
    return costs | {"decode": OUTPUT_SHARE * costs["decode"]}


def later_ms(decision: Decision, instance_id: str) -> float:
    """How much later the first token would have come with this one of the workers that were compared."""
    theirs = _of(decision, instance_id)
    other_ms = first_token_ms(theirs) if isinstance(theirs, Plan) else theirs.ready_ms
    return other_ms - first_token_ms(decision.chosen)


def _of(decision: Decision, instance_id: str) -> Plan | Costs:
    plans = (plan for plan in decision.plans if plan.instance_id == instance_id)
    costs = (it for it in decision.prefills if it.candidate.instance_id == instance_id)
    return next(plans, None) or next(costs)


def milliseconds(ms: float) -> str:
    """For people."""
    if ms >= 1000:
        return f"{ms / 1e3:,.1f} s"
    return f"{ms:.0f} ms" if ms >= 10 else f"{ms:.1f} ms"


def _passed_over(decision: Decision, holder: Holder, policy: str) -> str:
    """Why the holder does not compute the prompt."""
    name = holder.instance_id
    if holder.passed_over is PassedOver.NOT_ASKED:
        return f"the policy {policy} did not choose among all workers by what they have cached"
    if holder.passed_over is not PassedOver.COSTLIER:
        return _NOT_ASKED[holder.passed_over].format(holder=name)
    chosen, theirs = decision.chosen, _of(decision, name)
    if isinstance(theirs, Plan):
        reason = _worse(plan_costs_ms(chosen), plan_costs_ms(theirs), theirs.here.candidate)
    else:
        reason = _prefill_worse(chosen, theirs)
    first_ms = first_token_ms(chosen)
    other_ms = first_ms + later_ms(decision, name)
    there = (
        f"first token predicted after {milliseconds(first_ms)} there, {milliseconds(other_ms)} on {name}"
    )
    return f"{reason}: {there}"


def _worse(chosen: dict[str, float], theirs: dict[str, float], candidate: Candidate) -> str:
    """By what the passed-over worker was worse than the chosen one, the largest difference."""
    more = {cost: theirs[cost] - chosen.get(cost, 0.0) for cost in theirs}
    cost = max(more, key=more.__getitem__)
    name, load = candidate.instance_id, candidate.load
    extra, requests = milliseconds(more[cost]), _requests(candidate)
    match cost:
        case "queue" if load.prefill_tokens:
            return f"{name} had {milliseconds(theirs[cost])} of prompts in its queue"
        case "queue":
            return f"{name} had no room before {milliseconds(theirs[cost])}"
        case "inflicted":
            delay = milliseconds(theirs["prefill"])
            return f"computing the rest of it on {name} would have delayed its {requests} by {delay}"
        case "decode":
            longer = milliseconds(more[cost] / OUTPUT_SHARE)
            return f"the output would have taken {longer} longer beside the {requests} of {name}"
        case "missed":
            return f"more answers would have missed --slo-itl-ms on {name}, which had {requests}"
        case "transfer":
            return f"moving its KV to {name} would have taken {extra} longer"
        case "prefill":
            return f"{name} computes prompts more slowly, by {extra} for this one"
    return f"its cost `{cost}` on {name} was {extra} more"


def _prefill_worse(chosen: Plan, theirs: Costs) -> str:
    name = theirs.candidate.instance_id
    if chosen.first is None:
        return f"handing it over from {name} was predicted to cost more than computing it here"
    ours = {"queue": chosen.first.queue_ms, "prefill": chosen.first.prefill_ms}
    return _worse(ours, {"queue": theirs.queue_ms, "prefill": theirs.prefill_ms}, theirs.candidate)


def _chosen(facts: RequestFacts, placing: Placing, policy: str) -> str:
    """Why the chosen worker, where nobody had more of the prompt cached."""
    decision = placing.decision
    chosen = decision.chosen
    if decision.query.handed is not None and chosen.path is Path.REMOTE and chosen.first is None:
        return "which reads the KV that a prefill worker holds for it"
    first = f"first token predicted after {milliseconds(first_token_ms(chosen))}"
    others = [plan for plan in decision.plans if plan is not chosen]
    if policy != COSTS_POLICY:
        return f"as the policy {policy} chose: {first}"
    if facts.whole_prompt:
        return f"the cheapest for a prompt that is computed whole: {first}"
    if placing.cached_tokens:
        had = f"{placing.cached_tokens:,} of {facts.prompt_tokens:,} prompt tokens cached"
        return f"and nobody had more of it cached ({had}): {first}"
    cold = "nobody had any of the prompt cached"
    if not others:
        return f"the only worker that could take it; {cold}: {first}"
    second = min(others, key=lambda plan: plan.total_ms)
    if second.total_ms <= chosen.total_ms:
        return f"drawn among equally cheap ones; {cold}: {first}"
    next_best = f"{milliseconds(first_token_ms(second))} on {second.instance_id}, the next best"
    return f"the cheapest; {cold}: {first}, {next_best}"


def _path(decision: Decision) -> str:
    """What the path not taken would have cost."""
    chosen = decision.chosen
    if chosen.other_start_ms is None:
        return ""
    taken, other = milliseconds(chosen.start_ms), milliseconds(chosen.other_start_ms)
    if chosen.path is Path.REMOTE:
        return f" (with the prefill worker {taken} until it decodes, without {other})"
    return f" (without a prefill worker {taken} until it decodes, with one {other})"


def _by_history(decision: Decision, holder: Holder | None) -> str:
    """Of whom the cached tokens above are not what its events say."""
    named = {decision.computes.candidate.instance_id, holder.instance_id if holder is not None else None}
    compared = [plan.here.candidate for plan in decision.plans]
    compared += [costs.candidate for costs in decision.prefills]
    causes = {it.instance_id: Cause(it.distrusted) for it in compared if it.distrusted}
    words = [f"{it}: {CAUSE_WORDS[causes[it]]}" for it in sorted(causes) if it in named]
    return f"; cached tokens only as far as they were sent there ({', '.join(words)})" if words else ""


def _requests(candidate: Candidate) -> str:
    count = candidate.requests
    return "1 request" if count == 1 else f"{count} requests"
