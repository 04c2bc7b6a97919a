"""What can go wrong. Each fault picks its target and its length, happens, and is over when it returns.

A new fault is one more function here; its docstring is what `python -m simulator --faults list` shows. Its
decorator gives its name and says whether its target is a worker or a frontend, and whether gentle scenarios
may have it. If no link ends because of it, its name is in LEAVES_LINKS (lab.py) as well.
"""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from penstock.core.overlap_check import Cause
from penstock.engines.cycle import MAX_FAILED_STEPS
from penstock.shapes import Delta, Role
from penstock.wire.messages import Cancel, Generate, Ping, Release
from simulator.checked_engine import InjectedFault
from simulator.clients import draw_calls
from simulator.false_events import tell_false_events
from simulator.injector import Injector
from simulator.lies import Liar
from simulator.network import first_message
from simulator.processes import SimulatedFrontend, SimulatedWorker
from simulator.watch import Seen

Fault = Callable[[Injector, random.Random], Awaitable[None]]
WorkerHarm = Callable[[Injector, random.Random, SimulatedWorker], Awaitable[None]]
FrontendHarm = Callable[[Injector, random.Random, SimulatedFrontend], Awaitable[None]]

FAULTS: dict[str, Fault] = {}

STEPS_S = 3.0
"""How long a fault waits for the step that is to fail."""

DEFECT_SHARE = 0.3
"""The share of a frontend's requests that one mistake meets."""

GENTLE: list[str] = []
"""Faults of which each costs a request few attempts, and leaves one worker alone if asked to."""


def _fault(name: str, gentle: bool = False) -> Callable[[Fault], Fault]:
    def add(fault: Fault) -> Fault:
        FAULTS[name] = fault
        if gentle:
            GENTLE.append(name)
        return fault

    return add


def _worker_fault(name: str, *roles: Role, gentle: bool = False) -> Callable[[WorkerHarm], Fault]:
    """A fault of one worker, which is picked by chance; nothing happens when there is none to pick."""

    def add(harm: WorkerHarm) -> Fault:
        @functools.wraps(harm)
        async def fault(injector: Injector, rng: random.Random) -> None:
            worker = injector.worker(rng, *roles)
            if worker is not None:
                injector.begins(name, worker.instance_id, injector.world.flying(worker.instance_id))
                await harm(injector, rng, worker)

        return _fault(name, gentle)(fault)

    return add


def _frontend_fault(name: str, gentle: bool = False) -> Callable[[FrontendHarm], Fault]:
    """A fault of one frontend, which is picked by chance; nothing happens when there is none to pick."""

    def add(harm: FrontendHarm) -> Fault:
        @functools.wraps(harm)
        async def fault(injector: Injector, rng: random.Random) -> None:
            frontend = injector.frontend(rng)
            if frontend is not None:
                injector.begins(name, frontend.name, injector.world.flying(frontend=frontend.name))
                await harm(injector, rng, frontend)

        return _fault(name, gentle)(fault)

    return add


# --- processes ------------------------------------------------------------------------------------


@_worker_fault("crash", gentle=True)
async def crash(injector: Injector, rng: random.Random, worker: SimulatedWorker) -> None:
    """A worker is killed, and started again later."""
    worker.kill()
    await injector.world.restart(worker, rng.uniform(0.05, 6.0))


@_worker_fault("host-lost", gentle=True)
async def host_lost(injector: Injector, rng: random.Random, worker: SimulatedWorker) -> None:
    """A worker's host is lost: no connection is closed, nothing answers. Both are started again later."""
    world = injector.world
    name = worker.instance_id
    others = [it.name for it in world.frontends] + [it for it in world.workers if it != name]
    for other in others:
        world.network.block(name, other)
        world.network.block(other, name)
    worker.kill()
    await asyncio.sleep(rng.uniform(0.5, 12.0))
    for other in others:
        world.network.open(name, other)
        world.network.open(other, name)
    await world.restart(worker, 0.0)


@_worker_fault("freeze", gentle=True)
async def freeze(injector: Injector, rng: random.Random, worker: SimulatedWorker) -> None:
    """A worker's process stands still, its sockets stay open; later it goes on with everything late."""
    with injector.watch.suspecting([worker], seen=Seen.AT_ONCE):
        worker.process.freeze()
        await asyncio.sleep(rng.uniform(0.2, 12.0))
        worker.process.thaw()


@_frontend_fault("frontend-freeze", gentle=True)
async def frontend_freeze(injector: Injector, rng: random.Random, frontend: SimulatedFrontend) -> None:
    """A frontend's process stands still, its sockets stay open; its clients wait that much longer."""
    frontend.process.freeze()
    seconds = rng.uniform(0.2, 12.0)
    injector.frozen_s[frontend.name] += seconds
    await asyncio.sleep(seconds)
    injector.watch.forgive(frontend.name)
    frontend.process.thaw()


@_frontend_fault("frontend-crash", gentle=True)
async def frontend_crash(injector: Injector, rng: random.Random, frontend: SimulatedFrontend) -> None:
    """A frontend is killed with its clients' requests; the next one may give requests the same names."""
    world = injector.world
    place = world.frontends.index(frontend)
    frontend.kill()
    await asyncio.sleep(rng.uniform(0.0, 3.0))
    world.start_frontend(place, same_requests=rng.random() < 0.5)


@_worker_fault("drain", gentle=True)
async def drain(injector: Injector, rng: random.Random, worker: SimulatedWorker) -> None:
    """A worker gets SIGTERM, and its next incarnation follows, as in a rolling restart."""
    worker.leave()
    while not worker.exited:
        await asyncio.sleep(0.1)
    await injector.world.restart(worker, rng.uniform(0.05, 2.0))


@_fault("replace-model")
async def replace_model(injector: Injector, rng: random.Random) -> None:
    """All workers are replaced, one by one, by others with another model under the same name."""
    world = injector.world
    models = world.models
    models.newest = 1 - models.newest
    injector.begins("replace-model", f"version {models.newest}", world.flying())
    while old := [it for it in world.live_workers() if it.version != models.newest]:
        worker = old[0]
        if worker.serving:
            if rng.random() < 0.2:
                worker.kill()
            else:
                worker.leave()
        while not worker.exited and (worker.leaving or not worker.serving):
            await asyncio.sleep(0.1)
        if world.workers[worker.instance_id] is worker and worker.exited:
            await world.restart(worker, rng.uniform(0.0, 1.0))


@_fault("next-generation", gentle=True)
async def next_generation(injector: Injector, rng: random.Random) -> None:
    """Workers are replaced, some at a time, by others with another block size, as in a rolling update."""
    world = injector.world
    world.generation = 1 - world.generation
    injector.begins("next-generation", f"generation {world.generation}", world.flying())
    at_once = rng.randint(1, 1 + len(world.workers) // 4)
    while old := [
        it for it in world.live_workers() if it.generation != world.generation and injector.may_go(it)
    ]:
        leaving = [it for it in old if it.serving][:at_once]
        for worker in leaving:
            worker.leave()
        await asyncio.sleep(0.1)
        while any(not worker.exited for worker in leaving):
            await asyncio.sleep(0.1)
        for worker in leaving:
            if world.workers[worker.instance_id] is worker:
                await world.restart(worker, rng.uniform(0.0, 1.0))


@_fault("scale-down", gentle=True)
async def scale_down(injector: Injector, rng: random.Random) -> None:
    """A worker leaves for good, if it is not the last of its kind."""
    world = injector.world
    worker = injector.worker(rng)
    if worker is None:
        return
    alike = [it for it in world.live_workers() if it.up and it.role.decodes == worker.role.decodes]
    if len(alike) > 1:
        injector.begins("scale-down", worker.instance_id, world.flying(worker.instance_id))
        worker.leave()
        while not worker.exited:
            await asyncio.sleep(0.1)


@_fault("scale-up", gentle=True)
async def scale_up(injector: Injector, rng: random.Random) -> None:
    """One more worker."""
    world = injector.world
    role = rng.choice(list(world.scenario.roles.values()))
    worker = world.add_worker(role)
    injector.begins("scale-up", worker.instance_id, [])


# --- engines --------------------------------------------------------------------------------------


@_worker_fault("wedge", gentle=True)
async def wedge(injector: Injector, rng: random.Random, worker: SimulatedWorker) -> None:
    """An engine takes work and makes no step; its worker is well."""
    with injector.watch.suspecting([worker], seen=Seen.WHEN_BUSY):
        worker.clock.wedge()
        await asyncio.sleep(rng.uniform(0.2, 12.0))
        worker.clock.unwedge()


@_worker_fault("step-failure", gentle=True)
async def step_failure(injector: Injector, rng: random.Random, worker: SimulatedWorker) -> None:
    """One step of an engine fails, with the attempts in it."""
    await _fail_steps(worker, 1)


@_worker_fault("engine-death")
async def engine_death(injector: Injector, rng: random.Random, worker: SimulatedWorker) -> None:
    """An engine is broken from now on; its worker gives up."""
    await _fail_steps(worker, MAX_FAILED_STEPS)


async def _fail_steps(worker: SimulatedWorker, count: int) -> None:
    """Its next steps fail, if there are any soon."""
    worker.engine.failing_steps = count
    await asyncio.sleep(STEPS_S)
    worker.engine.failing_steps = 0


@_frontend_fault("poison")
async def poison(injector: Injector, rng: random.Random, frontend: SimulatedFrontend) -> None:
    """A request that makes every step fail which computes it, or kills the engine."""
    world = injector.world
    call = draw_calls(rng, 1, 0.0, world.scenario.vocab_size)[0]
    asked = world.ask(frontend, replace(call, samplings=call.samplings[:1], hang_up_s=None))
    steps = rng.choice((1, MAX_FAILED_STEPS))
    for it in asked:
        it.poison_steps = steps


@_worker_fault("eviction-storm", gentle=True)
async def eviction_storm(injector: Injector, rng: random.Random, worker: SimulatedWorker) -> None:
    """A worker loses all blocks that are not in use, several times."""
    for _ in range(rng.randint(1, 6)):
        if worker.exited:
            return
        if rng.random() < 0.3:
            worker.engine.clear()
        else:
            worker.engine.evict()
        await asyncio.sleep(rng.uniform(0.0, 0.5))


@_worker_fault("stale-handoff", Role.DECODE, gentle=True)
async def stale_handoff(injector: Injector, rng: random.Random, worker: SimulatedWorker) -> None:
    """A worker that decodes is wedged until handoffs given to it have expired, or nearly."""
    with injector.watch.suspecting([worker], seen=Seen.WHEN_BUSY):
        worker.clock.wedge()
        await asyncio.sleep(injector.world.scenario.sim.scheduler.handoff_ttl_s * rng.uniform(0.8, 1.3))
        worker.clock.unwedge()


# --- the network ----------------------------------------------------------------------------------


@_fault("partition", gentle=True)
async def partition(injector: Injector, rng: random.Random) -> None:
    """Nothing arrives between a frontend and a worker, in one direction or both."""
    world = injector.world
    worker, frontend = injector.worker(rng), injector.frontend(rng)
    if worker is None or frontend is None:
        return
    routes = [(worker.instance_id, frontend.name), (frontend.name, worker.instance_id)]
    routes = rng.choice((routes, routes[:1], routes[1:]))
    name = " ".join(f"{source}>{target}" for source, target in routes)
    injector.begins("partition", name, world.flying(worker.instance_id, frontend.name))
    one_way = routes == [(frontend.name, worker.instance_id)]  # noticed by what does not arrive there
    with injector.watch.suspecting(
        [worker], [frontend], seen=Seen.WHEN_SENT_TO if one_way else Seen.AT_ONCE
    ):
        for route in routes:
            world.network.block(*route)
        await asyncio.sleep(rng.uniform(0.2, 13.0))
        for route in routes:
            world.network.open(*route)


@_fault("reset", gentle=True)
async def reset(injector: Injector, rng: random.Random) -> None:
    """A link is cut, and may be opened again at once."""
    world = injector.world
    worker, frontend = injector.worker(rng), injector.frontend(rng)
    if worker is not None and frontend is not None:
        met = world.flying(worker.instance_id, frontend.name)
        injector.begins("reset", f"{frontend.name} {worker.instance_id}", met)
        world.network.cut(frontend.name, worker.instance_id)


@_worker_fault("delay", gentle=True)
async def delay(injector: Injector, rng: random.Random, worker: SimulatedWorker) -> None:
    """What a worker sends takes longer to arrive; with it, perhaps, what it is sent."""
    world = injector.world
    routes = [(worker.instance_id, it.name) for it in world.frontends]
    if rng.random() < 0.5:
        routes += [(target, source) for source, target in routes]
    for _ in range(rng.randint(1, 3)):
        for route in routes:
            world.network.slower_s[route] = rng.uniform(0.02, 2.0)
        await asyncio.sleep(rng.uniform(0.2, 4.0))
    for route in routes:
        world.network.slower_s.pop(route, None)


@_frontend_fault("slow-reader", gentle=True)
async def slow_reader(injector: Injector, rng: random.Random, frontend: SimulatedFrontend) -> None:
    """A frontend reads only a trickle of what workers send."""
    frontend.process.read_bytes_per_s = rng.choice((2_000, 20_000, 100_000))
    await asyncio.sleep(rng.uniform(0.5, 6.0))
    frontend.process.read_bytes_per_s = None


@_worker_fault("slow-worker")
async def slow_worker(injector: Injector, rng: random.Random, worker: SimulatedWorker) -> None:
    """A worker reads only a trickle of what frontends send."""
    worker.process.read_bytes_per_s = rng.choice((1_000, 5_000, 50_000))
    await asyncio.sleep(rng.uniform(0.5, 6.0))
    worker.process.read_bytes_per_s = None


@_frontend_fault("duplicate")
async def duplicate(injector: Injector, rng: random.Random, frontend: SimulatedFrontend) -> None:
    """A frontend sends messages twice: a Generate ends its link, any other changes nothing."""
    world = injector.world
    kinds: tuple[type[Any], ...] = rng.choice(((Cancel, Release, Ping), (Generate,)))

    def twice(route: tuple[str, str], data: bytes) -> bytes:
        doubled = route[0] == frontend.name and rng.random() < 0.3
        return data + data if doubled and isinstance(first_message(data), kinds) else data

    world.network.taps.append(twice)
    await asyncio.sleep(rng.uniform(0.2, 3.0))
    world.network.taps.remove(twice)


@_worker_fault("transfer-cut", Role.PREFILL, gentle=True)
async def transfer_cut(injector: Injector, rng: random.Random, holder: SimulatedWorker) -> None:
    """Workers cannot pull from one of them."""
    world = injector.world
    others = [it for it in world.workers if it != holder.instance_id]
    for other in others:
        world.network.block(other, holder.instance_id)
    await asyncio.sleep(rng.uniform(0.2, 10.0))
    for other in others:
        world.network.open(other, holder.instance_id)


@_worker_fault("transfer-slow", Role.PREFILL, gentle=True)
async def transfer_slow(injector: Injector, rng: random.Random, holder: SimulatedWorker) -> None:
    """Pulls from one worker take much longer."""
    world = injector.world
    world.transfers.slower[holder.instance_id] = rng.choice((10.0, 100.0, 1000.0))
    await asyncio.sleep(rng.uniform(0.2, 10.0))
    world.transfers.slower.pop(holder.instance_id, None)


# --- peers that lie, and defects of ours -----------------------------------------------------------


LIE_SHARES = (0.02, 0.2, 1.0)


@_worker_fault("lying-worker", gentle=True)
async def lying_worker(injector: Injector, rng: random.Random, worker: SimulatedWorker) -> None:
    """A worker says what no worker may say. The links on which it does end, and nothing else."""
    await Liar(injector.world, rng, worker.instance_id, rng.choice(LIE_SHARES)).tell(rng.uniform(0.2, 6.0))


@_frontend_fault("lying-frontend", gentle=True)
async def lying_frontend(injector: Injector, rng: random.Random, frontend: SimulatedFrontend) -> None:
    """A frontend says what no frontend may say. Its links end, and only its own requests may fail."""
    injector.lying.add(frontend.name)
    await Liar(injector.world, rng, frontend.name, rng.choice(LIE_SHARES)).tell(rng.uniform(0.2, 6.0))


@_frontend_fault("defect", gentle=True)
async def defect(injector: Injector, rng: random.Random, frontend: SimulatedFrontend) -> None:
    """A mistake in the frontend meets some of its requests: these end, the others do not."""

    def fail(delta: Delta) -> None:
        raise InjectedFault("this request was made to fail")

    for asked in injector.world.flying(frontend=frontend.name):
        if asked.ticket is not None and rng.random() < DEFECT_SHARE:
            asked.defect = True
            asked.ticket.on_delta = fail


@_worker_fault("events-off", gentle=True)
async def events_off(injector: Injector, rng: random.Random, worker: SimulatedWorker) -> None:
    """A worker is replaced by one that tells nothing of its cache. Frontends name it, and it serves."""
    await tell_false_events(injector, rng, worker, Cause.EVENTS_OFF)


@_worker_fault("wrong-block-size", gentle=True)
async def wrong_block_size(injector: Injector, rng: random.Random, worker: SimulatedWorker) -> None:
    """A worker is replaced by one whose cache events are of blocks of another size. Likewise."""
    await tell_false_events(injector, rng, worker, Cause.BLOCK_SIZE)


# --- time, discovery, clients ---------------------------------------------------------------------


@_fault("clock-jump")
async def clock_jump(injector: Injector, rng: random.Random) -> None:
    """One process's clock jumps forward."""
    world = injector.world
    target = rng.choice((injector.worker(rng), injector.frontend(rng)))
    if target is not None:
        name = target.process.name
        injector.begins("clock-jump", name, world.flying(name) or world.flying(frontend=name))
        target.process.clock.ahead_s += rng.choice((0.5, 3.0, 30.0, 300.0))


@_fault("discovery-away", gentle=True)
async def discovery_away(injector: Injector, rng: random.Random) -> None:
    """The directory does not answer; it may have lost everything when it is back."""
    world = injector.world
    injector.begins("discovery-away", "directory", world.flying())
    world.directory.away += 1
    await asyncio.sleep(rng.uniform(0.2, 12.0))
    if rng.random() < 0.5:
        world.directory.lose_everything()
    world.directory.away -= 1


@_fault("discovery-flaps", gentle=True)
async def discovery_flaps(injector: Injector, rng: random.Random) -> None:
    """All registrations are lost, again and again; workers renew them."""
    world = injector.world
    injector.begins("discovery-flaps", "directory", world.flying())
    for _ in range(rng.randint(1, 4)):
        world.directory.lose_everything()
        await asyncio.sleep(rng.uniform(0.1, 3.0))


@_fault("hang-ups", gentle=True)
async def hang_ups(injector: Injector, rng: random.Random) -> None:
    """Many clients leave at once."""
    world = injector.world
    share = rng.choice((0.3, 0.6, 1.0))
    leaving = [asked for asked in world.flying() if rng.random() < share]
    injector.begins("hang-ups", "clients", leaving)
    for asked in leaving:
        frontend = next(it for it in world.frontends if it.name == asked.frontend)
        if asked.cancel is not None:
            frontend.process.soon(asked.cancel)


@_fault("burst")
async def burst(injector: Injector, rng: random.Random) -> None:
    """Many requests at once."""
    world = injector.world
    frontends = world.live_frontends()
    calls = draw_calls(rng, rng.randint(20, 80), 0.0, world.scenario.vocab_size)
    for call in calls if frontends else []:
        world.ask(rng.choice(frontends), replace(call))
    injector.begins("burst", "clients", world.flying())
