"""What one decision costs a frontend: hashing the prompt apart, all else that is done to place a request.

    python benchmarks/decisions.py [--tokens 32768] [--block-size 16] [--workers 8,64,256,1000]

Each request has a prompt of its own behind one of 20 shared prefixes of different lengths, each of which
some workers have cached. Between two requests a tenth of the workers report new loads; what that costs is
told apart. All figures are CPU time.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from penstock.core.admission import AdmissionSettings
from penstock.core.dispatcher import Dispatcher, RequestRecord
from penstock.core.hashing import root_hash, sequence_hashes
from penstock.core.membership import Membership
from penstock.core.placement import Placement
from penstock.core.settings import RouterSettings
from penstock.shapes import (
    Card,
    EngineCard,
    Incarnation,
    Load,
    ModelCard,
    ModelKey,
    Rates,
    Registration,
    Request,
    Role,
    Sampling,
)

REPEATS = 60
PREFIXES = 20
MODEL = ModelCard("m", max_model_len=131_072, vocab_size=150_000)
CAPACITY_BLOCKS = 50_000


class Fleet:
    """A dispatcher with so many workers, all of them busy."""

    def __init__(self, workers: int, block_size: int, roles: tuple[Role, ...], rng: random.Random) -> None:
        settings = RouterSettings(admission=AdmissionSettings(dispatch_wait_ms=1e9))
        self.rng = rng
        self.membership = Membership()
        self.placement = Placement(settings.policy, settings.disagg, rng)
        self.dispatcher = Dispatcher(settings, self.membership, self.placement, rng, 0.0)
        engine = EngineCard(
            "e", MODEL, block_size=block_size, total_blocks=CAPACITY_BLOCKS, max_running=256, layout="l"
        )
        self.names = [f"worker-{number}" for number in range(workers)]
        cards = [
            Card(Incarnation(name, 1), roles[number % len(roles)], engine)
            for number, name in enumerate(self.names)
        ]
        self.membership.discovered(
            {it.instance_id: Registration(it.instance_id, 1, it.role, "m", it.instance_id) for it in cards}
        )
        for card in cards:
            self.membership.up(card.instance_id, card)
            self.membership.loaded(card.instance_id)
            self.placement.up(card, self.load())
        self.membership.elect()
        ((name, revision),) = self.membership.served.items()
        self.model = ModelKey(name, revision)

    def load(self) -> Load:
        """As a busy worker reports it."""
        rng, running = self.rng, self.rng.randrange(1, 32)
        queued = rng.choice((0, 0, 0, rng.randrange(20_000)))
        return Load(
            running=running,
            waiting=1 if queued else 0,
            prefill_tokens=queued,
            used_blocks=rng.randrange(CAPACITY_BLOCKS // 2),
            total_blocks=CAPACITY_BLOCKS,
            context_tokens=running * rng.randrange(1000, 8000),
            rates=Rates(8.0 * rng.uniform(0.95, 1.05), 0.046 * rng.uniform(0.95, 1.05), 0.03),
            output_tokens=rng.uniform(200.0, 400.0),
            prefill_context_tokens=queued * 1000,
        )

    def report(self, share: float) -> float:
        """So many of the workers report. Returns the seconds that one report took."""
        names = self.rng.sample(self.names, max(1, int(len(self.names) * share)))
        loads = [self.load() for _ in names]
        start = time.thread_time()
        for name, load in zip(names, loads, strict=True):
            self.placement.reported(name, 0, load, 0.0)
        return (time.thread_time() - start) / len(names)

    def decide(self, request: Request, hashes: list[int]) -> float:
        """Submit and place a request and end it again. Returns the seconds until it was placed."""
        start = time.thread_time()
        record = self.dispatcher.submit(request, None, 0.0)
        assert isinstance(record, RequestRecord)
        record.placed.hashes[len(request.token_ids) // len(hashes)] = hashes
        effects = self.dispatcher.place(record, 0.0)
        took = time.thread_time() - start
        assert effects, "it was not placed"
        self.dispatcher.drop(record)
        return took


def bench(workers: int, tokens: int, block_size: int, roles: tuple[Role, ...]) -> None:
    """Print the times for one graph."""
    rng = random.Random(workers)
    fleet = Fleet(workers, block_size, roles, rng)
    root = root_hash("m")
    prefixes = []
    for number in range(PREFIXES):
        prefixes.append([rng.randrange(150_000) for _ in range(tokens * (number + 1) // PREFIXES)])
        hashes = sequence_hashes(prefixes[-1], block_size, root)
        for name in rng.sample(fleet.names, min(workers, rng.choice((1, 3, 10, workers // 4 + 1)))):
            fleet.placement.cache_changed(name, hashes[: rng.randrange(len(hashes) + 1)], [], False)
    hashing, deciding, reporting = [], [], []
    for number in range(REPEATS):
        prefix = prefixes[number % PREFIXES]
        prompt = prefix + [rng.randrange(150_000) for _ in range(tokens - len(prefix))]
        request = Request(f"r{number}", fleet.model, prompt, Sampling(max_tokens=400))
        start = time.thread_time()
        hashes = sequence_hashes(prompt, block_size, root)
        hashing.append(time.thread_time() - start)
        reporting.append(fleet.report(0.1))
        deciding.append(fleet.decide(request, hashes))
    hash_ms, decide_ms = statistics.median(hashing) * 1e3, statistics.median(deciding) * 1e3
    print(
        f"{workers:5} workers ({' and '.join(roles)}): hash {hash_ms:.2f} ms + decide {decide_ms:.2f} ms = "
        f"{hash_ms + decide_ms:.2f} ms (least {(min(hashing) + min(deciding)) * 1e3:.2f}); "
        f"a report {statistics.median(reporting) * 1e6:.1f} us"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--workers", default="8,64,256,1000")
    args = parser.parse_args()
    for roles in ((Role.AGGREGATED,), (Role.PREFILL, Role.DECODE)):
        for workers in map(int, args.workers.split(",")):
            bench(workers, args.tokens, args.block_size, roles)


if __name__ == "__main__":
    main()
