from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from penstock.errors import ConfigError
from penstock.graph import Graph, Service, ServiceKind
from penstock.launcher.gpus import GpuPool, visible_gpus
from penstock.launcher.launches import (
    Site,
    check_gpus,
    labels,
    lowest_free_index,
    plan_frontend,
    plan_worker,
)
from penstock.shapes import Role


def worker(
    name: str = "Prefill", role: Role = Role.PREFILL, gpus: int = 1, engine: str = "vllm"
) -> Service:
    flags = {"role": role.value, "engine": engine, "model": "m", "port": "7"}
    return Service(name, ServiceKind.WORKER, role, 2, flags, (), {"OMP_NUM_THREADS": "4"}, gpus)


FRONTEND = Service(
    "Frontend",
    ServiceKind.FRONTEND,
    None,
    1,
    {"http-host": "0.0.0.0"},
    (),
    {"DYN_SYSTEM_PORT": "9090", "DYN_LOG": "debug"},
    0,
)


def graph(*services: Service) -> Graph:
    return Graph("toy", "ns", (FRONTEND, *services))


def site(*services: Service, http_host: str = "127.0.0.1", **environ: str) -> Site:
    return Site(graph(*services), Path("/s/discovery"), Path("/s/secret"), http_host, environ, 42)


def flags(argv: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(argv[1::2], argv[2::2], strict=True))


def test_a_worker_listens_on_a_free_local_port_and_registers_here() -> None:
    service = worker()
    launch = plan_worker(site(service, PATH="/bin", OPENBLAS_NUM_THREADS="3"), service, 1, ("0", "3"))
    assert (launch.name, launch.instance_id, launch.drain_s) == ("prefill-1", "toy-prefill-1", 30.0)
    assert launch.argv[0] == "worker"
    assert flags(launch.argv) == {
        "--role": "prefill",
        "--engine": "vllm",
        "--model": "m",
        "--host": "127.0.0.1",
        "--port": "0",
        "--advertise-host": "127.0.0.1",
        "--advertise-port": "0",
        "--kv-port": "0",
        "--kv-advertise-port": "0",
        "--instance-id": "toy-prefill-1",
        "--system-port": "0",
        "--namespace": "ns",
        "--discovery": "file:/s/discovery",
        "--link-secret-file": "/s/secret",
    }
    assert launch.env == {
        "PATH": "/bin",
        "OMP_NUM_THREADS": "4",
        "OPENBLAS_NUM_THREADS": "3",
        "CUDA_VISIBLE_DEVICES": "0,3",
        "PENSTOCK_SUPERVISOR_PID": "42",
        "PYTHONUNBUFFERED": "1",
    }


def test_a_frontend_gets_its_port_and_waits_for_the_graphs_roles() -> None:
    launch = plan_frontend(site(worker()), FRONTEND, 0, 8001)
    assert flags(launch.argv) == {
        "--expect": "prefill",
        "--http-host": "127.0.0.1",
        "--http-port": "8001",
        "--namespace": "ns",
        "--discovery": "file:/s/discovery",
        "--link-secret-file": "/s/secret",
    }
    assert launch.url == "http://localhost:8001"
    assert launch.env["DYN_LOG"] == "debug"
    assert "DYN_SYSTEM_PORT" not in launch.env
    for host, url in (
        ("10.0.0.7", "http://10.0.0.7:80"),
        ("::", "http://localhost:80"),
        ("::1", "http://[::1]:80"),
    ):
        assert plan_frontend(site(http_host=host), FRONTEND, 0, 80).url == url


def test_what_the_environment_says_is_known_here_too() -> None:
    around = {"PENSTOCK_DRAIN_S": "90"}
    service = worker()
    assert plan_worker(site(service, **around), service, 0, ()).drain_s == 90.0
    assert plan_frontend(site(**around), FRONTEND, 0, 8001).drain_s == 90.0
    patient = msgspec.structs.replace(service, env={"PENSTOCK_DRAIN_S": "120"})
    assert plan_worker(site(patient, **around), patient, 0, ()).drain_s == 120.0


def test_services_of_one_role_are_told_apart() -> None:
    assert labels(graph(worker("A"), worker("B"), worker("C", Role.DECODE))) == {
        "Frontend": "frontend",
        "A": "prefill-a",
        "B": "prefill-b",
        "C": "decode",
    }


def test_gpus_are_needed_by_those_who_use_them() -> None:
    assert check_gpus(graph(worker("A"), worker("B", Role.DECODE)), 4) == []
    with pytest.raises(
        ConfigError, match=r"^toy needs 4 GPUs \(A 2, B 2\), this machine has 3; try --engine"
    ):
        check_gpus(graph(worker("A"), worker("B", Role.DECODE)), 3)
    assert check_gpus(graph(worker("A", engine="reference")), 0) == [
        "A: no GPUs are used, this engine runs on the CPU"
    ]


def test_a_pool_of_gpus() -> None:
    pool = GpuPool(["0", "1", "GPU-x"])
    first, second = pool.take(1), pool.take(2)
    assert (first, second, pool.free, len(pool)) == (("0",), ("1", "GPU-x"), 0, 3)
    with pytest.raises(ConfigError, match=r"^1 GPUs are needed, 0 of this machine's 3 are free$"):
        pool.take(1)
    pool.give_back(second)
    pool.give_back(first)
    assert pool.take(3) == ("0", "1", "GPU-x")


def test_which_gpus_are_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2, 3"}) == ["2", "3"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus({}) == []
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 0\necho 1\n")
    program.chmod(0o700)
    assert visible_gpus({}) == ["0", "1"]
    program.write_text("#!/bin/sh\nexit 9\n")
    assert visible_gpus({}) == []


def test_lowest_free_index() -> None:
    assert [lowest_free_index(taken) for taken in ([], [0, 1], [1], [0, 2])] == [0, 2, 0, 1]


def test_a_manifests_own_expectation_stands() -> None:
    frontend = msgspec.structs.replace(FRONTEND, flags={"expect": "decode"})
    assert flags(plan_frontend(site(worker()), frontend, 0, 1).argv)["--expect"] == "decode"
