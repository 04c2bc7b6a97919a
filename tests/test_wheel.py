"""The wheel: what is in it, and that it runs without the checkout."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import penstock
from penstock.engines.vllm.installed import INSTALL

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, capture_output=True, timeout=120, check=True)
    [path] = folder.glob("*.whl")
    return path


def test_it_has_its_name_and_all_files_of_the_package(wheel: Path) -> None:
    assert wheel.name == f"penstock_llm-{penstock.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"penstock_llm-{penstock.__version__}.dist-info"
        metadata = HeaderParser().parsestr(archive.read(f"{info}/METADATA").decode())
    assert metadata["Name"] == "penstock-llm"
    assert {"vllm", "nixl", "etcd"} <= set(metadata.get_all("Provides-Extra"))
    ours = [
        path
        for path in (ROOT / "penstock").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    assert {str(path.relative_to(ROOT)) for path in ours} == {
        name for name in names if not name.startswith(info)
    }


def test_it_runs_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    run = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 120, "check": True}
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], **run)
    python = environment / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--no-compile", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], **run)
    # What it needs is here already; the checkout, which these tests run from, is not among it.
    [site] = environment.glob("lib/python*/site-packages")
    (site / "needed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    done = subprocess.run([environment / "bin" / "penstock", "--version"], **run)
    assert done.stdout == f"{penstock.__version__}\n"
    where = subprocess.run([python, "-c", "import penstock; print(penstock.__file__)"], **run)
    assert Path(where.stdout.strip()).is_relative_to(environment)
    subprocess.run([environment / "bin" / "penstock", "worker", "--help"], **run)


def test_what_errors_say_to_install_is_what_the_extras_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert project["scripts"] == {"penstock": "penstock.__main__:main"}
    assert " ".join(f"'{requirement}'" for requirement in extras["vllm"]) in INSTALL
    assert extras["etcd"] == ["httpx2>=2.12,<3"]  # assembly.py says so
