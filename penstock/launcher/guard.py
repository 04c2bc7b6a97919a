"""The child's side of supervision: never outlive the supervisor."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from penstock.options.config import SUPERVISOR_VARIABLE

_PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with_supervisor() -> None:
    """Have the kernel kill this process when the supervisor that started it dies; without one, nothing.

    Called by the child itself, as its first act: nothing has to run between the supervisor's fork and
    exec, where threads make that unsafe. Only Linux can do it.
    """
    supervisor = os.environ.pop(SUPERVISOR_VARIABLE, "")
    if not supervisor or sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if str(os.getppid()) != supervisor:  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)
