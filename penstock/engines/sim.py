"""The sim engine: everything of an engine but the arithmetic.

Scheduler, block pool, prefix cache, KV events, handoffs and transfers are the real ones; a step takes the
time that a cost model of real hardware gives it, and tokens are drawn from (seed, position). So a hundred
GPUs fit on a laptop, on its own clock or on a virtual one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import log
from pathlib import Path

import msgspec
from xxhash import xxh3_64_intdigest

from penstock import __version__
from penstock.clock import Clock
from penstock.engines import byte_tokenizer
from penstock.engines.assets import Assets, assets_from
from penstock.engines.batch import BatchRow, Sampled, Sequence, scored_tokens
from penstock.engines.cost_models import cost_model
from penstock.engines.cycle import LoadedModel
from penstock.engines.settings import SchedulerSettings
from penstock.engines.stepping import SteppingEngine
from penstock.engines.virtual import VirtualEngine
from penstock.errors import ConfigError
from penstock.ports import Engine, KvTransfer
from penstock.shapes import EngineCard, ModelCard, PromptLogprob, Sampling, TokenLogprob

POOL_BYTES_PER_BLOCK = 64
"""Of memory, so that real transfers have something to move between sim engines of several processes."""

_SEED_MASK = (1 << 64) - 1
_EOS_SCALE = 1 << 32


class SimSettings(msgspec.Struct, frozen=True):
    """What is simulated."""

    model: str = "sim"
    """Served name."""

    cost_model: str = "qwen3-32b/h200/tp2"
    """How long steps take, a name in cost_models.json; `zero` for no time at all."""

    speedup: float = 1.0
    """Steps take their time divided by this."""

    block_size: int = 16
    """Tokens per block."""

    total_blocks: int = 16384
    """Blocks in the pool; with 16 tokens a block, about what 64 GiB hold of a 32B model's KV."""

    max_model_len: int = 40960
    """Prompt and output, in tokens."""

    vocab_size: int | None = None
    """Token ids are below this. None: what config.json of `assets` says."""

    eos_token_ids: tuple[int, ...] = ()
    """Drawn only as `eos_rate` says."""

    eos_rate: float = 0.0
    """The probability that a token is an EOS, 0 to 1. At 0 outputs end by max_tokens or the context."""

    assets: str = ""
    """A model folder whose tokenizer and templates frontends are to use. Empty, and no vocabulary given:
    a token per byte (byte_tokenizer.py), and only printable ASCII is drawn."""

    scheduler: SchedulerSettings = SchedulerSettings()

    def __post_init__(self) -> None:
        for name in ("speedup", "block_size", "total_blocks", "max_model_len"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be more than 0, got {getattr(self, name)}")
        if not 0.0 <= self.eos_rate <= 1.0:
            raise ConfigError(f"eos_rate must be between 0 and 1, got {self.eos_rate}")
        if self.eos_rate and not self.eos_token_ids:
            raise ConfigError("eos_rate needs eos_token_ids")
        if self.vocab_size is None:
            return
        if any(not 0 <= token_id < self.vocab_size for token_id in self.eos_token_ids):
            raise ConfigError(f"eos_token_ids must be in the vocabulary of {self.vocab_size}")
        if len(set(self.eos_token_ids)) >= self.vocab_size:
            raise ConfigError(f"vocab_size of {self.vocab_size} leaves no token beside eos_token_ids")


class SimRunner:
    """Draws tokens.

    Args:
        token_ids: those that are drawn.
        duration_s: how long to sleep over a batch, in seconds; None: it takes no time.
    """

    def __init__(
        self,
        settings: SimSettings,
        token_ids: range,
        duration_s: Callable[[list[BatchRow]], float] | None = None,
    ) -> None:
        self._duration_s = duration_s
        self._token_ids = token_ids
        self._eos = frozenset(settings.eos_token_ids)
        self._eos_below = int(settings.eos_rate * _EOS_SCALE)
        self._logprob = -log(len(token_ids))

    def run(self, batch: list[BatchRow]) -> list[Sampled | None]:
        """As Runner.run."""
        if self._duration_s is not None:
            time.sleep(self._duration_s(batch))
        for row in batch:
            if row.sequence.prompt_logprobs is not None:
                self._score_prompt(row, row.sequence.prompt_logprobs)
        return [self._sample(row.sequence) if row.sample else None for row in batch]

    def _sample(self, sequence: Sequence) -> Sampled:
        token_id = self.draw(len(sequence.token_ids) - sequence.prompt_len, sequence.sampling)
        if sequence.sampling.logprobs is None:
            return Sampled(token_id)
        # All tokens but EOS are equally likely, so any others are the next most likely.
        place = token_id - self._token_ids.start
        named = sequence.sampling.logprob_token_ids
        likeliest = (self._token_id(place + more) for more in range(sequence.sampling.logprobs))
        top = [(token_id, self._logprob) for token_id in named or likeliest]
        return Sampled(token_id, TokenLogprob(token_id, self._logprob, top))

    def _score_prompt(self, row: BatchRow, logprobs: list[PromptLogprob]) -> None:
        token_ids = [row.sequence.token_ids[position] for position in scored_tokens(row)]
        logprobs += [PromptLogprob(token_id, self._logprob) for token_id in token_ids]

    def draw(self, position: int, sampling: Sampling) -> int:
        """The token at this output position, from 0: a function of it and of the request's seed alone, but
        for stop tokens, which it steps over."""
        draw = xxh3_64_intdigest(position.to_bytes(8, "little"), sampling.seed & _SEED_MASK)
        if draw % _EOS_SCALE < self._eos_below and position >= sampling.min_tokens:
            return min(self._eos)
        place = draw >> 32
        avoided = self._eos.union(sampling.stop_token_ids) if sampling.stop_token_ids else self._eos
        for more in range(len(avoided)):
            if self._token_id(place + more) not in avoided:
                return self._token_id(place + more)
        return self._token_id(place + len(avoided))

    def _token_id(self, place: int) -> int:
        return self._token_ids[place % len(self._token_ids)]


def sim_engine(
    settings: SimSettings, transfer: KvTransfer | None = None, clock: Clock | None = None
) -> Engine:
    """An engine that only takes time.

    Args:
        transfer: moves its (empty) blocks; SimTransfer within a process, any other between processes.
        clock: the clock its steps pass on, as tasks of the running event loop. None: the machine's own,
            in a thread.

    Raises ConfigError when the cost model is unknown.
    """
    costs = cost_model(settings.cost_model)

    def duration_s(batch: list[BatchRow]) -> float:
        return costs.step_ms(batch) / 1e3 / settings.speedup

    if clock is None:
        return SteppingEngine(lambda: load_sim(settings, duration_s), settings.scheduler, transfer)
    return VirtualEngine(lambda: load_sim(settings, None), duration_s, settings.scheduler, clock, transfer)


def load_sim(settings: SimSettings, duration_s: Callable[[list[BatchRow]], float] | None) -> LoadedModel:
    """A runner that draws tokens, and takes the time for it itself if `duration_s` is given."""
    files, vocab_size, token_ids = _tokens(settings)
    assets = Assets(files)
    settings = msgspec.structs.replace(settings, vocab_size=vocab_size)  # checks EOS ids against it
    card = EngineCard(
        name=f"sim {__version__} of {settings.cost_model}",
        model=ModelCard(
            name=settings.model,
            # No longer than its blocks can hold: a frontend refuses at once what no worker could take.
            max_model_len=min(settings.max_model_len, settings.total_blocks * settings.block_size),
            vocab_size=vocab_size,
            eos_token_ids=sorted(settings.eos_token_ids),
            assets=assets.digests,
        ),
        block_size=settings.block_size,
        total_blocks=settings.total_blocks,
        layout=f"sim/{settings.model}/{settings.block_size}",
        max_running=settings.scheduler.max_running,
    )
    shape = (settings.total_blocks, POOL_BYTES_PER_BLOCK)
    pool = memoryview(bytearray(settings.total_blocks * POOL_BYTES_PER_BLOCK)).cast("B", shape)
    return LoadedModel(card, assets, SimRunner(settings, token_ids, duration_s), pool)


def _tokens(settings: SimSettings) -> tuple[dict[str, bytes], int, range]:
    """The frontend's files, the vocabulary's size, and the token ids that are drawn."""
    if settings.assets:
        folder = Path(settings.assets)
        assets = assets_from(folder)
        vocab_size = settings.vocab_size or _vocab_size(folder)
        return assets, vocab_size, range(vocab_size)
    if settings.vocab_size is None:
        return byte_tokenizer.assets(), byte_tokenizer.VOCAB_SIZE, byte_tokenizer.PRINTABLE
    return {}, settings.vocab_size, range(settings.vocab_size)


class _ModelConfig(msgspec.Struct):
    vocab_size: int


def _vocab_size(folder: Path) -> int:
    path = folder / "config.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=_ModelConfig).vocab_size
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{path}: {error}") from error
