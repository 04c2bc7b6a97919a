from __future__ import annotations

import asyncio
import logging
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trustme

from penstock.discovery.etcd import EtcdDiscovery
from penstock.discovery.etcd_client import OUT_OF_RANGE, EtcdClient, EtcdError, WatchReply
from penstock.discovery.etcd_settings import EtcdSettings
from penstock.errors import ConfigError
from penstock.shapes import Registration
from tests.builders import registration
from tests.discovery.contract import DiscoveryContract, Watcher
from tests.discovery.etcd_server import Etcd, running_cluster, running_etcd
from tests.waiting import until

WAIT_S = 60.0  # for what takes a second or two on an idle machine
LEASE_S = 2.0

# Writes its registration, says so, and holds the lease until it is killed.
OWNER = """
import asyncio, sys
from penstock.discovery.etcd import EtcdDiscovery
from penstock.discovery.etcd_settings import EtcdSettings
from penstock.shapes import Registration, Role

async def main():
    settings = EtcdSettings(endpoints=(sys.argv[1],), namespace=sys.argv[2], lease_s=float(sys.argv[3]))
    us = Registration("child-0", 1, Role.DECODE, "m", "10.0.0.7:1")
    lease = await EtcdDiscovery(settings).register(us)
    print("up" if lease.registered else lease.trouble, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""

Open = Callable[..., EtcdDiscovery]


def quick(*endpoints: str, **settings: Any) -> EtcdSettings:
    """Settings by which everything is noticed within a second or two."""
    return EtcdSettings(
        endpoints=endpoints,
        **{
            "namespace": f"t-{uuid.uuid4().hex}",
            "lease_s": LEASE_S,
            "call_s": 1.0,
            "close_s": 1.0,
            "retry_min_s": 0.05,
            "retry_max_s": 0.5,
            **settings,
        },
    )


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    """For tests that leave it as it is."""
    with running_etcd(tmp_path_factory.mktemp("etcd")) as etcd:
        yield etcd


@pytest.fixture
def own_etcd(tmp_path: Path) -> Iterator[Etcd]:
    """For tests that hurt it."""
    with running_etcd(tmp_path) as etcd:
        yield etcd


@pytest.fixture
async def opened() -> AsyncIterator[Open]:
    """Opens discoveries; their leases and they themselves are closed at the end."""
    discoveries = []
    leases = []

    class Recording(EtcdDiscovery):
        async def register(self, registration: Registration):
            leases.append(await super().register(registration))
            return leases[-1]

    def open_one(settings: EtcdSettings) -> EtcdDiscovery:
        discoveries.append(Recording(settings))
        return discoveries[-1]

    yield open_one
    await asyncio.gather(*(lease.close() for lease in leases))
    for discovery in discoveries:
        await discovery.close()


def logged(caplog: pytest.LogCaptureFixture, words: str) -> int:
    return sum(words in record.getMessage() for record in caplog.records)


class TestEtcdDiscovery(DiscoveryContract):
    @pytest.fixture
    def open_discovery(self, etcd: Etcd, opened: Open) -> Callable[[], EtcdDiscovery]:
        settings = quick(etcd.endpoint)
        return lambda: opened(settings)


class TestEtcdDiscoveryWithoutWatching(DiscoveryContract):
    """Fresh lists alone must do, too, and must not be taken for changes."""

    @pytest.fixture
    def open_discovery(self, etcd: Etcd, opened: Open) -> Callable[[], EtcdDiscovery]:
        settings = quick(etcd.endpoint, watch_s=0.05)
        return lambda: opened(settings)


# --- what is in etcd --------------------------------------------------------------------------------


async def test_the_key_and_its_value_are_for_everybody_to_read(etcd: Etcd, opened: Open) -> None:
    settings = quick(etcd.endpoint)
    await opened(settings).register(registration())
    key = f"/penstock/{settings.namespace}/instances/w-0"
    assert etcd.ctl("get", key, "--print-value-only").encode().strip() == msgspec.json.encode(
        registration()
    )


async def test_namespaces_do_not_meet(etcd: Etcd, opened: Open) -> None:
    await opened(quick(etcd.endpoint, namespace="prod")).register(registration())
    async with Watcher(opened(quick(etcd.endpoint, namespace="prod2"))) as watcher:
        await watcher.until()


async def test_garbage_is_named_once_and_ignored(etcd: Etcd, opened: Open, caplog) -> None:
    settings = quick(etcd.endpoint, watch_s=0.2)
    etcd.ctl("put", settings.prefix + "half", '{"instance_id"')
    etcd.ctl("put", settings.prefix + "huge", "x" * (settings.value_bytes_max + 1))
    etcd.ctl("put", settings.prefix + "deep", '{"x":' + 8000 * "[" + 8000 * "]" + "}")
    etcd.ctl(
        "put", settings.prefix + "alias", msgspec.json.encode(registration(address="10.0.0.7:666")).decode()
    )
    await opened(settings).register(registration())
    async with Watcher(opened(settings)) as watcher:
        assert (await watcher.until("w-0"))["w-0"] == registration()
        etcd.ctl("put", settings.prefix + "late", "[]")
        await until(lambda: logged(caplog, "late") > 0)
        await asyncio.sleep(0.5)
        assert watcher.updates == 1
    names = ("half", "huge", "deep", "alias", "late")
    assert [logged(caplog, name) for name in names] == [1] * len(names)


async def test_instances_beyond_the_limit_are_ignored(etcd: Etcd, opened: Open, caplog) -> None:
    settings = quick(etcd.endpoint, instances_max=2, watch_s=0.2)
    for number in range(4):
        await opened(settings).register(registration(f"w-{number}"))
    async with Watcher(opened(settings)) as watcher:
        assert len(await watcher.until_true(lambda latest: latest is not None)) == 2
        await asyncio.sleep(0.5)
    assert logged(caplog, "the rest is ignored") == 1


async def test_an_older_incarnation_gives_way(etcd: Etcd, opened: Open, caplog) -> None:
    settings = quick(etcd.endpoint)
    old = await opened(settings).register(registration(epoch=1))
    await opened(settings).register(registration(epoch=2))
    await until(lambda: old.trouble == "a newer incarnation took over")
    async with Watcher(opened(settings)) as watcher:
        assert (await watcher.until("w-0"))["w-0"].epoch == 2
    assert logged(caplog, "took over") == 1


# --- leases and keys that vanish ----------------------------------------------------------------------


async def test_a_revoked_lease_is_made_again(etcd: Etcd, opened: Open, caplog) -> None:
    settings = quick(etcd.endpoint)
    lease = await opened(settings).register(registration())
    async with Watcher(opened(settings)) as watcher:
        await watcher.until("w-0")
        etcd.ctl("lease", "revoke", f"{lease._lease:x}")
        await watcher.until()
        assert (await watcher.until("w-0", within_s=WAIT_S))["w-0"] == registration()
    assert logged(caplog, "lost its lease") == 1


async def test_a_deleted_key_is_written_again(etcd: Etcd, opened: Open) -> None:
    settings = quick(etcd.endpoint)
    await opened(settings).register(registration())
    async with Watcher(opened(settings)) as watcher:
        await watcher.until("w-0")
        etcd.ctl("del", "--prefix", settings.prefix)
        await watcher.until()
        await watcher.until("w-0", within_s=WAIT_S)


async def test_a_live_lease_outlasts_its_length(etcd: Etcd, opened: Open) -> None:
    settings = quick(etcd.endpoint)
    await opened(settings).register(registration())
    async with Watcher(opened(settings)) as watcher:
        await watcher.until("w-0")
        await asyncio.sleep(2 * LEASE_S)
        assert watcher.updates == 1


def start_owner(settings: EtcdSettings) -> subprocess.Popen[str]:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, settings.endpoints[0], settings.namespace, str(LEASE_S)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout.readline() == "up\n"
    return owner


async def test_a_frozen_owner_is_gone_and_comes_back(etcd: Etcd, opened: Open) -> None:
    settings = quick(etcd.endpoint)
    owner = await asyncio.to_thread(start_owner, settings)
    try:
        async with Watcher(opened(settings)) as watcher:
            await watcher.until("child-0")
            owner.send_signal(signal.SIGSTOP)
            await watcher.until(within_s=WAIT_S)
            owner.send_signal(signal.SIGCONT)
            await watcher.until("child-0", within_s=WAIT_S)
            owner.kill()
            await watcher.until(within_s=WAIT_S)
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()


# --- etcd that goes away ------------------------------------------------------------------------------


async def test_an_outage_keeps_the_last_set(own_etcd: Etcd, opened: Open, caplog) -> None:
    settings = quick(own_etcd.endpoint)
    lease = await opened(settings).register(registration())
    with caplog.at_level(logging.INFO, "penstock.discovery.etcd"):
        async with Watcher(watching := opened(settings)) as watcher:
            await watcher.until("w-0")
            own_etcd.kill()
            await until(lambda: bool(lease.trouble and watching.trouble))
            await asyncio.sleep(LEASE_S)
            assert lease.registered  # it was, which is what /health goes by
            assert logged(caplog, "is not available") == 2  # once for the lease, once for the watch
            await asyncio.to_thread(own_etcd.start)
            await until(lambda: not lease.trouble)
            await opened(settings).register(registration("w-1"))
            await watcher.until("w-0", "w-1", within_s=WAIT_S)
            await until(lambda: logged(caplog, "available again") == 2 and watching.trouble == "")


async def test_lost_data_is_written_again(own_etcd: Etcd, opened: Open) -> None:
    settings = quick(own_etcd.endpoint)
    for number in range(3):
        await opened(settings).register(registration(f"w-{number}", epoch=7))
    async with Watcher(opened(settings)) as watcher:
        before = await watcher.until("w-0", "w-1", "w-2")
        own_etcd.kill()
        own_etcd.lose_data()
        await asyncio.to_thread(own_etcd.start)
        await watcher.until_true(lambda latest: latest != before, WAIT_S)
        assert await watcher.until("w-0", "w-1", "w-2", within_s=WAIT_S) == before


async def test_registering_waits_for_etcd(own_etcd: Etcd, opened: Open) -> None:
    settings = quick(own_etcd.endpoint)
    own_etcd.kill()
    async with Watcher(opened(settings)) as watcher:
        lease = await opened(settings).register(registration())
        assert not lease.registered
        assert own_etcd.endpoint in lease.trouble
        assert watcher.updates == 0
        await asyncio.to_thread(own_etcd.start)
        await watcher.until("w-0", within_s=WAIT_S)
        await until(lambda: lease.registered and not lease.trouble)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_closing_is_bounded_while_etcd_is_down(own_etcd: Etcd, caplog, number) -> None:
    settings = quick(own_etcd.endpoint)
    discovery = EtcdDiscovery(settings)
    lease = await discovery.register(registration())
    updates = discovery.watch()
    assert set(await anext(updates)) == {"w-0"}
    own_etcd.signal(number)
    async with asyncio.timeout(WAIT_S):
        await lease.close()
        await lease.close()
        await discovery.close()
        assert [update async for update in updates] == []
    assert logged(caplog, "could not be deregistered") == 1


async def test_a_compacted_revision_leads_to_a_new_list(etcd: Etcd, opened: Open) -> None:
    settings = quick(etcd.endpoint)
    discovery = opened(settings)
    refused = []

    class Overtaken(EtcdClient):
        """Between its first list and the watch from there, much happens and is compacted away."""

        async def watch(self, prefix: str, revision: int, handle: Callable[[WatchReply], None]) -> None:
            if not refused:
                await opened(settings).register(registration("w-1"))
                now = (await self.list_below(prefix, 1)).header.revision
                await asyncio.to_thread(etcd.ctl, "put", "elsewhere", "x")
                await asyncio.to_thread(etcd.ctl, "compact", str(now + 1))
            try:
                await super().watch(prefix, revision, handle)
            except EtcdError as error:
                refused.append(error.code)
                raise

    await opened(settings).register(registration("w-0"))
    await discovery._client.close()
    discovery._client = Overtaken(settings)
    async with Watcher(discovery) as watcher:
        await watcher.until("w-0", "w-1", within_s=WAIT_S)
    assert refused == [OUT_OF_RANGE]


# --- several members ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_another_member_takes_over(tmp_path: Path, opened: Open, number, caplog) -> None:
    with running_cluster(tmp_path) as cluster:
        settings = quick(*(member.endpoint for member in cluster), watch_s=1.0, lease_s=6.0)
        lease = await opened(settings).register(registration())
        async with Watcher(opened(settings)) as watcher:
            await watcher.until("w-0", within_s=WAIT_S)
            cluster[0].signal(number)
            await opened(settings).register(registration("w-1"))
            await watcher.until("w-0", "w-1", within_s=WAIT_S)
            await until(lambda: not lease.trouble)
            await asyncio.sleep(6.0)
            assert set(watcher.latest) == {"w-0", "w-1"}
        assert logged(caplog, "lost its lease") == 0


async def test_members_that_cannot_answer_are_passed_over(etcd: Etcd, opened: Open) -> None:
    with socket.create_server(("127.0.0.1", 0)) as blackhole, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = [f"http://127.0.0.1:{listener.getsockname()[1]}" for listener in (blackhole, closed)]
        settings = quick(*dead, "http://no-such-host.invalid:2379", etcd.endpoint)
        async with Watcher(opened(settings)) as watcher:
            lease = await opened(settings).register(registration())
            assert lease.registered
            await watcher.until("w-0", within_s=WAIT_S)


async def test_what_is_no_etcd_is_named(opened: Open) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhello")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        lease = await opened(quick(f"http://127.0.0.1:{port}")).register(registration())
        assert "HTTP 404 instead of an answer: 'hello'" in lease.trouble
        await lease.close()


async def test_replies_are_bounded(etcd: Etcd, opened: Open) -> None:
    settings = quick(etcd.endpoint)
    await opened(settings).register(registration())
    small = EtcdClient(msgspec.structs.replace(settings, reply_bytes_max=100))
    with pytest.raises(EtcdError, match="more than 100 bytes"):
        await small.list_below(settings.prefix, 10)
    await small.close()


# --- who may ------------------------------------------------------------------------------------------


def require_users(etcd: Etcd, *options: str) -> None:
    """Users `workers` and `frontends` with the password `secret`, for Penstock's keys."""
    etcd.ctl(*options, "user", "add", "root:root")
    etcd.ctl(*options, "user", "grant-role", "root", "root")
    for name, permission in (("workers", "readwrite"), ("frontends", "read")):
        etcd.ctl(*options, "role", "add", name)
        etcd.ctl(*options, "role", "grant-permission", name, "--prefix=true", permission, "/penstock/")
        etcd.ctl(*options, "user", "add", f"{name}:secret")
        etcd.ctl(*options, "user", "grant-role", name, name)
    etcd.ctl(*options, "auth", "enable")


async def test_users_and_forgotten_tokens(own_etcd: Etcd, opened: Open) -> None:
    await asyncio.to_thread(require_users, own_etcd)
    settings = quick(own_etcd.endpoint, user="workers", password="secret")
    lease = await opened(settings).register(registration())
    await until(lambda: lease.registered)
    frontend = msgspec.structs.replace(settings, user="frontends")
    async with Watcher(opened(frontend)) as watcher:
        await watcher.until("w-0")
        own_etcd.kill()
        await asyncio.to_thread(own_etcd.start)  # its tokens lived in memory
        await opened(settings).register(registration("w-1"))
        await watcher.until("w-0", "w-1", within_s=WAIT_S)
        await until(lambda: not lease.trouble)
        own_etcd.ctl("--user", "root:root", "user", "add", "another:one")  # makes all older tokens invalid
        await asyncio.sleep(LEASE_S)
        await until(lambda: not lease.trouble)


@pytest.mark.parametrize(
    ("user", "password", "reason"),
    [
        ("workers", "wrong", "invalid user ID or password"),
        ("nobody", "secret", "invalid user ID or password"),
        ("", "", "user name is empty"),
        ("guests", "secret", "permission denied"),
    ],
)
async def test_who_may_not_is_told_so(own_etcd: Etcd, opened: Open, caplog, user, password, reason) -> None:
    own_etcd.ctl("user", "add", "guests:secret")
    await asyncio.to_thread(require_users, own_etcd)
    settings = quick(own_etcd.endpoint, user=user, password=password)
    async with Watcher(watching := opened(settings)) as watcher:
        lease = await opened(settings).register(registration())
        # etcd takes its time over passwords: the first calls may go unanswered on a busy machine.
        await until(lambda: reason in lease.trouble and reason in watching.trouble)
        await asyncio.sleep(0.3)
        assert not lease.registered
        assert watcher.updates == 0
    assert logged(caplog, "is not available") == 2
    assert password not in caplog.text or not password or password == user


@pytest.fixture
def authority(tmp_path: Path) -> trustme.CA:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    trustme.CA().cert_pem.write_to_path(tmp_path / "other-ca.pem")
    replace(tmp_path, "server", authority)
    replace(tmp_path, "client", authority)
    replace(tmp_path, "late", trustme.CA())
    return authority


def replace(folder: Path, name: str, authority: trustme.CA, common_name: str | None = None) -> None:
    """A certificate of the authority's, and its key, in the place of what is there."""
    certificate = authority.issue_cert("127.0.0.1", common_name=common_name)
    certificate.private_key_pem.write_to_path(folder / f"{name}.key")
    certificate.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")


async def test_tls_both_ways(tmp_path: Path, authority: trustme.CA, opened: Open) -> None:
    def path(name: str) -> str:
        return str(tmp_path / name)

    options = ["--cert-file", path("server.pem"), "--key-file", path("server.key")]
    options += ["--client-cert-auth", "--trusted-ca-file", path("ca.pem")]
    ours = {"ca_file": path("ca.pem"), "cert_file": path("client.pem"), "key_file": path("client.key")}
    late = ours | {"cert_file": path("late.pem"), "key_file": path("late.key")}
    certificate = ["--cert", path("client.pem"), "--key", path("client.key")]
    with running_etcd(tmp_path, options, scheme="https") as etcd:
        settings = quick(etcd.endpoint, **ours)
        lease = await opened(settings).register(registration())
        await until(lambda: lease.registered and not lease.trouble)
        async with Watcher(opened(settings)) as watcher:
            await watcher.until("w-0")
        stranger = quick(etcd.endpoint, **(ours | {"ca_file": path("other-ca.pem")}))
        unknown = await opened(stranger).register(registration())
        await until(lambda: "CERTIFICATE_VERIFY_FAILED" in unknown.trouble)
        impostor = quick(etcd.endpoint, **late)
        lease = await opened(impostor).register(registration())
        assert not lease.registered
        replace(tmp_path, "late", authority, common_name="workers")
        await until(lambda: lease.registered)
        etcd.signal(signal.SIGSTOP)  # in the middle of handshakes: none may be left open
        frozen = await opened(quick(etcd.endpoint, call_s=0.4, **ours)).register(registration())
        await until(lambda: "no answer in time" in frozen.trouble)
        etcd.signal(signal.SIGCONT)
        nameless = quick(etcd.endpoint, ca_file=path("ca.pem"))
        lease = await opened(nameless).register(registration())
        assert not lease.registered
        # Users come from passwords: etcd refuses certificates that would name one.
        await asyncio.to_thread(require_users, etcd, "--cacert", path("ca.pem"), *certificate)
        user = {"user": "workers", "password": "secret"}
        known = await opened(quick(etcd.endpoint, **user, **ours)).register(registration())
        await until(lambda: known.registered)
        refused = await opened(quick(etcd.endpoint, **user, **late)).register(registration())
        await until(lambda: "CommonName" in refused.trouble)


def test_tls_files_are_checked_at_the_start(tmp_path: Path, authority: trustme.CA) -> None:
    (tmp_path / "bad.pem").write_text("not a certificate")
    ours = {"cert_file": str(tmp_path / "client.pem"), "key_file": str(tmp_path / "client.key")}
    for change, message in (
        ({"ca_file": "/no.pem"}, "--etcd-ca: cannot read /no.pem: No such file"),
        ({"ca_file": str(tmp_path / "bad.pem")}, "--etcd-ca: .*bad.pem is not usable"),
        (ours | {"cert_file": "/no.pem"}, "--etcd-cert: cannot read /no.pem"),
        (ours | {"key_file": "/no.key"}, "--etcd-key: cannot read /no.key"),
        (ours | {"key_file": str(tmp_path / "server.key")}, "--etcd-cert: .* is not usable"),
    ):
        with pytest.raises(ConfigError, match=message):
            EtcdDiscovery(quick("https://127.0.0.1:1", **change))
