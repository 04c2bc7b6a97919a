"""Who is let in and as whom, files of hashed keys, and their renewal."""

import os

import pytest

from penstock.clock import VirtualClock
from penstock.errors import ConfigError, Rejection, RequestRejected
from penstock.frontend.http.api_keys import (
    MAX_FILE_BYTES,
    UNNAMED,
    ApiKeys,
    key_line,
    new_key,
    read_api_keys,
)
from penstock.net.renewed import RECHECK_S

ONE, TWO = "one-key-of-20-letters", "two-key-of-20-letters"


def bearer(key):
    return f"Bearer {key}".encode()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys"


def write(path, *lines):
    """Replace the file, as a deployment would: at once, by another one."""
    new = path.with_name("new")
    new.write_text("".join(f"{line}\n" for line in lines))
    os.replace(new, path)


def test_without_keys_everybody_is_let_in():
    assert ApiKeys().check(None) == ""
    assert ApiKeys().check(b"Bearer anything") == ""


@pytest.mark.parametrize("authorization", [None, b"", b"Bearer ", b"Basic one"])
def test_a_key_where_anthropics_clients_send_it_is_as_good(authorization):
    keys = ApiKeys("one")
    assert keys.check(authorization, b" one ") == UNNAMED
    with pytest.raises(RequestRejected) as raised:
        keys.check(authorization, b"two")
    assert raised.value.code == "invalid_api_key"


def test_of_two_keys_the_one_of_authorization_counts():
    assert ApiKeys("one").check(b"Bearer one", b"two") == UNNAMED
    with pytest.raises(RequestRejected, match="not valid"):
        ApiKeys("one").check(b"Bearer two", b"one")


@pytest.mark.parametrize("header", [b"Bearer one", b"bearer one", b"BEARER  one "])
def test_the_key_of_the_settings(header):
    assert ApiKeys("one").check(header) == UNNAMED


def test_a_key_of_any_characters():
    assert ApiKeys("schlüssel").check(bearer("schlüssel")) == UNNAMED


def test_keys_of_a_file_have_names(path):
    write(path, "# ours", "", key_line("a", ONE), "  " + key_line("b.2", TWO) + "  ")
    keys = ApiKeys("three", str(path))
    assert keys.check(bearer(ONE)) == "a"
    assert keys.check(bearer(TWO)) == "b.2"
    assert keys.check(bearer("three")) == UNNAMED


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (None, "missing_api_key"),
        (b"", "missing_api_key"),
        (b"Bearer", "missing_api_key"),
        (b"Bearer ", "missing_api_key"),
        (b"Basic " + ONE.encode(), "missing_api_key"),
        (bearer(ONE[:-1]), "invalid_api_key"),
        (bearer(ONE + ONE), "invalid_api_key"),
        (b"Bearer \xff", "invalid_api_key"),
    ],
)
def test_nothing_else_opens(path, header, code):
    write(path, key_line("a", ONE))
    with pytest.raises(RequestRejected) as raised:
        ApiKeys("", str(path)).check(header)
    assert (raised.value.kind, raised.value.code) == (Rejection.UNAUTHENTICATED, code)


def test_what_stands_in_the_file_opens_nothing(path):
    write(path, key_line("a", ONE))
    digest = path.read_text().split(":")[1].strip()
    for stolen in (digest, f"sha256:{digest}", bytes.fromhex(digest).hex().upper()):
        with pytest.raises(RequestRejected):
            ApiKeys("", str(path)).check(bearer(stolen))


@pytest.mark.parametrize("content", [None, b"", b"# none\n\n", b"\xff\xfe", b"#" * (MAX_FILE_BYTES + 1)])
def test_a_file_without_keys_refuses_to_start(path, content):
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=str(path)):
        ApiKeys("", str(path))


@pytest.mark.parametrize(
    "line",
    [
        "sk-a-key-in-the-clear",
        "a sk-a-key-in-the-clear",
        "a:sk-a-key-in-the-clear",
        "a sha256:sk-a-key-in-the-clear",
        "a sha256:" + "0" * 63 + "g",
        "a sha256:" + "0" * 64 + " more",
        "ä sha256:" + "0" * 64,
        "sha256:" + "0" * 64,
    ],
)
def test_a_line_that_is_none_is_refused_without_being_shown(path, line):
    write(path, key_line("a", ONE), line)
    with pytest.raises(ConfigError, match=r"line 2: .*`penstock key NAME --hash`") as raised:
        read_api_keys(path)
    assert "sk-" not in str(raised.value)


def test_one_key_has_one_name(path):
    write(path, key_line("a", ONE), key_line("a", TWO), key_line("a", ONE))
    assert set(read_api_keys(path).values()) == {"a"}
    write(path, key_line("a", ONE), key_line("b", ONE))
    with pytest.raises(ConfigError, match=r"line 2: the same key as a has$"):
        read_api_keys(path)


def test_new_keys_are_unique_and_accepted_in_a_file_of_keys():
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(len(key) == 46 and key_line("a", key) for key in keys)


@pytest.mark.parametrize("name", ["", "-a", "a b", "a\n", "ä", "a" * 65])
def test_bad_names(name):
    with pytest.raises(ConfigError, match=r"^name: "):
        key_line(name, ONE)


@pytest.mark.parametrize("key", ["", "x" * 19, "x" * 19 + " x", "ü" * 20, "x" * 20 + "\n"])
def test_bad_keys(key):
    with pytest.raises(ConfigError, match=r"^key: ") as raised:
        key_line("a", key)
    assert not key or key not in str(raised.value)


async def test_a_changed_file_counts_without_a_restart(path, caplog):
    clock = VirtualClock()
    write(path, key_line("a", ONE))
    keys = ApiKeys("fixed", str(path), clock)

    write(path, key_line("a", TWO))
    await clock.advance(RECHECK_S)
    assert keys.check(bearer(TWO)) == "a"
    with pytest.raises(RequestRejected):
        keys.check(bearer(ONE))
    assert keys.check(bearer("fixed")) == UNNAMED

    write(path, ONE)  # a mistake
    await clock.advance(RECHECK_S)
    assert keys.check(bearer(TWO)) == "a"
    assert "the value read before stays in use" in caplog.text
    assert ONE not in caplog.text

    write(path, key_line("a", ONE), key_line("a", TWO))  # as while a key is being replaced
    await clock.advance(RECHECK_S)
    assert keys.check(bearer(ONE)) == keys.check(bearer(TWO)) == "a"
