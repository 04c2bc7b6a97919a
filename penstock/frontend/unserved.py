"""Fields of other servers' APIs that are known here and not served.

An answer that ignored a field which changes it would be wrong without a word. So each such field is
refused by its name, unless its value asks for nothing. Fields that change no answer are on a second list,
with the reason. Both lists are held against the request classes of vLLM, Dynamo and SGLang by
tests/frontend/test_fields.py. Fields that are on neither list are nobody's, and are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Final, NamedTuple, TypeVar, cast

import msgspec

from penstock.errors import RequestRejected
from penstock.shapes import JsonObject


class RefusedField(NamedTuple):
    """A field that is refused unless it is null or has one of the neutral values."""

    neutral: tuple[Any, ...] = ()
    instead: str = ""  # what to do about it, as the rest of a sentence

    def allows(self, value: Any) -> bool:
        """Whether this value asks for nothing. 0 is not False."""
        return any(type(value) is type(neutral) and value == neutral for neutral in self.neutral)


_OFF: Final = RefusedField((False,))
_STRUCTURED: Final = RefusedField((), "use `structured_outputs`")
_ROUTED: Final = RefusedField((), "the router chooses the workers")
_TOOLS: Final = "use `tools` and `tool_choice`"
_EFFORT: Final = RefusedField((), "use `reasoning_effort` or `chat_template_kwargs`")
_KV: Final = RefusedField(({},), "KV is moved between workers of this deployment only")

REFUSED: Final[dict[str, RefusedField]] = {
    # OpenAI
    "audio": RefusedField(),
    "function_call": RefusedField(("none", "auto"), _TOOLS),
    "functions": RefusedField(([],), _TOOLS),
    "moderation": RefusedField(),
    "modalities": RefusedField((["text"], []), "only text is served"),
    "suffix": RefusedField(("",)),
    "verbosity": RefusedField(("medium",)),
    "web_search_options": RefusedField(),
    # vLLM
    "chat_template": RefusedField(),
    "ec_transfer_params": _KV,
    "kv_transfer_params": _KV,
    "media_io_kwargs": RefusedField(({},)),
    "mm_processor_kwargs": RefusedField(({},)),
    "prompt_embeds": RefusedField(),
    "use_beam_search": _OFF,
    "vllm_xargs": RefusedField(({},)),
    "watermarking": _OFF,
    # vLLM until 0.11, and Dynamo
    "guided_choice": _STRUCTURED,
    "guided_decoding_backend": _STRUCTURED,
    "guided_grammar": _STRUCTURED,
    "guided_json": _STRUCTURED,
    "guided_regex": _STRUCTURED,
    "guided_whitespace_pattern": _STRUCTURED,
    # Dynamo
    "thinking": _EFFORT,
    # SGLang
    "bootstrap_host": _KV,
    "bootstrap_port": _KV,
    "bootstrap_room": _KV,
    "custom_logit_processor": RefusedField(),
    "custom_params": RefusedField(({},)),
    "data_parallel_rank": _ROUTED,
    "disagg_prefill_dp_rank": _ROUTED,
    "ebnf": RefusedField((), "use `structured_outputs.grammar`"),
    "extra_key": RefusedField((), "use `cache_salt`"),
    "input_ids": RefusedField((), "send token ids to /v1/completions as `prompt`"),
    "json_schema": RefusedField((), "use `structured_outputs.json`"),
    "lora_path": RefusedField(),
    "max_new_tokens": RefusedField((), "use `max_tokens`"),
    "min_new_tokens": RefusedField((0,), "use `min_tokens`"),
    "ngram_corpus_id": RefusedField(),
    "no_stop_trim": RefusedField((False,), "use `include_stop_str_in_output`"),
    "reasoning": _EFFORT,
    "regex": RefusedField((), "use `structured_outputs.regex`"),
    "return_cached_tokens_details": _OFF,
    "return_hidden_states": _OFF,
    "return_meta_info": _OFF,
    "return_prompt_token_ids": _OFF,
    "return_routed_experts": _OFF,
    "routed_dp_rank": _ROUTED,
    "separate_reasoning": RefusedField((True,)),
    "session_params": RefusedField(({},)),
    "stop_regex": RefusedField(),
    "stream_reasoning": RefusedField((True,), "use `include_reasoning`"),
    "task": RefusedField(),
}

_FORMAT: Final = RefusedField((), "use `response_format`")
_SYSTEM: Final = RefusedField((), "send it as a message of the role `system`")
_CHATS: Final = "/v1/chat/completions has it"

_OF_OTHER_APIS: Final[dict[str, RefusedField]] = {
    # OpenAI's Responses API
    "input": RefusedField((), "/v1/responses has it"),
    "instructions": _SYSTEM,
    "max_output_tokens": RefusedField((), "use `max_tokens`"),
    "previous_response_id": RefusedField((), "/v1/responses has it"),
    "text": _FORMAT,
    # Anthropic
    "output_config": _FORMAT,
    "output_format": _FORMAT,
    "stop_sequences": RefusedField(([],), "use `stop`"),
    "system": _SYSTEM,
}
CHAT_REFUSED: Final = REFUSED | _OF_OTHER_APIS | {"prompt": RefusedField((), "/v1/completions has it")}
COMPLETION_REFUSED: Final[dict[str, RefusedField]] = (
    REFUSED
    | _OF_OTHER_APIS
    | {
        "chat_template_kwargs": RefusedField(({},), _CHATS),
        "max_completion_tokens": RefusedField((), "use `max_tokens`"),
        "messages": RefusedField((), _CHATS),
        "reasoning_effort": RefusedField((), _CHATS),
        "tool_choice": RefusedField(("none",), _CHATS),
        "tools": RefusedField(([],), _CHATS),
        "top_logprobs": RefusedField((0,), "use `logprobs`"),
    }
)
"""The same for either API, with what a client that moves from another one may go on sending."""

_NO_IMAGES: Final = "counts for images and videos only, which are refused themselves"
_NO_EXPERTS: Final = "counts for answers with routed experts only, which are refused themselves"
_RENDERING: Final = "counts for endpoints that only render; vLLM ignores it here, too"
_NAME: Final = "names a request or a client; X-Request-Id and API keys do that here"
_HINT: Final = "a hint for scheduling or caching, and no part of the question"

HARMLESS: Final[dict[str, str]] = {
    # OpenAI
    "metadata": "is kept with stored completions, and nothing is stored",
    "prediction": "only makes answers faster",
    "prompt_cache_options": _HINT,
    "prompt_cache_retention": _HINT,
    "safety_identifier": _NAME,
    "service_tier": "chooses what is paid for",
    "store": "stores completions at OpenAI; nothing is stored here",
    "user": _NAME,
    # vLLM
    "length_penalty": "counts for beam search only, which is refused itself",
    "mm_payload": _RENDERING,
    "request_id": _NAME,
    "return_assistant_tokens_mask": _RENDERING,  # before 0.31
    "return_mm_kwargs": _RENDERING,
    "return_token_offsets": _RENDERING,
    "routed_experts_prompt_start": _NO_EXPERTS,
    "spaces_between_special_tokens": "tokenizers of today put no spaces there either way",
    "stream_interval": "only says into how many chunks a stream is cut",
    # SGLang
    "custom_labels": _NAME,
    "images_config": _NO_IMAGES,
    "max_dynamic_patch": _NO_IMAGES,
    "min_dynamic_patch": _NO_IMAGES,
    "rid": _NAME,
    "routed_experts_start_len": _NO_EXPERTS,
    "use_audio_in_video": _NO_IMAGES,
}

NVEXT_REFUSED: Final[dict[str, RefusedField]] = {
    "annotations": RefusedField(([],)),
    "backend_instance_id": _ROUTED,
    "decode_worker_id": _ROUTED,
    "dp_rank": _ROUTED,
    "guided_choice": _STRUCTURED,
    "guided_decoding_backend": _STRUCTURED,
    "guided_grammar": _STRUCTURED,
    "guided_json": _STRUCTURED,
    "guided_regex": _STRUCTURED,
    "guided_whitespace_pattern": _STRUCTURED,
    "metadata_upload": RefusedField(),
    "prefill_dp_rank": _ROUTED,
    "prefill_worker_id": _ROUTED,
    "routing_constraints": _ROUTED,
    "token_data": RefusedField((), "send token ids to /v1/completions as `prompt`"),
    "use_raw_prompt": RefusedField((False,), "use /v1/completions"),
}

NVEXT_HARMLESS: Final[dict[str, str]] = {
    "agent_context": _HINT,
    "agent_hints": _HINT,
    "cache_control": _HINT,
    "enable_local_updates": "says who keeps the router's books",
    "expected_output_tokens": _HINT,
    "request_timestamp_ms": "is for replays on a virtual clock",
    "router": _HINT,
    "session_control": _HINT,
}

_Body = TypeVar("_Body", bound=msgspec.Struct)


def with_refused(kind: type[_Body], refused: Mapping[str, RefusedField] = REFUSED) -> type[_Body]:
    """The same request with the refused fields after its own, for `refuse` to look at."""
    fields = [(name, Any, None) for name in refused]
    rules = {"refused": refused, "nothing": (None,) * len(refused)}
    made = msgspec.defstruct(kind.__name__, fields, bases=(kind,), kw_only=True, namespace=rules)
    return cast(type[_Body], made)


@cache
def only_refused(kind: Any) -> type[msgspec.Struct]:
    """The refused fields alone of a type that `with_refused` made."""
    return with_refused(msgspec.Struct, kind.refused)


def refuse(request: Any) -> None:
    """Raises RequestRejected that names the first refused field which asks for something.

    `request` is of a type that `with_refused` made."""
    nothing: tuple[None, ...] = request.nothing
    values = msgspec.structs.astuple(request)[-len(nothing) :]
    if values != nothing:
        check_refused(dict(zip(request.refused, values, strict=True)), request.refused)


def check_refused(given: JsonObject, refused: Mapping[str, RefusedField], prefix: str = "") -> None:
    """As `refuse`, for fields in an object. `prefix` is the path to it."""
    for name, value in given.items():
        rule = refused.get(name)
        if rule is not None and value is not None and not rule.allows(value):
            raise unsupported(prefix + name, instead=rule.instead)


def unsupported(field: str, what: str = "", instead: str = "") -> RequestRejected:
    """The refusal of a field that would change the answer."""
    message = f"`{field}`{what} is not supported{f': {instead}' if instead else ''}."
    return RequestRejected(message, code="unsupported_value", field=field)
