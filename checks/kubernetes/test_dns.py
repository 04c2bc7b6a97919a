"""The cluster's DNS server: what names mean, message by message."""

from __future__ import annotations

import socket
import struct
from typing import Any

import pytest

from checks.kubernetes.cluster import dns
from checks.kubernetes.cluster.dns import (
    ANY,
    NO_ERROR,
    NO_SUCH_NAME,
    SERVER_FAILURE,
    SRV,
    A,
    Found,
    Records,
)

AAAA = 28


def records() -> Records:
    """In the namespace shop: services with and without an address; pods with and without a host name."""
    known = Records()
    ports = [{"name": "http", "port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"}]
    known.services = {
        ("shop", "web"): {"spec": {"clusterIP": "10.96.1.2", "ports": ports}},
        ("shop", "db"): {"spec": {"clusterIP": "None"}},
        ("shop", "empty"): {"spec": {"clusterIP": "None"}},
        ("shop", "early"): {"spec": {"clusterIP": "None", "publishNotReadyAddresses": True}},
    }
    pods = [{"ip": "10.244.1.5", "hostname": "db-0"}, {"ip": "10.244.2.6"}]
    known.endpoints = {
        ("shop", "db"): {
            "subsets": [
                {
                    "addresses": pods,
                    "notReadyAddresses": [{"ip": "10.244.9.9", "hostname": "db-1"}],
                    "ports": [{"name": "sql", "port": 5432}],
                }
            ]
        },
        ("shop", "early"): {"subsets": [{"notReadyAddresses": [{"ip": "10.244.9.9"}]}]},
        ("shop", "empty"): {},
    }
    return known


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("web.shop.svc.cluster.local", Found(["10.96.1.2"])),
        ("db.shop.svc.cluster.local", Found(["10.244.1.5", "10.244.2.6"])),
        ("early.shop.svc.cluster.local", Found(["10.244.9.9"])),
        ("empty.shop.svc.cluster.local", Found([])),
        ("db-0.db.shop.svc.cluster.local", Found(["10.244.1.5"])),
        ("10-244-2-6.db.shop.svc.cluster.local", Found(["10.244.2.6"])),
        ("10-244-7-7.shop.pod.cluster.local", Found(["10.244.7.7"])),
        ("_http._tcp.web.shop.svc.cluster.local", Found(ports=[(80, "web.shop.svc.cluster.local")])),
        ("_dns._udp.web.shop.svc.cluster.local", Found(ports=[(53, "web.shop.svc.cluster.local")])),
        (
            "_sql._tcp.db.shop.svc.cluster.local",
            Found(
                ports=[
                    (5432, "db-0.db.shop.svc.cluster.local"),
                    (5432, "10-244-2-6.db.shop.svc.cluster.local"),
                ]
            ),
        ),
    ],
)
def test_names_that_exist(name: str, found: Found) -> None:
    assert records().find(name) == found


@pytest.mark.parametrize(
    "name",
    [
        "",
        "cluster.local",
        "svc.cluster.local",
        "shop.svc.cluster.local",
        "web.other.svc.cluster.local",
        "other.shop.svc.cluster.local",
        "db-0.web.shop.svc.cluster.local",
        "db-1.db.shop.svc.cluster.local",  # not ready
        "_http._udp.web.shop.svc.cluster.local",
        "_ftp._tcp.web.shop.svc.cluster.local",
        "a.b.db.shop.svc.cluster.local",
        "not-an-address.shop.pod.cluster.local",
        "10-244-7-777.shop.pod.cluster.local",
        "web.shop.svc.cluster.local.example.org",
        "example.org",
    ],
)
def test_names_that_do_not_exist(name: str) -> None:
    assert records().find(name) is None


def summary(message: bytes) -> dict[str, Any]:
    number, flags, questions, answers, *_ = struct.unpack_from(">HHHHHH", message)
    return {"number": number, "code": flags & 0xF, "questions": questions, "answers": answers}


@pytest.mark.parametrize(
    ("name", "kind", "code", "answers"),
    [
        ("web.shop.svc.cluster.local", A, NO_ERROR, 1),
        ("WEB.Shop.svc.cluster.local", A, NO_ERROR, 1),
        ("web.shop.svc.cluster.local", AAAA, NO_ERROR, 0),  # it exists, and has no such address
        ("db.shop.svc.cluster.local", A, NO_ERROR, 2),
        ("_sql._tcp.db.shop.svc.cluster.local", SRV, NO_ERROR, 2),
        ("_sql._tcp.db.shop.svc.cluster.local", A, NO_ERROR, 0),
        ("_sql._tcp.db.shop.svc.cluster.local", ANY, NO_ERROR, 2),
        ("example.org", A, NO_SUCH_NAME, 0),
    ],
)
def test_replies(name: str, kind: int, code: int, answers: int) -> None:
    asked = dns.question(name, kind)
    reply = dns.reply(asked, records())
    assert summary(reply) == {"number": 1, "code": code, "questions": 1, "answers": answers}
    assert reply[12 : len(asked)] == asked[12:]  # the question, as it was put


def test_the_record_of_an_address() -> None:
    asked = dns.question("web.shop.svc.cluster.local", A)
    rest = dns.reply(asked, records())[len(asked) :]
    assert struct.unpack(">HHHIH4s", rest) == (0xC00C, A, 1, dns.TTL_S, 4, socket.inet_aton("10.96.1.2"))


def test_the_record_of_a_port() -> None:
    asked = dns.question("_http._tcp.web.shop.svc.cluster.local", SRV)
    rest = dns.reply(asked, records())[len(asked) :]
    *_, port = struct.unpack_from(">HHHIHHHH", rest)
    assert port == 80
    assert dns.decode_name(rest, 18) == ("web.shop.svc.cluster.local", len(rest))


def test_before_the_first_list_the_server_fails() -> None:
    """Not "no such name", which clients would believe."""
    assert summary(dns.reply(dns.question("web.shop.svc.cluster.local", A), None))["code"] == SERVER_FAILURE


@pytest.mark.parametrize(
    ("name", "expected"),
    [("db.shop.svc.cluster.local", ["10.244.1.5", "10.244.2.6"]), ("example.org", [])],
)
def test_the_client_understands_the_server(name: str, expected: list[str]) -> None:
    query = dns.question(name)
    assert dns.addresses_of(dns.reply(query, records()), len(query)) == expected


def test_the_client_tells_a_failure_from_an_unknown_name() -> None:
    query = dns.question("db.shop.svc.cluster.local")
    with pytest.raises(OSError, match="cannot answer yet"):
        dns.addresses_of(dns.reply(query, None), len(query))
