"""The cluster's DNS server, as Kubernetes specifies it for services and pods, and a client to ask it.

Debian has no CoreDNS. This answers A and SRV for `cluster.local` from what the API server says about
services and endpoints: services with and without an address of their own, their named ports, the pods
behind services without an address by host name or address, and pods by address. It knows nothing outside
the cluster: any other name does not exist.

Runs in a pod as `python3 dns.py serve`, standard library only and nothing of this project. Elsewhere,
`python3 dns.py ask SERVER PORT NAME` prints the addresses of a name.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import socketserver
import ssl
import struct
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ZONE = ("cluster", "local")
PORT = 5353  # of this process; the service has 53
HEALTH_PORT = 8080
TTL_S = 5
WATCH_S = 300
RETRY_S = 1.0
MAX_MESSAGE = 65535
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

A, SRV, ANY = 1, 33, 255
NO_ERROR, SERVER_FAILURE, NO_SUCH_NAME = 0, 2, 3
IN = 1
NAME_OF_QUESTION = b"\xc0\x0c"  # "the name that stands at byte 12"

Key = tuple[str, str]  # namespace, name


@dataclass
class Found:
    """What there is under a name."""

    addresses: list[str] = field(default_factory=list)
    ports: list[tuple[int, str]] = field(default_factory=list)  # port, name of its host


class Records:
    """What the API server last said, and what it means for names."""

    def __init__(self) -> None:
        self.services: dict[Key, dict[str, Any]] = {}
        self.endpoints: dict[Key, dict[str, Any]] = {}

    def find(self, name: str) -> Found | None:
        """What is under a name, in lower case and without a dot at its end; None when it does not exist."""
        labels = tuple(name.split("."))
        if labels[-len(ZONE) :] != ZONE:
            return None
        match labels[: -len(ZONE)]:
            case (address, _, "pod") if is_address(address.replace("-", ".")):
                return Found([address.replace("-", ".")])
            case (*inner, service, namespace, "svc"):
                return self._find_service((namespace, service), inner)
        return None

    def _find_service(self, key: Key, inner: list[str]) -> Found | None:
        service = self.services.get(key)
        if service is None:
            return None
        own_name = ".".join((key[1], key[0], "svc", *ZONE))
        address = service["spec"].get("clusterIP")
        has_address = address not in (None, "", "None")
        match inner:
            case []:
                if has_address:
                    return Found([address])
                return Found(sorted({pod for pod, _, _ in self._behind(key)}))
            case [host] if not has_address:
                pods = sorted({pod for pod, name, _ in self._behind(key) if host == name})
                return Found(pods) if pods else None
            case [port, protocol] if port.startswith("_") and protocol in ("_tcp", "_udp"):
                if has_address:
                    ports = [(item, own_name) for item in service["spec"].get("ports", ())]
                else:
                    ports = [(item, f"{name}.{own_name}") for _, name, item in self._behind(key)]
                named = [
                    (item["port"], name)
                    for item, name in ports
                    if "_" + item.get("name", "") == port
                    and "_" + item.get("protocol", "TCP").lower() == protocol
                ]
                return Found(ports=named) if named else None
        return None

    def _behind(self, key: Key) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """The address, host name and a port of all pods behind a service."""
        unready_too = self.services[key]["spec"].get("publishNotReadyAddresses", False)
        for subset in self.endpoints.get(key, {}).get("subsets") or []:
            addresses = subset.get("addresses") or []
            if unready_too:
                addresses = addresses + (subset.get("notReadyAddresses") or [])
            for address in addresses:
                name = address.get("hostname") or address["ip"].replace(".", "-")
                for port in subset.get("ports") or [{}]:
                    yield address["ip"], name, port


def is_address(text: str) -> bool:
    try:
        socket.inet_pton(socket.AF_INET, text)
    except OSError:
        return False
    return True


# --- messages ---------------------------------------------------------------------------------------------


def encode_name(name: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode("ascii") for label in name.split(".")) + b"\0"


def decode_name(message: bytes, start: int) -> tuple[str, int]:
    """The uncompressed name at `start`, and where it ends."""
    labels = []
    while length := message[start]:
        labels.append(message[start + 1 : start + 1 + length].decode("latin-1"))
        start += 1 + length
    return ".".join(labels), start + 1


def reply(query: bytes, records: Records | None) -> bytes:
    """The answer to one question. Without records (they are not here yet) it is a failure of the server."""
    number, flags = struct.unpack_from(">HH", query)
    name, end = decode_name(query, 12)
    kind, _ = struct.unpack_from(">HH", query, end)
    found = records.find(name.lower()) if records is not None else None
    code = SERVER_FAILURE if records is None else NO_SUCH_NAME if found is None else NO_ERROR
    answers = []
    if found is not None and kind in (A, ANY):
        answers += [record(A, socket.inet_aton(address)) for address in found.addresses]
    if found is not None and kind in (SRV, ANY):
        answers += [
            record(SRV, struct.pack(">HHH", 0, 100, port) + encode_name(host)) for port, host in found.ports
        ]
    recursion_wanted = flags & 0x0100
    is_authoritative_answer = 0x8400
    head = struct.pack(
        ">HHHHHH", number, is_authoritative_answer | recursion_wanted | code, 1, len(answers), 0, 0
    )
    return head + query[12 : end + 4] + b"".join(answers)


def record(kind: int, data: bytes) -> bytes:
    return NAME_OF_QUESTION + struct.pack(">HHIH", kind, IN, TTL_S, len(data)) + data


def ask(server: str, port: int, name: str, timeout_s: float = 2.0) -> list[str]:
    """The addresses of a name; none when it does not exist. Raises OSError when no answer comes."""
    query = question(name)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(timeout_s)
        client.sendto(query, (server, port))
        return addresses_of(client.recv(MAX_MESSAGE), len(query))


def question(name: str, kind: int = A) -> bytes:
    recursion_wanted = 0x0100
    head = struct.pack(">HHHHHH", 1, recursion_wanted, 1, 0, 0, 0)
    return head + encode_name(name) + struct.pack(">HH", kind, IN)


def addresses_of(answer: bytes, start: int) -> list[str]:
    """The addresses in an answer of ours: all its records, from byte `start`, are addresses."""
    flags, _, count = struct.unpack_from(">HHH", answer, 2)
    if flags & 0xF == SERVER_FAILURE:
        raise OSError("the DNS server cannot answer yet")
    size = len(record(A, bytes(4)))
    ends = range(start + size, start + size * count + 1, size)
    return [socket.inet_ntoa(answer[end - 4 : end]) for end in ends]


# --- serving ----------------------------------------------------------------------------------------------


def follow(kind: str, into: dict[Key, dict[str, Any]], synced: threading.Event) -> None:
    """List and watch one kind of objects, for ever."""
    while True:
        try:
            listed = json.load(get(f"/api/v1/{kind}"))
            fresh = {key_of(item): item for item in listed["items"]}
            for gone in into.keys() - fresh.keys():
                into.pop(gone)
            into.update(fresh)
            synced.set()
            version = listed["metadata"]["resourceVersion"]
            for line in get(f"/api/v1/{kind}?watch=1&timeoutSeconds={WATCH_S}&resourceVersion={version}"):
                event = json.loads(line)
                if event["type"] == "ERROR":
                    break  # the version is too old: list again
                if event["type"] == "DELETED":
                    into.pop(key_of(event["object"]), None)
                else:
                    into[key_of(event["object"])] = event["object"]
        except (OSError, http.client.HTTPException, ValueError) as error:
            print(f"following {kind}: {error!r}", flush=True)
            time.sleep(RETRY_S)


def key_of(item: dict[str, Any]) -> Key:
    return item["metadata"]["namespace"], item["metadata"]["name"]


def get(path: str) -> http.client.HTTPResponse:
    client = http.client.HTTPSConnection(
        os.environ["KUBERNETES_SERVICE_HOST"],
        int(os.environ["KUBERNETES_SERVICE_PORT"]),
        context=ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt")),
        timeout=WATCH_S + 30,
    )
    client.request("GET", path, headers={"Authorization": "Bearer " + (ACCOUNT / "token").read_text()})
    response = client.getresponse()
    if response.status != 200:
        raise OSError(f"{path}: {response.status} {response.read(200)!r}")
    return response


def serve() -> None:
    records = Records()
    synced = {"services": threading.Event(), "endpoints": threading.Event()}
    for kind, event in synced.items():
        threading.Thread(target=follow, args=(kind, getattr(records, kind), event), daemon=True).start()

    def current() -> Records | None:
        return records if all(event.is_set() for event in synced.values()) else None

    class Datagram(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            query, client = self.request
            client.sendto(reply(query, current()), self.client_address)

    class Stream(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while len(head := self.rfile.read(2)) == 2:
                answer = reply(self.rfile.read(int.from_bytes(head, "big")), current())
                self.wfile.write(len(answer).to_bytes(2, "big") + answer)

    class Health(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            status = b"503 Not synced" if current() is None else b"200 OK"
            self.wfile.write(b"HTTP/1.0 " + status + b"\r\nContent-Length: 0\r\n\r\n")

    servers: list[socketserver.BaseServer] = [
        socketserver.ThreadingUDPServer(("", PORT), Datagram),
        socketserver.ThreadingTCPServer(("", PORT), Stream),
        socketserver.ThreadingTCPServer(("", HEALTH_PORT), Health),
    ]
    threads = [threading.Thread(target=server.serve_forever) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve"]:
            serve()
        case ["ask", server, port, name]:
            print("\n".join(ask(server, int(port), name)))
        case _:
            sys.exit(__doc__)
