"""Sets up the logging of a process.

Log lines are one line each, `time level component message`, with values as key=value; or each line is one
JSON object with the same parts.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal, TextIO

import msgspec

from penstock.errors import ConfigError
from penstock.logs.log_pipe import unblocked

LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}

LEVEL_VARIABLES = ("PENSTOCK_LOG", "DYN_LOG")  # the second is Dynamo's
_COLOURS = {logging.WARNING: "\x1b[33m", logging.ERROR: "\x1b[31m", logging.CRITICAL: "\x1b[31m"}
_DIM, _RESET = "\x1b[2m", "\x1b[0m"


class LineFormatter(logging.Formatter):
    """Formats a record as `2026-01-31T12:00:00.123Z INFO  router message`. A traceback follows on lines of
    its own."""

    def __init__(self, colour: bool) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        when, component = _when(record), _component(record)
        level = f"{record.levelname:<7}"
        if self._colour:
            when, component = f"{_DIM}{when}{_RESET}", f"{_DIM}{component}{_RESET}"
            level = f"{_COLOURS.get(record.levelno, '')}{level}{_RESET}"
        # Line breaks are escaped, since a client may choose parts of a message, for example a model's name.
        message = record.getMessage().replace("\r", "\\r").replace("\n", "\\n")
        line = f"{when} {level} {component} {message}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object in one line, with a traceback as a text in it."""

    def format(self, record: logging.LogRecord) -> str:
        parts = {
            "time": _when(record),
            "level": record.levelname,
            "component": _component(record),
            "message": record.getMessage(),
        }
        if record.exc_info:
            parts["traceback"] = self.formatException(record.exc_info)
        # A client may choose parts of a message, and half a surrogate is no text of JSON.
        whole = {name: part.encode("utf-8", "replace").decode() for name, part in parts.items()}
        return msgspec.json.encode(whole).decode()


def _when(record: logging.LogRecord) -> str:
    return f"{_second(int(record.created))}.{int(record.msecs):03d}Z"


@lru_cache(maxsize=1)
def _second(unix_s: int) -> str:
    """A second may have many lines."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(unix_s))


def _component(record: logging.LogRecord) -> str:
    return record.name.removeprefix("penstock.")


def setup_logging(
    level: str | None = None,
    form: Literal["text", "json"] = "text",
    *,
    environ: Mapping[str, str] = os.environ,
    stream: TextIO | None = None,
) -> None:
    """Send this process's logs to `stream` (default: standard error).

    The level is the flag's, else PENSTOCK_LOG's, else DYN_LOG's, else `info`. A filter list after a comma
    (`info,penstock.router=debug`) sets single components. Raises ConfigError for an unknown level.
    """
    source, wanted = "--log-level", level
    for name in LEVEL_VARIABLES:
        if wanted is None and environ.get(name):
            source, wanted = name, environ[name]
    root_level, components = _parse_levels(source, wanted or "info")
    stream = stream or sys.stderr
    colour = stream.isatty() and "NO_COLOR" not in environ
    formatter = JsonFormatter() if form == "json" else LineFormatter(colour)

    def lost_line(count: int) -> str:
        message = "lines_lost=%d: nobody read them"
        return formatter.format(
            logging.LogRecord("penstock.logs", logging.WARNING, __file__, 0, message, (count,), None)
        )

    _leave_out_places()
    handler = logging.StreamHandler(unblocked(stream, lost_line))
    handler.setFormatter(formatter)
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    # The chosen level is for Penstock; libraries log only warnings and errors.
    root.setLevel(max(root_level, logging.WARNING))
    logging.getLogger("penstock").setLevel(root_level)
    for component, component_level in components.items():
        logging.getLogger(component).setLevel(component_level)


def _leave_out_places() -> None:
    """Do not look up for each record what no line shows: where in the code it was made, and by which thread
    and process. That is half of what a line costs (Python's logging HOWTO, "Optimization")."""
    vars(logging)["_srcfile"] = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    if sys.version_info >= (3, 12):
        logging.logAsyncioTasks = False


def _parse_levels(source: str, text: str) -> tuple[int, dict[str, int]]:
    root_level = logging.INFO
    components = {}
    for part in text.split(","):
        component, equals, level_name = part.strip().rpartition("=")
        level = LEVELS.get(level_name.strip().lower())
        if level is None:
            raise ConfigError(f"{source}: unknown level {level_name!r}; one of {', '.join(LEVELS)}")
        if equals:
            components[component.strip()] = level
        else:
            root_level = level
    return root_level, components
