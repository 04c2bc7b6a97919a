"""What one seed stands for: which workers and frontends, what is asked of them, what goes wrong when."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from penstock.core.deadlines import Deadlines
from penstock.core.settings import RouterSettings
from penstock.engines import byte_tokenizer
from penstock.engines.sim import SimSettings
from penstock.link.settings import ClientSettings, ServerSettings
from penstock.shapes import Role
from penstock.transfer.sim import SimTransferSettings
from simulator.clients import SimulatedCall

REPLACED_VOCAB_SIZE = 6000

MIXED_SHARE = 0.25
"""The share of seeds that begin with workers of two generations, as in the middle of a rolling update."""

BLOCK_SIZES = (4, 8, 16)


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line may say. None and empty: the seed's choice."""

    workers: int | None = None
    frontends: int | None = None
    faults: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class PlannedFault:
    kind: str
    at: float
    seed: int  # of its target and its length


@dataclass(frozen=True, slots=True)
class Scenario:
    """All that is decided in advance. Times are virtual seconds."""

    seed: int
    gentle: bool  # there is always a way to serve every request: no error is allowed
    quiet: bool  # nothing goes wrong
    roles: dict[str, Role]
    frontends: int
    load_s: float
    calls: list[SimulatedCall]
    faults: list[PlannedFault]
    router: RouterSettings
    client: ClientSettings
    server: ServerSettings
    sim: SimSettings
    transfer: SimTransferSettings
    max_waiting: int  # this and the next: of each worker
    max_wait_ms: float
    drain_s: float
    latency_s: tuple[float, float]
    callback_s: float
    deadlines: Deadlines = field(default_factory=Deadlines)

    @property
    def mixed(self) -> bool:
        """Whether it begins with workers of both generations."""
        return random.Random(f"mixed {self.seed}").random() < MIXED_SHARE

    @property
    def vocab_size(self) -> int:
        """Of the first model's tokenizer."""
        return self.sim.vocab_size or byte_tokenizer.VOCAB_SIZE

    @property
    def pool_tokens(self) -> int:
        """That a worker's KV pool holds."""
        return self.sim.total_blocks * self.sim.block_size

    def sim_of(self, version: int, generation: int) -> SimSettings:
        """What a worker serves. Both generations have the same version of the model, in blocks of other
        sizes: requests run on either, and neither reads the other's KV."""
        sim = self.replaced_sim if version else self.sim
        size = BLOCK_SIZES[(BLOCK_SIZES.index(sim.block_size) + generation) % len(BLOCK_SIZES)]
        return replace(sim, block_size=size, total_blocks=sim.total_blocks * sim.block_size // size)

    @property
    def replaced_sim(self) -> SimSettings:
        """Another model under the same name: with another EOS, and other tokens if it has no files."""
        vocab_size = self.sim.vocab_size and REPLACED_VOCAB_SIZE
        return replace(self.sim, eos_token_ids=(1,), vocab_size=vocab_size)
