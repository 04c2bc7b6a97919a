"""What must be true once nothing is going on any more. Each function returns what is not, in words."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import asdict

from penstock.core.membership import State
from simulator.processes import SimulatedFrontend, SimulatedWorker
from simulator.world import World


def unsettled(world: World) -> list[str]:
    """Blocks that are held, books that are open, and indexes that differ from the caches."""
    complaints = [it for worker in world.live_workers() for it in _busy(worker)]
    for frontend in world.live_frontends():
        complaints += _open_books(world, frontend)
        complaints += _wrong_index(world, frontend)
    return complaints


def unready(world: World) -> list[str]:
    """Workers that some frontend does not use, and instances that it should have forgotten."""
    complaints = [f"{world.restarting} workers are starting again"] if world.restarting else []
    there = {worker.instance_id: worker for worker in world.live_workers() if worker.up}
    for frontend in world.live_frontends():
        members = frontend.router.membership.members
        complaints += [
            f"{frontend.name} has {instance_id} as {members[instance_id].state}"
            if instance_id in members
            else f"{frontend.name} does not know {instance_id}"
            for instance_id, worker in there.items()
            if instance_id not in members
            or members[instance_id].state is not State.READY
            or members[instance_id].registration.epoch != worker.epoch
        ]
        complaints += [f"{frontend.name} still knows {name}" for name in members if name not in there]
    return complaints


def _busy(worker: SimulatedWorker) -> list[str]:
    pool = worker.engine.scheduler.pool
    shell = asdict(worker.worker.statistics())
    shell["handshakes"] = shell.pop("link")["handshakes"]
    del shell["handoffs"]  # which last until they expire
    parts = [("the worker", shell), ("the scheduler", asdict(worker.engine.scheduler.statistics()))]
    if worker.transfer is not None:
        parts.append(("the transfer", asdict(worker.transfer.statistics())))
    complaints = [
        f"{worker.instance_id}: {part} has {count} {what}"
        for part, counts in parts
        for what, count in counts.items()
        if count
    ]
    try:
        pool.check()
    except AssertionError as error:
        complaints.append(f"{worker.instance_id}: {error}")
    cached = set(pool.cached_hashes())
    if cached != set(worker.engine.cached_hashes()):
        complaints.append(f"{worker.instance_id} has {len(cached)} blocks cached and says something else")
    return complaints


def _open_books(world: World, frontend: SimulatedFrontend) -> list[str]:
    router = frontend.router
    placement, instances, dispatcher = router.placement, router.fleet, router.dispatcher
    parts = [router, dispatcher, dispatcher.suspects, instances, instances.served_models]
    for queue in dispatcher.queues.values():
        parts += [queue, queue.waiting, queue.prediction]
    parts += [placement, placement.overlap_check]
    lasting = {"queues", "_recent", "_served", "_gone", "_lost", "_without_pairs", "_usual_prompts"}
    lasting |= set(router.membership.members)
    complaints = [f"{frontend.name}: {it}" for it in _kept(parts, lasting)]
    for instance_id, load in placement.loads.items():
        if any((load.on_the_way, load.booked, load.uncached_tokens, load.context_tokens)):
            complaints.append(f"{frontend.name} has {load} of {instance_id}")
    for worker in world.live_workers():
        name = worker.instance_id
        if placement.load(name) != worker.worker.load():
            complaints.append(
                f"{frontend.name} has {placement.load(name)} of {name}, not {worker.worker.load()}"
            )
    return complaints


def _kept(parts: Iterable[object], lasting: set[str]) -> list[str]:
    """What these still keep of requests that have ended. `lasting`: names and keys that may stay."""
    found = []
    for part in parts:
        for name, kept in vars(part).items():
            known = isinstance(kept, (dict, set)) and lasting.issuperset(kept)
            if isinstance(kept, (dict, set, list, deque)) and kept and not known and name not in lasting:
                found.append(f"{type(part).__name__}.{name} keeps {len(kept)} entries")
    return found


def _wrong_index(world: World, frontend: SimulatedFrontend) -> list[str]:
    index = frontend.router.placement.index.blocks()
    up = {name for name, member in frontend.router.membership.members.items() if member.up}
    complaints = [f"{frontend.name} indexes {name}, which is not up" for name in sorted(set(index) - up)]
    for worker in world.live_workers():
        if worker.instance_id not in up:
            continue
        known = index.get(worker.instance_id)
        there = set(worker.engine.cached_hashes())
        if known is None:
            complaints.append(f"{frontend.name} does not index {worker.instance_id}, which is up")
        elif known != there:
            complaints.append(
                f"{frontend.name} indexes {len(known - there)} blocks that {worker.instance_id} lacks, "
                f"and lacks {len(there - known)}"
            )
    return complaints
