"""An attempt that vLLM works on, as the engine keeps it."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.engines.vllm.continuation import Continuation
from penstock.engines.vllm.metrics import CoreTimes
from penstock.shapes import Attempt


@dataclass(slots=True)
class ActiveRequest:
    """An attempt that vLLM works on."""

    attempt: Attempt
    core_id: str  # its name there
    continuation: Continuation
    times: CoreTimes
    replayed: int = 0
    given: int = 0  # tokens of its own
    context_tokens: int = 0  # as counted in the load
    told: bool = False  # its first output has been handed out
