"""No field that changes an answer is ignored without a word: each field of vLLM's, Dynamo's and SGLang's
requests, and of the official clients, is served, refused by its name, or known to be harmless."""

import json
from pathlib import Path

import anthropic.types as anthropic_types
import anthropic.types.beta as anthropic_beta
import anthropic.types.beta.message_count_tokens_params as beta_count
import anthropic.types.beta.message_create_params as beta_create
import anthropic.types.message_count_tokens_params as count
import anthropic.types.message_create_params as create
import openai.types.chat as openai_chat
import openai.types.chat.completion_create_params as openai_chat_body
import openai.types.completion_create_params as openai_text_body
import openai.types.responses as openai_responses
import openai.types.responses.response_create_params as openai_responses_body
import openai.types.responses.response_input_item_param as openai_items
import openai.types.shared_params as openai_shared
import pytest
from openai.types.shared_params.response_format_json_schema import JSONSchema

from penstock.frontend.anthropic import (
    ANTHROPIC_HARMLESS,
    ANTHROPIC_REFUSED,
    AnthropicMessage,
    AnthropicTool,
    AnthropicToolChoice,
    ContentBlock,
    ConversationRequest,
    MessagesRequest,
    OutputConfig,
    Thinking,
)
from penstock.frontend.messages import ContentPart, Message, ToolCall
from penstock.frontend.openai import ChatRequest, CompletionRequest, NvExt, StreamOptions
from penstock.frontend.responses_api.request_body import (
    RESPONSES_HARMLESS,
    RESPONSES_REFUSED,
    FlatSchemaFormat,
    InputItem,
    ReasoningConfig,
    ResponsesRequest,
    ResponseStreamOptions,
    ResponseTool,
    ResponseToolChoice,
    TextConfig,
)
from penstock.frontend.structured import NamedSchema, StructuredOutputs
from penstock.frontend.tokenization import TOKENIZE_REFUSED, DetokenizeRequest, TokenizeRequest
from penstock.frontend.tools import AllowedTools, Function, Tool, ToolSelection
from penstock.frontend.unserved import (
    CHAT_REFUSED,
    COMPLETION_REFUSED,
    HARMLESS,
    NVEXT_HARMLESS,
    NVEXT_REFUSED,
    REFUSED,
)

PEERS = json.loads(Path(__file__).with_name("peer_fields.json").read_text())
VLLM = PEERS["vllm"]

ENDPOINTS = {
    "chat": (ChatRequest, CHAT_REFUSED, HARMLESS),
    "completions": (CompletionRequest, COMPLETION_REFUSED, HARMLESS),
    "responses": (ResponsesRequest, RESPONSES_REFUSED, RESPONSES_HARMLESS),
    "messages": (MessagesRequest, ANTHROPIC_REFUSED, ANTHROPIC_HARMLESS),
    "count_tokens": (ConversationRequest, ANTHROPIC_REFUSED, ANTHROPIC_HARMLESS),
    "tokenize": (TokenizeRequest, TOKENIZE_REFUSED, {}),
    "detokenize": (DetokenizeRequest, {}, {}),
    "nvext": (NvExt, NVEXT_REFUSED, NVEXT_HARMLESS),
}
"""By endpoint: the fields that are served, refused and harmless."""

CLIENTS = {
    "chat": [openai_chat_body.CompletionCreateParamsBase],
    "completions": [openai_text_body.CompletionCreateParamsBase],
    "responses": [openai_responses_body.ResponseCreateParamsBase],
    "messages": [create.MessageCreateParamsBase, beta_create.MessageCreateParamsBase],
    "count_tokens": [count.MessageCountTokensParams, beta_count.MessageCountTokensParams],
}
"""By endpoint: the bodies that the official clients write."""

BODIES = {
    f"{peer} {endpoint}": (endpoint, fields[endpoint])
    for peer, fields in PEERS.items()
    for endpoint in sorted(ENDPOINTS.keys() & fields.keys())
} | {
    f"{body.__module__} {endpoint}": (endpoint, body.__annotations__.keys() - {"stream"})
    for endpoint, bodies in CLIENTS.items()
    for body in bodies
}


@pytest.mark.parametrize("body", BODIES)
def test_every_field_of_a_peer_has_one_place(body):
    endpoint, fields = BODIES[body]
    struct, *unserved = ENDPOINTS[endpoint]
    places = [struct.__struct_fields__, *unserved]
    found = {name: sum(name in place for place in places) for name in fields}
    assert {name: times for name, times in found.items() if times != 1} == {}


def test_what_a_chat_serves_has_a_place_in_responses_too():
    places = {*ResponsesRequest.__struct_fields__, *RESPONSES_REFUSED, *RESPONSES_HARMLESS}
    served = {*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__, *REFUSED, *HARMLESS}
    assert served - places == set()


# --- inside of fields -----------------------------------------------------------------------------

CACHING = "every prefix is cached here without being asked for"
SERVER_TOOLS = "tells which tools a server ran; none are run here"
NOT_SHOWN = "no template shows it to a model"
STREAMED = "only says how early a tool's arguments are streamed, which is at once"
PADDING = "pads events against who listens on the way; there is none here"
SEARCH = "tells about searches at OpenAI, and only its own cache may be searched, which is left out"

INSIDE = [
    # vLLM
    (StreamOptions, VLLM["stream_options"], {}),
    (Tool, VLLM["tool"], {}),
    (Function, VLLM["function"], {}),
    (StructuredOutputs, VLLM["structured_outputs"], {}),
    (Message, VLLM["message"], {}),
    (AnthropicTool, VLLM["message_tool"], {}),
    (
        ContentBlock,
        VLLM["message_block"],
        {
            **dict.fromkeys(("source", "tool", "tool_name"), "is of blocks whose type is refused"),
            **dict.fromkeys(("signature", "data"), "only its maker can read it"),
        },
    ),
    # OpenAI's chats
    *(
        (Message, message, {})
        for message in (
            openai_chat.ChatCompletionAssistantMessageParam,
            openai_chat.ChatCompletionDeveloperMessageParam,
            openai_chat.ChatCompletionFunctionMessageParam,
            openai_chat.ChatCompletionSystemMessageParam,
            openai_chat.ChatCompletionToolMessageParam,
            openai_chat.ChatCompletionUserMessageParam,
        )
    ),
    (StreamOptions, openai_chat.ChatCompletionStreamOptionsParam, {"include_obfuscation": PADDING}),
    (Tool, openai_chat.ChatCompletionFunctionToolParam, {}),
    (Function, openai_shared.FunctionDefinition, {}),
    (ToolSelection, openai_chat.ChatCompletionNamedToolChoiceParam, {}),
    (ToolSelection, openai_chat.ChatCompletionAllowedToolChoiceParam, {}),
    (AllowedTools, openai_chat.ChatCompletionAllowedToolsParam, {}),
    (NamedSchema, JSONSchema, {}),
    (ToolCall, openai_chat.ChatCompletionMessageFunctionToolCallParam, {}),
    (ContentPart, openai_chat.ChatCompletionContentPartTextParam, {"prompt_cache_breakpoint": CACHING}),
    # OpenAI's responses
    (ResponseStreamOptions, openai_responses_body.StreamOptions, {}),
    (TextConfig, openai_responses.ResponseTextConfigParam, {}),
    (FlatSchemaFormat, openai_responses.ResponseFormatTextJSONSchemaConfigParam, {"type": "is its tag"}),
    (ReasoningConfig, openai_shared.Reasoning, {}),
    *(
        (ResponseToolChoice, choice, {})
        for choice in (
            openai_responses.ToolChoiceAllowedParam,
            openai_responses.ToolChoiceCustomParam,
            openai_responses.ToolChoiceFunctionParam,
        )
    ),
    *(
        (
            ResponseTool,
            tool,
            {
                "allowed_callers": SERVER_TOOLS,
                "async": "says that the client may answer later, which it may here, too",
                "output_schema": NOT_SHOWN,
            },
        )
        for tool in (openai_responses.FunctionToolParam, openai_responses.CustomToolParam)
    ),
    (ResponseTool, openai_responses.NamespaceToolParam, {}),
    (
        ResponseTool,
        openai_responses.WebSearchToolParam,
        dict.fromkeys(("filters", "search_context_size", "user_location"), SEARCH),
    ),
    *(
        (
            InputItem,
            item,
            {
                "phase": NOT_SHOWN,
                "caller": SERVER_TOOLS,
                "async": "says that the client may answer later, which it may here, too",
            },
        )
        for item in (
            openai_items.Message,
            openai_items.FunctionCallOutput,
            openai_items.ItemReference,
            openai_responses.EasyInputMessageParam,
            openai_responses.ResponseOutputMessageParam,
            openai_responses.ResponseFunctionToolCallParam,
            openai_responses.ResponseCustomToolCallParam,
            openai_responses.ResponseCustomToolCallOutputParam,
            openai_responses.ResponseReasoningItemParam,
        )
    ),
    (ContentPart, openai_responses.ResponseInputTextParam, {"prompt_cache_breakpoint": CACHING}),
    (
        ContentPart,
        openai_responses.ResponseOutputTextParam,
        dict.fromkeys(("annotations", "logprobs"), NOT_SHOWN),
    ),
    (ContentPart, openai_responses.ResponseOutputRefusalParam, {}),
    # Anthropic's messages
    (
        AnthropicTool,
        anthropic_types.ToolParam,
        {"cache_control": CACHING, "eager_input_streaming": STREAMED},
    ),
    (AnthropicToolChoice, anthropic_types.ToolChoiceToolParam, {}),
    (AnthropicToolChoice, anthropic_types.ToolChoiceAutoParam, {}),
    (OutputConfig, anthropic_beta.BetaOutputConfigParam, {}),
    (Thinking, anthropic_types.ThinkingConfigEnabledParam, {}),
    (Thinking, anthropic_types.ThinkingConfigAdaptiveParam, {}),
    (AnthropicMessage, anthropic_types.UserMessageParam, {}),
    (AnthropicMessage, anthropic_types.AssistantMessageParam, {}),
    (
        AnthropicMessage,
        anthropic_beta.BetaSystemMessageParam,
        {"output_config": "changes the effort in the middle of a conversation, which no template can say"},
    ),
    *(
        (
            ContentBlock,
            block,
            {
                "cache_control": CACHING,
                "citations": "names documents, which are refused themselves",
                "caller": SERVER_TOOLS,
                "toolset_name": SERVER_TOOLS,
                "signature": "only its maker can read it",
                "data": "only its maker can read it",
            },
        )
        for block in (
            anthropic_types.TextBlockParam,
            anthropic_types.ToolUseBlockParam,
            anthropic_types.ToolResultBlockParam,
            anthropic_types.ThinkingBlockParam,
            anthropic_types.RedactedThinkingBlockParam,
        )
    ),
]
"""What is inside of fields: our struct, a peer's fields, and those that change nothing, with the reason."""


@pytest.mark.parametrize(
    ("struct", "peer", "harmless"),
    INSIDE,
    ids=[f"{struct.__name__} {getattr(peer, '__name__', 'vllm')}" for struct, peer, _ in INSIDE],
)
def test_what_a_peer_has_inside_of_a_field_is_read_or_harmless(struct, peer, harmless):
    names = set(getattr(peer, "__annotations__", peer))
    assert names - set(struct.__struct_encode_fields__) <= harmless.keys()
    assert all(harmless.values())
