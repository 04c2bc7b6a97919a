"""What routing costs: time to hash and match a prompt and to choose, memory for a block, time to forget.

    python benchmarks/index.py [--tokens 32768] [--workers 256] [--block-size 16] [--blocks 1000000]

The match is the dearest one: every worker drops out at another depth and one has the whole prompt.
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
import time
from array import array
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from penstock.core.hashing import root_hash, sequence_hashes
from penstock.core.policy import Candidate, Query, choose
from penstock.core.prefix_index import PrefixIndex
from penstock.shapes import Load, Role

REPEATS = 30
STEP_BLOCKS = 512
PROMPT_BLOCKS = 2048


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


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def bench_events(blocks: int, workers: int, holders: int) -> None:
    """Print what a block takes in memory that `holders` of the workers have, and the CPU time of storing,
    removing, matching and forgetting blocks; run in a process of its own."""
    rng = random.Random(0)
    index = PrefixIndex()
    names = [f"worker-{number}" for number in range(workers)]
    for name in names:
        index.add_worker(name)
    hashes = array("Q", (rng.getrandbits(64) for _ in range(blocks)))
    before, stored = resident_bytes(), 0.0
    longest = 0.0
    for first in range(0, blocks, STEP_BLOCKS):
        step = hashes[first : first + STEP_BLOCKS].tolist()
        for name in random.Random(first // PROMPT_BLOCKS).sample(names, holders):
            took = cpu_s(partial(index.stored, name, step))
            stored, longest = stored + took, max(longest, took)
    size = (resident_bytes() - before) / blocks
    print(f"  {blocks} blocks, each on {holders} of {workers} workers: {size:.0f} bytes a block")
    each_ns = stored / blocks / holders * 1e9
    print(f"    stored: {each_ns:.0f} ns a block, longest event {longest * 1e3:.2f} ms")
    for batch in (4, STEP_BLOCKS):
        took = sum(bench_changes(index, names, hashes, batch, rng) for _ in range(REPEATS)) / REPEATS
        print(f"    some removed, others stored, by {batch}: {took * 1e9:.0f} ns a block")
    prompts = [hashes[at : at + PROMPT_BLOCKS].tolist() for at in range(0, blocks // 2, PROMPT_BLOCKS)]
    matches = [cpu_s(partial(index.overlaps, prompt)) for prompt in prompts[:200]]
    print(f"    {PROMPT_BLOCKS} blocks matched: {statistics.median(matches) * 1e3:.2f} ms")
    stalls = [cpu_s(partial(index.remove_worker, names[0]))]
    more = True
    while more:
        start = time.thread_time()
        more = index.sweep()
        stalls.append(time.thread_time() - start)
    print(
        f"    a worker forgotten: {sum(stalls) * 1e3:.0f} ms in {len(stalls)} sweeps, "
        f"longest {max(stalls) * 1e3:.2f} ms"
    )


def bench_changes(
    index: PrefixIndex, names: list[str], hashes: array[int], batch: int, rng: random.Random
) -> float:
    """The seconds for each block where workers evict some and store as many."""
    events = []
    for _ in range(4096 // batch):
        first = rng.randrange(len(hashes) // 2, len(hashes) - batch)
        new = [rng.getrandbits(64) for _ in range(batch)]
        events.append((rng.choice(names), hashes[first : first + batch].tolist(), new))
    start = time.thread_time()
    for name, gone, new in events:
        index.removed(name, gone)
        index.stored(name, new)
    return (time.thread_time() - start) / len(events) / batch / 2


def cpu_s(work: Callable[[], object]) -> float:
    """The CPU time of one call: that of others on the machine does not count."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


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
    for case in ((8, 1), (8, 3), (1000, 1), (1000, 3)):
        process = get_context("spawn").Process(target=bench_events, args=(args.blocks, *case))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
