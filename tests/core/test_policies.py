"""What each policy makes of small pools."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from penstock.core.costs import Candidate, Query
from penstock.core.policies import ENTRY_POINTS, POLICIES, policy_named
from penstock.errors import ConfigError
from penstock.shapes import Load, Rates, Role

EXAMPLE = Path(__file__).parents[2] / "examples" / "policy"
RATES = Rates(step_ms=10.0, prefill_token_ms=0.05, decode_request_ms=0.05)


def worker(
    name: str,
    *,
    cached: int = 0,
    queued: int = 0,
    running: int = 0,
    context: int = 0,
    role: Role = Role.AGGREGATED,
) -> Candidate:
    load = Load(
        running=running, prefill_tokens=queued, context_tokens=context, total_blocks=10_000, rates=RATES
    )
    return Candidate(name, role, load, block_size=100, overlap_blocks=cached // 100)


def shortlisted(policy: str, *pool: Candidate, tokens: int = 10_000, **query: object) -> str:
    """The names, in one word."""
    return "".join(it.instance_id for it in POLICIES[policy](Query(tokens, **query), pool, Random(0)))  # type: ignore[arg-type]


def test_least_prefill_counts_the_queue_and_what_is_not_cached() -> None:
    pool = worker("a", queued=4_000), worker("b", cached=9_000, queued=12_000), worker("c", cached=5_000)
    assert shortlisted("least-prefill", *pool) == "c"
    assert shortlisted("least-prefill", worker("a", running=3), worker("b", running=2)) == "b"


def test_lmetric_multiplies_prompt_tokens_by_requests() -> None:
    """10,000 tokens for one, or 4,000 for four more: 10,000 against 20,000."""
    assert shortlisted("lmetric", worker("a"), worker("b", cached=6_000, running=4)) == "a"
    assert shortlisted("lmetric", worker("a"), worker("b", cached=9_000, running=4)) == "b"


def test_dynamo_counts_blocks_in_use_like_blocks_to_compute() -> None:
    pool = worker("a"), worker("b", cached=5_000, context=6_000)
    assert shortlisted("dynamo", *pool) == "a"
    assert shortlisted("dynamo-tuned", *pool) == "b"


def test_predicted_ttft_ignores_what_others_lose() -> None:
    assert shortlisted("predicted-ttft", worker("a", queued=2_000), worker("b", running=50)) == "b"
    assert shortlisted("predicted-ttft", worker("a"), worker("b", running=50)) == "a"


def test_inflicted_delay_counts_it() -> None:
    pool = worker("a", queued=2_000), worker("b", running=20)
    assert shortlisted("predicted-ttft", *pool) == "b"
    assert shortlisted("inflicted-delay", *pool) == "a"


def test_sticky_leaves_the_warm_worker_only_when_it_is_saturated() -> None:
    cold = worker("c")
    assert shortlisted("sticky", worker("w", cached=9_000, queued=100_000), cold) == "w"
    assert shortlisted("sticky", worker("w", cached=9_000, queued=500_000), cold) == "c"
    assert shortlisted("sticky", worker("w", cached=7_000, queued=8_000), cold) == "c", "below four fifths"


def test_a_session_stays_on_its_worker() -> None:
    pool = [worker(name, running=number) for number, name in enumerate("abcdefgh")]
    homes = {
        session: shortlisted("session-affinity", *pool, session=session) for session in map(str, range(200))
    }
    assert set(homes.values()) == set("abcdefgh")
    for gone in pool:
        left = [it for it in pool if it is not gone]
        for session, home in homes.items():
            if home != gone.instance_id:
                assert shortlisted("session-affinity", *left, session=session) == home
    assert shortlisted("session-affinity", *pool) == "a", "one without a session: fewest requests"


@pytest.mark.parametrize(
    "policy", ["least-prefill", "lmetric", "dynamo", "predicted-ttft", "inflicted-delay", "sticky"]
)
def test_where_nothing_of_the_prompt_is_computed_requests_count(policy: str) -> None:
    pool = (
        worker("a", role=Role.DECODE, running=3, cached=9_000),
        worker("b", role=Role.DECODE, running=2, queued=50_000),
    )
    assert shortlisted(policy, *pool, computed_elsewhere=True) == "b"
    assert shortlisted(policy, *pool) == "a", "decode workers that compute prompts themselves"


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_says_what_it_does_and_returns_some_of_the_pool(policy: str) -> None:
    assert POLICIES[policy].__doc__
    pool = [worker(name, cached=number * 1_000, running=number) for number, name in enumerate("abcd")]
    shortlist = POLICIES[policy](Query(10_000, session="s"), pool, Random(1))
    assert shortlist
    assert all(it in pool for it in shortlist)


@pytest.fixture
def installed_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example, as pip would install it."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    (group, points), *_ = project["entry-points"].items()
    info = tmp_path / "penstock_policy_warmest-1.0.dist-info"
    info.mkdir()
    lines = [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLE)
    assert group == ENTRY_POINTS
    policy_named.cache_clear()
    yield
    policy_named.cache_clear()


@pytest.mark.usefixtures("installed_example")
def test_a_users_own_policy_is_found_by_its_entry_point() -> None:
    warmest = policy_named("warmest")
    pool = worker("a", cached=9_900, running=40), worker("b", cached=500), worker("c")
    assert [it.instance_id for it in warmest(Query(10_000), pool, Random(0))] == ["b"]


def test_an_unknown_policy_is_named_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"unknown policy 'warmest'; there are: kv, .*sticky"):
        policy_named("warmest")
