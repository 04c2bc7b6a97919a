"""`penstock calibrate`: measures what the steps of a running worker cost."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, TypeVar

import msgspec
import typer
import uvloop
from rich.console import Console

from penstock.bench.answers import JsonAnswer
from penstock.bench.command import calibrate as words_per_token
from penstock.bench.command import first_model
from penstock.bench.conversations import PlannedConversation, PlannedTurn, words
from penstock.bench.driver import Driver, Limits, Payload
from penstock.bench.http_client import HttpClient, RequestFailed
from penstock.bench.measurements import Measurements, RequestOutcome
from penstock.bench.text import filler
from penstock.engines.cost_models import MeasuredCosts
from penstock.errors import ConfigError, PenstockError
from penstock.plan.calibration import (
    OUTPUT_TOKENS,
    Burst,
    Measured,
    bursts,
    costs_of,
    itl_error,
    prompt_lengths,
    ttft_error,
)
from penstock.shapes import Rates

Option = typer.Option
Url = Annotated[str, Option(metavar="URL", help="The frontend, or unix:/PATH. [the running graph's]")]
Model = Annotated[str, Option(metavar="NAME", help="Which model. [the first one served]")]
ApiKey = Annotated[str, Option(envvar="PENSTOCK_API_KEY", show_default=False, help="Key of the frontend.")]
WorkerGpus = Annotated[int, Option("--gpus", min=1, help="GPUs of each worker.")]
CostsFile = Annotated[Path, Option("--write", help="File for the cost model; its name ends with .json.")]

REQUEST_TIMEOUT_S = 600.0
ONE_STEP_TOKENS = 2048
"""Prompts up to this length are computed in one step by default, whatever the engine."""

TEMPLATE_TOKENS = 128
"""At most, of the chat template around a prompt."""

REPORT_PAUSE_S = 0.5
"""After which the frontend has the worker's latest load."""


Answer = TypeVar("Answer")


class _Model(msgspec.Struct):
    id: str
    max_model_len: int


class _Models(msgspec.Struct):
    data: list[_Model]


class _Rates(msgspec.Struct):
    """Those that are used of Rates, by name: on the link they are an array."""

    step_ms: float
    prefill_token_ms: float
    prefill_context_ms: float
    decode_request_ms: float
    decode_context_ms: float


class _Load(msgspec.Struct):
    rates: _Rates
    steps: int = 0


class _Instance(msgspec.Struct):
    instance_id: str
    model: str
    state: str
    load: _Load
    cache_tokens: int


class _Health(msgspec.Struct):
    instances: list[_Instance]


class _Outcomes(Measurements):
    """Keeps those of requests that did not fail."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: list[RequestOutcome] = []

    def add(self, outcome: RequestOutcome, message: str = "") -> None:
        super().add(outcome, message)
        if outcome.error is None:
            self.outcomes.append(outcome)


def calibrate(
    write: CostsFile,
    url: Url = "",
    model: Model = "",
    api_key: ApiKey = "",
    gpus: WorkerGpus = 1,
) -> None:
    """Measure what the steps of a running worker cost."""
    if write.suffix != ".json":
        raise ConfigError(f"write: `{write}` does not end with .json")
    console = Console(stderr=True)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    client = HttpClient(url, headers)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            measured = runner.run(_Calibration(client, console).run(model, gpus))
        except RequestFailed as error:
            raise ConfigError(f"url: {url}: {error}") from error
        finally:
            runner.run(client.close())
    write.write_bytes(msgspec.json.format(msgspec.json.encode(measured), indent=2) + b"\n")
    _show(measured, write)


def _show(measured: MeasuredCosts, path: Path) -> None:
    costs = measured.costs
    print(f"A step with n new tokens of prompts: {costs.c0:.3g} ms + {1e3 * costs.c1:.3g} us * n")
    print(f"  and {1e6 * costs.c2:.3g} ns for each of them and each token before it.")
    print(f"A step of b requests that decode: {costs.a0:.3g} ms + {1e3 * costs.a1:.3g} us * b")
    print(f"  and {1e6 * costs.a2:.3g} ns for each token of their contexts.")
    print(
        f"Median error: {measured.itl_error:.1%} of the time per token, {measured.ttft_error:.1%} of TTFT"
    )
    print("  (which includes the frontend and the network).")
    print(f"Written to {path}; use it as: penstock plan --cost-model {path}")


class _Calibration:
    """One calibration of one model's workers."""

    def __init__(self, client: HttpClient, console: Console) -> None:
        self._client = client
        self._console = console
        self._run_id = os.urandom(8).hex()  # so that nothing is cached
        self._sent = 0
        self._words_per_token = 1.0

    async def run(self, model: str, gpus: int) -> MeasuredCosts:
        """Send everything, and read what the workers have measured."""
        name = model or await first_model(self._client)
        payload = Payload(name, ignore_eos=True)
        max_tokens = await self._max_model_len(name)
        self._words_per_token = await words_per_token(self._client, name)
        idle = await self._instances(name)
        cache_tokens = min(it.cache_tokens for it in idle.values())
        max_tokens = min(max_tokens, cache_tokens) - TEMPLATE_TOKENS
        prompts = [
            await self._send(payload, Burst(1, tokens), 1) for tokens in prompt_lengths(max_tokens, seed=0)
        ]
        self._console.print(f"{len(prompts)} prompts were computed")
        prefilled = await self._instances(name)
        after_prompts = _rates(_busiest(idle, prefilled))
        batches = []
        for burst in bursts(max_tokens, cache_tokens):
            together = burst._replace(requests=burst.requests * len(idle))
            measured = await self._send(payload, together, OUTPUT_TOKENS)
            batches.append(measured._replace(requests=burst.requests))
        self._console.print(f"{len(batches)} batches were decoded")
        worker = _busiest(prefilled, await self._instances(name))
        costs = costs_of(after_prompts, _rates(worker))
        return MeasuredCosts(
            costs=costs,
            model=name,
            gpus=gpus,
            cache_tokens=worker.cache_tokens,
            ttft_error=ttft_error(costs, prompts, ONE_STEP_TOKENS),
            itl_error=itl_error(costs, batches),
        )

    async def _send(self, payload: Payload, burst: Burst, output_tokens: int) -> Measured:
        """Send these requests together, and wait for all answers."""
        texts = []
        for _ in range(burst.requests):
            self._sent += 1
            length = words(burst.prompt_tokens, self._words_per_token)
            texts.append(filler.__wrapped__(f"{self._run_id}/{self._sent}", length))
        conversations = iter([PlannedConversation([PlannedTurn(text, output_tokens)]) for text in texts])
        limits = Limits(requests=burst.requests, request_timeout_s=REQUEST_TIMEOUT_S)
        measured = _Outcomes()
        await Driver(self._client, payload, limits, measured).closed(conversations, burst.requests)
        if measured.failed:
            report = measured.report(1.0, 0.0)
            raise PenstockError(f"requests failed: {report.errors}: {'; '.join(report.examples.values())}")
        return Measured(
            burst.requests,
            fmean(it.prompt_tokens for it in measured.outcomes),
            median(it.ttft_s for it in measured.outcomes) * 1e3,
            median(it.itl_s for it in measured.outcomes) * 1e3,
        )

    async def _max_model_len(self, name: str) -> int:
        for model in (await self._get("/v1/models", _Models)).data:
            if model.id == name:
                return model.max_model_len
        raise ConfigError(f"model: `{name}` is not served there")

    async def _instances(self, name: str) -> dict[str, _Instance]:
        """The workers that serve this model, with their latest loads."""
        await asyncio.sleep(REPORT_PAUSE_S)
        instances = (await self._get("/health", _Health)).instances
        ready = {it.instance_id: it for it in instances if it.model == name and it.state == "ready"}
        if not ready:
            raise ConfigError(f"url: /health lists no ready worker with the model `{name}`")
        return ready

    async def _get(self, path: str, kind: type[Answer]) -> Answer:
        answer = JsonAnswer()
        await self._client.request("GET", path, b"", answer)
        try:
            return msgspec.convert(answer.decode(), kind)
        except msgspec.ValidationError as error:
            raise ConfigError(
                f"url: {path} answers {answer.status}, and not as Penstock does: {error}"
            ) from None


def _rates(instance: _Instance) -> Rates:
    return Rates(**msgspec.structs.asdict(instance.load.rates))


def _busiest(before: dict[str, _Instance], after: dict[str, _Instance]) -> _Instance:
    """The worker that has taken most steps."""
    return max(
        (it for it in after.values() if it.instance_id in before),
        key=lambda it: it.load.steps - before[it.instance_id].load.steps,
    )
