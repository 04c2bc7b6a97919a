"""Writes a candidate as a DynamoGraphDeployment, with what was assumed in comments."""

from __future__ import annotations

from collections.abc import Iterable

from penstock.plan.candidates import PlannedGraph
from penstock.shapes import Role

SIM_CONTEXT_TOKENS = 40_960
"""What a sim worker takes, and Qwen3 by itself: only a load with longer requests needs a flag for it."""

TEMPLATE_TOKENS = 1024
"""What chat templates may add to the longest request."""


def manifest(candidate: PlannedGraph, context_tokens: int, remarks: Iterable[str]) -> str:
    """The YAML text of this graph.

    Args:
        context_tokens: of the longest request, prompt and answer together.
        remarks: lines for the comment at the top.
    """
    comment = [*remarks, "", "On a laptop, with the timing that was assumed: penstock up FILE --engine sim"]
    lines = [f"# {line}".rstrip() for line in comment]
    lines += [
        "apiVersion: nvidia.com/v1alpha1",
        "kind: DynamoGraphDeployment",
        "metadata:",
        "  name: planned",
        "spec:",
        "  backendFramework: vllm",
        "  services:",
        "    Frontend:",
        "      componentType: frontend",
        "      replicas: 1",
        "      extraPodSpec:",
        "        mainContainer:",
        "          command: [penstock, frontend]",
        f'          args: [--http-port, "8000", --router-mode, {candidate.policy}]',
    ]
    counts = {
        Role.AGGREGATED: candidate.aggregated,
        Role.PREFILL: candidate.prefill,
        Role.DECODE: candidate.decode,
    }
    for role, replicas in counts.items():
        if replicas:
            lines += _workers(candidate, role, replicas, context_tokens)
    return "\n".join(lines) + "\n"


def _workers(candidate: PlannedGraph, role: Role, replicas: int, context_tokens: int) -> list[str]:
    kind = candidate.kind
    name = "Worker" if role is Role.AGGREGATED else f"{role.value.capitalize()}Worker"
    context_tokens += TEMPLATE_TOKENS
    longer = f'--max-model-len, "{context_tokens}", ' if context_tokens > SIM_CONTEXT_TOKENS else ""
    return [
        f"    {name}:",
        "      componentType: worker",
        f"      replicas: {replicas}",
        "      resources:",
        f'        limits: {{gpu: "{kind.gpus}"}}',
        "      extraPodSpec:",
        "        mainContainer:",
        "          command: [penstock, worker]",
        "          args:",
        f"            [--role, {role.value}, --engine, vllm, --model, {kind.model},",
        f'             {longer}--max-batch-tokens, "{candidate.max_batch_tokens}",',
        "             # Only the sim engine reads these two.",
        f'             --sim-cost-model, {kind.cost_model}, --sim-cache-tokens, "{kind.cache_tokens}",',
        f'             --, --tensor-parallel-size, "{kind.gpus}"]',
    ]
