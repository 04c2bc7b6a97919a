"""deploy/docker/Dockerfile, really built: by buildah, on the Debian of the cluster's own images."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from checks.kubernetes.cluster import binaries, images, packages, places

pytestmark = pytest.mark.own_cluster  # it takes Debian, its packages, and root

BASE, BUILT = "localhost/base:bookworm", "localhost/penstock:built"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
BUILD_S = 600
POLICY = {"default": [{"type": "insecureAcceptAnything"}]}


@dataclass(frozen=True)
class Buildah:
    """Containers are only chroots: no container engine, no network of their own."""

    folder: Path

    def __call__(self, *arguments: str) -> str:
        """What it printed. Fails the test with what it complained of when it fails."""
        places_given = ("--root", str(self.folder / "root"), "--runroot", str(self.folder / "run"))
        done = subprocess.run(
            ["buildah", "--storage-driver=vfs", *places_given, *arguments],
            cwd=places.CHECKOUT,
            env={**os.environ, "BUILDAH_ISOLATION": "chroot"},
            capture_output=True,
            text=True,
            timeout=BUILD_S,
            check=False,
        )
        assert done.returncode == 0, f"buildah {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    @property
    def policy(self) -> str:
        """Images are not signed."""
        return f"--signature-policy={self.folder / 'policy.json'}"


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    """With the image BUILT in its store."""
    if shutil.which("buildah") is None:
        packages.refresh()
        packages.install(["buildah"])
    tool = Buildah(tmp_path_factory.mktemp("buildah"))
    (tool.folder / "policy.json").write_text(json.dumps(POLICY))
    with binaries.one_at_a_time():
        images.folder().mkdir(parents=True, exist_ok=True)
        base = images.layer("base", images.make_base, packages.RELEASE, *images.BASE_PACKAGES)
    container = tool("from", "scratch")
    tool("add", container, str(base.path), "/")
    tool("commit", tool.policy, "--rm", container, BASE)
    # The machine may trust authorities of its own, through which packages come.
    trusted = ("--volume", f"{CERTIFICATES}:{CERTIFICATES}:ro") if CERTIFICATES.exists() else ()
    recipe = ("--build-arg", f"BASE={BASE}", "-f", "deploy/docker/Dockerfile", "-t", BUILT, ".")
    tool("bud", tool.policy, "--pull-never", *trusted, *recipe)
    yield tool
    tool("rmi", "--all", "--force")


def test_the_built_image_runs_penstock_as_its_own_user(buildah: Buildah) -> None:
    container = buildah("from", buildah.policy, "--pull-never", BUILT)
    try:
        run = ("run", container, "--")
        assert buildah(*run, "id", "-u") == images.PENSTOCK_USER
        assert buildah(*run, "penstock", "--version")
        for program in ("frontend", "worker", "operator"):  # each imports what it needs
            assert f"penstock {program}" in buildah(*run, "penstock", program, "--help")
        assert buildah(*run, "python3", "-c", "import lightkube, cryptography, httpx2") == ""
        for tool in ("curl", "jq", "bash"):
            assert buildah(*run, "which", tool)
        model = buildah(*run, "ls", "/models/tiny").split()
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(model)
        # Kubernetes sees by the number that it is not root.
        inspected = json.loads(buildah("inspect", "--type", "image", BUILT))["OCIv1"]["config"]
        assert (inspected["User"], inspected["Entrypoint"]) == (images.PENSTOCK_USER, ["penstock"])
    finally:
        buildah("rm", container)
