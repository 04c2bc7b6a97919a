"""What routing costs: time to hash and match a prompt and to choose, memory for a block, time to forget.

    python benchmarks/index.py [--tokens 32768] [--workers 256] [--block-size 16] [--blocks 1000000]

The match is the dearest one: every worker drops out at another depth and one has the whole prompt.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable
from functools import partial

from penstock.core.hashing import root_hash, sequence_hashes
from penstock.core.policy import Candidate, Query, choose
from penstock.core.prefix_index import PrefixIndex
from penstock.shapes import Load, Role

REPEATS = 30
EVENT_BLOCKS = 512


def median_ms(work: Callable[[], object]) -> float:
    """The median time of one call in milliseconds."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def bench_match(tokens: int, workers: int, block_size: int, rng: random.Random) -> None:
    """Print the times to hash a prompt and to find every worker's overlap with it."""
    prompt = [rng.randrange(150_000) for _ in range(tokens)]
    root = root_hash("model")
    hashes = sequence_hashes(prompt, block_size, root)
    index = PrefixIndex()
    for number in range(workers):
        index.add_worker(f"worker-{number}")
        index.stored(f"worker-{number}", hashes[: len(hashes) * (number + 1) // workers])
    assert len(index.overlaps(hashes)) == min(workers, len(hashes))
    hash_ms = median_ms(lambda: sequence_hashes(prompt, block_size, root))
    match_ms = median_ms(lambda: index.overlaps(hashes))
    print(f"{tokens} tokens in blocks of {block_size}, {workers} workers")
    print(f"  hash {hash_ms:.2f} ms + match {match_ms:.2f} ms = {hash_ms + match_ms:.2f} ms")


def bench_choose(rng: random.Random) -> None:
    """Print the time to choose among aggregated workers, and among as many prefill and decode workers."""
    load = Load(running=8, prefill_tokens=2000, total_blocks=10_000)
    for roles in ((Role.AGGREGATED,), (Role.PREFILL, Role.DECODE)):
        for size in (8, 256):
            pool = [
                Candidate(f"worker-{number}", roles[number % len(roles)], load, 16, number % 50)
                for number in range(size)
            ]
            took_ms = median_ms(partial(choose, Query(2000), pool, rng=rng))
            print(f"  choose among {size} ({' and '.join(roles)}): {took_ms * 1e3:.0f} us")


def bench_memory(blocks: int, holders: int, rng: random.Random) -> None:
    """Print the bytes for a block that `holders` of 256 workers have (prefixes of 64 blocks each)."""
    index = PrefixIndex()
    for number in range(256):
        index.add_worker(f"worker-{number}")
    gc.collect()
    tracemalloc.start()
    for _ in range(blocks // 64):
        hashes = [rng.getrandbits(64) for _ in range(64)]
        for number in rng.sample(range(256), holders):
            index.stored(f"worker-{number}", hashes)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    print(f"  {size / len(index):.0f} bytes a block, {len(index)} blocks on {holders} of 256 workers")


def bench_events(blocks: int, rng: random.Random) -> None:
    """Print what storing, removing and forgetting a worker's blocks costs, and the longest stall."""
    index = PrefixIndex()
    for worker in ("goes", "stays"):
        index.add_worker(worker)
    hashes = [rng.getrandbits(64) for _ in range(blocks)]
    start = time.perf_counter()
    stalls = []
    for worker in ("goes", "stays"):
        for first in range(0, blocks, EVENT_BLOCKS):
            before = time.perf_counter()
            index.stored(worker, hashes[first : first + EVENT_BLOCKS])
            stalls.append(time.perf_counter() - before)
    took = time.perf_counter() - start
    print(f"  stored: {took / blocks / 2 * 1e9:.0f} ns a block, longest event {max(stalls) * 1e3:.2f} ms")
    start = time.perf_counter()
    index.remove_worker("goes")
    stalls = [time.perf_counter() - start]
    more = True
    while more:
        before = time.perf_counter()
        more = index.sweep()
        stalls.append(time.perf_counter() - before)
    print(
        f"  a worker with {blocks} blocks forgotten: {sum(stalls) * 1e3:.0f} ms in {len(stalls)} sweeps, "
        f"longest {max(stalls) * 1e3:.2f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--workers", type=int, default=256)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    args = parser.parse_args()
    rng = random.Random(0)
    bench_match(args.tokens, args.workers, args.block_size, rng)
    bench_choose(rng)
    for holders in (1, 2, 4):
        bench_memory(args.blocks // 5, holders, rng)
    bench_events(args.blocks, rng)


if __name__ == "__main__":
    main()
