"""Starts a frontend and its workers, Penstock's or Dynamo's, on the same model folder and timing.

Dynamo's are its frontend with the KV router, and its mocker, which runs all workers in one process; neither
etcd nor NATS (`--discovery-backend file --request-plane tcp --event-plane zmq`). Both have their defaults
for everything else, but for the sizes of an engine, which are Penstock's for both.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models

from benchmarks.dynamo.timing import write_mocker, write_penstock
from benchmarks.english import model_folder
from benchmarks.processes import READY_TIMEOUT_S, STOP_TIMEOUT_S, start, stop, wait_ready
from checks.clients.environments import python_environment
from penstock.core.admission import AdmissionSettings
from penstock.engines.cost_models import CostModel
from penstock.engines.settings import SchedulerSettings
from penstock.engines.sim import SimSettings

REQUIREMENTS = Path(__file__).parent / "dynamo.requirements.txt"
ENGINE, SCHEDULER, ADMISSION = SimSettings(), SchedulerSettings(), AdmissionSettings()
PLANES = ["--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq"]
TICK_S = 1 / os.sysconf("SC_CLK_TCK")

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": ENGINE.max_model_len,
    "eos_token_id": 2,
}
"""What Dynamo's frontend wants to know of a model, weights or not."""

CHARACTERS = 4096
"""Token ids of `character_model`: the mocker draws all of them below 2,000 or so."""


@dataclass(frozen=True, slots=True)
class Graph:
    """A running frontend; the pid is its process's alone."""

    name: str
    url: str
    pid: int

    def cpu_s(self) -> tuple[float, float]:
        """User and system time so far, of all threads."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) * TICK_S, int(fields[12]) * TICK_S


def english_model(folder: Path) -> Path:
    """The tokenizer of benchmarks/english.py, with a configuration that both take."""
    made = folder / "english"
    shutil.copytree(model_folder(), made)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(LLAMA | config))
    return made


def character_model(folder: Path) -> Path:
    """A model whose tokens are characters, so that the next turn's prompt has an answer's very tokens."""
    made = folder / "characters"
    made.mkdir()
    special = ["<|begin|>", "<|pad|>", "<|end|>"]
    letters = [chr(code) for code in range(ord(" "), ord("~") + 1)]
    others = [chr(0x4E00 + k) for k in range(CHARACTERS - len(special) - len(letters))]
    vocabulary = {text: token_id for token_id, text in enumerate([*special, *letters, *others])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.save(str(made / "tokenizer.json"))
    settings = {"eos_token": special[2], "chat_template": "{{ messages[0].content }}"}
    (made / "tokenizer_config.json").write_text(json.dumps(settings))
    (made / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": CHARACTERS}))
    return made


@contextmanager
def penstock(model: Path, workers: int, costs: CostModel | None, slowness: float = 1.0) -> Iterator[Graph]:
    """Penstock's frontend and sim workers. Without `costs` their steps take no time; with `slowness` they,
    and what clients may wait for, take so many times as long."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        discovery = ["--discovery", f"file:{folder}/discovery"]
        timing = "zero"
        if costs is not None:
            write_penstock(costs, folder / "costs.json")
            timing = f"{folder}/costs.json"
        patience = ["--max-wait-ms", str(ADMISSION.max_wait_ms * slowness)]
        worker = ["worker", "--engine", "sim", "--model", str(model), "--served-model-name", "bench"]
        worker += ["--sim-cost-model", timing, "--sim-speedup", str(1 / slowness)]
        worker += ["--max-model-len", str(ENGINE.max_model_len), *discovery]
        log, processes = folder / "log", [start(worker) for _ in range(workers)]
        try:
            with log.open("w") as output:
                processes.append(start(["frontend", "--http-port", "0", *patience, *discovery], output))
            yield Graph("Penstock", wait_ready(log, workers), processes[-1].pid)
        finally:
            stop(processes)


@contextmanager
def dynamo(model: Path, workers: int, costs: CostModel | None, slowness: float = 1.0) -> Iterator[Graph]:
    """Dynamo's frontend and mocker workers. As `penstock`; Dynamo refuses nobody for waiting."""
    python = str(python_environment(REQUIREMENTS) / "bin" / "python")
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), _free_port()
        frontend = ["--http-host", "127.0.0.1", "--http-port", str(port), "--router-mode", "kv", *PLANES]
        mocker = ["--model-path", str(model), "--model-name", "bench", "--num-workers", str(workers)]
        mocker += ["--block-size", str(ENGINE.block_size)]
        mocker += ["--num-gpu-blocks-override", str(ENGINE.total_blocks)]
        mocker += ["--max-model-len", str(ENGINE.max_model_len)]
        mocker += ["--max-num-seqs", str(SCHEDULER.max_running)]
        mocker += ["--max-num-batched-tokens", str(SCHEDULER.max_batch_tokens)]
        mocker += ["--kv-bytes-per-token", "1024", *PLANES]  # it would load transformers to compute it
        if costs is None:
            mocker += ["--speedup-ratio", "0"]
        else:
            write_mocker(costs, folder / "costs.npz")
            mocker += ["--planner-profile-data", str(folder / "costs.npz")]
            mocker += ["--speedup-ratio", str(1 / slowness)]
        processes = list[subprocess.Popen[bytes]]()
        try:
            for module, arguments in (("mocker", mocker), ("frontend", frontend)):
                command = [python, "-m", f"dynamo.{module}", *arguments]
                with (folder / f"{module}.log").open("w") as log:
                    env = _environment(folder)
                    processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=env))
            url = f"http://127.0.0.1:{port}"
            _wait_for_dynamo(url, workers, processes, folder / "mocker.log")
            yield Graph("Dynamo", url, processes[-1].pid)
        finally:
            for process in processes:
                process.send_signal(signal.SIGTERM)
            for process in processes:
                _end(process)


def _environment(folder: Path) -> dict[str, str]:
    """Of Dynamo's processes: nothing is listened to from elsewhere but for the mocker's events, nothing
    stays in the user's home, nothing is downloaded."""
    own = {"HOME": str(folder), "DYN_FILE_KV": f"{folder}/discovery", "HF_HUB_OFFLINE": "1"}
    hosts = ("DYN_EVENT_PLANE_HOST", "DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST")
    return os.environ | own | dict.fromkeys(hosts, "127.0.0.1")


def _wait_for_dynamo(
    url: str, workers: int, processes: Sequence[subprocess.Popen[bytes]], log: Path
) -> None:
    """Until it serves the model with so many workers."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        instances = _asked(f"{url}/health").get("instances", [])
        ready = sum(instance["endpoint"] == "generate" for instance in instances)
        if ready == workers and _asked(f"{url}/v1/models").get("data"):
            return
        time.sleep(0.2)
    raise SystemExit(f"Dynamo did not get ready:\n{log.read_text()[-4000:]}")


def _asked(url: str) -> dict[str, list[dict[str, str]]]:
    try:
        with urllib.request.urlopen(url, timeout=READY_TIMEOUT_S) as answer:
            decoded: dict[str, list[dict[str, str]]] = json.load(answer)
            return decoded
    except (urllib.error.URLError, ConnectionError):
        return {}


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(timeout=STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
