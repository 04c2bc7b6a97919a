"""Guided fuzzing with atheris, which follows the branches that inputs take: `make fuzz`.

    make fuzz                                   every target for 60 seconds
    make fuzz ARGS="--seconds 20 chat http"     some of them, shorter

Each target runs in a process of its own, from its corpus on. What it finds is written to `.fuzz/`; a
finding belongs in the corpus once it is mended, where the ordinary tests try it again. Ends with 1 when
there is one, and with 2 when a target could not be run.
"""

from __future__ import annotations

import argparse
import logging
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
FOUND = Path(".fuzz")

INPUT_SECONDS = 10  # an input that takes longer is a finding
MEMORY_MIB = 2048  # and so is a process that needs more
MAX_INPUT_BYTES = 16_384

# libFuzzer's exit codes for a failed property, a timeout, too much memory.
FINDINGS = (77, 70, 71)


def search(name: str, seconds: int) -> int:
    """Run one target here; ends the process."""
    import atheris

    with atheris.instrument_imports(include=["penstock", "yaml", "json", "jinja2"]):
        from tests.fuzz.targets import TARGETS

    logging.disable(logging.CRITICAL)
    found = FOUND / name
    found.mkdir(parents=True, exist_ok=True)
    options = [
        f"-max_total_time={seconds}",
        f"-timeout={INPUT_SECONDS}",
        f"-rss_limit_mb={MEMORY_MIB}",
        f"-max_len={MAX_INPUT_BYTES}",
        f"-artifact_prefix={found}/",
        "-print_final_stats=1",
    ]
    grown = FOUND / f"{name}.corpus"  # libFuzzer adds what reaches new branches to the first folder
    grown.mkdir(exist_ok=True)
    atheris.Setup([sys.argv[0], *options, str(grown), str(FOLDER / "corpus" / name)], TARGETS[name])
    atheris.Fuzz()
    return 0


def main() -> int:
    """Run the targets one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help="which; all when none is named")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    known = sorted(path.name for path in (FOLDER / "corpus").iterdir())
    wrong = [name for name in arguments.targets if name not in known]
    if wrong:
        parser.error(f"no such target: {', '.join(wrong)}; known: {', '.join(known)}")
    if arguments.one:
        return search(arguments.targets[0], arguments.seconds)
    codes = [run_apart(name, arguments.seconds) for name in arguments.targets or known]
    return max(codes)


def run_apart(name: str, seconds: int) -> int:
    command = [sys.executable, "-m", "tests.fuzz.guided", "--one", "--seconds", str(seconds), name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 300, check=False)
    except subprocess.TimeoutExpired:
        print(f"{name}: did not end", flush=True)
        return 2
    runs = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    if done.returncode == 0 and runs:
        print(f"{name}: {runs[1]} inputs, nothing found", flush=True)
        return 0
    print(done.stdout[-2000:], done.stderr[-4000:], sep="\n")
    print(f"{name}: exit code {done.returncode}; see .fuzz/{name}/", flush=True)
    return 1 if done.returncode in FINDINGS or done.returncode < 0 else 2


if __name__ == "__main__":
    sys.exit(main())
