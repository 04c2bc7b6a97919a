"""What is recorded of requests for `penstock simulate` and `penstock bench`: when each came, how long it
was, and which blocks of tokens it had in common with others. No text, and nothing to guess a text from.

A block is named by a keyed hash of its prompt up to its end. The key is the recording's salt: who does not
know it cannot try out texts, as one could with the hashes by which prompts are routed. It is random, and
forgotten when the recording ends; `penstock record` also puts numbers in place of the hashes, in the order
in which they first come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from hashlib import blake2b
from typing import Annotated

import msgspec
from msgspec import Meta

from penstock.core.hashing import last_hash, root_hash, sequence_hashes
from penstock.shapes import Request

MAX_RECORDINGS = 4
"""At one time, of a frontend."""

MAX_WAITING_BYTES = 16 * 1024 * 1024
"""Of requests that the reader of a recording has not fetched yet. Further ones are left out and counted."""

_HASH_BYTES = 8


class RecordingWanted(msgspec.Struct, frozen=True):
    """What a recording is to be like."""

    salt: Annotated[str, Meta(pattern="^[0-9a-f]{32,128}$", description="Random bytes, in hexadecimal.")]
    block_tokens: Annotated[int, Meta(ge=16, le=65_536)] = 64
    model: str = ""  # only its requests; empty: those of all models


class RecordedRequest(msgspec.Struct, omit_defaults=True):
    """A request that has ended. The names are those of Mooncake's traces as far as these have them."""

    timestamp: float  # when it came, in ms
    input_length: int  # in tokens, as all lengths
    output_length: int
    hash_ids: list[int]  # one for each block of the prompt, the last of which may be a part of one
    output_hash_ids: list[int]
    """One for each block of prompt and answer together, from the one in which the answer begins: prompts of
    later turns have these blocks."""
    block_tokens: int
    model: str
    rounded_ms: float  # to which `timestamp` was rounded
    session: int | None = None  # equal for requests of one session, where clients name theirs
    left_out: int = 0  # requests that ended before it and are missing, as the reader was too slow


class Recording:
    """One recording, from its beginning until its reader leaves.

    Args:
        tenant: whose requests; None: everybody's.
        began_at: requests that came before are left out.
        unix_s: what to add to a frontend's clock for Unix time.
        on_more: called when there is something more to `take`.
    """

    def __init__(
        self,
        wanted: RecordingWanted,
        tenant: str | None,
        began_at: float,
        unix_s: float,
        on_more: Callable[[], None],
    ) -> None:
        self._wanted = wanted
        self._tenant = tenant
        self._began_at = began_at
        self._unix_s = unix_s
        self._on_more = on_more
        self._salted = blake2b(key=bytes.fromhex(wanted.salt), digest_size=_HASH_BYTES)
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._left_out = 0

    def ended(self, request: Request, token_ids: list[int], came_at: float) -> None:
        """A request has ended. `token_ids`: its prompt and its answer."""
        wanted, model = self._wanted, request.model.name
        others = wanted.model not in ("", model) or self._tenant not in (None, request.tenant)
        if others or came_at < self._began_at:
            return
        recorded = self._recorded(request, token_ids, came_at)
        recorded.left_out = self._left_out
        line = msgspec.json.encode(recorded)
        if self._waiting_bytes + len(line) > MAX_WAITING_BYTES:
            self._left_out += 1
            return
        self._left_out = 0
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        self._on_more()

    def take(self) -> list[bytes]:
        """What has ended since the last call: each a RecordedRequest as JSON."""
        taken = list(self._waiting)
        self._waiting.clear()
        self._waiting_bytes = 0
        return taken

    def _recorded(self, request: Request, token_ids: list[int], came_at: float) -> RecordedRequest:
        size, prompt_len = self._wanted.block_tokens, len(request.token_ids)
        root = root_hash(request.model.name, request.cache_salt)
        hashes = sequence_hashes(token_ids, size, root)
        begins = prompt_len // size  # the block in which the answer does
        prompt = hashes[:begins]
        if prompt_len % size:
            prompt.append(_tail_hash(token_ids[:prompt_len], prompt, size, root))
        output = hashes[begins:]
        if len(token_ids) % size:
            output.append(_tail_hash(token_ids, hashes, size, root))
        return RecordedRequest(
            timestamp=(came_at + self._unix_s) * 1e3,
            input_length=prompt_len,
            output_length=len(token_ids) - prompt_len,
            hash_ids=[self._keyed(each) for each in prompt],
            output_hash_ids=[self._keyed(each) for each in output],
            block_tokens=size,
            model=request.model.name,
            rounded_ms=0.0,
            session=self._keyed(root_hash(request.tenant, request.session)) if request.session else None,
        )

    def _keyed(self, name: int) -> int:
        salted = self._salted.copy()
        salted.update(name.to_bytes(_HASH_BYTES, "little"))
        return int.from_bytes(salted.digest(), "little")


def _tail_hash(token_ids: list[int], whole: list[int], size: int, root: int) -> int:
    """The hash of what is behind the whole blocks of these tokens."""
    tail = token_ids[len(token_ids) // size * size :]
    return last_hash(tail, size, whole[-1] if whole else root)
