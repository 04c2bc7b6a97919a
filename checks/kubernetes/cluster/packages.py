"""What the cluster needs of Debian, by the machine's own package configuration.

Plain tools are installed with apt-get. Programs that Debian runs as services (etcd, containerd), or that a
machine may have from elsewhere (runc, CNI plugins, Go), are only downloaded and unpacked into the cluster's
own folder: no service starts, and nothing that is installed is replaced.

Sources of packages are fetched with a list of sources and a folder for package lists of their own, so that
the machine's apt configuration stays as it is.
"""

from __future__ import annotations

from pathlib import Path

from checks.kubernetes.cluster.command import ClusterError, output, run

RELEASE = "bookworm"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

TOOLS = [
    "conntrack",
    "debian-archive-keyring",
    "debootstrap",
    "dpkg-dev",
    "gcc",
    "iproute2",
    "iptables",
    "libc6-dev",
    "mount",
    "openssl",
]
NONINTERACTIVE = {"DEBIAN_FRONTEND": "noninteractive"}
UNSANDBOXED = ("-o", "APT::Sandbox::User=root")  # apt's own user cannot write to our folders


def refresh() -> None:
    """Learn which packages there are: a new machine knows of none."""
    run("apt-get", "-q", "update")


def missing_tools() -> list[str]:
    return [name for name in TOOLS if not installed(name)]


def installed(name: str) -> bool:
    done = run("dpkg-query", "-W", "-f", "${db:Status-Status}", name, check=False)
    return done.stdout.startswith("installed")  # once for each architecture


def install(names: list[str]) -> None:
    run("apt-get", "-q", "-y", "install", "--no-install-recommends", *names, env=NONINTERACTIVE)


def unpack(names: list[str], folder: Path) -> None:
    """Download these packages, and unpack them below `folder` as they would lie below /."""
    downloads = folder / "downloads"
    downloads.mkdir(parents=True)
    run("apt-get", "-q", *UNSANDBOXED, "download", *names, cwd=downloads)
    for archive in sorted(downloads.glob("*.deb")):
        run("dpkg-deb", "--extract", archive, folder)
        archive.unlink()
    downloads.rmdir()


def unpack_source(name: str, folder: Path) -> Path:
    """Download and unpack a source package in `folder`; the folder that it unpacked to."""
    lists, cache, sources = folder / "lists", folder / "cache", folder / "sources.list"
    for needed in (lists, cache):
        (needed / "partial").mkdir(parents=True)
    (cache / "archives" / "partial").mkdir(parents=True)
    signed_by = f"[signed-by={KEYRING}] " if KEYRING.exists() else ""
    sources.write_text(f"deb-src {signed_by}{archive_address()} {RELEASE} main\n")
    options = (
        *UNSANDBOXED,
        *("-o", f"Dir::Etc::sourcelist={sources}", "-o", "Dir::Etc::sourceparts=/dev/null"),
        *("-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={cache}"),
    )
    run("apt-get", "-q", *options, "update")
    run("apt-get", "-q", *options, "source", name, cwd=folder)
    [unpacked] = [found for found in folder.glob(f"{name}-*") if found.is_dir()]
    return unpacked


def archive_address() -> str:
    """Where this machine gets Debian from."""
    addresses = output(
        *("apt-get", "indextargets", "--format", "$(REPO_URI)"),
        *("Created-By: Packages", "Origin: Debian", "Component: main", f"Release: {RELEASE}"),
    ).split()
    if not addresses:
        raise ClusterError(f"apt on this machine has no source for Debian {RELEASE}, main: add one")
    return addresses[0]


def proxy_environment() -> dict[str, str]:
    """apt's HTTP proxy, if it has one, for programs that download from Debian without apt."""
    proxy = output("apt-config", "shell", "proxy", "Acquire::http::Proxy")
    value = proxy.removeprefix("proxy=").strip("'")
    return {"http_proxy": value} if value and value != "false" else {}
