"""Clients that ask again and again until they are told to stop, and then print what became of their
requests.

Tests run this text in a pod, where most clients are: they reach frontends by a Service. So it needs nothing
but Python. Its arguments: URL, number of clients, request body, the right answer.

While the cluster's own DNS server moves to another node, a question to it may be lost. Such a request was
never sent, so it says nothing about Penstock: it is asked again for a while, and counted.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import Any

STOP_FILE = "/tmp/stop"
PAUSE_S = 0.2
UNRESOLVED_S = 30.0
"""For which a client asks for the name again: two rounds of a resolver without an answer, and a moment."""


def ask(url: str, body: bytes) -> str:
    """The text of a streamed answer. Raises ValueError when the stream does not come to its end."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    text, finished = "", False
    with urllib.request.urlopen(request, timeout=120) as response:
        for line in response:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise ValueError(chunk["error"])
                for choice in chunk["choices"]:
                    text += choice["delta"].get("content") or ""
                    finished = finished or choice.get("finish_reason") is not None
    if not finished:
        raise ValueError(f"the stream ended early: {text!r}")
    return text


def main(url: str, clients: int, body: bytes, wanted: str) -> None:
    told: dict[str, Any] = {"answers": 0, "wrong": [], "errors": [], "unresolved": 0, "longest_s": 0.0}
    stop = threading.Event()

    def ask_by_name() -> str:
        deadline = time.monotonic() + UNRESOLVED_S
        while True:
            try:
                return ask(url, body)
            except urllib.error.URLError as error:
                if not isinstance(error.reason, socket.gaierror) or time.monotonic() > deadline:
                    raise
                told["unresolved"] += 1
                time.sleep(PAUSE_S)

    def run() -> None:
        while not stop.is_set():
            began = time.time()
            try:
                text = ask_by_name()
                told["answers"] += 1
                if text != wanted:
                    told["wrong"].append(text)
            except Exception as error:  # noqa: BLE001 - whatever it is, the request failed, and the test says so
                told["errors"].append(f"after {time.time() - began:.1f} s: {error!r}")
            told["longest_s"] = max(told["longest_s"], round(time.time() - began, 2))
            stop.wait(PAUSE_S)

    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    while not os.path.exists(STOP_FILE):
        time.sleep(PAUSE_S)
    stop.set()
    for thread in threads:
        thread.join()
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3].encode(), sys.argv[4])
