"""A process that the launcher started must not outlive it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from penstock.options.config import SUPERVISOR_VARIABLE

_PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with_supervisor() -> None:
    """Have the kernel kill this process when the supervisor that started it dies. Does nothing when no
    supervisor started it.

    The child calls this first of all. The supervisor could do it between fork and exec, but code that runs
    there is unsafe in a process with threads. Only Linux supports this.
    """
    supervisor = os.environ.pop(SUPERVISOR_VARIABLE, "")
    if not supervisor or sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if str(os.getppid()) != supervisor:  # the supervisor died before the call above
        os.kill(os.getpid(), signal.SIGKILL)
