"""The Secrets of a graph's links: made, kept, renewed before they expire, made again when lost."""

from __future__ import annotations

import base64
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from penstock.kubernetes.api import Object, name_of
from penstock.operator.certificates import AUTHORITY_DAYS, CERTIFICATE_DAYS, is_signed_by
from penstock.operator.links import link_secrets, next_due_at
from penstock.operator.names import LINK_SERVER_NAME

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
NAMES = ("g-link-ca", "g-link-worker", "g-link-frontend")


def by_name(objects: list[Object]) -> dict[str, Object]:
    return {name_of(item): item for item in objects}


def after(current: dict[str, Object], **passed: float) -> dict[str, Object]:
    return by_name(link_secrets("g", current, NOW + timedelta(**passed)))


def value(secrets: dict[str, Object], name: str, key: str) -> bytes:
    return base64.b64decode(secrets[name]["data"][key])


@pytest.fixture
def fresh() -> dict[str, Object]:
    return by_name(link_secrets("g", {}, NOW))


def test_all_share_a_secret_and_the_authority_key_is_mounted_nowhere(fresh: dict[str, Object]) -> None:
    assert tuple(fresh) == NAMES
    assert len({value(fresh, name, "secret") for name in NAMES}) == 1
    assert len(value(fresh, "g-link-worker", "secret")) >= 32
    for name in NAMES[1:]:
        assert set(fresh[name]["data"]) == {"secret", "tls.crt", "tls.key", "ca.crt"}


def test_nothing_changes_while_nothing_is_due(fresh: dict[str, Object]) -> None:
    assert after(fresh) == after(fresh, days=CERTIFICATE_DAYS * 0.6) == fresh


def test_the_next_renewal_is_when_something_changes(fresh: dict[str, Object]) -> None:
    due = next_due_at(list(fresh.values()))
    assert by_name(link_secrets("g", fresh, due - timedelta(minutes=1))) == fresh
    assert by_name(link_secrets("g", fresh, due)) != fresh


def test_certificates_are_renewed_and_the_secret_and_the_authority_stay(fresh: dict[str, Object]) -> None:
    renewed = after(fresh, days=CERTIFICATE_DAYS * 0.7)
    assert renewed["g-link-ca"] == fresh["g-link-ca"]
    for name in NAMES[1:]:
        assert value(renewed, name, "tls.crt") != value(fresh, name, "tls.crt")
        assert value(renewed, name, "ca.crt") == value(fresh, name, "ca.crt")
        assert value(renewed, name, "secret") == value(fresh, name, "secret")


def test_an_authority_is_trusted_for_a_day_before_it_signs(fresh: dict[str, Object]) -> None:
    due_days = AUTHORITY_DAYS * 0.67
    announced = after(fresh, days=due_days)
    assert value(announced, "g-link-ca", "ca.crt") == value(fresh, "g-link-ca", "ca.crt")
    successor = value(announced, "g-link-ca", "next.crt")
    for name in NAMES[1:]:
        assert successor in value(announced, name, "ca.crt")
        assert not is_signed_by(value(announced, name, "tls.crt"), successor)
    promoted = after(announced, days=due_days + 1.1)
    assert value(promoted, "g-link-ca", "ca.crt") == successor
    later = after(promoted, days=due_days + CERTIFICATE_DAYS)
    assert is_signed_by(value(later, "g-link-worker", "tls.crt"), successor)
    assert value(fresh, "g-link-ca", "ca.crt") in value(later, "g-link-worker", "ca.crt")


@pytest.mark.parametrize("lost", NAMES)
def test_a_deleted_secret_is_made_again_so_that_running_processes_go_on(
    fresh: dict[str, Object], lost: str
) -> None:
    left = {name: item for name, item in fresh.items() if name != lost}
    mended = after(left)
    old_authority = value(fresh, "g-link-ca", "ca.crt")
    for name in NAMES[1:]:
        assert value(mended, name, "secret") == value(fresh, name, "secret")
        assert old_authority in value(mended, name, "ca.crt")
        if name != lost:
            assert value(mended, name, "tls.crt") == value(fresh, name, "tls.crt")
    assert after(mended) == mended


def test_while_a_successor_is_announced_its_day_is_the_next_date(fresh: dict[str, Object]) -> None:
    """And not the one on which its predecessor became due: that is past."""
    due_days = AUTHORITY_DAYS * 0.67
    announced = list(after(fresh, days=due_days).values())
    assert next_due_at(announced) > NOW + timedelta(days=due_days + 0.9)


def test_garbage_is_replaced(fresh: dict[str, Object]) -> None:
    fresh["g-link-worker"]["data"]["tls.crt"] = base64.b64encode(b"not a certificate").decode()
    fresh["g-link-frontend"]["data"]["tls.crt"] = "%%%"
    mended = after(fresh)
    authority = value(mended, "g-link-ca", "ca.crt")
    assert all(is_signed_by(value(mended, name, "tls.crt"), authority) for name in NAMES[1:])


def test_a_worker_and_a_frontend_accept_each_other_and_nobody_else(
    fresh: dict[str, Object], tmp_path: Path
) -> None:
    others = by_name(link_secrets("other", {}, datetime.now(UTC)))
    ours = by_name(link_secrets("g", {}, datetime.now(UTC)))

    def context(secrets: dict[str, Object], name: str, side: ssl._SSLMethod) -> ssl.SSLContext:
        for key in ("tls.crt", "tls.key", "ca.crt"):
            (tmp_path / key).write_bytes(value(secrets, name, key))
        made = ssl.SSLContext(side)
        made.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
        made.load_verify_locations(tmp_path / "ca.crt")
        made.verify_mode = ssl.CERT_REQUIRED
        made.verify_flags |= ssl.VERIFY_X509_STRICT
        return made

    def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        worker = server.wrap_bio(to_server, to_client, server_side=True)
        frontend = client.wrap_bio(to_client, to_server, server_hostname=LINK_SERVER_NAME)
        for _ in range(4):
            for side in (frontend, worker):
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    continue

    worker = context(ours, "g-link-worker", ssl.PROTOCOL_TLS_SERVER)
    shake_hands(worker, context(ours, "g-link-frontend", ssl.PROTOCOL_TLS_CLIENT))
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(worker, context(others, "other-link-frontend", ssl.PROTOCOL_TLS_CLIENT))
    # A worker's certificate is none of a frontend's.
    with pytest.raises(ssl.SSLError):
        shake_hands(worker, context(ours, "g-link-worker", ssl.PROTOCOL_TLS_CLIENT))
