from __future__ import annotations

import pytest

from penstock.errors import ConfigError
from penstock.net.address import is_loopback, join_address, split_address


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


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "worker-1", ""])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)
