"""What is known against the installed packages: `make audit`.

Vulnerabilities come from pip-audit, which asks the package index. An index that has no advisories (a mirror
behind a firewall) is no clean bill: then this ends with 3, or with 0 and a plain word where the caller has
said `--advisories-may-be-missing`. Licences and version ranges need no network, and are always checked.

Exit codes: 0 nothing found, 1 something found, 3 advisories cannot be had.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import sysconfig
import tomllib
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

FREE = re.compile(
    r"\b(MIT|BSD|0BSD|Apache|PSF|Python Software Foundation|ISC|MPL|Mozilla|Unlicense)\b", re.I
)
"""Licences that an Apache-2.0 project may depend on."""

TIMEOUT_S = 300


def unbounded(requirements: list[str]) -> list[str]:
    """Requirements that a new major version could break, or that any old one meets."""
    bounded = re.compile(r"==|>=.*<|<.*>=|~=")
    return [text for text in requirements if not bounded.search(text) and not text.startswith("types-")]


def licence_of(name: str) -> str:
    found = metadata.metadata(name)
    classifiers = [line for line in found.get_all("Classifier") or [] if line.startswith("License")]
    return " ".join(
        [found.get("License-Expression") or "", (found.get("License") or "")[:200], *classifiers]
    )


def needed(name: str, seen: set[str]) -> set[str]:
    """A package and all it needs at run time, of those that are installed."""
    folded = re.sub(r"[-_.]+", "-", name).lower()
    if folded in seen:
        return seen
    try:
        requirements = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return seen  # for another system
    seen.add(folded)
    for requirement in requirements:
        if "extra ==" not in requirement:
            needed(re.split(r"[^\w.-]", requirement, maxsplit=1)[0], seen)
    return seen


def advisories(pip_audit: str) -> tuple[list[str], list[str]]:
    """Vulnerabilities found, and packages for which none could be looked up."""
    command = [pip_audit, "--path", sysconfig.get_paths()["purelib"], "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        return [], [f"all: {(done.stderr.strip().splitlines() or ['no report'])[-1]}"]
    found, unknown = [], []
    for package in report["dependencies"]:
        if "skip_reason" in package and package["name"] != "penstock-llm":
            unknown.append(package["name"])
        for flaw in package.get("vulns", []):
            fixed = ", ".join(flaw["fix_versions"]) or "no version"
            found.append(f"{package['name']} {package['version']}: {flaw['id']}, mended in {fixed}")
    return found, unknown


def main() -> int:
    """Check, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pip-audit", required=True, help="the program")
    parser.add_argument("--advisories-may-be-missing", action="store_true", help="say so, and end with 0")
    arguments = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    own = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    wrong = [f"{text}: needs a lower and an upper bound" for text in unbounded(own)]
    packages = sorted(needed("penstock-llm", set()) - {"penstock-llm"})
    wrong += [
        f"{name}: licence {licence_of(name).strip() or 'unknown'!r}"
        for name in packages
        if not FREE.search(licence_of(name))
    ]
    found, unknown = advisories(arguments.pip_audit)
    for line in wrong + found:
        print(line)
    print(f"{len(packages)} packages at run time, {len(wrong)} objections to licences or ranges")
    if unknown:
        print(
            f"NOT AUDITED: the package index has no advisories for {len(unknown)} packages"
            f" ({', '.join(unknown[:3])}, ...). Run `make audit` where it has."
        )
    else:
        print(f"{len(found)} known vulnerabilities")
    if wrong or found:
        return 1
    return 3 if unknown and not arguments.advisories_may_be_missing else 0


if __name__ == "__main__":
    sys.exit(main())
