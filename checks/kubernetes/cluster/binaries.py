"""Kubernetes, built from Debian's source package with Debian's Go, and the programs that it runs on.

It takes six minutes on two cores, needs 2 GB of disk meanwhile and no network besides Debian's packages.
The result is kept in the user's cache folder, in one folder for each content of the recipe (this file and
packages.py), 0.4 GB. One build runs at a time; a build that was interrupted goes on where Go's cache ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from checks.kubernetes.cluster import packages
from checks.kubernetes.cluster.command import ClusterError, run, say
from checks.kubernetes.cluster.places import CACHE

PROGRAMS = [
    "kubelet",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kube-proxy",
    "kubectl",
]
RUNTIME_PACKAGES = ["etcd-server", "etcd-client", "containerd", "runc", "containernetworking-plugins"]
BUILD_PACKAGES = ["golang-1.19-go", "golang-1.19-src", "golang-github-modern-go-reflect2-dev"]
GO = Path("usr/lib/go-1.19")
# Without these two, the kubelet waits for Docker and for clouds whenever it starts, and the build takes
# half as long again.
BUILD_TAGS = "providerless,dockerless"
OPENAPI = "pkg/generated/openapi"


@cache  # the files may change while this runs: a build ends as it began
def recipe() -> str:
    """A name for how binaries are made: whenever that changes, they are built again. A module that only
    moved to another folder changes nothing, so imports do not count."""
    digest = hashlib.sha256()
    for module in (__file__, packages.__file__):
        for line in Path(module).read_text(encoding="utf-8").splitlines():
            if not line.startswith(("from ", "import ")):
                digest.update(line.encode() + b"\n")
    return digest.hexdigest()[:12]


def folder() -> Path:
    return CACHE / f"cluster-{recipe()}"


def kubernetes(program: str) -> Path:
    return folder() / "bin" / program


def tool(program: str) -> Path:
    """etcd, containerd and the like."""
    return folder() / "tools" / "usr" / program


def build() -> None:
    """Build what is not there yet."""
    with one_at_a_time():
        complete = folder() / "complete"
        if complete.exists() and not packages.missing_tools():
            return
        started = time.monotonic()
        packages.refresh()
        say(f"packages come from {packages.archive_address()}")
        if missing := packages.missing_tools():
            say("installing " + ", ".join(missing))
            packages.install(missing)
        if not complete.exists():
            build_all()
            complete.touch()
        say(f"built in {time.monotonic() - started:.0f} s: {folder()}")


@contextmanager
def one_at_a_time() -> Iterator[None]:
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"cluster-{recipe()}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another build runs: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        os.set_inheritable(lock.fileno(), True)
        yield


def build_all() -> None:
    workshop = folder() / "build"
    go_cache = workshop / "go-cache"
    go_cache.mkdir(parents=True, exist_ok=True)
    for left in (folder() / "tools", *(path for path in workshop.iterdir() if path != go_cache)):
        shutil.rmtree(left, ignore_errors=True)
    say("downloading etcd, containerd, runc, CNI plugins, Go and the source of Kubernetes")
    packages.unpack(RUNTIME_PACKAGES, folder() / "tools")
    packages.unpack(BUILD_PACKAGES, workshop / "debian")
    (workshop / "source").mkdir()
    unpacked = packages.unpack_source("kubernetes", workshop / "source")
    source = workshop / "go" / "src" / "k8s.io" / "kubernetes"
    source.parent.mkdir(parents=True)
    unpacked.rename(source)
    environment = go_environment(workshop)
    prepare(source, workshop, environment)
    compile_all(source, version_of(unpacked.name), environment)
    build_pause(source)
    shutil.rmtree(workshop)


def version_of(name: str) -> str:
    """'kubernetes-1.20.5+really1.20.2' is version 1.20.2."""
    found = re.search(r"(?:really|-)(\d+\.\d+\.\d+)$", name)
    if found is None:
        raise ClusterError(f"no version in the name of Debian's source package: {name}")
    return found[1]


def go_environment(workshop: Path) -> dict[str, str]:
    root = workshop / "debian" / GO
    return {
        "GOROOT": str(root),
        "GOPATH": str(workshop / "go"),
        "GOCACHE": str(workshop / "go-cache"),
        "GO111MODULE": "off",
        "GOFLAGS": "",
        "CGO_ENABLED": "0",
        "PATH": f"{root / 'bin'}:{os.environ['PATH']}",
    }


def prepare(source: Path, workshop: Path, environment: dict[str, str]) -> None:
    """Three things that the source package lacks before it builds with this Go, and runs well here."""
    # The vendored reflect2 reads the runtime's maps as they were before Go 1.18.
    vendored = source / "vendor/github.com/modern-go/reflect2"
    shutil.rmtree(vendored)
    shutil.copytree(workshop / "debian/usr/share/gocode/src/github.com/modern-go/reflect2", vendored)
    # The kubelet asks each of these clouds for passwords of registries as it starts, and waits 6 s for AWS.
    plugins = source / "cmd/kubelet/app/plugins.go"
    lines = plugins.read_text().splitlines(keepends=True)
    plugins.write_text("".join(line for line in lines if not re.search(r'provider/(aws|azure|gcp)"', line)))
    # One generated package is not shipped.
    say("generating Kubernetes' OpenAPI definitions")
    generator = workshop / "openapi-gen"
    run(*go_build(generator), "./vendor/k8s.io/kube-openapi/cmd/openapi-gen", cwd=source, env=environment)
    run(
        *(generator, "--logtostderr", "-i", ",".join(packages_with_openapi(source))),
        *("-p", f"k8s.io/kubernetes/{OPENAPI}", "-O", "zz_generated.openapi"),
        *("-h", "hack/boilerplate/boilerplate.generatego.txt", "-r", workshop / "violations"),
        cwd=source,
        env=environment,
    )


def packages_with_openapi(source: Path) -> list[str]:
    """Go packages that ask for OpenAPI definitions, by the names under which Kubernetes imports them."""
    found = set()
    for top in ("staging/src/k8s.io", "pkg", "cmd"):
        for path in (source / top).rglob("*.go"):
            place = str(path.relative_to(source))
            # Generators and examples carry the marker without meaning it.
            if re.search(r"code-generator|sample-(apiserver|controller)|generated|_test\.go$", place):
                continue
            if "+k8s:openapi-gen=" in path.read_text(encoding="utf-8"):
                package = os.path.dirname(place)
                found.add("k8s.io/kubernetes/" + re.sub(r"^staging/src/", "vendor/", package))
    return sorted(found)


def go_build(target: Path) -> list[str | Path]:
    return ["nice", "-n", "19", "go", "build", "-trimpath", "-o", target]


def compile_all(source: Path, version: str, environment: dict[str, str]) -> None:
    major, minor, _ = version.split(".")
    values = {"gitVersion": f"v{version}", "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
    # Where servers and clients look for their version, as the linker names vendored packages.
    vendored = [f"k8s.io/kubernetes/vendor/k8s.io/{name}" for name in ("component-base", "client-go/pkg")]
    settings = [f"-X {package}/version.{name}={values[name]}" for package in vendored for name in values]
    flags = "-s -w " + " ".join(settings)
    for number, program in enumerate(PROGRAMS, 1):
        started = time.monotonic()
        command = [
            *go_build(kubernetes(program)),
            "-tags",
            BUILD_TAGS,
            "-ldflags",
            flags,
            f"./cmd/{program}",
        ]
        run(*command, cwd=source, env=environment)
        say(f"{number}/{len(PROGRAMS)} {program}: {time.monotonic() - started:.0f} s")


def build_pause(source: Path) -> None:
    """The process that holds a pod's namespaces."""
    code = source / "build/pause/linux/pause.c"
    run("gcc", "-Os", "-static", "-s", "-DVERSION=3.2", "-o", kubernetes("pause"), code)
