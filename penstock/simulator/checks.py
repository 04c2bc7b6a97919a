"""What must be true once nothing is going on any more. Each function returns what is not, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.core.membership import State
from penstock.core.prefix_index import PrefixIndex

if TYPE_CHECKING:
    from penstock.simulator.lab import Lab
    from penstock.simulator.parts import SimFrontend, SimWorker


def unsettled(lab: Lab) -> list[str]:
    """Blocks that are held, books that are open, and indexes that differ from the caches."""
    complaints = [it for worker in lab.live_workers() for it in _busy(worker)]
    for frontend in lab.live_frontends():
        complaints += _open_books(frontend)
        complaints += _wrong_index(lab, frontend)
    return complaints


def unready(lab: Lab) -> list[str]:
    """Workers that some frontend does not use, and instances that it should have forgotten."""
    complaints = [f"{lab.restarting} workers are starting again"] if lab.restarting else []
    there = {worker.instance_id: worker for worker in lab.live_workers() if worker.up}
    for frontend in lab.live_frontends():
        members = frontend.router._instances.membership.members
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


def _busy(worker: SimWorker) -> list[str]:
    scheduler, shell = worker.engine.scheduler, worker.worker
    counts = {
        "used_blocks": scheduler.pool.used_blocks,
        "held_handoffs": len(scheduler.held),
        "pulls": len(scheduler.pulls),
        "attempts": len(scheduler._active),
        "owned attempts": len(shell._owners),
        "attempts on the way": len(shell._on_the_way),
    }
    complaints = [f"{worker.instance_id} has {count} {what}" for what, count in counts.items() if count]
    try:
        scheduler.pool.check()
    except AssertionError as error:
        complaints.append(f"{worker.instance_id}: {error}")
    pool = scheduler.pool
    cached = {pool.sequence_hash(block) for block in pool._cached.values()}
    if cached != set(worker.engine.cached_hashes()):
        complaints.append(f"{worker.instance_id} has {len(cached)} blocks cached and says something else")
    return complaints


def _open_books(frontend: SimFrontend) -> list[str]:
    router = frontend.router
    complaints = [f"{frontend.name} has request {it} live" for it in router._live]
    complaints += [
        f"{frontend.name} has {it.requests} requests queued" for it in router.queues() if it.requests
    ]
    complaints += [f"{frontend.name} has request {it} resting" for it in router._resting]
    complaints += [f"{frontend.name} suspects request {it}" for it in router._suspects._noted]
    for instance_id, account in router._placement._book._accounts.items():
        left = (
            len(account.on_the_way),
            len(account.booked),
            account.uncached_tokens,
            account.context_tokens,
        )
        if any(left):
            complaints.append(f"{frontend.name} books {left} on {instance_id}")
    return complaints


def _wrong_index(lab: Lab, frontend: SimFrontend) -> list[str]:
    index = indexed(frontend.router._placement._index)
    up = {name for name, member in frontend.router._instances.membership.members.items() if member.up}
    complaints = [f"{frontend.name} indexes {name}, which is not up" for name in sorted(set(index) - up)]
    for worker in lab.live_workers():
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


def indexed(index: PrefixIndex) -> dict[str, set[int]]:
    """What an index says of each worker."""
    found: dict[int, set[int]] = {slot: set() for slot in index._slots.values()}
    for shard in index._shards:
        for key, bits in shard.items():
            for slot, keys in found.items():
                if bits >> slot & 1:
                    keys.add(key)
    return {worker: found[slot] for worker, slot in index._slots.items()}
