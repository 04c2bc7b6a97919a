"""`truncation: "auto"`: a conversation that is too long for the model loses its beginning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from penstock.errors import RequestRejected
from penstock.frontend.chat import Chat
from penstock.frontend.endpoint import PromptEncoder
from penstock.frontend.messages import Message

MAX_CUTS: Final = 8
"""How often a conversation is shortened, each time to what should fit, before it is refused."""

ANSWER_SHARE: Final = 4
"""A quarter of the context is left for the answer, or less where the client wants less."""

SURPLUS: Final = 0.95  # of the characters that should fit: their tokens are not equally long
CHARS_PER_TOKEN: Final = 4  # of a prompt that is too long to be tokenized at all
MESSAGE_CHARS: Final = 16  # about what a template writes around a message


async def fitting(
    messages: list[Message],
    chat_of: Callable[[list[Message]], Chat],
    prompts: PromptEncoder,
    max_tokens: int | None,
) -> list[Message]:
    """The messages without those at the beginning that leave no room; what the system says stays, and the
    last message. Raises RequestRejected when the template refuses what is left."""
    context = prompts.model.max_model_len
    room = min(max_tokens or context, context // ANSWER_SHARE)
    for _ in range(MAX_CUTS):
        chars = sum(map(_chars, messages))
        try:
            tokens = len(await chat_of(messages).prompt(prompts))
        except RequestRejected as error:
            if error.code != "context_length_exceeded":
                raise
            tokens = max(chars // CHARS_PER_TOKEN, 2 * context)
        if tokens <= context - room:
            break
        shorter = _without_beginning(messages, int(chars * SURPLUS * (context - room) / tokens))
        if len(shorter) == len(messages):
            break
        messages = shorter
    return messages


def _without_beginning(messages: Sequence[Message], limit_chars: int) -> list[Message]:
    kept = [message for message in messages if message.role in ("system", "developer")]
    others = [message for message in messages if message.role not in ("system", "developer")]
    chars = sum(map(_chars, messages))
    dropped = 0
    while dropped < len(others) - 1 and (chars > limit_chars or others[dropped].role == "tool"):
        chars -= _chars(others[dropped])
        dropped += 1
    return [*kept, *others[dropped:]]


def _chars(message: Message) -> int:
    calls = sum(len(str(call.called.arguments)) for call in message.tool_calls or ())
    return len(str(message.content or "")) + len(message.reasoning or "") + calls + MESSAGE_CHARS
