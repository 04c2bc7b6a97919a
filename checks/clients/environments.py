"""Where the client programs are installed: an environment for each, in the user's cache folder.

It is made when it is first needed, and anew when its requirements change.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from checks.kubernetes.cluster.places import CACHE

INSTALL_S = 600
NODE = Path(__file__).parent / "node" / "node.requirements.txt"


def python_environment(requirements: Path) -> Path:
    """A venv that has just these packages."""

    def install(folder: Path) -> None:
        run(sys.executable, "-m", "venv", str(folder))
        pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        run(*pip, "install", "--quiet", "--no-deps", "--requirement", str(requirements))

    return kept(client_of(requirements), sys.version + requirements.read_text(), install)


def node_environment(package: Path) -> Path:
    """A folder with the packages of this package.json in `node_modules`, and Node.js in `bin`."""
    node = python_environment(NODE)

    def install(folder: Path) -> None:
        folder.mkdir()
        shutil.copy(package, folder / "package.json")
        (folder / "bin").symlink_to(node / "bin")
        run(str(node / "bin" / "npm"), "install", "--no-audit", "--no-fund", "--prefix", str(folder))

    return kept(client_of(package), node.name + package.read_text(), install)


def client_of(file: Path) -> str:
    return file.name.partition(".")[0]


def kept(client: str, recipe: str, install: Callable[[Path], None]) -> Path:
    """The folder that `install` made by this recipe; the mark of completion comes last."""
    folder = CACHE / f"clients-{client}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever is second waits for the first
        if not (folder / ".complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            install(folder)
            (folder / ".complete").touch()
    return folder


def run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=INSTALL_S)
