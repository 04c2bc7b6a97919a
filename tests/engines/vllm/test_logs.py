"""vLLM's log within Penstock's."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.engines.vllm.logs import (
    LAST_WORDS_VARIABLE,
    NOTICES,
    LastWords,
    NoNotices,
    hear_parsers,
    last_words,
    log_environment,
    parser_complaints,
)


@pytest.fixture(autouse=True)
def levels() -> Iterator[None]:
    """Levels as before, afterwards."""
    loggers = [logging.getLogger(name) for name in ("penstock", "vllm")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.NOTSET)
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


@pytest.mark.parametrize(
    ("penstock", "vllm", "expected"),
    [
        (logging.INFO, logging.NOTSET, "WARNING"),
        (logging.DEBUG, logging.NOTSET, "INFO"),
        (logging.INFO, logging.DEBUG, "DEBUG"),
        (logging.DEBUG, logging.ERROR, "ERROR"),
    ],
)
def test_level_follows_what_was_asked_for(penstock: int, vllm: int, expected: str) -> None:
    logging.getLogger("penstock").setLevel(penstock)
    logging.getLogger("vllm").setLevel(vllm)
    assert log_environment()["VLLM_LOGGING_LEVEL"] == expected


def test_configuration_is_left_to_whoever_switched_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM refuses a configuration file then."""
    path = Path(log_environment()["VLLM_LOGGING_CONFIG_PATH"])
    assert json.loads(path.read_text())["loggers"].keys() == {"vllm"}
    monkeypatch.setenv("VLLM_CONFIGURE_LOGGING", "0")
    assert "VLLM_LOGGING_CONFIG_PATH" not in log_environment()


def test_a_pipe_that_nobody_reads_stops_no_process_of_vllms() -> None:
    """vLLM itself, which logging.json asks for the level, need not be here."""
    program = """
import json, logging.config, sys
config = json.load(open(sys.argv[1]))
config["loggers"]["vllm"]["level"] = "WARNING"
logging.config.dictConfig(config)
for number in range(2000):
    logging.getLogger("vllm.core").warning("number=%d %s", number, "x" * 200)
"""
    path = log_environment()["VLLM_LOGGING_CONFIG_PATH"]
    with subprocess.Popen([sys.executable, "-c", program, path], stderr=subprocess.PIPE) as process:
        try:
            assert process.wait(60) == 0
        finally:
            process.kill()
        assert process.stderr is not None
        assert b" WARNING vllm.core number=0 x" in process.stderr.readline()


@pytest.mark.parametrize(
    ("message", "level", "passes"),
    [
        (NOTICES[0] + " and subject to change", logging.WARNING, False),
        (NOTICES[0] + " and subject to change", logging.INFO, True),
        ("Request was preempted", logging.WARNING, True),
    ],
)
def test_vllms_notices_pass_only_at_info_and_other_lines_always(
    message: str, level: int, passes: bool
) -> None:
    logging.getLogger("vllm").setLevel(level)
    record = logging.LogRecord("vllm.config", logging.WARNING, __file__, 1, "%s", (message,), None)
    assert NoNotices().filter(record) is passes


def test_last_words_are_the_first_ones() -> None:
    log = logging.Logger("vllm.v1.engine.core")
    log.addHandler(LastWords())
    with last_words() as words:
        assert words() == ""
        log.error("no exception")
        for cause in ("no memory\nleft", "a process ended"):
            try:
                raise ValueError(cause)
            except ValueError:
                log.exception("failed to start")
        assert words() == "no memory left"
    log.error("nobody listens", exc_info=ValueError("more"))


def test_errors_after_the_start_are_no_last_words_and_end_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A process keeps the environment that it was started with; nobody listens there any more."""
    monkeypatch.setenv(LAST_WORDS_VARIABLE, str(tmp_path / "gone" / "last-words"))
    log = logging.Logger("vllm.v1.engine.core")
    log.addHandler(LastWords())
    log.error("a transfer failed", exc_info=ValueError("no such peer"))


def test_what_parsers_say_of_an_answer_goes_to_who_has_it_parsed(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("vllm.tool_parsers.some_parser")
    hear_parsers()
    with parser_complaints() as heard:
        try:
            json.loads("{")
        except ValueError:
            log.exception("Error in\nextracting tool call from response.")
        log.debug("not heard")
        logging.getLogger("vllm.engine").warning("somebody else's")
    assert [line[:52] for line in heard] == ["Error in extracting tool call from response. Expecti"]
    assert "Error" not in caplog.text
    assert "somebody else's" in caplog.text
    log.error("as ever")
    assert "as ever" in caplog.text
