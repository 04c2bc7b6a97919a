"""The ports: what the shells need from the outside, each with several adapters behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Final, Protocol

import msgspec

from penstock.core.spans import Span
from penstock.shapes import (
    Answering,
    Attempt,
    AttemptReport,
    EngineCard,
    Handoff,
    JsonObject,
    Load,
    ModelView,
    Output,
    Parsed,
    Registration,
    StructuredOutput,
    TraceContext,
)


class Engine(Protocol):
    """Turns attempts into steps. All methods are called on the event loop's thread.

    Every submitted attempt gets exactly one Output with a finish_reason, unless the engine dies, which
    ends `steps()` with a RemoteError. Nothing here blocks: an engine that computes does so in a thread
    or process of its own.
    """

    async def start(self) -> EngineCard:
        """Load the model. Raises ConfigError when it cannot, RemoteError when another time it might. After
        this was cancelled, nothing else is called, not even `stop`."""

    def submit(self, attempt: Attempt) -> int:
        """Queue an attempt. Returns about how many of its tokens will have to be computed before its first,
        going by what is cached. Bad input ends it with an ERROR output; this never raises."""

    def cancel(self, attempt_id: str) -> None:
        """End an attempt early; its last output is CANCELLED. Unknown or ended ids are ignored."""

    def release(self, handoff_id: str, *, sent: bool) -> None:
        """Drop the KV held for a handoff that nobody will pull, or, when it was `sent` to a decode worker,
        that nobody will use: it may still be read. Unknown ids are ignored."""

    def cached_hashes(self) -> Sequence[int]:
        """Sequence hashes of all cached blocks, consistent with the steps already handed out."""

    def asset(self, sha256: str) -> bytes | None:
        """A file of the model, by what its card says; None for any other."""

    def exposition(self) -> bytes:
        """The engine's own metrics as Prometheus reads them; empty where there are none, or not yet."""

    def steps(self) -> AsyncIterator[EngineStep]:
        """One item per engine step, and one when the load changes without a step."""

    async def stop(self, grace_s: float) -> None:
        """Finish running attempts for at most `grace_s`, cancel the rest, free everything."""


class EngineStep(msgspec.Struct):
    """Everything one engine step has to say: tokens of all attempts, KV events and load."""

    outputs: list[Output] = []
    stored: list[int] = []  # sequence hashes of blocks now in the cache
    removed: list[int] = []  # sequence hashes evicted; within one step, removed before stored
    cleared: bool = False  # the whole cache was dropped, before `stored`
    load: Load = Load()
    ended: list[AttemptReport] = []  # of the attempts whose last output is here


class Pulled(msgspec.Struct, frozen=True):
    """How a pull ended. `error` is None exactly when every block arrived and the holder confirmed that
    it still held them after the last byte was read."""

    blocks: int
    bytes: int
    seconds: float
    error: str | None = None


class KvTransfer(Protocol):
    """Moves blocks between the pools of two workers. Methods may be called from any thread and return
    at once; callbacks come on a thread of the transfer's own and must return at once."""

    name: str

    def start(self, pool: memoryview, on_pulled: Callable[[str], None]) -> None:
        """Begin serving.

        Args:
            pool: the KV pool, writable, shape (total_blocks, bytes per block), format 'B', C-contiguous.
            on_pulled: called with a handoff_id once its reader has everything: it may be freed.
        """

    def export(self, handoff_id: str, block_ids: Sequence[int]) -> tuple[str, bytes]:
        """Allow one reader to pull these blocks. Returns (address, params) for the Handoff."""

    def retract(self, handoff_id: str) -> bool:
        """Stop allowing it. True when no reader is reading and none will: the blocks may be reused.
        False while a read is under way; ask again later (on_pulled follows, or the read's timeout)."""

    def pull(
        self,
        handoff: Handoff,
        source_indices: Sequence[int],
        block_ids: Sequence[int],
        timeout_s: float,
        on_done: Callable[[Pulled], None],
    ) -> None:
        """Read the handoff's blocks number `source_indices` into own pool rows `block_ids`.

        `source_indices` may be empty (everything was cached): the holder is told to let go.
        `on_done` is called exactly once, within `timeout_s` and a little; after it nothing is written.
        """

    def stop(self) -> None:
        """Close everything and join its threads."""


class Lease(Protocol):
    """A registration, kept up to date in the background: where discovery forgets it, it is made again."""

    registered: bool
    """Whether discovery has ever listed this instance."""

    trouble: str
    """Why it may not be listed now; empty when it is."""

    async def close(self) -> None:
        """Deregister at once."""


class Discovery(Protocol):
    """Who exists. Level-based: a watcher always gets the whole set."""

    @property
    def trouble(self) -> str:
        """Why the set that watchers have may be out of date; empty when it is not."""

    async def register(self, registration: Registration) -> Lease:
        """Register until the lease is closed or this process dies. An outage is no error: the lease tells
        of it and goes on trying. Raises ConfigError for what only a person can mend."""

    def watch(self) -> AsyncIterator[Mapping[str, Registration]]:
        """The current instances by id, at once and after each change. Never raises for an outage of
        the directory: it keeps the last set and tries again."""

    async def close(self) -> None:
        """Release what is open. Leases are closed on their own."""


class BegunTrace(Protocol):
    """A request of this process whose span has begun."""

    context: TraceContext
    """For whoever does a part of it."""

    recording: bool
    """Whether anybody will see the span."""

    def end(self, span: Span) -> None:
        """It has ended, as this says."""


class Tracing(Protocol):
    """Sends spans to wherever traces are collected. Nothing here waits for that, or raises."""

    def begin(self, name: str, given: TraceContext | None, began_at: float) -> BegunTrace:
        """A request begins; `given`: of what, by its client. Time in seconds of the monotonic clock."""

    def record(self, span: Span, parent: TraceContext) -> None:
        """A part of somebody else's request has ended."""

    async def close(self) -> None:
        """Send what is left, for a short time at most."""


CALL_ID_PREFIX: Final = "call_"  # of the ids of tool calls, as in OpenAI's API


class AnswerParser(Protocol):
    """Takes one answer apart. Either `push`, step by step, or `whole`, once. Raises
    RequestRejected(INTERNAL) for an answer that it cannot read."""

    def push(self, text: str, token_ids: Sequence[int], *, finished: bool) -> Parsed | None:
        """What the next text, of these tokens, adds; None when nothing yet."""

    def whole(self, text: str, token_ids: Sequence[int]) -> Parsed:
        """The whole answer, with one ToolCallDelta for each call."""

    def reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """How many of the answer's tokens were reasoning."""


class CallParser(Protocol):
    """One chat request, as its model's parsers see it."""

    skip_special_tokens: bool
    """Whether special tokens are left out of the text that they read."""

    def structured(self, prompt_ids: Sequence[int]) -> StructuredOutput | None:
        """What its answers must look like, tool calls included."""

    def answer(self, prompt_ids: Sequence[int]) -> AnswerParser:
        """For one of its answers."""


class ChatParser(Protocol):
    """Knows how one model writes reasoning and tool calls."""

    def begin(self, body: JsonObject) -> CallParser:
        """Read a chat request, with only those fields that the client set. Raises RequestRejected."""


class ChatParsers(Protocol):
    """Parsers by the names that engines give them."""

    def has(self, answering: Answering) -> bool:
        """Whether the parsers that a model needs are among them, as far as can be said before `load`."""

    def load(self, model: ModelView) -> ChatParser:
        """Seconds of work; not on the event loop. Raises ConfigError when this model's tokenizer or
        names do not fit."""


STORED_ENTRY_BYTES = 1024  # about what a stored response takes beside its texts


class StoredResponse(msgspec.Struct, frozen=True):
    """A response of /v1/responses that is kept, with what it answered."""

    response_id: str
    response: bytes  # JSON
    items: bytes  # its own input items, a JSON list
    previous_id: str  # of the response that it continues; empty when it begins a conversation

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.response) + len(self.items) + STORED_ENTRY_BYTES


class ResponseStore(Protocol):
    """Keeps responses apart by the tenant that made them."""

    async def put(self, tenant: str, stored: StoredResponse) -> bool:
        """Keep it. False when it is beyond the limits of the store, or the store does not answer."""

    async def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        """None when there is none, or it is another tenant's. Raises StoreUnavailable."""

    async def delete(self, tenant: str, response_id: str) -> bool:
        """Whether there was one. Raises StoreUnavailable."""

    async def check(self) -> None:
        """Log whether it answers."""

    async def close(self) -> None:
        """Close its connections."""
