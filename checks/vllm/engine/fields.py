"""The recorded fields of vLLM's requests are those that this vLLM has."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from pydantic import BaseModel
from vllm.entrypoints.anthropic.protocol import (
    AnthropicContentBlock,
    AnthropicCountTokensRequest,
    AnthropicMessagesRequest,
    AnthropicTool,
)
from vllm.entrypoints.generate.base.protocol import FunctionDefinition, StreamOptions
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionToolsParam
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.tokenize.protocol import (
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)
from vllm.sampling_params import StructuredOutputsParams

from penstock.engines.vllm.installed import installed_version, minor

try:
    from vllm.renderers.chat_utils import CustomChatCompletionMessageParam
except ModuleNotFoundError:  # before 0.32
    from vllm.entrypoints.chat_utils import CustomChatCompletionMessageParam

RECORDED = json.loads(Path("tests/frontend/peer_fields.json").read_text())["vllm"]
"""The fields of all supported versions."""

CAME_WITH: dict[tuple[int, int], dict[str, set[str]]] = {
    (0, 31): {"messages": {"thinking"}},
    (0, 32): {
        "chat": {"mm_payload", "return_mm_kwargs"},
        "completions": {"mm_payload", "return_mm_kwargs"},
        "responses": {"min_p", "mm_payload", "return_mm_kwargs", "stop_token_ids"},
        "messages": {"mm_payload", "return_mm_kwargs", "watermarking"},
        "count_tokens": {"output_config", "thinking"},
        "message_block": {"tool"},
    },
}
"""Those that older versions do not have."""

WENT_WITH: dict[tuple[int, int], dict[str, set[str]]] = {
    (0, 31): {"chat": {"return_assistant_tokens_mask"}},
}
"""Those that this version and newer ones do not have."""

MODELS: dict[str, list[type[BaseModel]]] = {
    "chat": [ChatCompletionRequest],
    "completions": [CompletionRequest],
    "responses": [ResponsesRequest],
    "messages": [AnthropicMessagesRequest],
    "count_tokens": [AnthropicCountTokensRequest],
    "tokenize": [TokenizeCompletionRequest, TokenizeChatRequest],
    "detokenize": [DetokenizeRequest],
    "message_block": [AnthropicContentBlock],
    "message_tool": [AnthropicTool],
    "stream_options": [StreamOptions],
    "tool": [ChatCompletionToolsParam],
    "function": [FunctionDefinition],
}


def _of_this_version(kind: str) -> list[str]:
    installed = minor(installed_version())
    absent = [fields.get(kind, set()) for version, fields in CAME_WITH.items() if installed < version]
    absent += [fields.get(kind, set()) for version, fields in WENT_WITH.items() if installed >= version]
    return sorted(set(RECORDED[kind]).difference(*absent))


@pytest.mark.parametrize("kind", MODELS)
def test_fields_of_requests(kind: str) -> None:
    fields = [item for model in MODELS[kind] for item in model.model_fields.items()]
    assert sorted({field.alias or name for name, field in fields}) == _of_this_version(kind)


def test_fields_inside_of_requests() -> None:
    options = [field.name for field in dataclasses.fields(StructuredOutputsParams) if field.init]
    assert sorted(options) == RECORDED["structured_outputs"]
    assert sorted(CustomChatCompletionMessageParam.__annotations__) == RECORDED["message"]
