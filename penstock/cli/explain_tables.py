"""What `penstock explain` prints, from the answers of /v1/explain."""

from __future__ import annotations

import time
from shutil import get_terminal_size
from typing import Any

from rich.console import Console
from rich.table import Table

from penstock.core.overlap_check import CAUSE_WORDS, Cause

_LEAST_WIDTH = 160  # of a table: a narrower terminal breaks lines, where rich would cut figures off

_TIMES = {
    "frontend_ms": "waiting in the frontend",
    "cached_tokens": "cached tokens",
    "queue_ms": "queue on workers",
    "prefill_ms": "prefill",
    "transfer_ms": "KV transfer",
    "first_token_ms": "first token, once sent",
    "decode_ms": "decode",
    "output_tokens": "output tokens",
}


_CAUSES = {
    "cold": "nobody had computed them, as far as the record reaches back",
    "whole_prompt": "the client asked for log-probabilities of the whole prompt",
    "evicted_meanwhile": "the chosen worker evicted them between the decision and the arrival",
    "evicted": "the worker had computed them, and evicted them before the decision",
    "worker_lost": "the worker that had computed them left or restarted",
    "costlier": "the worker that had them was compared, and another was cheaper",
    "not_asked": "the policy had not shortlisted the worker that had them",
    "avoided": "the request avoided the worker that had them, where an attempt had failed",
    "full": "the worker that had them had just refused an attempt, being full",
    "suspect": "kept apart from the worker that had them, as one of the requests may kill engines",
    "distrusted": "the worker that had computed them tells nothing true of its cache",
    "other_format": "no decode worker reads the KV of the prefill worker that had them",
    "no_prefill": "a prefill worker had them, and none is to be used",
    "not_ready": "the worker that had them took no new requests of this model",
}


def print_explanation(answer: dict[str, Any]) -> None:
    """Each request of the call, with its decisions."""
    console = _console()
    for number, request in enumerate(answer["requests"]):
        console.print("\n" * bool(number) + _heading(request))
        if not request["decisions"]:
            console.print(f"  {request['summary']}")
        for decision in request["decisions"]:
            console.print(f"  {decision['summary']}")
            _print_tables(console, decision)
        if request["error"]:
            console.print(f"  it failed: {request['error']}")


def print_misses(answer: dict[str, Any]) -> None:
    """The totals, the causes with the most tokens, and the requests that lost most."""
    console = _console()
    prompt, cached = answer["prompt_tokens"], answer["cached_tokens"]
    since = time.strftime("%H:%M:%S", time.localtime(answer["since"]))
    requests = "1 request" if answer["requests"] == 1 else f"{answer['requests']:,} requests"
    console.print(
        f"since {since}: {requests} with {prompt:,} prompt tokens: "
        f"{cached:,} were cached, {answer['cold_tokens']:,} new, "
        f"{answer['lost_tokens']:,} computed again that some worker had had"
    )
    for instance_id, cause in answer["distrusted"].items():
        words = CAUSE_WORDS[Cause(cause)] if cause in list(Cause) else cause
        console.print(f"{instance_id} is distrusted: {words}; what was sent to it counts instead")
    if answer["causes"]:
        table = _table("TOKENS", "REQUESTS", "WORKER")
        table.add_column("WHY THEY WERE COMPUTED", no_wrap=True)
        for it in answer["causes"]:
            why = _CAUSES.get(it["cause"], it["cause"])
            if (later_ms := it["later_ms"]) is not None:
                when = "sooner, and the rest later" if later_ms < 0 else "later"
                why += f" (its first token predicted {_amount(abs(later_ms))} ms {when}, on average)"
            table.add_row(_amount(it["tokens"]), _amount(it["requests"]), it["worker"] or "-", why)
        console.print(table)
    if answer["worst"]:
        console.print("the requests that lost most:")
    for it in answer["worst"]:
        causes = ", ".join(f"{tokens:,} {cause}" for cause, tokens in it["causes"].items())
        lost = f"{it['lost_tokens']:,} of {it['prompt_tokens']:,} tokens ({causes})"
        console.print(f"  {it['request_id']}: {lost}: {it['summary']}")


def _console() -> Console:
    width = max(_LEAST_WIDTH, get_terminal_size().columns)
    return Console(highlight=False, markup=False, width=width, soft_wrap=True)


def _heading(request: dict[str, Any]) -> str:
    words = [f"{request['request_id']}: {request['model']}, {request['prompt_tokens']:,} prompt tokens"]
    if request["created"] is not None:
        words.append(time.strftime("%H:%M:%S", time.localtime(request["created"])))
        words.append(str(request["outcome"]))
    if request["duration_ms"] is not None:
        words.append(f"{request['output_tokens']:,} output tokens in {_amount(request['duration_ms'])} ms")
    return ", ".join(words)


def _print_tables(console: Console, decision: dict[str, Any]) -> None:
    times = _table("", "PREDICTED", "ACTUAL")
    for name, title in _TIMES.items():
        predicted, actual = decision["predicted"][name], decision["actual"][name]
        if predicted is not None or actual is not None:
            unit = " ms" if name.endswith("_ms") else ""
            times.add_row(f"  {title}", _amount(predicted, unit), _amount(actual, unit))
    console.print(times)
    _print_candidates(console, "worker", decision["candidates"])
    _print_candidates(console, "prefill worker", decision["prefill_candidates"])
    if decision["candidates_left_out"]:
        console.print(f"  and {decision['candidates_left_out']} workers more")


def _print_candidates(console: Console, title: str, candidates: list[dict[str, Any]]) -> None:
    if not candidates:
        return
    costs = [
        name
        for name in candidates[0].get("costs_ms", {})
        if any(it["costs_ms"][name] >= 0.05 for it in candidates)  # not what costs nothing anywhere
    ]
    columns = ["CACHED", "TO COMPUTE", "REQUESTS", "QUEUED TOKENS", "FIRST TOKEN"]
    named = [f"{name.upper().replace('_', ' ')} MS" for name in costs]
    total = ["TOTAL MS"] if "total_ms" in candidates[0] else []
    table = _table(f"  {title.upper()}", *columns, *named, *total)
    for it in candidates:
        name = f"{'>' if it['chosen'] else ' '} {it['instance_id']}"
        if it.get("prefill"):
            name += f" after {it['prefill']}"
        if it.get("distrusted"):
            name += f" ({it['distrusted']})"
        figures = [it["cached_tokens"], it["uncached_tokens"], it["running"] + it["waiting"]]
        table.add_row(
            name,
            *map(_amount, (*figures, it["prefill_tokens"])),
            _amount(it["first_token_ms"], " ms"),
            *(_amount(it["costs_ms"][cost]) for cost in costs),
            *([_amount(it["total_ms"])] if "total_ms" in it else []),
        )
    console.print(table)


def _table(first: str, *titles: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first, no_wrap=True)
    for title in titles:
        table.add_column(title.replace(" ", "\n"), justify="right", no_wrap=True)
    return table


def _amount(value: float | None, unit: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}{unit}" if value >= 100 or value == int(value) else f"{value:,.1f}{unit}"
