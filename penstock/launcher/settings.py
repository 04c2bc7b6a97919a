"""What can be set about a launcher, and its limits."""

from __future__ import annotations

import msgspec


class LauncherSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How processes are started, watched, restarted and stopped."""

    http_host: str = "127.0.0.1"
    """Address that frontends listen on."""

    http_port: int | None = None
    """Port of the first frontend, others follow; 0 takes free ones; None: as the manifest says."""

    restart_min_s: float = 0.5
    """Pause before the first restart; doubles with each one that follows."""

    restart_max_s: float = 30.0
    """Longest pause: short enough that a repaired cause is picked up while one watches."""

    stable_s: float = 30.0
    """A process that ran this long is well: its next restart starts with the shortest pause again."""

    accept_after_s: float = 3.0
    """What a frontend that crashed gets to find its workers again before it accepts connections that it can
    only answer with 503."""

    kill_margin_s: float = 5.0
    """Beyond its own drain time, what a process gets to end after SIGTERM. Then SIGKILL."""

    start_timeout_s: float = 900.0
    """What a replica gets to become ready before a rolling restart is ended for it: a large model may have
    to be downloaded first."""

    ready_poll_s: float = 0.1
    """Between looks at whether a starting process is ready."""

    health_timeout_s: float = 2.0
    """For one GET /health."""

    folder_poll_s: float = 0.5
    """Between looks at whether somebody deleted the state folder."""

    replicas_max: int = 64
    """Of one service, on this one machine."""

    log_file_bytes: int = 16 * 1024 * 1024
    """Size at which an instance's log file is set aside; one older file is kept."""
