"""Container images, made without a container engine.

An image is a few layers, each a tar archive of files, with a configuration. All of them go into one archive
in the OCI image layout, which containerd imports:

- base:bookworm  Debian with python3, curl and jq
- penstock:dev   the base, Penstock's dependencies, and Penstock as it is in this checkout; user 10001
- etcd:3.4       the base and etcd
- pause:3.2      what holds a pod's namespaces

Layers are kept in the cache folder under a name that says what they were made from, so a changed checkout
costs one small layer. Its files carry no times: the same content gives the same layer, which containerd
stores once.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import platform
import shutil
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from checks.kubernetes.cluster import binaries, packages
from checks.kubernetes.cluster.command import run, say
from checks.kubernetes.cluster.places import CHECKOUT

REGISTRY = "docker.io/library"  # what containerd takes for the registry of a name without one
BASE_PACKAGES = ["ca-certificates", "curl", "iproute2", "jq", "procps", "python3"]
BASE_PYTHON = "3.11"
EXTRAS = ("etcd", "kubernetes")  # those of them that this checkout has
HOME = "opt/penstock"
BASE = "base:bookworm"
PENSTOCK_USER = "10001"
NOBODY = "65534"
LAYERS_KEPT = 4  # of each kind: checkouts share the cache folder

LAUNCHER = """\
#!/usr/bin/python3
import sys

from penstock.__main__ import main

if __name__ == "__main__":  # vLLM's processes import what started them
    sys.argv[0] = "penstock"
    main()
"""


@dataclass(frozen=True)
class Layer:
    path: Path
    digest: str  # sha256, also of the uncompressed archive: layers are not compressed


@dataclass(frozen=True)
class Image:
    name: str
    layers: Sequence[Layer]
    user: str = ""
    entrypoint: Sequence[str] = ()
    environment: Sequence[str] = ()


def folder() -> Path:
    return binaries.folder() / "images"


def build() -> Path:
    """The archive with all images, for this checkout. Makes what is not there yet."""
    with binaries.one_at_a_time():
        folder().mkdir(exist_ok=True)
        for unfinished in folder().glob(".*"):  # by a build that was killed
            shutil.rmtree(unfinished)
        images = describe()
        key = digest_of(*(layer.digest for image in images for layer in image.layers))
        path = folder() / f"images-{key[:16]}.tar"
        if not path.exists():
            forget_old("images", kept=1)
            unfinished = path.with_suffix(".unfinished")
            write_archive(images, unfinished)
            unfinished.rename(path)
        path.touch()
        return path


def describe() -> list[Image]:
    base = layer("base", make_base, packages.RELEASE, *BASE_PACKAGES)
    etcd = layer("etcd", make_etcd, binaries.recipe())
    pause = layer("pause", make_pause, binaries.recipe())
    needed = requirements_of_checkout()
    compiled = (base.digest, inspect.getsource(compile_python))
    dependencies = layer("dependencies", partial(make_dependencies, base, needed), *compiled, *needed)
    penstock = layer("penstock", partial(make_penstock, base), *compiled, LAUNCHER, *checkout_content())
    return [
        Image(BASE, [base]),
        Image("etcd:3.4", [base, etcd], user=NOBODY, entrypoint=["etcd"]),
        Image("pause:3.2", [pause], user=NOBODY, entrypoint=["/pause"]),
        Image(
            "penstock:dev",
            [base, dependencies, penstock],
            user=PENSTOCK_USER,
            entrypoint=["penstock"],
            environment=[f"PYTHONPATH=/{HOME}", "PYTHONUNBUFFERED=1", "HOME=/tmp"],
        ),
    ]


# --- layers -----------------------------------------------------------------------------------------------


def layer(name: str, make: Callable[[Path], None], *made_from: str) -> Layer:
    """The layer NAME: from the cache, or of what `make` puts into an empty folder.

    It is made again whenever the code of `make` changes, or what that reads: `made_from`.
    """
    code = inspect.getsource(make.func if isinstance(make, partial) else make)
    path = folder() / f"{name}-{digest_of(code, *made_from)[:16]}.tar"
    if path.exists():
        path.touch()
        return Layer(path, file_digest(path))
    say(f"making the image layer {name}")
    with tempfile.TemporaryDirectory(dir=folder(), prefix=f".{name}-") as temporary:
        content = Path(temporary) / "content"
        content.mkdir(mode=0o755)
        make(content)
        written = Path(temporary) / "layer.tar"
        with tarfile.open(written, "w", format=tarfile.PAX_FORMAT) as tar:
            for entry in sorted(content.iterdir()):
                tar.add(entry, entry.name, filter=FILTERS.get(name, for_everybody))
        written.rename(path)
    forget_old(name, LAYERS_KEPT)
    return Layer(path, file_digest(path))


def forget_old(name: str, kept: int) -> None:
    """Delete what was not used for the longest time."""
    for old in sorted(folder().glob(f"{name}-*.tar"), key=lambda file: file.stat().st_mtime)[:-kept]:
        old.unlink()


def for_everybody(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without times and owners, and readable for any user, whatever the checkout's files are like."""
    info.mtime = 0
    return without_owner(info)


def without_owner(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """The same with the times of the files."""
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    info.mode |= (info.mode & 0o500) >> 3 | (info.mode & 0o500) >> 6
    return info


FILTERS: dict[str, Callable[[tarfile.TarInfo], tarfile.TarInfo] | None] = {
    "base": None,  # Debian's modes matter, and its bytecode is checked against times
    "vllm": without_owner,  # so is the bytecode that pip made
}
"""What becomes of the files of some layers; those of all others are `for_everybody`."""


def make_base(target: Path) -> None:
    # In namespaces of its own: when it is killed, what it runs and what it mounts ends with it.
    run(
        *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
        *("debootstrap", "--variant=minbase", f"--include={','.join(BASE_PACKAGES)}"),
        *(packages.RELEASE, target, packages.archive_address()),
        env=packages.proxy_environment(),
    )
    for unneeded in (
        *(target / "var/lib/apt/lists").iterdir(),
        *(target / "var/cache/apt").iterdir(),
        *(target / "var/cache/debconf").iterdir(),
        *(target / "var/log").iterdir(),
        *(target / "dev").iterdir(),
        *((target / "usr/share" / name) for name in ("doc", "man", "locale")),
    ):
        shutil.rmtree(unneeded) if unneeded.is_dir() and not unneeded.is_symlink() else unneeded.unlink()


def make_etcd(target: Path) -> None:
    programs = target / "usr/bin"
    programs.mkdir(parents=True)
    for name in ("etcd", "etcdctl"):
        shutil.copy2(binaries.tool(f"bin/{name}"), programs)


def make_pause(target: Path) -> None:
    shutil.copy2(binaries.kubernetes("pause"), target)


def requirements_of_checkout() -> list[str]:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    return [*project["dependencies"], *(line for extra in EXTRAS for line in optional.get(extra, ()))]


def make_dependencies(base: Layer, requirements: Sequence[str], target: Path) -> None:
    """Packages for the Python of the base image, whichever Python runs this."""
    home = target / HOME
    run(
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile"),
        *("--python-version", BASE_PYTHON, "--implementation", "cp", "--only-binary", ":all:"),
        *("--target", str(home), *requirements),
    )
    compile_python(base, target)


def make_penstock(base: Layer, target: Path) -> None:
    """Penstock as `pip install` would lay it out, but without running a build for every change."""
    home = target / HOME
    without_bytecode = shutil.ignore_patterns("__pycache__")
    shutil.copytree(CHECKOUT / "penstock", home / "penstock", ignore=without_bytecode)
    shutil.copytree(CHECKOUT / "models/tiny", target / "models/tiny", ignore=without_bytecode)
    launcher = target / "usr/local/bin/penstock"
    launcher.parent.mkdir(parents=True)
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)
    compile_python(base, target)


def compile_python(base: Layer, target: Path) -> None:
    """Bytecode, by the base image's own Python: pods have read-only roots, and would compile at every
    start.

    It is never checked against the sources, whose times are gone.
    """
    with tempfile.TemporaryDirectory(dir=folder(), prefix=".root-") as root:
        with tarfile.open(base.path) as tar:
            tar.extractall(root, filter="fully_trusted")
        shutil.copytree(target / HOME, Path(root) / HOME, symlinks=True)
        (Path(root) / "dev/shm").mkdir(parents=True)  # for the locks between its processes
        options = ("-q", "--invalidation-mode", "unchecked-hash", "-j", "0")
        run("chroot", root, "python3", "-m", "compileall", *options, f"/{HOME}")
        shutil.copytree(Path(root) / HOME, target / HOME, symlinks=True, dirs_exist_ok=True)


def checkout_content() -> Iterable[str]:
    """All that the Penstock layer is made from, as names and digests."""
    for top in ("penstock", "models/tiny"):
        for path in sorted((CHECKOUT / top).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield str(path.relative_to(CHECKOUT))
                yield file_digest(path)


# --- the archive ------------------------------------------------------------------------------------------


def write_archive(images: Sequence[Image], path: Path) -> None:
    """An OCI image layout: blobs named by their digest, and an index of the images."""
    with tarfile.open(path, "w") as tar:
        written = set()

        def put(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        def put_json(value: Any, kind: str) -> dict[str, Any]:
            content = json.dumps(value, sort_keys=True).encode()
            name = digest_of(content)
            put(f"blobs/sha256/{name}", content)
            return {
                "mediaType": f"application/vnd.oci.image.{kind}.v1+json",
                "digest": f"sha256:{name}",
                "size": len(content),
            }

        put("oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
        manifests = []
        for image in images:
            for layer in image.layers:
                if layer.digest not in written:
                    written.add(layer.digest)
                    tar.add(layer.path, f"blobs/sha256/{layer.digest}")
            manifest = put_json(manifest_of(image, put_json(configuration_of(image), "config")), "manifest")
            manifest["annotations"] = {"io.containerd.image.name": f"{REGISTRY}/{image.name}"}
            manifests.append(manifest)
        put("index.json", json.dumps({"schemaVersion": 2, "manifests": manifests}).encode())


def configuration_of(image: Image) -> dict[str, Any]:
    path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    config: dict[str, Any] = {"Env": [path, *image.environment], "WorkingDir": "/"}
    if image.user:
        config["User"] = image.user
    if image.entrypoint:
        config["Entrypoint"] = list(image.entrypoint)
    return {
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()],
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer.digest}" for layer in image.layers]},
    }


def manifest_of(image: Image, configuration: dict[str, Any]) -> dict[str, Any]:
    return {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": configuration,
        "layers": [
            {
                "mediaType": "application/vnd.oci.image.layer.v1.tar",
                "digest": f"sha256:{layer.digest}",
                "size": layer.path.stat().st_size,
            }
            for layer in image.layers
        ],
    }


# --- digests ----------------------------------------------------------------------------------------------


def digest_of(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(data if len(parts) == 1 else hashlib.sha256(data).digest())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
