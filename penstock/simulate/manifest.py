"""What `penstock simulate --graph` takes from a manifest: its workers, and how its frontends choose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from penstock.core.settings import RouterSettings
from penstock.engines.cost_models import cost_models
from penstock.engines.sim import SimSettings
from penstock.errors import ConfigError
from penstock.graph import load_graph
from penstock.graph.services import Service
from penstock.options.config import FrontendOptions, WorkerOptions
from penstock.options.flags import build_options
from penstock.options.routing import router_settings
from penstock.shapes import Role
from penstock.simulate.run import SimulatedGraph

VLLM_BLOCK_TOKENS = 16

FIELDS = {
    "cost_model": "cost-model",
    "cache_tokens": "cache-tokens",
    "block_size": "block-size",
    "max_batch_tokens": "max-batch-tokens",
}
"""What all workers must have alike, and the flag that says it instead of the manifest."""


class DescribedGraph(msgspec.Struct, frozen=True):
    """A manifest, as it is simulated."""

    graph: SimulatedGraph
    router: RouterSettings
    frontends: int


def described_graph(path: Path, given: Mapping[str, Any]) -> DescribedGraph:
    """The graph of a manifest. `given`: values of FIELDS that count instead of what it says.

    Raises:
        ConfigError: a line for each thing that cannot be known from the manifest.
    """
    graph = load_graph(path)
    services = [service for service in graph.services if service.replicas]
    frontends = [service for service in services if service.role is None]
    replicas: Counter[Role] = Counter()
    workers: dict[str, dict[str, Any]] = {}
    for service in services:
        if service.role is not None:
            replicas[service.role] += service.replicas
            workers[service.name] = {**_worker(service, given), **given}
    if not frontends or not workers:
        raise ConfigError(f"graph: {path}: has no {'workers' if frontends else 'frontend'} with replicas")
    alike = _alike(path, workers)
    batch_tokens = alike.pop("max_batch_tokens")
    simulated = SimulatedGraph(
        aggregated=replicas[Role.AGGREGATED], prefill=replicas[Role.PREFILL], decode=replicas[Role.DECODE]
    )
    scheduler = msgspec.structs.replace(
        simulated.scheduler,
        max_batch_tokens=batch_tokens,
        max_running=min(alike.pop("max_running"), batch_tokens),
    )
    options = build_options(FrontendOptions, frontends[0].flags, frontends[0].env)
    return DescribedGraph(
        msgspec.structs.replace(simulated, scheduler=scheduler, **alike),
        router_settings(options),
        sum(service.replicas for service in frontends),
    )


def _worker(service: Service, given: Mapping[str, Any]) -> dict[str, Any]:
    """A service's workers, in fields of SimulatedGraph and SchedulerSettings. Raises ConfigError."""
    options = build_options(WorkerOptions, service.flags, service.env, service.engine_args)
    defaults, scheduler, sim = SimulatedGraph(), SimulatedGraph().scheduler, SimSettings()
    is_sim = options.engine == "sim"
    block_size = options.block_size or (sim.block_size if is_sim else VLLM_BLOCK_TOKENS)
    default_batch = sim.scheduler.max_batch_tokens if is_sim else scheduler.max_batch_tokens
    default_len = sim.max_model_len if is_sim else defaults.max_model_len
    found: dict[str, Any] = {
        "block_size": block_size,
        "max_batch_tokens": options.max_batch_tokens or default_batch,
        "max_running": options.max_running or scheduler.max_running,
        "max_model_len": options.max_model_len or default_len,
    }
    if is_sim:
        if options.sim_speedup != 1.0 and "cost_model" not in given:
            raise ConfigError(
                f"graph: {service.name}: --sim-speedup is not simulated; name a cost model by --cost-model"
            )
        found["cost_model"] = sim.cost_model
        found["cache_tokens"] = sim.total_blocks * block_size
    # `penstock plan` names both also for workers with other engines.
    if options.sim_cost_model:
        found["cost_model"] = options.sim_cost_model
    if options.sim_cache_tokens is not None:
        found["cache_tokens"] = options.sim_cache_tokens
    wrong = []
    if "cost_model" not in found.keys() | given.keys():
        wrong.append(
            f"graph: {service.name}: how long steps of {Path(options.model).name} take with the"
            f" {options.engine} engine is not known; name what comes close by --cost-model, one of"
            f" {', '.join(sorted(cost_models()))}"
        )
    if "cache_tokens" not in found.keys() | given.keys():
        wrong.append(
            f"graph: {service.name}: how many tokens its KV cache holds is not known; give --cache-tokens"
            " (a running worker's `cache_tokens` in /health)"
        )
    if wrong:
        raise ConfigError("\n".join(wrong))
    return found


def _alike(path: Path, workers: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What all these workers are like. Raises ConfigError where they differ."""
    (first, alike), *others = workers.items()
    for name, worker in others:
        for field, value in worker.items():
            if value != alike[field]:
                flag = FIELDS.get(field, "")
                instead = f"; give --{flag} for all" if flag else ""
                raise ConfigError(
                    f"graph: {path}: {first} has {field} {alike[field]} and {name} has {value}, but"
                    f" simulated workers are all alike{instead}"
                )
    return alike
