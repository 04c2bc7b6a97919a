"""What `penstock explain --misses` prints."""

import pytest

from penstock.cli.explain_tables import print_misses

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
