"""`penstock bench`: puts load on a server, and reports latencies and throughput."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Annotated

import msgspec
import typer
import uvloop
from rich.console import Console

from penstock.bench.answers import MAX_MESSAGE_CHARS, JsonAnswer
from penstock.bench.conversations import Rate, Shape, arrivals, synthetic
from penstock.bench.display import progress, report_table
from penstock.bench.driver import Driver, Limits, Payload
from penstock.bench.http_client import HttpClient, RequestFailed
from penstock.bench.measurements import BenchReport, Measurements, Slo
from penstock.bench.text import filler
from penstock.bench.traces import TraceRow, read_trace, replay
from penstock.errors import ConfigError

CALIBRATION_WORDS = (64, 320)
PREPARE_TIMEOUT_S = 60.0
"""Timeout of the requests before a run. The first may have to wait until a worker has loaded its model."""

_TRANSIENT = (408, 425, 429)
"""Statuses of a server that may accept the same request later."""


class BenchOptions(msgspec.Struct, frozen=True):
    """The checked options of a run."""

    url: str
    model: str | None
    api_key: str | None
    limits: Limits
    shape: Shape
    slo: Slo
    seed: int
    concurrency: int
    rate: Rate | None
    trace: Path | None
    speedup: float
    temperature: float
    ignore_eos: bool

    @property
    def needs_lengths(self) -> bool:
        """Whether prompts must have a given number of tokens."""
        return self.trace is not None or bool(self.shape.prompt_tokens or self.shape.shared_prefix_tokens)


def bench(
    url: Annotated[
        str,
        typer.Option(
            show_default=False, help="Server with OpenAI's API, or unix:/PATH. [the running graph's]"
        ),
    ] = "",
    model: Annotated[str | None, typer.Option(help="Served model; default: the server's first.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Closed loop: users at once.")] = 16,
    rate: Annotated[str | None, typer.Option(help="Open loop: conversations begun, e.g. 10/s.")] = None,
    arrival: Annotated[str, typer.Option(help="With --rate: poisson or constant.")] = "poisson",
    duration: Annotated[float | None, typer.Option(min=0.1, help="Seconds to send for.")] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Requests to send.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Synthetic prompts this long.")] = None,
    output_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    shared_prefix_tokens: Annotated[int, typer.Option(min=0, help="System prompt of all.")] = 0,
    multi_turn: Annotated[int, typer.Option(min=1, help="Turns in a conversation.")] = 1,
    trace: Annotated[Path | None, typer.Option(help="Mooncake .jsonl[.gz] or Azure .csv[.gz].")] = None,
    speedup: Annotated[float, typer.Option(min=0.001, help="Replay a trace this much faster.")] = 1.0,
    slo_ttft_ms: Annotated[float | None, typer.Option(help="Goodput: time to first token.")] = None,
    slo_itl_ms: Annotated[float | None, typer.Option(help="Goodput: mean time per token.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    ignore_eos: Annotated[
        bool | None, typer.Option(help="Answers of full length; default: when lengths are given.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one request.")] = 600.0,
    seed: Annotated[int, typer.Option(help="Same seed, same load.")] = 0,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", show_default=False)] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report here, too.")] = None,
) -> None:
    """Put load on a server and report latencies, throughput, goodput and cache hits."""
    if trace is not None and rate is not None:
        raise ConfigError("rate: a trace has its own arrival times; use --speedup")
    if arrival not in ("poisson", "constant"):
        raise ConfigError(f"arrival: `{arrival}` is neither poisson nor constant")
    if duration is None and requests is None and trace is None:
        duration = 30.0
    given_lengths = trace is not None or prompt_tokens is not None
    options = BenchOptions(
        url=url,
        model=model,
        api_key=api_key,
        limits=Limits(duration_s=duration, requests=requests, request_timeout_s=timeout),
        shape=Shape(
            turns=multi_turn,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            shared_prefix_tokens=shared_prefix_tokens,
        ),
        slo=Slo(slo_ttft_ms, slo_itl_ms),
        seed=seed,
        concurrency=concurrency,
        rate=Rate.parse(rate, poisson=arrival == "poisson") if rate is not None else None,
        trace=trace,
        speedup=speedup,
        temperature=temperature,
        ignore_eos=given_lengths if ignore_eos is None else ignore_eos,
    )
    console = Console()
    report = run(options, console)
    console.print(report_table(report))
    for warning in report.warnings:
        console.print(f"[yellow]warning:[/] {warning}")
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    if not report.ok:
        raise typer.Exit(1)


def run(options: BenchOptions, console: Console) -> BenchReport:
    """Run a benchmark. When it is interrupted, report what was measured so far.

    Raises ConfigError if the server or the trace cannot be used."""
    rows = read_trace(options.trace, speedup=options.speedup, seed=options.seed) if options.trace else []
    client = HttpClient(options.url, _headers(options))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            payload, words_per_token = runner.run(_prepare(options, client))
            driver = Driver(client, payload, options.limits, Measurements(options.slo))
            try:
                runner.run(_drive(options, driver, rows, words_per_token, console))
            except KeyboardInterrupt:
                console.print("interrupted")
            return driver.report()
        finally:
            runner.run(client.close())


def _headers(options: BenchOptions) -> dict[str, str]:
    return {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}


async def _prepare(options: BenchOptions, client: HttpClient) -> tuple[Payload, float]:
    """The fields of every request, and the number of filler words per token."""
    try:
        async with asyncio.timeout(PREPARE_TIMEOUT_S):
            model = options.model or await first_model(client)
            payload = Payload(model, options.temperature, options.ignore_eos)
            await check_accepted(client, payload)
            words_per_token = await calibrate(client, model) if options.needs_lengths else 1.0
    except TimeoutError:
        raise ConfigError(f"url: no answer from {options.url} within {PREPARE_TIMEOUT_S:g} s") from None
    except RequestFailed as error:
        raise ConfigError(f"url: {options.url}: {error}") from error
    return payload, words_per_token


async def _drive(
    options: BenchOptions, driver: Driver, rows: list[TraceRow], words_per_token: float, console: Console
) -> None:
    shape = msgspec.structs.replace(options.shape, words_per_token=words_per_token)
    conversations = synthetic(shape, options.seed)
    async with progress(driver, options.limits, len(rows), console):
        if rows:
            await driver.open(replay(rows, words_per_token=words_per_token, seed=options.seed))
        elif options.rate is not None:
            await driver.open(arrivals(conversations, options.rate, options.seed))
        else:
            await driver.closed(conversations, options.concurrency)


async def first_model(client: HttpClient) -> str:
    """The name of the first model that the server lists."""
    answer = JsonAnswer()
    await client.request("GET", "/v1/models", b"", answer)
    try:
        return str(answer.decode()["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise ConfigError(f"model: /v1/models names none (status {answer.status}); use --model") from None


async def check_accepted(client: HttpClient, payload: Payload) -> None:
    """Ask one short request such as the run will have. Raises ConfigError, naming the field at fault, where
    the server refuses it: it would refuse each of them. A server that is busy or broken may recover."""
    answer = JsonAnswer()
    body = payload.encode([{"role": "user", "content": "Hi"}], 1, stream=False)
    await client.request("POST", "/v1/chat/completions", body, answer)
    if not 400 <= answer.status < 500 or answer.status in _TRANSIENT:
        return
    field = "api-key" if answer.status in (401, 403) else "url"
    message = ""
    with contextlib.suppress(KeyError, TypeError):
        error = answer.decode()["error"]
        message = str(error["message"])[:MAX_MESSAGE_CHARS]
        field = error["param"] or field
    raise ConfigError(f"{field}: the server refuses such requests (status {answer.status}): {message}")


async def calibrate(client: HttpClient, model: str) -> float:
    """Measure the number of filler words per token of the server's tokenizer. It is the difference between
    two prompts of different length, so that the tokens of the chat template cancel out."""
    tokens = []
    for words in CALIBRATION_WORDS:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": filler("calibration", words)}],
            "max_tokens": 1,
        }
        answer = JsonAnswer()
        await client.request("POST", "/v1/chat/completions", msgspec.json.encode(body), answer)
        try:
            tokens.append(int(answer.decode()["usage"]["prompt_tokens"]))
        except (KeyError, TypeError, ValueError):
            raise ConfigError(
                "prompt-tokens: cannot measure the tokenizer: /v1/chat/completions answered "
                f"{answer.status} without usage.prompt_tokens"
            ) from None
    return (CALIBRATION_WORDS[1] - CALIBRATION_WORDS[0]) / max(1, tokens[1] - tokens[0])
