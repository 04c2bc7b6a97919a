"""What differs between the supported versions of vLLM (installed.py), each difference in one place. Each is
found by looking at what is there, and not by the version's number: so it holds for later versions too.
"""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.parser.abstract_parser import Parser
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine.core_client import AsyncMPClient
    from vllm.v1.metrics.stats import SchedulerStats


# --- the core -------------------------------------------------------------------------------------------


async def ask_all_ranks(client: AsyncMPClient, method: str, *args: Any) -> list[Any]:
    """The answers of all data-parallel ranks. (The client has this as a method since 0.32; before, it gives
    the first rank's answer only.)"""
    return await asyncio.gather(
        *[client._call_utility_async(method, *args, engine=rank) for rank in client.core_engines]
    )


def client_sockets(client: AsyncMPClient) -> list[Any]:
    """Those that it has open. (Version 0.33 has others than those before.)"""
    found = [value for name, value in vars(client.resources).items() if name.endswith("_socket")]
    return [socket for socket in found if socket is not None]


def core_error(output: EngineCoreOutput) -> tuple[str, str]:
    """Code and text of the error by which a request ended, empty where vLLM says none. (Since 0.33, whose
    core also checks grammars, and then says that the request is wrong.)"""
    error = getattr(output, "error", None)
    return ("", "") if error is None else (error.code, error.message)


def pulling(stats: SchedulerStats) -> int:
    """How many requests wait for KV that is on its way. (Before 0.32 they are counted only together with
    the few that wait for a grammar.)"""
    stages = getattr(stats, "num_kv_fetch_reqs_by_stage", None)
    return stats.num_skipped_waiting_reqs if stages is None else sum(stages.values())


# --- parsers --------------------------------------------------------------------------------------------


def parser_class(tokenizer: Any, **names: Any) -> Any:
    """vLLM's Parser for these names, which raises an error of any kind unless it can read this tokenizer.
    (Before 0.32 only the parser itself tries that.)"""
    from vllm.parser import ParserManager

    if "tokenizer" in inspect.signature(ParserManager.get_parser).parameters:
        return ParserManager.get_parser(tokenizer=tokenizer, **names)
    kind: Any = ParserManager.get_parser(**names)
    kind(tokenizer)
    return kind


def always_adjusts(kind: type[Parser]) -> bool:
    """Whether it changes also requests that need no parsing. (Since 0.32.)"""
    return bool(getattr(kind, "always_adjust_request", False))


def tell_prompt(parser: Parser, prompt_ids: list[int]) -> None:
    """Tell a parser of the prompt before it reads a whole answer. (Since 0.32.)"""
    if hasattr(parser, "set_prompt_token_ids"):
        parser.set_prompt_token_ids(prompt_ids)


def reasoning_ended(request: ChatCompletionRequest, parser: Parser, prompt_ids: list[int]) -> bool | None:
    """Whether a grammar applies from the answer's first token on; None: vLLM's core looks at the prompt.
    (Before 0.32 the server says this and not the request.)"""
    if hasattr(request, "resolve_reasoning_ended"):
        ended: bool | None = request.resolve_reasoning_ended(parser, prompt_ids)
        return ended
    if not request.include_reasoning or request._grammar_from_parser:
        return True
    return None if parser.reasoning_parser is None else bool(parser.is_reasoning_end(prompt_ids))
