from __future__ import annotations

import hashlib

import pytest

from penstock.link.download import Download
from penstock.wire.messages import Asset

CONTENT = b"0123456789"
NAME = hashlib.sha256(CONTENT).hexdigest()


@pytest.mark.parametrize("part", [1, 3, 10])
async def test_parts_of_a_file_are_joined_to_the_whole(part: int) -> None:
    download = Download(NAME, len(CONTENT))
    for start in range(0, len(CONTENT), part):
        assert not download.done.done()
        end = start + part
        download.add(Asset(sha256=NAME, data=CONTENT[start:end], last=end >= len(CONTENT)))
    assert await download.done == CONTENT


async def test_too_long_keeps_nothing_beyond_the_limit() -> None:
    download = Download(NAME, 9)
    download.add(Asset(sha256=NAME, data=CONTENT))
    assert len(download._content) <= 9
    download.add(Asset(sha256=NAME, last=True))
    assert await download.done == "it has 10 bytes, where 9 may be"


async def test_wrong_content_and_missing() -> None:
    wrong, missing = Download(NAME, 100), Download(NAME, 100)
    wrong.add(Asset(sha256=NAME, data=b"other", last=True))
    missing.add(Asset(sha256=NAME, last=True, missing=True))
    assert await wrong.done == "its content has another hash"
    assert await missing.done == "the worker does not have it"


async def test_failing_twice_keeps_the_first_reason() -> None:
    download = Download(NAME, 100)
    download.fail("down")
    download.fail("down again")
    download.add(Asset(sha256=NAME, data=CONTENT, last=True))
    assert await download.done == "down"
