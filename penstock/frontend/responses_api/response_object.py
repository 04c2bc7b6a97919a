"""The response object: what was asked for, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from penstock.errors import PenstockError, Rejection
from penstock.frontend.choice import Choice
from penstock.frontend.completion_objects import usage_of
from penstock.frontend.endpoint import Beginning
from penstock.frontend.http.statuses import kind_of
from penstock.frontend.responses_api.request_body import ResponsesRequest
from penstock.frontend.responses_api.tool_names import shown_tools
from penstock.shapes import FinishReason, JsonObject


class ResponseObject:
    """Makes the response object of one call, at each moment of its life."""

    def __init__(self, request: ResponsesRequest, beginning: Beginning) -> None:
        text, reasoning = request.text, request.reasoning
        format = text.format if text is not None else None
        self._fixed: JsonObject = {
            "id": beginning.answer_id,
            "object": "response",
            "created_at": beginning.created,
            "model": beginning.model.name,
            "background": False,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": request.max_tool_calls,
            "metadata": request.metadata or {},
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "prompt_cache_key": request.prompt_cache_key,
            "prompt_cache_retention": request.prompt_cache_retention,
            "reasoning": {
                "effort": reasoning.effort if reasoning is not None else None,
                "summary": reasoning.summary if reasoning is not None else None,
            },
            "safety_identifier": request.safety_identifier,
            "service_tier": request.service_tier or "default",
            "store": request.store is not False,
            "temperature": beginning.sampling.temperature,
            "text": {
                "format": msgspec.to_builtins(format) if format is not None else {"type": "text"},
                "verbosity": text.verbosity if text is not None and text.verbosity else "medium",
            },
            "tool_choice": msgspec.to_builtins(request.tool_choice) or "auto",
            "tools": shown_tools(request),
            "top_logprobs": request.top_logprobs or 0,
            "top_p": beginning.sampling.top_p,
            "truncation": request.truncation or "disabled",
            "user": request.user,
        }

    def begun(self) -> JsonObject:
        """Before anything of the answer."""
        return self._with("in_progress")

    def ended(self, choices: Sequence[Choice], output: list[JsonObject]) -> JsonObject:
        """Once the answer is complete."""
        details = None
        if choices[0].finish_reason is FinishReason.LENGTH:
            details = {"reason": "max_output_tokens"}
        response = self._with("completed" if details is None else "incomplete", output)
        usage = usage_of(choices)
        reasoning = usage.completion_tokens_details or {}
        response.update(
            completed_at=int(time.time()) if details is None else None,
            incomplete_details=details,
            usage={
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {**usage.prompt_tokens_details, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": reasoning.get("reasoning_tokens", 0)},
                "total_tokens": usage.total_tokens,
            },
        )
        return response

    def failed(self, error: PenstockError, output: list[JsonObject]) -> JsonObject:
        """When it cannot go on. OpenAI has few codes for that; the message says more."""
        overloaded = kind_of(error) is Rejection.OVERLOADED
        code = "rate_limit_exceeded" if overloaded else "server_error"
        return self._with("failed", output) | {"error": {"code": code, "message": str(error)}}

    def _with(self, status: str, output: Sequence[JsonObject] = ()) -> JsonObject:
        return {
            **self._fixed,
            "status": status,
            "output": list(output),
            "error": None,
            "incomplete_details": None,
            "completed_at": None,
            "usage": None,
        }
