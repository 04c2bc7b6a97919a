from __future__ import annotations

import math

import pytest

from penstock.errors import ConfigError
from penstock.link.secret import LinkSecret
from penstock.link.settings import ClientSettings, ServerSettings


@pytest.mark.parametrize("settings", [ServerSettings, ClientSettings])
def test_the_defaults_are_allowed_and_the_secret_stays_out_of_logs(settings: type) -> None:
    assert "hidden" not in repr(settings(secret=LinkSecret("hidden" * 3)))


@pytest.mark.parametrize("value", [0, -1, math.nan])
@pytest.mark.parametrize("name", ["heartbeat_s", "peer_timeout_s", "max_peers", "handshake_timeout_s"])
def test_server_values_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        ServerSettings(**{name: value})


@pytest.mark.parametrize("value", [0, -1, math.nan])
@pytest.mark.parametrize("name", ["ping_s", "retry_min_s", "asset_timeout_s", "max_pending_assets"])
def test_client_values_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        ClientSettings(**{name: value})


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"heartbeat_s": 6}, "peer_timeout_s"),
        ({"port": 65_536}, "port"),
        ({"port": -1}, "port"),
        ({"max_frame_bytes": 0}, "max_frame_bytes"),
        ({"max_frame_bytes": 2**30}, "max_unsent_bytes"),
    ],
)
def test_server_values_that_do_not_fit_together(values: dict[str, float], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        ServerSettings(**values)


@pytest.mark.parametrize(
    ("values", "name"), [({"silence_s": 0.4}, "silence_s"), ({"retry_max_s": 0.01}, "retry_max_s")]
)
def test_client_values_that_do_not_fit_together(values: dict[str, float], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        ClientSettings(**values)
