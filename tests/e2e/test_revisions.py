"""A model is replaced by another under its name, worker by worker, while clients ask: real processes."""

from __future__ import annotations

import json
import shutil
import signal
import struct
import threading
from pathlib import Path

import openai
import pytest

from tests.e2e.conftest import MODEL, ROOT, START_S, Deployment
from tests.waiting import wait_until

NAMES = ("Alice", "Bob", "Carol", "Dave", "Emma", "Frank")


def with_other_token_ids(folder: Path) -> Path:
    """A copy of models/tiny in which every token but the special ones has another id. It computes the same
    text. Its ids are nonsense to the original, and the original's to it."""
    shutil.copytree(ROOT / "models" / MODEL, folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    special = {token["id"] for token in spec["added_tokens"]}
    vocabulary = spec["model"]["vocab"]
    ordinary = sorted(set(vocabulary.values()) - special)
    other_id = dict(zip(ordinary, reversed(ordinary), strict=True)) | {each: each for each in special}
    spec["model"]["vocab"] = {piece: other_id[token_id] for piece, token_id in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    content = (folder / "model.safetensors").read_bytes()
    (header_bytes,) = struct.unpack("<Q", content[:8])
    table = json.loads(content[8 : 8 + header_bytes])["model.embed_tokens.weight"]
    start, end = (8 + header_bytes + offset for offset in table["data_offsets"])
    row_bytes = (end - start) // table["shape"][0]
    rows = bytearray(content[start:end])
    for token_id in ordinary:
        row = content[start + token_id * row_bytes :][:row_bytes]
        rows[other_id[token_id] * row_bytes : (other_id[token_id] + 1) * row_bytes] = row
    (folder / "model.safetensors").write_bytes(content[:start] + rows + content[end:])
    return folder


class Clients:
    """Threads that ask for a name that only the conversation has, whole and streamed in turns."""

    def __init__(self, deployment: Deployment, count: int) -> None:
        self.answers: list[
            tuple[str, str, str]
        ] = []  # the revision's fingerprint, what came, what was right
        self.errors: list[Exception] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(deployment.client(), number))
            for number in range(count)
        ]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * START_S)

    def _run(self, client: openai.OpenAI, number: int) -> None:
        turn = number
        while not self._stop.is_set():
            name = NAMES[turn % len(NAMES)]
            turn += 1
            try:
                self.answers.append(
                    (*self._ask(client, name, stream=turn % 2 == 0), f"Your name is {name}.")
                )
            except openai.OpenAIError as error:
                self.errors.append(error)

    @staticmethod
    def _ask(client: openai.OpenAI, name: str, *, stream: bool) -> tuple[str, str]:
        messages = [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": f"My name is {name}."},
            {"role": "assistant", "content": f"Hello {name}! Nice to meet you."},
            {"role": "user", "content": "What is my name?"},
        ]
        create = client.chat.completions.create
        if not stream:
            answer = create(model=MODEL, messages=messages, max_tokens=20)
            return answer.system_fingerprint, answer.choices[0].message.content
        chunks = list(create(model=MODEL, messages=messages, max_tokens=20, stream=True))
        (fingerprint,) = {chunk.system_fingerprint for chunk in chunks}
        return fingerprint, "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    def wait_for_more(self, count: int) -> None:
        wanted = len(self.answers) + count
        wait_until(lambda: len(self.answers) >= wanted, lambda: self.errors[:3], START_S)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_each_answer_is_wholly_of_one_revision_while_workers_are_replaced(
    deployment: Deployment, tmp_path: Path, how: signal.Signals
) -> None:
    old, new = ROOT / "models" / MODEL, with_other_token_ids(tmp_path / "other")
    for name in ("old0", "old1"):
        deployment.worker(name, "aggregated", old)
    deployment.wait_for(old0="ready", old1="ready")
    with Clients(deployment, 4) as clients:
        clients.wait_for_more(20)
        deployment.worker("new0", "aggregated", new)
        deployment.wait_for(old0="ready", old1="ready", new0="standby")
        clients.wait_for_more(10)
        deployment.end("old0", how)
        deployment.worker("new1", "aggregated", new)
        deployment.wait_for(old1="standby", new0="ready", new1="ready")
        clients.wait_for_more(10)
        deployment.end("old1", how)
        clients.wait_for_more(20)
        deployment.end("new0", how)  # and back: the old model again, in place of the new one
        deployment.worker("old2", "aggregated", old)
        deployment.wait_for(new1="ready", old2="standby")
        deployment.end("new1", how)
        clients.wait_for_more(20)
    assert not clients.errors if how is signal.SIGTERM else all(map(_was_begun, clients.errors))
    assert [answer for answer in clients.answers if answer[1] != answer[2]] == []
    assert len({fingerprint for fingerprint, _, _ in clients.answers}) == 2
    assert "Traceback" not in (tmp_path / "frontend.log").read_text()


def _was_begun(error: Exception) -> bool:
    """A killed worker's streams that had begun cannot go on with another revision."""
    return isinstance(error, openai.APIError) and error.code == "model_replaced"


def test_a_prefill_worker_of_another_revision_gets_nothing(deployment: Deployment, tmp_path: Path) -> None:
    deployment.worker("decode", "decode", ROOT / "models" / MODEL)
    deployment.worker("prefill", "prefill", with_other_token_ids(tmp_path / "other"))
    deployment.wait_for(decode="ready", prefill="standby")
    with Clients(deployment, 2) as clients:
        clients.wait_for_more(20)
    assert clients.errors == []
    assert [answer for answer in clients.answers if answer[1] != answer[2]] == []
    assert deployment.metric("penstock_transfers_total") == 0
    log = (tmp_path / "frontend.log").read_text()
    assert "instance on standby: prefill: another revision of tiny is served, with other" in log
