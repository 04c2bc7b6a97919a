"""What can be tested of `transfer/nixl.py` without NIXL; `checks/nixl.py` has the rest."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest

from penstock.errors import ConfigError, RemoteError
from penstock.shapes import Incarnation
from penstock.transfer.nixl import NixlTransfer, NixlTransferSettings
from penstock.transfer.nixl_staging import Staging
from penstock.transfer.stream import DeadlinePassed


def test_without_nixl_it_refuses_to_start_and_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl._bindings", None)
    monkeypatch.setitem(sys.modules, "nixl", None)
    transfer = NixlTransfer(Incarnation("holder", 1))
    with pytest.raises(ConfigError, match="pip install --no-deps nixl"):
        transfer.start(np.zeros((4, 64), np.uint8).data, lambda handoff_id: None)
    transfer.stop()


@pytest.mark.parametrize(
    "wrong",
    [
        {"progress_interval_s": 0.0},
        {"staging_bytes": 0},
        {"max_pulls": 4, "staging_buffers": 3},
        {"max_pulls": 4, "max_peers": 3},
    ],
    ids=str,
)
def test_wrong_settings_refuse_to_start(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=list(wrong)[-1]):
        NixlTransferSettings(**wrong)


def test_a_staging_buffer_has_at_least_one_row() -> None:
    assert Staging(2, 4096, 1024).memory.shape == (2, 4, 1024)
    assert Staging(2, 4096, 5000).memory.shape == (2, 1, 5000)


def test_no_two_pulls_have_the_same_buffer() -> None:
    staging = Staging(3, 64, 64)
    soon = time.monotonic() + 0.05
    taken = {staging.take(soon) for _ in range(3)}
    assert taken == {0, 1, 2}
    with pytest.raises(DeadlinePassed, match="0 wait"):
        staging.take(soon)
    staging.give_back(1)
    assert staging.take(soon) == 1


def test_a_stranded_buffer_comes_back_when_its_read_has_ended_or_failed() -> None:
    staging = Staging(2, 64, 64)
    over = {0: False}

    def ends() -> bool:
        return over[0]

    def fails() -> bool:
        raise RemoteError("the holder is gone")

    first, second = staging.take(0.0), staging.take(0.0)
    staging.strand(first, ends)
    assert staging.stranded() == 1
    with pytest.raises(DeadlinePassed, match="1 wait"):
        staging.take(time.monotonic() + 0.1)
    staging.strand(second, fails)
    assert staging.take(0.0) == second
    over[0] = True
    assert staging.stranded() == 0
    assert staging.take(0.0) == first
