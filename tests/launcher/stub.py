"""Stands in for `penstock frontend` and `penstock worker`: registers or answers /health, and misbehaves as
the environment says. It takes the launcher's own flags."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from penstock.discovery.file import FileDiscovery
from penstock.launcher.parent_death import die_with_supervisor
from penstock.net.listening import inherited_listener
from penstock.shapes import Registration, Role


def flag(name: str) -> str:
    return sys.argv[sys.argv.index(f"--{name}") + 1]


class Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"status": "healthy", "expect": flag("expect")}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *ignored: object) -> None:
        pass


def serve_as_frontend() -> None:
    inherited = inherited_listener(os.environ)
    server = HTTPServer(("", 0), Health, bind_and_activate=False)
    server.socket.close()
    server.socket = inherited.socket
    server.socket.setblocking(True)
    inherited.report_ready()
    server.serve_forever()


async def serve_as_worker() -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    directory = Path(flag("discovery").removeprefix("file:")) / flag("namespace")
    role = Role(flag("role"))
    await asyncio.sleep(float(os.environ.get("STUB_START_S", "0")))
    registration = Registration(flag("instance-id"), 1, role, "stub", "127.0.0.1:1", pid=os.getpid())
    lease = await FileDiscovery(directory).register(registration)
    await stop.wait()
    print("draining", flush=True)
    await lease.close()
    await asyncio.sleep(float(os.environ.get("STUB_DRAIN_S", "0")))


def main() -> None:
    die_with_supervisor()
    behaviour = os.environ.get("STUB", "")
    print(f"started {' '.join(sys.argv[1:])}", flush=True)
    if behaviour == "crash":
        sys.exit(1)
    if behaviour == "refuse":
        sys.exit(print("penstock: --model: no such folder", file=sys.stderr) or 2)
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("deaf", flush=True)
        time.sleep(60)
    if behaviour == "flood":
        for number in range(200_000):
            print(f"line {number} of the flood")
        sys.stdout.flush()
    if behaviour == "grandchild":
        child = subprocess.Popen(["sleep", "60"])
        print(f"grandchild {child.pid}", flush=True)
        sys.exit(1)
    if sys.argv[1] == "frontend":
        serve_as_frontend()
    else:
        asyncio.run(serve_as_worker())


main()
