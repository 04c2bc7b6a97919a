"""What `penstock explain` prints."""

import pytest

from penstock.cli.explain_tables import print_explanation, print_misses

MISSES = {
    "since": 0.0,
    "requests": 2,
    "prompt_tokens": 96,
    "cached_tokens": 0,
    "cold_tokens": 0,
    "lost_tokens": 64,
    "distrusted": {},
    "worst": [],
}


@pytest.mark.parametrize(("later_ms", "words"), [(2.0, "2 ms later"), (-0.4, "0.4 ms sooner")])
def test_a_holder_whose_first_token_would_have_come_sooner_is_said_to_be_so(capsys, later_ms, words):
    cause = {"cause": "costlier", "worker": "w1", "tokens": 64, "requests": 2, "later_ms": later_ms}
    print_misses({**MISSES, "causes": [cause]})
    assert f"its first token predicted {words}" in " ".join(capsys.readouterr().out.split())


TIMES = ("frontend", "queue", "prefill", "transfer", "first_token", "decode")
NOTHING_KNOWN = dict.fromkeys([*(f"{name}_ms" for name in TIMES), "cached_tokens", "output_tokens"])


def candidate(name: str, **costs_ms: float) -> dict[str, object]:
    """A compared worker that does nothing."""
    load = dict.fromkeys(["cached_tokens", "uncached_tokens", "running", "waiting", "prefill_tokens"], 0)
    total_ms = sum(costs_ms.values())
    plan = {"costs_ms": costs_ms, "total_ms": total_ms, "first_token_ms": total_ms}
    return {"instance_id": name, "prefill": "a-prefill-worker-0", "chosen": name == "w1", **load, **plan}


def test_headings_are_never_cut_and_what_costs_nothing_has_no_column(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    costs = {"queue": 0.0, "prefill": 9.8, "inflicted": 1.0, "transfer": 1.0, "decode": 3.4, "missed": 0.04}
    idle = {**costs, "prefill": 0.0}
    decision = {
        "summary": "w1 was the cheapest",
        "predicted": NOTHING_KNOWN,
        "actual": NOTHING_KNOWN,
        "candidates": [candidate("w1", **costs), candidate("w2", **idle)],
        "prefill_candidates": [],
        "candidates_left_out": 0,
    }
    request = {"request_id": "r", "model": "m", "prompt_tokens": 8, "created": None, "duration_ms": None}
    print_explanation({"requests": [{**request, "decisions": [decision], "error": None}]})
    printed = capsys.readouterr().out
    assert "…" not in printed
    first, second = (line.split() for line in printed.splitlines()[-4:-2])
    assert first == ["TO", "QUEUED", "FIRST", "PREFILL", "INFLICTED", "TRANSFER", "DECODE", "TOTAL"]
    assert second == ["WORKER", "CACHED", "COMPUTE", "REQUESTS", "TOKENS", "TOKEN", *["MS"] * 5]
    assert "> w1 after a-prefill-worker-0" in printed
    assert "  w2 after a-prefill-worker-0" in printed
