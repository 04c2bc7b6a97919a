"""The link secret: what is accepted, from where, and how it is replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from penstock.clock import VirtualClock
from penstock.errors import ConfigError
from penstock.link.secret import MAX_FILE_BYTES, LinkSecret
from penstock.net.renewed import RECHECK_S

OLD, NEW = "old secret of 16+", "new secret of 16+"


def test_without_a_secret_none_is_asked_for() -> None:
    assert LinkSecret().accepted() == ()


def test_each_line_is_a_secret_and_empty_ones_are_none() -> None:
    assert LinkSecret(f"\n {OLD} \n\n{NEW}\n").accepted() == (OLD, NEW)


@pytest.mark.parametrize("text", ["", " ", "\n", "short", f"{OLD}\nshort", f"{OLD}\n" * 9])
def test_secrets_that_are_missing_short_or_too_many_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"^link secret: ") as raised:
        LinkSecret(text)
    assert OLD not in str(raised.value)
    with pytest.raises(ConfigError, match=rf"^link secret {path}: ") as raised:
        LinkSecret(path=str(path))
    assert OLD not in str(raised.value)


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 20, b"x" * (MAX_FILE_BYTES + 1)])
def test_a_file_that_cannot_be_used(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=str(path)):
        LinkSecret(path=str(path))


async def test_a_file_is_read_again(tmp_path: Path) -> None:
    path, clock = tmp_path / "secret", VirtualClock()
    path.write_text(OLD)
    secret = LinkSecret(path=str(path), clock=clock)
    path.write_text(f"{OLD}\n{NEW}")
    await clock.advance(RECHECK_S)
    assert secret.accepted() == (OLD, NEW)
    path.write_text("")  # never open
    await clock.advance(RECHECK_S)
    assert secret.accepted() == (OLD, NEW)


async def test_it_is_replaced_under_running_links(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """The four states of the procedure, changed on one side before the other: nobody is ever refused, and
    in the end the old secret opens nothing."""
    monkeypatch.setattr("penstock.net.renewed.RECHECK_S", 0.0)
    of_worker, of_frontend = tmp_path / "worker", tmp_path / "frontend"
    states = [OLD, f"{OLD}\n{NEW}", f"{NEW}\n{OLD}", NEW]
    for path in (of_worker, of_frontend):
        path.write_text(OLD)
    frontend_secret = LinkSecret(path=str(of_frontend))
    longest = bench.listener()
    async with (
        bench.server(bench.worker(), secret=LinkSecret(path=str(of_worker))) as server,
        bench.client(server.address, longest, "f0", secret=frontend_secret) as client,
    ):
        await bench.until(lambda: client.up)

        async def connects(frontend_id: str) -> None:
            listener = bench.listener()
            async with bench.client(server.address, listener, frontend_id, secret=frontend_secret) as new:
                await bench.until(lambda: new.up)

        for number, state in enumerate(states[1:]):
            first, last = (of_worker, of_frontend) if number % 2 else (of_frontend, of_worker)
            first.write_text(state)
            await connects(f"first{number}")
            last.write_text(state)
            await connects(f"last{number}")
        assert "refused" not in caplog.text
        assert client.up
        assert longest.downs == []
        late = bench.listener()
        async with bench.client(server.address, late, "late", secret=LinkSecret(OLD)):
            await bench.until(lambda: "the link secrets of frontend and worker differ" in caplog.text)
        assert late.calls == []
