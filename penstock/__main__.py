"""The `penstock` command, and `python -m penstock`."""

import os
import signal

_FIRST_PROCESS = 1


def main() -> None:
    """Run one command and exit.

    In a container it is the first process, to which Linux sends no signal that it has no handler for. So
    there has to be one before anything is imported: a pod that is deleted while it starts would otherwise
    stay for all of its grace period.
    """
    if os.getpid() == _FIRST_PROCESS:
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
    from penstock.cli import main as run_command

    run_command()


if __name__ == "__main__":
    main()
