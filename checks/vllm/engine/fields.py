"""The recorded fields of vLLM's requests are those that this vLLM has."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from pydantic import BaseModel
from vllm.entrypoints.generate.base.protocol import FunctionDefinition, StreamOptions
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionToolsParam
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.renderers.chat_utils import CustomChatCompletionMessageParam
from vllm.sampling_params import StructuredOutputsParams

RECORDED = json.loads(Path("tests/frontend/peer_fields.json").read_text())["vllm"]


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("chat", ChatCompletionRequest),
        ("completions", CompletionRequest),
        ("responses", ResponsesRequest),
        ("stream_options", StreamOptions),
        ("tool", ChatCompletionToolsParam),
        ("function", FunctionDefinition),
    ],
)
def test_fields_of_requests(kind: str, model: type[BaseModel]) -> None:
    assert sorted(field.alias or name for name, field in model.model_fields.items()) == RECORDED[kind]


def test_fields_inside_of_requests() -> None:
    options = [field.name for field in dataclasses.fields(StructuredOutputsParams) if field.init]
    assert sorted(options) == RECORDED["structured_outputs"]
    assert sorted(CustomChatCompletionMessageParam.__annotations__) == RECORDED["message"]
