from __future__ import annotations

import pytest

from penstock.errors import ConfigError
from penstock.link.address import join_address, split_address


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("h:1", "h", 1), ("127.0.0.1:65535", "127.0.0.1", 65535), ("[::1]:9000", "::1", 9000)],
)
def test_both_ways(address: str, host: str, port: int) -> None:
    assert split_address(address) == (host, port)
    assert join_address(host, port) == address


@pytest.mark.parametrize(
    "address", ["", "h", ":1", "h:", "h:x", "h:-1", "h:65536", "::1:80", "[]:1", "h:²"]
)
def test_not_an_address(address: str) -> None:
    with pytest.raises(ConfigError, match="address"):
        split_address(address)
