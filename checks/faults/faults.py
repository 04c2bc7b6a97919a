"""The catalogue: what can happen to a graph, and what its clients then see."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checks.faults import strangers
from checks.faults.processes import LINK_PORT, Graph, Part
from tests.proxy import Weather

Happening = Callable[[Graph], Awaitable[None]]

ALL = "queued prefill transfer decode"
UNBROKEN = "the unbroken answer, after the wait shown"
STALL = "a pause as long as that, then the rest of the answer"
OVERDUE = frozenset({"429 overloaded"})
CUT = "its connections end; clients that ask again get the answer from another frontend"


@dataclass(frozen=True)
class Fault:
    """One kind of fault. `happen` returns once it is over."""

    name: str
    promise: str  # what clients see, for docs/reliability.md
    phases: tuple[str, ...]
    happen: Happening
    quick: tuple[str, ...] = ()  # the phases of a quick run
    ends_connections: bool = False  # those of a frontend that it ends
    errors: frozenset[str] = frozenset()  # typed errors that clients may get
    reference: bool = False  # also with real weights
    discovery: str = ""  # file or etcd: only where instances are found there
    lasts_s: float = 0.0  # what of `happen` is the fault itself; the rest is recovery


FAULTS: list[Fault] = []


def fault(
    name: str, promise: str = UNBROKEN, phases: str = ALL, quick: str = "", **options: Any
) -> Callable[[Happening], Happening]:
    """Enter a fault into the catalogue."""

    def enter(happen: Happening) -> Happening:
        FAULTS.append(Fault(name, promise, tuple(phases.split()), happen, tuple(quick.split()), **options))
        return happen

    return enter


@fault("nothing", "for comparison: the same bursts without a fault", reference=True)
async def nothing(graph: Graph) -> None:
    await asyncio.sleep(0.0)


# --- workers that die or freeze ----------------------------------------------------------------------


async def kill(graph: Graph, victims: list[Part]) -> None:
    for victim in victims:
        victim.kill()
    await asyncio.gather(*(graph.restart(victim) for victim in victims))


@fault("kill -9 of a prefill worker", reference=True, quick="transfer")
async def kill_prefill(graph: Graph) -> None:
    await kill(graph, [await graph.busiest("prefill")])


@fault("kill -9 of a decode worker", reference=True, quick="decode")
async def kill_decode(graph: Graph) -> None:
    await kill(graph, [await graph.busiest("decode")])


@fault("kill -9 of all prefill workers at once", phases="queued prefill transfer")
async def kill_prefills(graph: Graph) -> None:
    await kill(graph, graph.role("prefill"))


@fault("kill -9 of all decode workers at once", phases="prefill transfer decode", quick="decode")
async def kill_decodes(graph: Graph) -> None:
    await kill(graph, graph.role("decode"))


@fault("kill -9 of all workers at once", phases="prefill decode")
async def kill_workers(graph: Graph) -> None:
    await kill(graph, graph.workers)


@fault("a new process takes a decode worker's name, the old one runs on for 3 s", phases="decode")
async def twin(graph: Graph) -> None:
    old = await graph.busiest("decode")
    async with graph.twin(old) as new:
        await asyncio.sleep(3.0)
        old.kill()
        await graph.wait_exit(old)
        await asyncio.sleep(1.0)
        new.signal(signal.SIGTERM)
        assert await graph.wait_exit(new) == 0
    await graph.launch(old)


async def freeze(part: Part, seconds: float) -> None:
    part.signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        part.signal(signal.SIGCONT)


@fault("a prefill worker frozen for 1 s", phases="queued prefill transfer", lasts_s=1)
async def freeze_prefill_short(graph: Graph) -> None:
    await freeze(await graph.busiest("prefill"), 1.0)


@fault("a prefill worker frozen for 20 s", phases="queued prefill transfer", lasts_s=20)
async def freeze_prefill_long(graph: Graph) -> None:
    await freeze(await graph.busiest("prefill"), 20.0)


@fault(
    "a decode worker frozen for 1 s", phases="transfer decode", reference=True, lasts_s=1, quick="decode"
)
async def freeze_decode_short(graph: Graph) -> None:
    await freeze(await graph.busiest("decode"), 1.0)


@fault("a decode worker frozen for 20 s", phases="transfer decode", reference=True, lasts_s=20)
async def freeze_decode_long(graph: Graph) -> None:
    await freeze(await graph.busiest("decode"), 20.0)


@fault(
    "a prefill and a decode worker that stand still again and again, for 15 s",
    phases="queued transfer decode",
    lasts_s=15,
)
async def stutter(graph: Graph) -> None:
    """Some are too short to be noticed, some end the moment they are, some are longer."""
    await asyncio.gather(*[stutters(await graph.busiest(role)) for role in ("prefill", "decode")])


async def stutters(part: Part) -> None:
    for seconds in (0.3, 1.9, 0.9, 2.5, 2.2, 4.0):
        await freeze(part, seconds)
        await asyncio.sleep(0.5)


# --- frontends ---------------------------------------------------------------------------------------


@fault("kill -9 of a frontend", CUT, "queued prefill transfer decode", "decode", ends_connections=True)
async def kill_frontend(graph: Graph) -> None:
    await kill(graph, graph.frontends[:1])


@fault("a frontend frozen for 1 s", STALL, "decode", lasts_s=1)
async def freeze_frontend_short(graph: Graph) -> None:
    await freeze(graph.frontends[0], 1.0)


@fault(
    "a frontend frozen for 20 s",
    STALL + "; new requests may get 429",
    "prefill decode",
    errors=OVERDUE,
    lasts_s=20,
)
async def freeze_frontend_long(graph: Graph) -> None:
    await freeze(graph.frontends[0], 20.0)


# --- leaving in order --------------------------------------------------------------------------------


async def drain(graph: Graph, part: Part) -> None:
    code = await graph.drain(part)
    assert code == 0, f"{part.name} exited with {code}"


@fault("SIGTERM to a prefill worker", reference=True)
async def drain_prefill(graph: Graph) -> None:
    await drain(graph, await graph.busiest("prefill"))


@fault("SIGTERM to a decode worker", reference=True, quick="decode")
async def drain_decode(graph: Graph) -> None:
    await drain(graph, await graph.busiest("decode"))


@fault("SIGTERM to a frontend", "the unbroken answer; new requests go to another frontend", quick="decode")
async def drain_frontend(graph: Graph) -> None:
    await drain(graph, graph.frontends[0])


@fault("rolling restart of every process", "as with SIGTERM to each", "queued decode", reference=True)
async def rolling_restart(graph: Graph) -> None:
    for part in graph.parts:
        await drain(graph, part)
        await graph.ready()


# --- the network --------------------------------------------------------------------------------------


async def storm(
    graph: Graph, parts: list[Part], weather: Weather, seconds: float, *, transfer: bool = False
) -> None:
    graph.weather(parts, weather, transfer=transfer)
    try:
        await asyncio.sleep(seconds)
    finally:
        graph.weather(parts, Weather(), transfer=transfer)


@fault("a prefill worker's links cut for 3 s", phases="queued prefill transfer", lasts_s=3)
async def cut_prefill(graph: Graph) -> None:
    await storm(graph, [await graph.busiest("prefill")], Weather(refused=True), 3.0)


@fault("a decode worker's links cut for 3 s", phases="transfer decode", lasts_s=3)
async def cut_decode(graph: Graph) -> None:
    await storm(graph, [await graph.busiest("decode")], Weather(refused=True), 3.0)


@fault("all links reset at once", phases="queued prefill transfer decode")
async def cut_all(graph: Graph) -> None:
    for part in graph.workers:
        assert part.link is not None
        part.link.cut()


@fault("a prefill worker's links silent for 8 s", phases="queued prefill transfer", lasts_s=8)
async def silence_prefill(graph: Graph) -> None:
    await storm(graph, [await graph.busiest("prefill")], Weather(hold_up=True, hold_down=True), 8.0)


@fault("a decode worker's links silent for 8 s", phases="transfer decode", lasts_s=8, quick="decode")
async def silence_decode(graph: Graph) -> None:
    await storm(graph, [await graph.busiest("decode")], Weather(hold_up=True, hold_down=True), 8.0)


@fault("links silent towards a decode worker for 8 s", phases="transfer decode", lasts_s=8)
async def silence_up(graph: Graph) -> None:
    await storm(graph, [await graph.busiest("decode")], Weather(hold_up=True), 8.0)


@fault("links silent from a decode worker for 8 s", phases="transfer decode", lasts_s=8)
async def silence_down(graph: Graph) -> None:
    await storm(graph, [await graph.busiest("decode")], Weather(hold_down=True), 8.0)


@fault("all links silent for 8 s", phases="prefill decode", lasts_s=8)
async def silence_all(graph: Graph) -> None:
    await storm(graph, graph.workers, Weather(hold_up=True, hold_down=True), 8.0)


@fault("200 ms more on every link for 5 s", phases="prefill decode", lasts_s=5)
async def delay_all(graph: Graph) -> None:
    await storm(graph, graph.workers, Weather(delay_s=0.2), 5.0)


@fault("20 kB/s on a decode worker's links for 5 s", phases="decode", lasts_s=5)
async def throttle_decode(graph: Graph) -> None:
    await storm(graph, [await graph.busiest("decode")], Weather(bytes_per_s=20e3), 5.0)


@fault("KV transfer refused for 5 s", phases="prefill transfer", reference=True, lasts_s=5, quick="prefill")
async def cut_transfer(graph: Graph) -> None:
    await storm(graph, graph.role("prefill"), Weather(refused=True), 5.0, transfer=True)


@fault("KV transfer silent for 8 s", phases="prefill", reference=True, lasts_s=8)
async def silence_transfer(graph: Graph) -> None:
    weather = Weather(hold_up=True, hold_down=True)
    await storm(graph, graph.role("prefill"), weather, 8.0, transfer=True)


@fault("KV transfer at 2 kB/s for 8 s", phases="prefill", reference=True, lasts_s=8)
async def throttle_transfer(graph: Graph) -> None:
    await storm(graph, graph.role("prefill"), Weather(bytes_per_s=2e3), 8.0, transfer=True)


@fault(
    "a decode worker killed, a prefill worker frozen and all links reset at once", phases="prefill decode"
)
async def three_at_once(graph: Graph) -> None:
    await cut_all(graph)
    victim, frozen = await graph.busiest("decode"), await graph.busiest("prefill")
    await asyncio.gather(kill(graph, [victim]), freeze(frozen, 5.0))


# --- discovery ---------------------------------------------------------------------------------------


@fault(
    "the discovery directory deleted", phases="queued decode", lasts_s=6, discovery="file", quick="decode"
)
async def delete_discovery(graph: Graph) -> None:
    shutil.rmtree(graph.directory)
    await asyncio.sleep(6.0)  # longer than a lease


@fault(
    "the discovery directory unreadable for 8 s",
    phases="decode",
    lasts_s=8,
    discovery="file",
)
async def hide_discovery(graph: Graph) -> None:
    hidden = graph.directory.with_name("hidden")
    graph.directory.rename(hidden)
    graph.directory.write_text("not a directory")
    try:
        await asyncio.sleep(8.0)
    finally:
        graph.directory.unlink()
        hidden.rename(graph.directory)


@fault("garbage in the discovery directory", phases="decode", lasts_s=2, discovery="file")
async def litter_discovery(graph: Graph) -> None:
    place = graph.directory / "default"
    litter = [place / "garbage.json", place / "large.json", place / "empty.json"]
    litter[0].write_bytes(os.urandom(999))
    litter[1].write_bytes(b" " * 1_000_000)
    litter[2].write_bytes(b"")
    await asyncio.sleep(2.0)
    for path in litter:
        path.unlink(missing_ok=True)


@fault("etcd killed for 15 s", phases="decode", discovery="etcd", lasts_s=15)
async def kill_etcd(graph: Graph) -> None:
    assert graph.etcd is not None
    graph.etcd.kill()
    await asyncio.sleep(15.0)  # longer than a lease
    graph.etcd.start()


@fault(
    "etcd killed and started again without its data",
    phases="decode",
    discovery="etcd",
    lasts_s=2,
    quick="decode",
)
async def lose_etcd(graph: Graph) -> None:
    assert graph.etcd is not None
    graph.etcd.kill()
    graph.etcd.lose_data()
    await asyncio.sleep(2.0)
    graph.etcd.start()
    await asyncio.sleep(1.0)


@fault("etcd frozen for 15 s", phases="decode", discovery="etcd", lasts_s=15)
async def freeze_etcd(graph: Graph) -> None:
    assert graph.etcd is not None
    graph.etcd.signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(15.0)
    finally:
        graph.etcd.signal(signal.SIGCONT)


@fault(
    "etcd killed for 8 s, a decode worker killed meanwhile", phases="decode", discovery="etcd", lasts_s=8
)
async def kill_etcd_and_worker(graph: Graph) -> None:
    assert graph.etcd is not None
    graph.etcd.kill()
    victim = await graph.busiest("decode")
    victim.kill()
    restarting = asyncio.create_task(graph.restart(victim))
    await asyncio.sleep(8.0)
    graph.etcd.start()
    await restarting
    if not victim.running:  # it gave up without etcd: a supervisor starts it again
        await graph.launch(victim)


# --- what runs out -----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def full_disk(graph: Graph) -> AsyncIterator[Path]:
    """A file system of 64 kB without a free byte."""
    place = graph.folder / "full"
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path) -> None:
    with contextlib.suppress(OSError), (place / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(b"x" * 512)


@fault("the disk full that a decode worker and a frontend log to", phases="decode")
async def full_log_disk(graph: Graph) -> None:
    parts = [await graph.busiest("decode"), graph.frontends[0]]
    async with full_disk(graph) as place:
        for part in parts:
            part.output = place / part.log.name
            await drain(graph, part)
        await graph.ready()
        fill(place)
        await asyncio.sleep(3.0)
        assert all(part.running for part in parts), "a process ended"
        for part in parts:
            part.output = None
            await drain(graph, part)


@contextlib.asynccontextmanager
async def no_descriptors(part: Part) -> AsyncIterator[None]:
    """It can open nothing more."""
    before = part.limit(resource.RLIMIT_NOFILE, part.descriptors())
    try:
        yield
    finally:
        part.limit(resource.RLIMIT_NOFILE, before)


@fault(
    "a frontend without file descriptors for 4 s",
    "streams go on; new connections wait or are closed, and another frontend answers",
    "prefill decode",
    "decode",
    ends_connections=True,
    lasts_s=4,
)
async def starve_frontend(graph: Graph) -> None:
    async with no_descriptors(graph.frontends[0]):
        await strangers.connect_only(graph.frontends[0].url, 50, 4.0)


@fault("a decode worker without file descriptors for 4 s", phases="transfer decode", lasts_s=4)
async def starve_decode(graph: Graph) -> None:
    async with no_descriptors(await graph.busiest("decode")):
        await asyncio.sleep(4.0)


@fault("a prefill worker without file descriptors for 4 s", phases="prefill transfer", lasts_s=4)
async def starve_prefill(graph: Graph) -> None:
    async with no_descriptors(await graph.busiest("prefill")):
        await asyncio.sleep(4.0)


@fault("a decode worker without memory for 4 s", phases="decode", lasts_s=4)
async def starve_memory(graph: Graph) -> None:
    part = await graph.busiest("decode")
    status = Path(f"/proc/{part.pid}/status").read_text()
    used = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmSize:"))
    before = part.limit(resource.RLIMIT_AS, used * 1024)
    await asyncio.sleep(4.0)
    if part.running:
        part.limit(resource.RLIMIT_AS, before)
    else:  # as after any death
        await graph.restart(part)


# --- strangers ---------------------------------------------------------------------------------------


@fault("garbage on a worker's link port", phases="decode", quick="decode")
async def garbage_link(graph: Graph) -> None:
    part = await graph.busiest("decode")
    await strangers.garbage(part.host, LINK_PORT)


@fault("garbage on a prefill worker's transfer port", phases="transfer", reference=True)
async def garbage_transfer(graph: Graph) -> None:
    part = await graph.busiest("prefill")
    assert part.transfer is not None
    await strangers.garbage(*part.transfer.target)


@fault("garbage on a frontend's HTTP port", phases="decode")
async def garbage_http(graph: Graph) -> None:
    await strangers.garbage("127.0.0.1", graph.frontends[0].port)


@fault(
    "64 clients that hang up",
    "other clients notice nothing; the work for clients that left ends",
    "queued decode",
    "decode",
)
async def hang_up(graph: Graph) -> None:
    await strangers.hang_up(graph.urls, 64)


@fault("16 clients that do not read", "other clients notice nothing", "decode", lasts_s=4)
async def slow_readers(graph: Graph) -> None:
    await strangers.do_not_read(graph.urls, 16, 4.0)
