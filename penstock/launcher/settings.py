"""The settings and limits of the launcher."""

from __future__ import annotations

import msgspec


class LauncherSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How the launcher starts, watches, restarts and stops processes."""

    http_host: str = "127.0.0.1"
    """Address that frontends listen on."""

    http_port: int | None = None
    """Port of the first frontend; the next ones take the ports after it. 0: free ports. None: the
    manifest's."""

    restart_min_s: float = 0.5
    """Pause before the first restart; it doubles with each further restart."""

    restart_max_s: float = 30.0
    """Longest pause before a restart: short enough for a user who has repaired the cause and waits."""

    stable_s: float = 30.0
    """After a run of this length, the next restart has the shortest pause again."""

    refuse_after_s: float = 2.0
    """Longest pause before a restart of a frontend during which connections wait for it. During a longer
    pause they are refused, so that clients learn at once that nothing answers."""

    accept_after_s: float = 3.0
    """How long a restarted frontend may look for its workers before it accepts connections, which it then
    answers with 503."""

    kill_margin_s: float = 5.0
    """Time that a process gets after SIGTERM, beyond its drain time, before SIGKILL."""

    start_timeout_s: float = 900.0
    """Time that a new replica gets to become ready before a rolling restart stops with an error. A large
    model may have to be downloaded first."""

    ready_poll_s: float = 0.1
    """Interval between checks whether a starting process is ready."""

    health_timeout_s: float = 2.0
    """Timeout of one GET /health."""

    folder_poll_s: float = 0.5
    """Interval between checks whether the state folder was deleted."""

    replicas_max: int = 64
    """Most replicas of one service."""

    log_file_bytes: int = 16 * 1024 * 1024
    """Size at which a log file is renamed to NAME.log.1, which replaces the older one."""
