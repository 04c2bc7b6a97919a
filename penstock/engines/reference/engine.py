"""The reference engine, put together: a model folder in, an Engine out."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import msgspec

from penstock import __version__
from penstock.engines.assets import Assets, assets_from
from penstock.engines.batch import BatchRow, Sequence
from penstock.engines.cycle import LoadedModel
from penstock.engines.fingerprint import weights_fingerprint
from penstock.engines.reference.checkpoint import weight_paths
from penstock.engines.reference.grammar import Grammars
from penstock.engines.reference.kv import KvPool, block_bytes
from penstock.engines.reference.model import Model
from penstock.engines.reference.model_config import ModelConfig, read_config
from penstock.engines.reference.runner import ReferenceRunner
from penstock.engines.reference.thinking import ThinkingMarks
from penstock.engines.reference.tiles import positions_agree
from penstock.engines.reference.weights import Weights, kv_layout, load_weights
from penstock.engines.settings import SchedulerSettings
from penstock.engines.stepping import SteppingEngine
from penstock.errors import ConfigError
from penstock.ports import KvTransfer
from penstock.shapes import Answering, EngineCard, ModelCard, Sampling

log = logging.getLogger("penstock.engine")

MAX_BLOCK_SIZE = 1024

WARM_UP_TOKENS = 16


class ReferenceSettings(msgspec.Struct, frozen=True):
    """What a reference engine serves, and with how much memory."""

    model: str
    """Folder with config.json, safetensors weights and the tokenizer's files."""

    served_name: str = ""
    """What clients call the model; empty: the folder's name."""

    block_size: int = 16
    """Tokens per KV block. Smaller blocks share more of a prefix, larger ones cost less to look up."""

    kv_cache_bytes: int = 256 * 1024 * 1024
    """Address space of the KV pool. Memory is used as blocks are first written."""

    max_model_len: int | None = None
    """Tokens of prompt and output together; None: what the model was made for, or what the pool holds."""

    tool_parser: str = ""
    """Name of the parser by which frontends read the model's tool calls; empty: it calls none."""

    reasoning_parser: str = ""
    """The same for its reasoning; empty: it does not reason."""

    reasoning_marks: tuple[str, str] = ("", "")
    """The tokens that begin and end its reasoning."""

    scheduler: SchedulerSettings = SchedulerSettings()

    def __post_init__(self) -> None:
        if not 1 <= self.block_size <= MAX_BLOCK_SIZE:
            raise ConfigError(f"block_size must be from 1 to {MAX_BLOCK_SIZE}, got {self.block_size}")
        if self.kv_cache_bytes < 1:
            raise ConfigError(f"kv_cache_bytes must be more than 0, got {self.kv_cache_bytes}")
        if self.max_model_len is not None and self.max_model_len < 1:
            raise ConfigError(f"max_model_len must be more than 0, got {self.max_model_len}")


def reference_engine(settings: ReferenceSettings, transfer: KvTransfer | None = None) -> SteppingEngine:
    """An Engine that loads the model when it is started. The transfer becomes the engine's own."""
    return SteppingEngine(lambda: load_model(settings), settings.scheduler, transfer)


def load_model(settings: ReferenceSettings) -> LoadedModel:
    """Read a model folder.

    Raises:
        ConfigError: the folder, the model or the settings cannot be served.
    """
    folder = Path(settings.model)
    files = assets_from(folder)
    assets = Assets(files)
    config = read_config(folder)
    tokenizer_json = files.get("tokenizer.json")
    thinking = _thinking_marks(tokenizer_json, settings)
    grammars = _grammars(tokenizer_json, config, settings.reasoning_marks[1])
    total_blocks = settings.kv_cache_bytes // block_bytes(config, settings.block_size)
    max_model_len = _max_model_len(settings, config, total_blocks)
    weights = load_weights(folder, config)
    _check_reproducible(weights)
    pool = _pool(config, total_blocks, settings.block_size)
    fingerprint = weights_fingerprint(weight_paths(folder))
    card = EngineCard(
        name=f"reference {__version__}",
        model=ModelCard(
            name=settings.served_name or folder.resolve().name,
            max_model_len=max_model_len,
            vocab_size=config.vocab_size,
            eos_token_ids=sorted(config.eos_token_ids),
            weights=fingerprint,
            assets=assets.digests,
            answering=Answering(
                sampling_defaults=config.sampling_defaults,
                structured_output=grammars is not None,
                tool_parser=settings.tool_parser,
                reasoning_parser=settings.reasoning_parser,
                thinking_budget=thinking is not None,
            ),
        ),
        block_size=settings.block_size,
        total_blocks=total_blocks,
        layout=kv_layout(config, fingerprint),
        max_running=settings.scheduler.max_running,
    )
    model = Model(config, weights, pool, max_model_len)
    runner = ReferenceRunner(model, config.eos_token_ids, grammars, thinking)
    _warm_up(runner, pool, settings.block_size)
    return LoadedModel(card, assets, runner, pool.raw(), runner.refusal)


def _thinking_marks(tokenizer_json: bytes | None, settings: ReferenceSettings) -> ThinkingMarks | None:
    """None when the model does not reason, or when its tokenizer does not have the token that begins it.

    Raises ConfigError when it does not have the one that ends it: no answer could be read.
    """
    begin, end = settings.reasoning_marks
    if tokenizer_json is None or not end:
        return None
    added = json.loads(tokenizer_json).get("added_tokens") or ()
    ids = {token["content"]: token["id"] for token in added}
    if end not in ids:
        raise ConfigError(
            f"reasoning parser {settings.reasoning_parser}: tokenizer.json has no token {end}"
        )
    return None if begin not in ids else ThinkingMarks(ids[begin], ids[end])


def _grammars(tokenizer_json: bytes | None, config: ModelConfig, reasoning_end: str) -> Grammars | None:
    """None when there is no tokenizer, or one whose tokens are not known as bytes: the model is served
    without structured output then."""
    if tokenizer_json is None:
        return None
    try:
        eos_token_ids = sorted(config.eos_token_ids)
        return Grammars(tokenizer_json.decode(), config.vocab_size, eos_token_ids, reasoning_end)
    except (ValueError, RuntimeError) as error:  # not UTF-8, or what the library raises
        log.warning("no structured output: tokenizer.json cannot be used for it: %s", error)
        return None


def _warm_up(runner: ReferenceRunner, pool: KvPool, block_size: int) -> None:
    """Compute something once, so that the first request does not pay for lazy imports, BLAS buffers and
    the first touch of every weight."""
    token_ids = [0] * min(block_size, WARM_UP_TOKENS)
    sampling = Sampling(max_tokens=1, temperature=0.0)
    sequence = Sequence("warm-up", token_ids, len(token_ids), sampling, block_ids=[0])
    runner.run([BatchRow(sequence, 0, len(token_ids), True)])
    pool.clear([0])


def _max_model_len(settings: ReferenceSettings, config: ModelConfig, total_blocks: int) -> int:
    pool_tokens = total_blocks * settings.block_size
    if pool_tokens == 0:
        needed = block_bytes(config, settings.block_size)
        raise ConfigError(
            f"kv_cache_bytes: {settings.kv_cache_bytes} bytes are less than one block, which has {needed}"
        )
    asked = settings.max_model_len
    if asked is None:
        return min(config.max_positions, pool_tokens)
    if asked > config.max_positions:
        raise ConfigError(
            f"max_model_len: {asked} is more than the model's {config.max_positions} positions"
        )
    if asked > pool_tokens:
        raise ConfigError(f"max_model_len: {asked} is more than the {pool_tokens} tokens of kv_cache_bytes")
    return asked


def _pool(config: ModelConfig, total_blocks: int, block_size: int) -> KvPool:
    try:
        return KvPool(config, total_blocks, block_size)
    except (MemoryError, ValueError) as error:  # more than the machine, or than numpy, can address
        raise ConfigError(f"kv_cache_bytes: cannot be allocated: {error}") from error


def _check_reproducible(weights: Weights) -> None:
    layer = weights.layers[0]
    matrices = (layer.qkv, layer.output, layer.gate_up, layer.down, weights.head)
    if not all(positions_agree(matrix) for matrix in matrices):
        log.warning(
            "this machine's BLAS computes equal rows differently at different positions: where two tokens"
            " are almost equally likely, a request's answer may depend on how it is batched or chunked"
        )
