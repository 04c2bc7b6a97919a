"""From settings to a running core process of vLLM, and what it then is."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from penstock.engines.assets import ASSET_NAMES, Assets, assets_from
from penstock.engines.fingerprint import weights_fingerprint
from penstock.engines.vllm.differences import ask_all_ranks, client_sockets
from penstock.engines.vllm.event_feed import EventEndpoints, EventSources, free_ports
from penstock.engines.vllm.handoff_params import engine_id, lease_s
from penstock.engines.vllm.inside.guard import own_engines
from penstock.engines.vllm.installed import installed_version, prepare_environment
from penstock.engines.vllm.logs import last_words, one_line
from penstock.engines.vllm.settings import VllmSettings
from penstock.errors import ConfigError, RemoteError
from penstock.net.address import is_loopback
from penstock.shapes import Answering, EngineCard, ModelCard, Role, SamplingDefaults

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine.core_client import AsyncMPClient
    from vllm.v1.engine.input_processor import InputProcessor

log = logging.getLogger("penstock.engine")

SHUTDOWN_S = 10.0
"""Seconds that vLLM gets to end its processes by itself."""

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".gguf"}
"""Of the files that vLLM reads weights from."""

TRANSPORT = "vllm-nixl"
"""Name of vLLM's KV transfer in cards and handoffs."""

OWN_FLAGS = {
    "--model": "use --model before --",
    "--served-model-name": "use --served-model-name before --",
    "--kv-transfer-config": "Penstock connects prefill and decode workers itself",
    "--kv-events-config": "Penstock reads the KV events itself",
    "--host": "vLLM serves nothing by itself here",
    "--port": "vLLM serves nothing by itself here",
}
"""vLLM flags that are not the user's, and what to do instead."""


@dataclass(slots=True)
class Core:
    """A started core process, seen from here."""

    config: VllmConfig
    client: AsyncMPClient
    inputs: InputProcessor
    card: EngineCard
    assets: Assets
    events: EventSources

    @property
    def ranks(self) -> int:
        """Data parallel ones, each with a process and a part of the blocks."""
        return int(self.config.parallel_config.data_parallel_size)

    async def complete_layout(self) -> None:
        """Make what vLLM itself compares a part of the card's layout. On the event loop."""
        if not self.card.transport:
            return
        ranks = await ask_all_ranks(self.client, "collective_rpc", "penstock_compared", None, (), None)
        parts = [self.card.layout, *sorted({compared for workers in ranks for compared in workers})]
        layout = hashlib.sha256(msgspec.json.encode(parts)).hexdigest()
        self.card = msgspec.structs.replace(self.card, layout=layout)

    async def close(self) -> None:
        """End vLLM's processes, and close what its client has open here. On the event loop."""
        await asyncio.to_thread(self.client.shutdown, SHUTDOWN_S)
        for socket in client_sockets(self.client):  # whoever watches over dead processes may not be so far
            socket.close(linger=0)
        ending = Thread(target=self.client.resources.ctx.term, name="vllm sockets", daemon=True)
        ending.start()
        await asyncio.to_thread(ending.join, SHUTDOWN_S)


def start_core(settings: VllmSettings) -> Core:
    """Start vLLM and wait until it is ready: seconds to minutes, so not on the event loop's thread.

    Raises ConfigError when it cannot start with these settings, RemoteError when it failed to: that may
    pass, as when an engine that ended has not given its memory back yet.
    """
    prepare_environment()
    log.info("starting vLLM %s: model=%s", installed_version(), settings.model)
    from vllm.v1.engine.core_client import EngineCoreClient
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.executor import Executor

    arguments = _parse(settings)
    events = EventSources(arguments.data_parallel_size)
    with last_words() as words:
        try:
            config = _config(settings, arguments, events.ranks[0])
            inputs = InputProcessor(config)
            _check_parsers(arguments, config, inputs)
            _settle_grammar_library(config, inputs)
            own_engines(events.directory)
            with _listening(settings, config):
                client = EngineCoreClient.make_async_mp_client(
                    config, Executor.get_class(config), log_stats=True
                )
        except ConfigError:
            events.close()
            raise
        except Exception as error:
            events.close()
            raise RemoteError(f"vLLM did not start: {words() or one_line(error)}") from error
    model, assets = _model(settings, config, inputs, arguments)
    return Core(config, client, inputs, _card(settings, config, model), assets, events)


# --- vLLM's configuration -----------------------------------------------------------------------------


def _parse(settings: VllmSettings) -> Any:
    """vLLM's own flags, ours before the user's, so that the user's win."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"after --: {message}")

    for argument in settings.engine_args:
        name = argument.partition("=")[0].replace("_", "-")
        if name in OWN_FLAGS:
            raise ConfigError(f"{name} after --: {OWN_FLAGS[name]}")
    parser = AsyncEngineArgs.add_cli_args(Parser(add_json_tip=False))
    parser.add_argument("--tool-call-parser", default="")
    parser.add_argument("--enable-auto-tool-choice", action="store_true")  # a parser's name is enough
    limits = {
        "--kv-cache-memory-bytes": settings.kv_cache_bytes,
        "--block-size": settings.block_size,
        "--max-model-len": settings.max_model_len,
        "--max-num-seqs": settings.max_running,
        "--max-num-batched-tokens": settings.max_batch_tokens,
    }
    own = ["--model", settings.model, "--scheduling-policy", "priority", "--no-use-tqdm-on-load"]
    for flag, value in limits.items():
        if value is not None:
            own += [flag, str(value)]
    return parser.parse_args([*own, *settings.engine_args])


def _config(settings: VllmSettings, arguments: Any, events: EventEndpoints) -> VllmConfig:
    from vllm.config import KVEventsConfig, KVTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    args = AsyncEngineArgs.from_cli_args(arguments)
    args.enable_prefix_caching = True
    args.enable_logging_iteration_details = True  # what each step computed, and how long that took
    args.worker_extension_cls = "penstock.engines.vllm.inside.extension.WorkerExtension"
    args.logits_processors = ["penstock.engines.vllm.inside.forced:ForcedTokens"]
    args.kv_events_config = KVEventsConfig(
        enable_kv_cache_events=True,
        publisher="zmq",
        endpoint=events.publish,
        replay_endpoint=events.replay,
    )
    if settings.role is not Role.AGGREGATED:
        args.kv_transfer_config = KVTransferConfig(
            kv_connector="PenstockConnector",
            kv_connector_module_path="penstock.engines.vllm.inside.connector",
            kv_role="kv_producer" if settings.role is Role.PREFILL else "kv_consumer",
            engine_id=engine_id(settings.incarnation),
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={"kv_lease_duration": lease_s(settings.handoff_ttl_s)},
        )
    try:
        config = args.create_engine_config()
    except Exception as error:  # pydantic's, Hugging Face's and vLLM's own
        absent = "" if Path(settings.model).exists() else ", which is no folder here"
        raise ConfigError(f"vLLM cannot serve {settings.model}{absent}: {_reason(error)}") from error
    if config.use_v2_model_runner:
        config.model_config.logits_processors = None  # made for V1; the engine notices and lives without
    return config


def _reason(error: Exception) -> str:
    """Of pydantic's many lines, those that vLLM's validators wrote."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return one_line(error)
    return "; ".join(
        " ".join(detail["msg"].removeprefix("Value error, ").split()) for detail in error.errors()
    )


def _check_parsers(arguments: Any, config: VllmConfig, inputs: InputProcessor) -> None:
    """Names that no frontend could use must not get that far."""
    from penstock.engines.vllm.parsing import parser_class

    reasoning_parser = config.structured_outputs_config.reasoning_parser or ""
    if arguments.tool_call_parser or reasoning_parser:
        parser_class(arguments.tool_call_parser, reasoning_parser, inputs.renderer.tokenizer)


def _settle_grammar_library(config: VllmConfig, inputs: InputProcessor) -> None:
    """Have one library compile all grammars. By "auto" vLLM's core uses the one that suited the first of
    them, also for those that only the other can compile: the same request would be served, served wrong or
    fail, as its worker's first request was. (Mistral's own tokenizer needs "auto": its tool calls have
    another grammar.)"""
    from vllm.utils.mistral import is_mistral_tokenizer

    structured = config.structured_outputs_config
    if structured.backend == "auto" and not is_mistral_tokenizer(inputs.renderer.tokenizer):
        structured.backend = "xgrammar"


@contextlib.contextmanager
def _listening(settings: VllmSettings, config: VllmConfig) -> Iterator[None]:
    """vLLM's processes take the address under which peers ask for their KV layout from the environment that
    they are started with; rank r listens on port + r. Their UCX would listen on every network device: for a
    loopback address it is kept to that one. What the user has set stays."""
    wanted = {}
    if settings.role is not Role.AGGREGATED:
        wanted["VLLM_NIXL_SIDE_CHANNEL_HOST"] = settings.host
        if settings.kv_port or "VLLM_NIXL_SIDE_CHANNEL_PORT" not in os.environ:
            ranks = config.parallel_config.data_parallel_size
            port = settings.kv_port or free_ports(ranks, settings.host)
            wanted["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(port)
        if is_loopback(settings.host):
            wanted["UCX_NET_DEVICES"] = os.environ.get("UCX_NET_DEVICES", "lo")
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


# --- what it is -----------------------------------------------------------------------------------------


def _card(settings: VllmSettings, config: VllmConfig, model: ModelCard) -> EngineCard:
    cache, scheduler = config.cache_config, config.scheduler_config
    return EngineCard(
        name=f"vllm {installed_version()}",
        model=model,
        block_size=cache.block_size,
        total_blocks=cache.num_gpu_blocks,
        layout=_layout(config, model.weights),
        transport="" if settings.role is Role.AGGREGATED else TRANSPORT,
        max_batch_tokens=scheduler.max_num_batched_tokens,
        max_running=scheduler.max_num_seqs * config.parallel_config.data_parallel_size,
    )


def _model(
    settings: VllmSettings, config: VllmConfig, inputs: InputProcessor, arguments: Any
) -> tuple[ModelCard, Assets]:
    model = config.model_config
    folder = _folder(model)
    assets = Assets(assets_from(folder))
    files = [path for path in sorted(folder.iterdir()) if path.suffix in WEIGHT_SUFFIXES]
    recommended = model.get_diff_sampling_param()
    recommended.pop("max_tokens", None)
    if "top_k" in recommended:
        recommended["top_k"] = max(0, recommended["top_k"])  # -1 means off, as 0 does
    card = ModelCard(
        name=settings.served_name or Path(settings.model).name,
        max_model_len=model.max_model_len,
        vocab_size=model.get_vocab_size(),
        eos_token_ids=_eos_token_ids(inputs),
        weights=weights_fingerprint(files),
        assets=assets.digests,
        answering=Answering(
            sampling_defaults=SamplingDefaults(**recommended),
            structured_output=not model.skip_tokenizer_init,
            tool_parser=arguments.tool_call_parser,
            reasoning_parser=config.structured_outputs_config.reasoning_parser or "",
            thinking_budget=config.reasoning_config is not None and config.reasoning_config.enabled,
        ),
    )
    return card, assets


def _folder(model: Any) -> Path:
    """Where the model's files are on this machine; those of a downloaded model were put there by vLLM."""
    if Path(model.model).is_dir():
        return Path(model.model)
    from huggingface_hub import snapshot_download

    patterns = [*ASSET_NAMES, "config.json", "*.safetensors"]
    return Path(snapshot_download(model.model, revision=model.revision, allow_patterns=patterns))


def _eos_token_ids(inputs: InputProcessor) -> list[int]:
    """The tokenizer's and the generation config's: vLLM stops at both."""
    configured = inputs.generation_config_fields.get("eos_token_id")
    found = configured if isinstance(configured, list) else [configured]
    return sorted(
        {token_id for token_id in (*found, inputs.renderer.get_eos_token_id()) if token_id is not None}
    )


def _layout(config: VllmConfig, weights: str) -> str:
    """What two workers must share for the KV of one to mean anything to the other."""
    model, cache = config.model_config, config.cache_config
    parts = [
        installed_version(),
        str(model.dtype),
        cache.cache_dtype,
        cache.block_size,
        model.hf_config.to_json_string(),
        weights,
    ]
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()
