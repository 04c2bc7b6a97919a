"""What a peer can say that no peer may: messages with one value changed, so that only a check notices.

Each lie must end the connection on which it was sent, and nothing else.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from typing import Any

import msgspec

from penstock.core.prefix_index import most_blocks
from penstock.shapes import MAX_TEXT_CHARS, Load, Output
from penstock.wire import frames
from simulator.network import End, Route
from simulator.world import World

Lie = Callable[[Any], Any]
"""Changes a message, as plain values, or returns other bytes in its place."""

NOTICED_S = 5.0
"""Within which a connection must have ended after a lie, while both ends are well and hear each other."""

LOOK_S = 0.1

_LOAD = {name: place for place, name in enumerate(Load.__struct_fields__)}
_OUTPUT = {name: place for place, name in enumerate(Output.__struct_fields__)}


def _put(message: Any, *path: Any) -> None:
    """Set a value: the path to it, and the value last."""
    *places, last, value = path
    for place in places:
        message = message[place]
    message[last] = value


def _prefilled(output: list[Any]) -> list[Any]:
    """An output that says that its KV is to be had, and not where."""
    _put(output, _OUTPUT["finish_reason"], "prefilled")
    _put(output, _OUTPUT["handoff"], None)
    return output


_ANY: list[Lie] = [
    lambda it: b"\0\0\0\1\xc1",  # not msgpack
    lambda it: b"\xff\xff\xff\xff",  # a frame longer than any
    lambda it: _put(it, "t", "nonsense"),
]

_LOADED: list[Lie] = [
    lambda it: _put(it, "seen", it["seen"] + 1_000_000),
    lambda it: _put(it, "load", _LOAD["rates"], 0, math.nan),
    lambda it: _put(it, "load", _LOAD["running"], -1),
    lambda it: _put(it, "load", _LOAD["steps"], -1),
    lambda it: _put(it, "load", _LOAD["used_blocks"], it["load"][_LOAD["total_blocks"]] + 1),
]

_ANSWERED: list[Lie] = [
    lambda it: _put(it, "outputs", 0, _OUTPUT["token_ids"], [2**31]),
    lambda it: _put(it, "outputs", 0, _OUTPUT["token_ids"], [-1]),
    lambda it: _put(it, "outputs", 0, _OUTPUT["token_ids"], [1] * 1000),
    lambda it: _put(it, "outputs", 0, _OUTPUT["attempt_id"], "nobody.1"),
    lambda it: it.update(outputs=[_prefilled(it["outputs"][0])]),
    lambda it: _put(it, "outputs", 0, _OUTPUT["cached_tokens"], 10**6),
]

_HANDED: list[Lie] = [
    lambda it: _put(it, "outputs", 0, _OUTPUT["handoff"], "holder", "instance_id", "w99"),
    lambda it: _put(it, "outputs", 0, _OUTPUT["handoff"], "holder", "epoch", 10**6),
    lambda it: _put(it, "outputs", 0, _OUTPUT["handoff"], "num_tokens", 10**6),
    lambda it: _put(it, "outputs", 0, _OUTPUT["handoff"], "block_size", 0),
]

_CACHED: list[Lie] = [
    lambda it: _put(it, "removed", [*it.get("removed", ()), 12345]),
    lambda it: _put(it, "stored", list(range(most_blocks(it["load"][_LOAD["total_blocks"]]) + 1))),
    lambda it: _put(it, "stored", [-1]),
]

_ASKED: list[Lie] = [
    lambda it: _put(it, "seq", it["seq"] + 1),
    lambda it: _put(it, "attempt", "prompt_len", 10**6),
    lambda it: _put(it, "attempt", "token_ids", 0, -1),
    lambda it: _put(it, "attempt", "sampling", "temperature", math.nan),
    lambda it: _put(it, "attempt", "sampling", "max_tokens", -1),
]

_BY_TAG: dict[str, list[Lie]] = {
    "welcome": [
        lambda it: _put(it, "card", "engine", "block_size", 0),
        lambda it: _put(it, "card", "engine", "model", "vocab_size", 0),
        lambda it: _put(it, "card", "engine", "model", "assets", {"../outside": "0" * 64}),
        lambda it: _put(it, "card", "incarnation", "instance_id", "w99"),
    ],
    "snapshot": [lambda it: _put(it, "hashes", [-1])],
    "step": _LOADED,
    "heartbeat": _LOADED,
    "bounce": [lambda it: _put(it, "attempt_id", "nobody.1")],
    "draining": [lambda it: _put(it, "reason", "x" * (MAX_TEXT_CHARS + 1))],
    "generate": _ASKED,
    "cancel": [lambda it: _put(it, "attempt_id", "")],
    "release": [lambda it: _put(it, "handoff_id", "x" * 1000)],
}


def lie(rng: random.Random, data: bytes) -> bytes:
    """A frame with one thing in it changed to what cannot be, before what else is written with it."""
    end = frames.LENGTH_BYTES + int.from_bytes(data[: frames.LENGTH_BYTES], "big")
    rest = data[end:]  # it may be there twice (faults.py)
    message = msgspec.msgpack.decode(data[frames.LENGTH_BYTES : end], strict=False)
    kinds = [_ANY, _BY_TAG.get(message["t"], _ANY)]
    outputs = message.get("outputs")
    if outputs:
        kinds += [_ANSWERED] * 2
        if outputs[0][_OUTPUT["handoff"]] is not None:
            kinds += [_HANDED] * 4
    if message["t"] == "step":
        kinds.append(_CACHED)
    said = rng.choice(rng.choice(kinds))(message)
    if isinstance(said, bytes):
        return said + rest
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(frames.LENGTH_BYTES, "big") + body + rest


class Liar:
    """Lies now and then in what one process says, while `telling`.

    Args:
        name: of the process.
        share: of its messages that become lies.
    """

    def __init__(self, world: World, rng: random.Random, name: str, share: float) -> None:
        self._world = world
        self._rng = rng
        self._name = name
        self._share = share
        self._told: list[tuple[End, Route]] = []  # the ends that lied, each once

    async def tell(self, seconds: float) -> None:
        """Lie for so long, then wait until each lie has ended its connection."""
        self._world.network.taps.append(self._tap)
        await asyncio.sleep(seconds)
        self._world.network.taps.remove(self._tap)
        for end, route in self._told:
            await self._noticed(end, route)

    def _tap(self, route: Route, data: bytes) -> bytes:
        writer = self._world.network.writer
        if route[0] != self._name or writer is None or self._rng.random() >= self._share:
            return data
        if writer.lied:
            return data  # one lie is enough for a connection
        writer.lied = True
        self._world.journal.note("lie", *route)
        self._told.append((writer, route))
        return lie(self._rng, data)

    async def _noticed(self, end: End, route: Route) -> None:
        calm_s = 0.0
        while not end.peer.closing:
            await asyncio.sleep(LOOK_S)
            calm_s += LOOK_S if self._calm(route) else 0.0
            if calm_s > NOTICED_S:
                self._world.journal.violate("liars are cut off", f"{route[1]} still listens to {route[0]}")
                return

    def _calm(self, route: Route) -> bool:
        """Whether both ends run, and what one says arrives at the other."""
        world = self._world
        worker = world.workers.get(route[0]) or world.workers.get(route[1])
        frontend = next((it for it in world.frontends if it.name in route), None)
        if worker is None or frontend is None or worker.process.held or frontend.process.held:
            return False
        return world.calm(frontend, worker)
