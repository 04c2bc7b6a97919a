"""vLLM's log within Penstock's: the same format, and only what an operator may have to act on.

vLLM's processes, this one included, configure their logging from a file, `logging.json`, which names what
is here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Final

from penstock.logs.log_pipe import unblocked

LAST_WORDS_VARIABLE = "PENSTOCK_ENGINE_LAST_WORDS"
"""Environment variable with a file's path."""

NOTICES = (
    # What Penstock decided itself.
    "Initializing KVConnectorBase_V1. This API is experimental",
    # What the graph's own flags and variables say.
    "Enforce eager set, disabling torch.compile",
    "Inductor compilation was disabled by user settings",
    "The global random seed is set to",
    # What the CPU build can do without.
    "Triton is not installed",
    "Model Runner V2 requires Triton",
    "libtcmalloc is not found",
    "libiomp is not found",
    "Reset SSM cache type to float32",
)
"""Beginnings of vLLM's warnings that warn of nothing."""


def stderr_handler() -> logging.Handler:
    """Writes to stderr, and waits for nobody who does not read it."""
    return logging.StreamHandler(unblocked(sys.stderr))


class NoNotices(logging.Filter):
    """Lets them pass only where vLLM is to say everything."""

    def filter(self, record: logging.LogRecord) -> bool:
        verbose = logging.getLogger("vllm").isEnabledFor(logging.INFO)
        return verbose or not record.getMessage().startswith(NOTICES)


PARSERS: Final = ("vllm.tool_parsers.", "vllm.reasoning.", "vllm.parser.")
"""Loggers of vLLM's parsers."""

_COMPLAINT_CHARS: Final = 300  # of what they say, which may repeat an answer

_complaints: ContextVar[list[str] | None] = ContextVar("complaints", default=None)


@contextlib.contextmanager
def parser_complaints() -> Iterator[list[str]]:
    """Meanwhile, what parsers (see `hear_parsers`) log of an answer that they cannot read goes into this
    list and not into the log. They log errors with tracebacks there, and then give the text back as it is;
    but it is the model, or `max_tokens`, that has left a tool call in pieces."""
    heard: list[str] = []
    token = _complaints.set(heard)
    try:
        yield heard
    finally:
        _complaints.reset(token)


class _NoComplaints(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        heard = _complaints.get()
        if heard is None or record.levelno < logging.WARNING:
            return True
        error = record.exc_info[1] if record.exc_info else None
        said = record.getMessage() + (f" {error}" if error is not None else "")
        heard.append(" ".join(said.split())[:_COMPLAINT_CHARS])
        return False


_no_complaints: Final = _NoComplaints()


def hear_parsers() -> None:
    """Have `parser_complaints` hear all parsers that are imported. They have a logger each, and what is put
    on a logger counts whichever way vLLM's log is configured."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(PARSERS):
            logging.getLogger(name).addFilter(_no_complaints)


class LastWords(logging.Handler):
    """Keeps why a process of vLLM's ended, so that its worker can say it: all that the worker is told by
    vLLM is that it ended."""

    def emit(self, record: logging.LogRecord) -> None:
        path = os.environ.get(LAST_WORDS_VARIABLE)
        error = record.exc_info[1] if record.exc_info else None
        if path is not None and error is not None:
            try:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(one_line(error) + "\n")
            except OSError:
                return  # nobody listens any more: these are no last words, and must not become some


@contextlib.contextmanager
def last_words() -> Iterator[Callable[[], str]]:
    """Listen to the processes that start meanwhile. Gives what the first of them died of, "" if none did:
    others follow it."""
    with tempfile.TemporaryDirectory(prefix="penstock-") as folder:
        path = Path(folder, "last-words")
        path.touch()
        os.environ[LAST_WORDS_VARIABLE] = str(path)
        try:
            yield lambda: path.read_text(encoding="utf-8").partition("\n")[0]
        finally:
            del os.environ[LAST_WORDS_VARIABLE]


def one_line(error: BaseException) -> str:
    """What an error says."""
    return " ".join((str(error) or repr(error)).split())


def log_environment() -> dict[str, str]:
    """What has vLLM, NIXL and torch log like this. For `debug`, vLLM's INFO is shown too; its own DEBUG
    when it is asked for by name (PENSTOCK_LOG=info,vllm=debug)."""
    asked = logging.getLogger("vllm").level
    if not asked:
        debug = logging.getLogger("penstock").isEnabledFor(logging.DEBUG)
        asked = logging.INFO if debug else logging.WARNING
    wanted = {
        "VLLM_LOGGING_LEVEL": logging.getLevelName(asked),
        "NIXL_LOG_LEVEL": "INFO" if asked < logging.INFO else "WARN",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TORCH_LOGS": "-torch._library.triton",
        "HF_HUB_VERBOSITY": "error",  # what failed in the end is told anyway
        "PYTHONWARNINGS": "ignore::FutureWarning",  # of vLLM's authors' concern
    }
    if os.environ.get("VLLM_CONFIGURE_LOGGING", "1") == "1":
        wanted["VLLM_LOGGING_CONFIG_PATH"] = str(Path(__file__).with_name("logging.json"))
    return wanted
