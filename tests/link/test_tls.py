"""TLS, with an authority and certificates made by the openssl program for each run."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import ConfigError
from penstock.link.settings import TlsSettings
from penstock.link.tls import client_context, server_context
from penstock.logs.quiet_log import BURST_LINES
from tests.waiting import WITHIN_S


def openssl(*args: str, cwd: Path) -> None:
    subprocess.run(["openssl", *args], cwd=cwd, check=True, capture_output=True, timeout=120)


def make_authority(folder: Path, name: str) -> None:
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}.key"]
    openssl("req", "-x509", *key, "-out", f"{name}.pem", "-subj", f"/CN={name}", "-days", "2", cwd=folder)


def make_certificate(folder: Path, name: str, authority: str, names: str) -> None:
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}.key"]
    openssl("req", *key, "-out", f"{name}.csr", "-subj", f"/CN={name}", cwd=folder)
    (folder / f"{name}.ext").write_text(f"subjectAltName={names}\n")
    signed_by = ["-CA", f"{authority}.pem", "-CAkey", f"{authority}.key", "-CAcreateserial"]
    files = ["-in", f"{name}.csr", "-out", f"{name}.pem", "-extfile", f"{name}.ext"]
    openssl("x509", "-req", *files, *signed_by, "-days", "2", cwd=folder)


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca signs worker (127.0.0.1), named (penstock-worker) and frontend; other_ca signs stranger."""
    folder = tmp_path_factory.mktemp("pki")
    for authority in ("ca", "other_ca"):
        make_authority(folder, authority)
    make_certificate(folder, "worker", "ca", "IP:127.0.0.1")
    make_certificate(folder, "named", "ca", "DNS:penstock-worker")
    make_certificate(folder, "frontend", "ca", "DNS:frontend")
    make_certificate(folder, "stranger", "other_ca", "IP:127.0.0.1")
    openssl("ec", "-in", "worker.key", "-aes256", "-passout", "pass:x", "-out", "locked.key", cwd=folder)
    (folder / "both.pem").write_text(
        (folder / "worker.pem").read_text() + (folder / "worker.key").read_text()
    )
    (folder / "empty.pem").write_text("")
    return folder


def files(pki: Path, own: str = "", ca: str = "", **more: str) -> TlsSettings:
    return TlsSettings(
        cert_file=str(pki / f"{own}.pem") if own else "",
        key_file=str(pki / f"{own}.key") if own else "",
        ca_file=str(pki / f"{ca}.pem") if ca else "",
        **more,
    )


async def exchange(bench: Any, worker_tls: TlsSettings, frontend_tls: TlsSettings | None) -> None:
    """A link comes up and carries a file (more than one TLS record) and an orderly close."""
    content = bytes(range(256)) * 10_000
    name = hashlib.sha256(content).hexdigest()
    worker, listener = bench.worker(range(20_000)), bench.listener()
    worker.assets[name] = content
    async with bench.client_of_tls(worker, listener, worker_tls, frontend_tls) as (server, client):
        await bench.until(lambda: client.up)
        assert listener.cached == worker.cached
        assert await client.asset(name) == content
        client.generate(bench.attempt(prompt=50_000))
        await bench.until(lambda: worker.generated)
        await server.close("done")
        await bench.until(lambda: listener.downs)
        assert listener.downs == ["the worker left: done"]


async def refused(
    bench: Any, worker_tls: TlsSettings | None, frontend_tls: TlsSettings | None, reason: str, caplog: Any
) -> None:
    listener = bench.listener()
    async with bench.client_of_tls(bench.worker(), listener, worker_tls, frontend_tls):
        await bench.until(lambda: reason in caplog.text.lower())
    assert listener.calls == []


async def test_the_worker_is_verified(bench: Any, pki: Path) -> None:
    await exchange(bench, files(pki, "worker"), files(pki, ca="ca"))


async def test_both_are_verified(bench: Any, pki: Path) -> None:
    await exchange(bench, files(pki, "worker", ca="ca"), files(pki, "frontend", ca="ca"))


async def test_a_name_of_its_own(bench: Any, pki: Path) -> None:
    named = files(pki, ca="ca", server_name="penstock-worker")
    await exchange(bench, files(pki, "named"), named)


async def test_a_worker_of_another_authority(bench: Any, pki: Path, caplog: Any) -> None:
    await refused(bench, files(pki, "stranger"), files(pki, ca="ca"), "certificate verify failed", caplog)


async def test_a_worker_of_another_name(bench: Any, pki: Path, caplog: Any) -> None:
    await refused(bench, files(pki, "named"), files(pki, ca="ca"), "ip address mismatch", caplog)


@pytest.mark.parametrize("own", ["", "stranger"])
async def test_a_frontend_without_the_right_certificate(
    bench: Any, pki: Path, caplog: Any, own: str
) -> None:
    await refused(bench, files(pki, "worker", ca="ca"), files(pki, own, ca="ca"), "is down: c", caplog)


async def test_tls_on_one_side_only(bench: Any, pki: Path, caplog: Any) -> None:
    await refused(bench, files(pki, "worker"), None, "is down", caplog)
    await refused(bench, None, files(pki, ca="ca"), "cannot connect", caplog)


async def test_silent_connections_count_from_accept_and_keep_nobody_out(
    bench: Any, pki: Path, caplog: Any
) -> None:
    caplog.set_level("INFO")
    listener = bench.listener()
    async with bench.server(bench.worker(), tls=files(pki, "worker"), max_handshakes=3) as server:
        silent = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(20)]
        for reader, _ in silent[:17]:
            assert await asyncio.wait_for(ended(reader), WITHIN_S)
        async with bench.client(server.address, listener, tls=files(pki, ca="ca")) as client:
            await bench.until(lambda: client.up)
        assert not silent[-1][0].at_eof()
        assert server._tls.handshakes <= 3
        for _, writer in silent:
            writer.close()
        assert caplog.text.count("too many other handshakes are under way") == BURST_LINES


async def test_a_handshake_that_does_not_end(bench: Any, pki: Path, caplog: Any) -> None:
    caplog.set_level("INFO")
    tls = files(pki, "worker")
    async with bench.server(bench.worker(), tls=tls, handshake_timeout_s=0.2) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"\x16\x03\x01\x02\x00")
        assert await asyncio.wait_for(ended(reader), WITHIN_S)
        await bench.until(lambda: "taking longer than 0.2 seconds" in caplog.text)
        assert server._tls.handshakes == 0
        writer.close()


async def test_who_was_cut_after_its_handshake_is_named(bench: Any, pki: Path, caplog: Any) -> None:
    context = client_context(files(pki, ca="ca"))
    async with bench.server(bench.worker(), tls=files(pki, "worker"), max_handshakes=1) as server:
        strangers, ports = [], []
        for _ in range(2):
            strangers.append(await asyncio.open_connection("127.0.0.1", server.port, ssl=context))
            ports.append(strangers[-1][1].get_extra_info("sockname")[1])
            await bench.until(lambda: not server._tls.handshakes)
        await bench.until(lambda: "was not established" in caplog.text)
        assert f"a link from 127.0.0.1:{ports[0]} was not established: too many others" in caplog.text
        for _, writer in strangers:
            writer.transport.abort()


async def test_closing_ends_handshakes(bench: Any, pki: Path) -> None:
    async with bench.server(bench.worker(), tls=files(pki, "worker")) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        await bench.until(lambda: server._tls.handshakes)
        await asyncio.wait_for(server.close("done"), WITHIN_S)
        assert await asyncio.wait_for(ended(reader), WITHIN_S)
        writer.close()


async def ended(reader: asyncio.StreamReader) -> bool:
    """Waits until the other side has hung up, whichever way."""
    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""
    return True


def install(pki: Path, folder: Path, own: str, ca: str) -> None:
    """Renew the files in `folder`, each at once."""
    for name, source in (("own.pem", f"{own}.pem"), ("own.key", f"{own}.key"), ("ca.pem", f"{ca}.pem")):
        (folder / "new").write_bytes((pki / source).read_bytes())
        os.replace(folder / "new", folder / name)


async def test_files_may_be_renewed_under_a_running_worker(
    bench: Any, pki: Path, tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Certificate and authorities of both: links that are up stay, new ones use what is there then."""
    monkeypatch.setattr("penstock.net.renewed.RECHECK_S", 0.0)
    install(pki, tmp_path, "worker", "ca")
    tls = files(tmp_path, "own", ca="ca")
    first, second, third = bench.listener(), bench.listener(), bench.listener()
    async with bench.client_of_tls(bench.worker(), first, tls, files(pki, "frontend", ca="ca")) as (
        server,
        client,
    ):
        await bench.until(lambda: client.up)
        install(pki, tmp_path, "stranger", "other_ca")
        renewed = files(pki, "stranger", ca="other_ca")
        async with bench.client(server.address, second, "f2", tls=renewed) as second_client:
            await bench.until(lambda: second_client.up)
        (tmp_path / "own.key").write_text("spoiled")
        async with bench.client(server.address, third, "f3", tls=renewed) as third_client:
            await bench.until(lambda: third_client.up)
        assert (
            "link certificate: the value read before stays in use: tls.cert_file and tls.key_file"
            in caplog.text
        )
        assert client.up
        assert first.downs == []


async def test_a_renewed_authority_keeps_out_whom_the_old_one_let_in(
    bench: Any, pki: Path, tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.net.renewed.RECHECK_S", 0.0)
    install(pki, tmp_path, "worker", "ca")
    listener = bench.listener()
    frontend_tls = files(pki, "frontend", ca="ca")
    async with bench.client_of_tls(bench.worker(), listener, files(tmp_path, "own", ca="ca"), frontend_tls):
        await bench.until(lambda: listener.ups)
    install(pki, tmp_path, "worker", "other_ca")
    await refused(bench, files(tmp_path, "own", ca="ca"), frontend_tls, "is down: c", caplog)


def spoil(folder: Path, how: str) -> None:
    """What a reader may see while all three are being replaced."""
    match how:
        case "absent":
            (folder / "own.pem").unlink()
        case "half written":
            (folder / "own.key").write_bytes((folder / "own.key").read_bytes()[:50])
        case "not matching":
            (folder / "own.key").write_bytes((folder / "ca.pem").with_name("other.key").read_bytes())
        case "empty authorities":
            (folder / "ca.pem").write_text("")


@pytest.mark.parametrize("how", ["absent", "half written", "not matching", "empty authorities"])
async def test_a_worker_first_met_while_the_files_are_being_replaced(
    bench: Any, pki: Path, tmp_path: Path, caplog: Any, how: str
) -> None:
    install(pki, tmp_path, "frontend", "ca")
    (tmp_path / "other.key").write_bytes((pki / "named.key").read_bytes())
    spoil(tmp_path, how)
    listener = bench.listener()
    worker_tls = files(pki, "worker", ca="ca")
    async with bench.client_of_tls(bench.worker(), listener, worker_tls, files(tmp_path, "own", ca="ca")):
        await bench.until(lambda: "cannot connect: tls." in caplog.text)
        assert [record.levelname for record in caplog.records] == ["WARNING"]  # however often it is tried
        install(pki, tmp_path, "frontend", "ca")
        await bench.until(lambda: listener.ups)


def test_a_file_cut_off_anywhere_is_told_as_such(pki: Path, tmp_path: Path) -> None:
    """Whatever stands in it, it is a ConfigError or usable: a certificate without its last newline is."""
    for name in ("own.pem", "own.key", "ca.pem"):
        install(pki, tmp_path, "frontend", "ca")
        whole = (tmp_path / name).read_bytes()
        for size in range(0, len(whole), 7):
            (tmp_path / name).write_bytes(whole[:size])
            try:
                client_context(files(tmp_path, "own", ca="ca"))
            except ConfigError as error:
                assert str(error).startswith("tls.")  # noqa: PT017 - it need not be one
            else:
                assert size > len(whole) - 7


def test_only_tls_1_3(pki: Path) -> None:
    for context in (server_context(files(pki, "worker")), client_context(files(pki, ca="ca"))):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    assert server_context(files(pki, "worker")).verify_mode is ssl.CERT_NONE
    assert server_context(files(pki, "worker", ca="ca")).verify_mode is ssl.CERT_REQUIRED
    assert client_context(files(pki, ca="ca")).check_hostname
    assert client_context(TlsSettings()).verify_mode is ssl.CERT_REQUIRED


def test_key_and_certificate_in_one_file(pki: Path) -> None:
    server_context(TlsSettings(cert_file=str(pki / "both.pem")))


@pytest.mark.parametrize(
    ("cert", "key", "ca", "message"),
    [
        ("", "", "", r"tls\.cert_file: a worker needs"),
        ("missing.pem", "worker.key", "", r"tls\.cert_file: cannot read"),
        ("worker.pem", "missing.key", "", r"tls\.key_file: cannot read"),
        ("worker.pem", "", "", r"tls\.cert_file: not usable"),
        ("worker.pem", "named.key", "", r"tls\.cert_file and tls\.key_file: not usable"),
        ("worker.pem", "locked.key", "", r"tls\.cert_file and tls\.key_file: not usable"),
        ("worker.pem", "worker.key", "missing.pem", r"tls\.ca_file: cannot read"),
        ("worker.pem", "worker.key", "empty.pem", r"tls\.ca_file: not usable"),
    ],
)
def test_bad_files_name_their_setting(pki: Path, cert: str, key: str, ca: str, message: str) -> None:
    paths = [str(pki / name) if name else "" for name in (cert, key, ca)]
    tls = TlsSettings(cert_file=paths[0], key_file=paths[1], ca_file=paths[2])
    with pytest.raises(ConfigError, match=message):
        server_context(tls)


def test_a_frontend_with_a_key_and_no_certificate(pki: Path) -> None:
    with pytest.raises(ConfigError, match=r"tls\.key_file"):
        client_context(TlsSettings(key_file=str(pki / "worker.key")))
