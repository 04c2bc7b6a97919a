"""Who is let in, and files of keys."""

import pytest

from penstock.errors import ConfigError, RequestRejected
from penstock.frontend.api_keys import ApiKeys, read_api_keys


def test_without_keys_everybody_is_let_in():
    ApiKeys([]).check(None)
    ApiKeys([]).check(b"Bearer anything")


@pytest.mark.parametrize(
    "header", [b"Bearer one", b"bearer two", b"BEARER  one ", "Bearer schlüssel".encode()]
)
def test_any_of_the_keys_opens(header):
    ApiKeys(["one", "two", "schlüssel"]).check(header)


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (None, "missing_api_key"),
        (b"", "missing_api_key"),
        (b"Bearer", "missing_api_key"),
        (b"Bearer ", "missing_api_key"),
        (b"Basic one", "missing_api_key"),
        (b"Bearer on", "invalid_api_key"),
        (b"Bearer oneone", "invalid_api_key"),
        (b"Bearer \xff", "invalid_api_key"),
    ],
)
def test_nothing_else_does(header, code):
    with pytest.raises(RequestRejected) as raised:
        ApiKeys(["one"]).check(header)
    assert (raised.value.status, raised.value.code) == (401, code)


def test_a_file_has_one_key_per_line(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# the team's\none\n\n  two  \n#three\n")
    assert read_api_keys(path) == {"one", "two"}


@pytest.mark.parametrize("content", [None, b"", b"# none\n\n", b"\xff\xfe"])
def test_a_file_without_keys_refuses_to_start(tmp_path, content):
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=str(path)):
        read_api_keys(path)
