"""Bytes of a peer, decoded and delivered to real objects: routers, and workers with their engines.

Two frontends and two workers of the simulation, on virtual time. One of them sends the bytes in place of
its next message. Whatever they are, both frontends must then have a request served, and nothing may crash.
"""

from __future__ import annotations

import asyncio
import dataclasses
from functools import cache

from penstock.shapes import Role
from simulator import settled
from simulator.draw import draw_scenario
from simulator.lab import Lab
from simulator.scenario import Options, Scenario

SEED = 7
CALLS = 4
AFTERMATH_S = 3.0
SERVED_S = 60.0


@cache
def scenario() -> Scenario:
    """Small and gentle."""
    drawn = draw_scenario(SEED, Options(workers=2, frontends=2, faults=("hang-ups",)))
    roles = dict.fromkeys(drawn.roles, Role.AGGREGATED)
    return dataclasses.replace(drawn, roles=roles, gentle=True, faults=[], calls=drawn.calls[:CALLS])


class Delivery(Lab):
    """One delivery of `data` from one process to another."""

    def __init__(self, data: bytes, source: str, target: str) -> None:
        # What was said may mislead, as long as it harms nobody's process.
        super().__init__(scenario(), minded={"no crash", "time passes", "served"})
        self._data = data
        self._route = (source, target)

    async def story(self) -> None:
        world = self.world
        world.spawn(world.directory.expire_forever(self.loop))
        for place in range(self.scenario.frontends):
            world.start_frontend(place)
        for instance_id, role in self.scenario.roles.items():
            world.start_worker(instance_id, role)
        await self.settle(settled.unready, "workers become ready")
        for call in self.scenario.calls:
            self.call(call)
        world.network.taps.append(self._replace)
        await asyncio.sleep(AFTERMATH_S)
        probes = [it for frontend in world.live_frontends() for it in frontend.ask(self.scenario.calls[0])]
        until = self.loop.time() + SERVED_S
        while not all(probe.ended for probe in probes) and self.loop.time() < until:
            await asyncio.sleep(0.1)
        for probe in probes:
            if probe.ended not in ("ok", "hung up"):
                self.journal.violate(
                    "served", f"{probe.request.request_id}: {probe.ended or 'no end'} {probe.error}"
                )

    def _replace(self, route: tuple[str, str], data: bytes) -> bytes:
        if route != self._route:
            return data
        self.world.network.taps.remove(self._replace)
        return self._data


def deliver(data: bytes, source: str, target: str) -> None:
    """Raises AssertionError when that crashes something, or keeps others from being served."""
    outcome = Delivery(data, source, target).run()
    assert outcome.violation is None, (outcome.violation, outcome.last_events)
