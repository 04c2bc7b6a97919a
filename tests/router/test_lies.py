"""Peers that lie to real objects: workers to a router, frontends to a worker. The others go on."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.discovery.file import FileDiscovery
from penstock.link.client import LinkClient
from penstock.link.server import LinkServer, Peer
from penstock.link.settings import ClientSettings, ServerSettings
from penstock.shapes import (
    Attempt,
    Card,
    FinishReason,
    Load,
    Output,
    Rates,
    Registration,
    Role,
    Sampling,
)
from penstock.wire.messages import Bounce, Generate, Heartbeat, Release, Step
from tests import builders
from tests.cards import card as card_of
from tests.cluster import MODEL, Cluster, cluster

PROMPT = list(range(1, 100))
FILE = b"{}"


class Liar:
    """A worker by hand: it is up as any other, and says what a test wants."""

    def __init__(self, instance_id: str, **card: Any) -> None:
        self.instance_id = instance_id
        self.peers: list[Peer] = []
        self.lost: list[Peer] = []
        self.attempts: list[Attempt] = []
        self.on_up: Callable[[Peer], None] | None = None
        self.once = True  # it lies to the first peer only
        self.rates = Rates(1e6, 1e6, 1e6, 1e6, 1e6)  # nobody asks it if there is another
        self.on_attempt: Callable[[Peer, Attempt], None] = lambda peer, attempt: None
        self.hashes: list[int] = []
        self._card = card_of(instance_id, engine="liar", model=MODEL, **card)
        self._server = LinkServer(ServerSettings(heartbeat_s=0.05), self)

    @contextlib.asynccontextmanager
    async def running(self, folder: Path) -> AsyncIterator[None]:
        await self._server.start()
        card = self.card()
        lease = await FileDiscovery(folder).register(
            Registration(self.instance_id, 1, card.role, MODEL, self._server.address)
        )
        beating = asyncio.create_task(self._server.run())
        try:
            yield
        finally:
            beating.cancel()
            await lease.close()
            await self._server.close("the test is over")
            await asyncio.sleep(0.05)  # for one that was accepted just before

    # What a LinkServer asks.

    def card(self) -> Card:
        return self._card

    def snapshot(self) -> tuple[Iterable[int], Load]:
        asyncio.get_running_loop().call_later(0.1, self._welcomed)
        return self.hashes, self.load()

    def _welcomed(self) -> None:
        for peer in self._server.peers:
            if peer not in self.peers:
                self.peers.append(peer)
                if self.on_up is not None and (len(self.peers) == 1 or not self.once):
                    self.on_up(peer)

    def load(self) -> Load:
        return Load(total_blocks=100, rates=self.rates)

    def asset(self, sha256: str) -> bytes | None:
        return FILE

    def on_generate(self, peer: Peer, attempt: Attempt) -> None:
        self.attempts.append(attempt)
        self.on_attempt(peer, attempt)

    def on_cancel(self, peer: Peer, attempt_id: str) -> None:
        pass

    def on_release(self, peer: Peer, handoff_id: str, sent: bool) -> None:
        pass

    def on_peer_lost(self, peer: Peer) -> None:
        self.lost.append(peer)


def raw(peer: Any, message: Any, **changes: Any) -> None:
    """Send a message as bytes, with other values in its fields, checked by nobody."""
    plain = msgspec.msgpack.decode(msgspec.msgpack.encode(message), strict=False)
    body = msgspec.msgpack.encode(plain | changes)
    peer.connection.write(len(body).to_bytes(4, "big") + body)


def step(*outputs: Output, load: Load | None = None, **fields: Any) -> Step:
    return Step(seen=0, load=load or Load(total_blocks=100), outputs=list(outputs), **fields)


def array(load: Load, **changes: Any) -> list[Any]:
    """A load as it travels."""
    plain = msgspec.structs.astuple(load)
    names = Load.__struct_fields__
    return [changes.get(name, value) for name, value in zip(names, plain, strict=True)]


SAID: dict[str, tuple[Callable[[Peer], None], str]] = {
    "not a message": (lambda peer: peer.connection.write(b"\0\0\0\1\xc1"), "not a message"),
    "a frame without end": (lambda peer: peer.connection.write(b"\xff\xff\xff\xff"), "a frame of"),
    "a step time that is no number": (
        lambda peer: raw(
            peer, Heartbeat(0, Load()), load=array(Load(), rates=[math.nan, 0.1, 0.1, 2.0, 0.05])
        ),
        "load.rates.step_ms",
    ),
    "fewer than no requests": (
        lambda peer: raw(peer, Heartbeat(0, Load()), load=array(Load(), running=-5)),
        "load.running",
    ),
    "attempts that it never got": (lambda peer: peer.send(Heartbeat(3, Load())), "seen"),
    "an output for nobody": (lambda peer: peer.send(step(Output("r0.1", [1]))), "outputs.attempt_id"),
    "a bounce for nobody": (lambda peer: peer.send(Bounce("r0.1", "full")), "bounce.attempt_id"),
    "blocks gone that were not there": (lambda peer: peer.send(step(removed=[5])), "step.removed"),
    "one block gone twice": (lambda peer: peer.send(step(stored=[5], removed=[5])), "step.removed"),
    "more blocks than its pool": (
        lambda peer: peer.send(step(stored=list(range(1300)))),
        "step.stored",
    ),
    "a pool that is larger than it was": (
        lambda peer: peer.send(Heartbeat(0, Load(total_blocks=1000))),
        "load.used_blocks",
    ),
    "a reason without end": (lambda peer: peer.send(Bounce("r0.1", "x" * 5000)), "bounce.reason"),
    "a message of the handshake": (
        lambda peer: raw(peer, Heartbeat(0, Load()), t="refused", reason=""),
        "",
    ),
}

CARDS: dict[str, tuple[dict[str, Any], str]] = {
    "blocks of no tokens": ({"block_size": 0}, "card.engine.block_size"),
    "no vocabulary": ({"vocab_size": 0}, "card.engine.model.vocab_size"),
    "a file outside": ({"assets": {"../../etc/passwd": "0" * 64}}, "card.engine.model.assets"),
    "a file of no hash": ({"assets": {"tokenizer.json": "0" * 63}}, "card.engine.model.assets"),
    "a default that no request may have": (
        {"temperature": -1.0},
        "card.engine.model.answering.sampling_defaults.temperature",
    ),
}


def warnings(caplog: pytest.LogCaptureFixture, name: str) -> list[str]:
    lines = [it.getMessage() for it in caplog.records if it.levelname in ("WARNING", "ERROR")]
    return [line for line in lines if name in line]


async def until(condition: Callable[[], object], timeout_s: float = 15.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


async def test_workers_that_lie_are_cut_off_and_the_others_serve(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All at once. Each is named in one line, with the field."""
    liars = {what: Liar(f"liar-{number}") for number, what in enumerate(SAID)}
    for what, liar in liars.items():
        liar.on_up = SAID[what][0]
    async with cluster(tmp_path, {"good": Role.AGGREGATED}) as it, contextlib.AsyncExitStack() as stack:
        asked = [it.ask(PROMPT, max_tokens=300, seed=seed)[0] for seed in range(8)]
        for liar in liars.values():
            await stack.enter_async_context(liar.running(tmp_path))
        for liar in liars.values():
            await until(lambda liar=liar: liar.lost)
        for answer in asked:
            assert len(await answer.tokens()) == 300
        for what, liar in liars.items():
            (line,) = warnings(caplog, f"{liar.instance_id}:")
            assert SAID[what][1] in line, what
        assert len(await it.complete(PROMPT)) == 8
    assert "Traceback" not in caplog.text


async def test_cards_that_lie_are_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    liars = {what: Liar(f"liar-{number}", **CARDS[what][0]) for number, what in enumerate(CARDS)}
    async with cluster(tmp_path, {"good": Role.AGGREGATED}) as it, contextlib.AsyncExitStack() as stack:
        for liar in liars.values():
            await stack.enter_async_context(liar.running(tmp_path))
        for what, liar in liars.items():
            await until(lambda liar=liar: warnings(caplog, liar._server.address))
            (line,) = warnings(caplog, liar._server.address)
            assert CARDS[what][1] in line
        assert len(await it.complete(PROMPT)) == 8
        states = {view.instance_id: view.state for view in it.router.instances()}
        assert {states[liar.instance_id] for liar in liars.values()} == {"connecting"}


def handed(attempt: Attempt) -> Output:
    elsewhere = builders.handoff(attempt.attempt_id, "good")
    return Output(attempt.attempt_id, [1], FinishReason.PREFILLED, handoff=elsewhere)


ANSWERS: dict[str, Callable[[Peer, Attempt], None]] = {
    "tokens that no model has": lambda peer, a: peer.send(
        Step(peer.seen, Load(), [Output(a.attempt_id, [1000])])
    ),
    "more tokens than were asked for": lambda peer, a: peer.send(
        Step(peer.seen, Load(), [Output(a.attempt_id, [1] * 9)])
    ),
    "two ends": lambda peer, a: peer.send(
        Step(
            peer.seen,
            Load(),
            [Output(a.attempt_id, [], FinishReason.ERROR), Output(a.attempt_id, [1], FinishReason.STOP)],
        )
    ),
    "a handoff of somebody else": lambda peer, a: peer.send(Step(peer.seen, Load(), [handed(a)])),
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
async def test_a_request_that_meets_a_liar_is_answered_by_another(
    tmp_path: Path, answer: Callable[[Peer, Attempt], None]
) -> None:
    """Nothing that the first one gave is used."""
    liar = Liar("liar", role=Role.AGGREGATED)
    liar.on_attempt = answer
    liar.rates = Rates(0.0, 0.0, 0.0, 0.0, 0.0)  # so that it is asked first
    async with cluster(tmp_path, {"good": Role.AGGREGATED}) as it:
        wanted = await it.complete(PROMPT)
        async with liar.running(tmp_path):
            await it.wait_ready("good", "liar")
            for seed in range(1, 40):
                got = await it.complete([seed, *PROMPT[1:]])
                assert got == wanted
                if liar.lost:
                    break
            assert liar.lost


async def test_one_that_lies_again_and_again_is_tried_less_and_less(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    liar = Liar("liar")
    liar.on_up = lambda peer: peer.send(step(removed=[5]))
    liar.once = False
    async with cluster(tmp_path, {"good": Role.AGGREGATED}), liar.running(tmp_path):
        await until(lambda: len(liar.lost) >= 3)
        assert len(warnings(caplog, "liar:")) <= len(liar.peers)


# --- frontends ------------------------------------------------------------------------------------------


class Listener:
    """A frontend's end, of which only the link is wanted."""

    def __init__(self) -> None:
        self.up = False
        self.downs: list[str] = []
        self.steps: list[Step] = []

    def on_cached(self, hashes: list[int], *, first: bool) -> None:
        pass

    def on_up(self, card: Card, load: Load) -> None:
        self.up = True

    def on_step(self, step: Step) -> None:
        self.steps.append(step)

    def on_heartbeat(self, seen: int, load: Load) -> None:
        pass

    def on_bounce(self, bounce: Bounce) -> None:
        pass

    def on_draining(self, reason: str) -> None:
        pass

    def on_down(self, reason: str, orderly: bool) -> None:
        self.downs.append(reason)


def attempt(**fields: Any) -> Attempt:
    return msgspec.structs.replace(Attempt("x.1", "x", [1, 2, 3], 3, Sampling(max_tokens=4)), **fields)


def generate(**changes: Any) -> Callable[[Any], None]:
    """Send an attempt with other values in its fields, and in those of its sampling."""

    def send(peer: Any) -> None:
        plain = msgspec.msgpack.decode(msgspec.msgpack.encode(attempt()))
        sampling = plain["sampling"] | changes.pop("sampling", {})
        raw(peer, Generate(1, attempt()), attempt={**plain, "sampling": sampling, **changes})

    return send


ASKED: dict[str, tuple[Callable[[Any], None], str]] = {
    "not a message": (lambda peer: peer.connection.write(b"\0\0\0\1\xc1"), "not a message"),
    "a prompt longer than its tokens": (generate(prompt_len=4), "attempt.prompt_len"),
    "no prompt": (generate(prompt_len=0), "attempt.prompt_len"),
    "tokens below none": (generate(token_ids=[1, -2, 3]), "attempt.token_ids[1]"),
    "a temperature that is no number": (
        generate(sampling={"temperature": math.nan}),
        "attempt.sampling.temperature",
    ),
    "a billion alternatives": (generate(sampling={"logprobs": 10**9}), "attempt.sampling.logprobs"),
    "a name that breaks the log": (generate(attempt_id="x\n.1"), "attempt.attempt_id"),
    "a number out of order": (lambda peer: raw(peer, Generate(7, attempt())), "Generate 7 after 0"),
    "a name without end": (lambda peer: raw(peer, Release("h"), handoff_id="h" * 999), "handoff_id"),
}

ENGINE_SAYS = {
    "tokens that the model has not": generate(token_ids=[1, 2, 10**6]),
    "stop tokens that it has not": generate(sampling={"stop_token_ids": [10**6]}),
    "biases for tokens that it has not": generate(sampling={"logit_bias": {10**6: 1.0}}),
    "no tokens": generate(sampling={"max_tokens": 0}),
}


@contextlib.asynccontextmanager
async def frontend(it: Cluster, name: str) -> AsyncIterator[tuple[LinkClient, Listener]]:
    address = next(view.address for view in it.router.instances())
    listener = Listener()
    client = LinkClient(address, listener, ClientSettings(), frontend_id=name)
    task = asyncio.create_task(client.run())
    try:
        await until(lambda: listener.up)
        yield client, listener
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_frontends_that_lie_are_cut_off_and_the_others_are_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with cluster(tmp_path, {"a0": Role.AGGREGATED}) as it:
        asked = [it.ask(PROMPT, max_tokens=300, seed=seed)[0] for seed in range(4)]
        for number, (what, (lie, field)) in enumerate(ASKED.items()):
            async with frontend(it, f"liar-{number}") as (client, listener):
                lie(client._session)
                await until(lambda listener=listener: listener.downs)
            (line,) = warnings(caplog, f"liar-{number} ")
            assert field in line, what
        for answer in asked:
            assert len(await answer.tokens()) == 300
        assert it.workers["a0"].worker.health()["status"] == "healthy"
    assert "Traceback" not in caplog.text


async def test_what_only_an_engine_can_refuse_ends_the_attempt_alone(tmp_path: Path) -> None:
    async with cluster(tmp_path, {"a0": Role.AGGREGATED}) as it:
        asked = [it.ask(PROMPT, max_tokens=300, seed=seed)[0] for seed in range(4)]
        for number, (what, ask) in enumerate(ENGINE_SAYS.items()):
            async with frontend(it, f"odd-{number}") as (client, listener):
                client._session._reports.sent(attempt())
                ask(client._session)
                await until(lambda listener=listener: any(step.outputs for step in listener.steps))
                (output,) = [output for step in listener.steps for output in step.outputs]
                assert output.finish_reason is FinishReason.ERROR, what
                assert not listener.downs
        for answer in asked:
            assert len(await answer.tokens()) == 300


async def test_the_hash_of_a_file_is_its_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another content than the card names is not taken, and the others are not asked to wait for it."""
    named = {"tokenizer.json": hashlib.sha256(b"other").hexdigest()}
    liar = Liar("liar", assets=named)
    async with cluster(tmp_path, {"good": Role.AGGREGATED}) as it, liar.running(tmp_path):
        await until(lambda: warnings(caplog, "liar: cannot fetch"))
        assert len(await it.complete(PROMPT)) == 8
