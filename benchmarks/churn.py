"""Constant churn under load: whoever survives must not grow.

    make soak ARGS="--churn --duration 1800"

A graph of plain processes (checks/faults) with clients that check every token. Every few
seconds something happens to one of them: it is killed, drained, frozen, cut off, added or taken away. One
frontend, one prefill and one decode worker survive, and are looked at all the time: resident memory, file
descriptors, threads, asyncio tasks. A line is fitted to each after the first quarter; it may not rise.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from checks.faults.clients import Client, sim_question
from checks.faults.http import get
from checks.faults.processes import Graph, Part
from tests.proxy import Weather

MODEL = ("--engine", "sim", "--model", "sim", "--sim-speedup", "0.5", "--transfer", "tcp")
PAUSE_S = (2.0, 6.0)
"""Between two events; most take a second or two themselves."""

QUESTIONS = 600
"""New texts cost a frontend memory, up to its cache's limit: 4 kB each here."""

SAMPLE_S = 5.0
WARM_SHARE = 0.25
"""Of the duration, in which caches that are meant to fill do so."""

RISE_MAX = {"rss_mib": 12.0, "descriptors": 4.0, "threads": 2.0, "tasks": 6.0}
"""Allowed rise of the fitted line over the rest. A leak of a kilobyte a request shows in half an hour."""


@dataclass
class Series:
    """What one process was like, over time."""

    at_s: list[float] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in RISE_MAX})

    def add(self, at_s: float, sample: dict[str, float]) -> None:
        self.at_s.append(at_s)
        for name, value in sample.items():
            self.values[name].append(value)

    def rise(self, name: str, after_s: float) -> tuple[float, float, float]:
        """The fitted line's ends, and its rise in an hour."""
        points = [point for point in zip(self.at_s, self.values[name], strict=True) if point[0] >= after_s]
        begin, end = points[0][0], points[-1][0]
        middle = sum(at for at, _ in points) / len(points)
        mean = sum(value for _, value in points) / len(points)
        spread = sum((at - middle) ** 2 for at, _ in points) or 1.0
        slope = sum((at - middle) * (value - mean) for at, value in points) / spread
        return mean + slope * (begin - middle), mean + slope * (end - middle), slope * 3600


async def sample(part: Part) -> dict[str, float]:
    status = Path(f"/proc/{part.pid}/status").read_text()  # noqa: ASYNC240 - not a disk
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    if part.kind == "frontend":
        found = re.search(rb"^penstock_tasks (\S+)$", (await get(f"{part.url}/metrics"))[1], re.MULTILINE)
        assert found is not None
        tasks = float(found[1])
    else:
        tasks = float(json.loads((await get(f"{part.url}/health"))[1])["tasks"])
    return {
        "rss_mib": int(fields["VmRSS"].split()[0]) / 1024,
        "descriptors": len(os.listdir(f"/proc/{part.pid}/fd")),
        "threads": int(fields["Threads"]),
        "tasks": tasks,
    }


class Churn:
    """What happens to a graph, one thing after the other."""

    def __init__(self, graph: Graph, rng: random.Random) -> None:
        self.graph = graph
        self.happened: Counter[str] = Counter()
        self.survivors = [graph.frontends[0], graph.role("prefill")[0], graph.role("decode")[0]]
        self._rng = rng
        self._added: list[Part] = []

    def _victim(self, *kinds: str) -> Part:
        return self._rng.choice(
            [part for part in self.graph.parts if part.kind in kinds and part not in self.survivors]
        )

    async def _kill(self) -> None:
        victim = self._victim("frontend", "prefill", "decode")
        victim.kill()
        await self.graph.restart(victim)

    async def _drain(self) -> None:
        victim = self._victim("frontend", "prefill", "decode")
        code = await self.graph.drain(victim)
        assert code == 0, f"{victim.name} exited with {code}"

    async def _freeze(self) -> None:
        victim = self._victim("frontend", "prefill", "decode")
        victim.signal(signal.SIGSTOP)
        await asyncio.sleep(self._rng.choice((0.5, 5.0)))
        victim.signal(signal.SIGCONT)

    async def _cut(self) -> None:
        victim = self._rng.choice(self.graph.workers)
        weather = self._rng.choice((Weather(refused=True), Weather(hold_down=True), Weather(hold_up=True)))
        self.graph.weather([victim], weather)
        await asyncio.sleep(self._rng.choice((0.5, 4.0)))
        self.graph.weather([victim], Weather())

    async def _add(self) -> None:
        self._added.append(await self.graph.add(self._rng.choice(("prefill", "decode"))))

    async def _take_away(self) -> None:
        code = await self.graph.remove(self._added.pop(0))
        assert code == 0, f"exit code {code}"

    async def run(self, until: float) -> None:
        while time.monotonic() < until:
            scale = self._take_away if len(self._added) > 1 else self._add
            event = self._rng.choice((self._kill, self._kill, self._drain, self._freeze, self._cut, scale))
            await event()
            self.happened[event.__name__.removeprefix("_")] += 1
            await asyncio.sleep(self._rng.uniform(*PAUSE_S))


async def ask(number: int, step: int, urls: Sequence[str], until: float, ended: Counter[str]) -> None:
    """One user: a question after the other, out of so few that caches of texts fill soon."""
    rng = random.Random(number)
    while time.monotonic() < until:
        number += step
        question = sim_question(number % QUESTIONS, (50, 400, 1500)[number % 3], 48)
        outcome = await Client(question, urls, number).run()
        ended[outcome.kind] += 1
        ended["connections cut, asked again"] += outcome.cuts
        if outcome.kind != "ok":
            print(f"{outcome.kind}: {outcome.detail}", flush=True)
        await asyncio.sleep(rng.uniform(0.0, 0.4))


async def watch(survivors: Sequence[Part], series: dict[str, Series], until: float) -> None:
    began = time.monotonic()
    while time.monotonic() < until:
        for part in survivors:
            try:
                series[part.name].add(time.monotonic() - began, await sample(part))
            except (OSError, TimeoutError) as error:
                print(f"{part.name} does not answer: {error!r}", flush=True)
        await asyncio.sleep(SAMPLE_S)


def judge(series: dict[str, Series], duration: float) -> list[str]:
    wrong = []
    for name, one in series.items():
        for measure, limit in RISE_MAX.items():
            first, last, hourly = one.rise(measure, WARM_SHARE * duration)
            print(f"{name:12} {measure:12} {first:8.1f} -> {last:8.1f}   {hourly:+8.2f} an hour")
            if last - first > limit:
                wrong.append(f"{name}: {measure} rose by {last - first:.1f}")
    return wrong


async def idle(graph: Graph) -> bool:
    """Whether nothing is left over once nobody asks."""
    deadline = time.monotonic() + 60.0
    names = ("running", "waiting", "held_handoffs", "used_blocks")
    while time.monotonic() < deadline:
        loads = [one["load"] for one in (await graph.first_health())["instances"]]
        if loads and not any(load[name] for load in loads for name in names):
            return True
        await asyncio.sleep(0.2)
    return False


async def soak(duration: float, concurrency: int, seed: int) -> list[str]:
    """Run it; what is wrong, in words."""
    ended: Counter[str] = Counter()
    folder = Path(tempfile.mkdtemp(prefix="penstock-churn-"))
    graph = Graph(folder, MODEL)
    wrong = []
    try:
        await graph.start()
        churn = Churn(graph, random.Random(seed))
        series = {part.name: Series() for part in churn.survivors}
        until = time.monotonic() + duration
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(churn.run(until))
            tasks.create_task(watch(churn.survivors, series, until))
            for number in range(concurrency):
                tasks.create_task(ask(1000 + number, concurrency, graph.urls, until, ended))
        await graph.ready()
        if not await idle(graph):
            wrong.append("requests, handoffs or blocks are left over")
    finally:
        await graph.stop()
    print(f"events: {dict(churn.happened)}")
    print(f"requests: {dict(ended)}")
    wrong += judge(series, duration)
    bad = {kind: count for kind, count in ended.items() if not kind.startswith(("ok", "connections"))}
    if bad or not ended["ok"]:
        wrong.append(f"requests ended as {bad}, {ended['ok']} well")
    return [*wrong, f"logs are in {folder}"] if wrong else []
