"""Log lines and metrics, as an operator reads them."""

import asyncio
import io
import json
import logging
import os
import platform
import re
from datetime import datetime

import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock import __version__
from penstock.errors import ConfigError
from penstock.logs.setup import LineFormatter, setup_logging
from penstock.metrics import Metrics
from penstock.shapes import Load


@pytest.fixture(autouse=True)
def _restored_logging():
    root, ours = logging.getLogger(), logging.getLogger("penstock")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:], root.level = before[0], before[1]
    root.setLevel(before[1])
    ours.setLevel(before[2])
    logging.getLogger("penstock.router").setLevel(logging.NOTSET)


def _lines(level=None, environ=None):
    stream = io.StringIO()
    setup_logging(level, environ=environ or {}, stream=stream)
    return stream


def test_a_line_has_time_level_component_and_message():
    stream = _lines()
    logging.getLogger("penstock.router").info("placed request=%s worker=%s", "r-1", "w-2")
    when, level, component, message = stream.getvalue().rstrip("\n").split(None, 3)
    assert when.endswith("Z")
    assert "T" in when
    assert (level, component, message) == ("INFO", "router", "placed request=r-1 worker=w-2")
    assert "\x1b" not in stream.getvalue()


def test_a_message_stays_on_one_line_and_a_traceback_follows():
    stream = _lines()
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("penstock").exception("model=%s", "a\nINFO forged")
    first, *rest = stream.getvalue().splitlines()
    assert first.endswith("model=a\\nINFO forged")
    assert rest[-1] == "ValueError: broken"


@pytest.mark.parametrize(
    ("level", "environ", "expected"),
    [
        (None, {}, logging.INFO),
        (None, {"DYN_LOG": "debug"}, logging.DEBUG),
        (None, {"PENSTOCK_LOG": "error", "DYN_LOG": "debug"}, logging.ERROR),
        ("warn", {"PENSTOCK_LOG": "error"}, logging.WARNING),
        ("INFO", {}, logging.INFO),
    ],
)
def test_the_flag_wins_over_the_variables(level, environ, expected):
    _lines(level, environ)
    assert logging.getLogger("penstock").level == expected


def test_json_lines_have_the_same_parts_as_text_and_one_object_each():
    stream = io.StringIO()
    setup_logging(None, "json", environ={}, stream=stream)
    logging.getLogger("penstock.router").info("placed request=%s", "r-1\nINFO forged \ud800")
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("penstock.frontend").exception("failed")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert datetime.fromisoformat(first.pop("time")).tzinfo is not None
    assert first == {
        "level": "INFO",
        "component": "router",
        "message": "placed request=r-1\nINFO forged ?",
    }
    assert second["traceback"].endswith("ValueError: broken")


def test_the_line_about_lost_lines_has_the_form_of_all_lines():
    reader, writer = os.pipe()
    with open(writer, "w") as stream, open(reader, "rb") as lines:
        setup_logging(None, "json", environ={}, stream=stream)
        for _ in range(2000):
            logging.getLogger("penstock.router").info("x" * 200)
        messages = []
        while not (messages and "lines_lost=" in messages[-1]):
            messages.append(json.loads(lines.readline())["message"])
        logging.getLogger().handlers[0].stream.close()
    lost = int(re.fullmatch(r"lines_lost=(\d+): nobody read them", messages[-1])[1])
    assert len(messages) - 1 + lost == 2000


def test_components_can_have_levels_of_their_own():
    _lines("warning,penstock.router=debug")
    assert logging.getLogger("penstock.frontend").getEffectiveLevel() == logging.WARNING
    assert logging.getLogger("penstock.router").getEffectiveLevel() == logging.DEBUG


def test_an_unknown_level_refuses_to_start_and_names_its_source():
    with pytest.raises(ConfigError, match="DYN_LOG: unknown level 'loud'"):
        _lines(environ={"DYN_LOG": "loud"})


def test_colour_is_for_terminals():
    record = logging.LogRecord("penstock.link", logging.ERROR, "", 0, "gone", None, None)
    assert "\x1b[31m" in LineFormatter(colour=True).format(record)
    assert "\x1b" not in LineFormatter(colour=False).format(record)


def _samples(metrics):
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


def test_every_metric_is_named_before_anything_happens():
    text = Metrics().render().decode()
    for name in (
        "penstock_requests_total",
        "penstock_time_to_first_token_seconds",
        "penstock_inter_token_latency_seconds",
        "penstock_request_duration_seconds",
        "penstock_queued_requests",
        "penstock_inflight_requests",
        "penstock_worker_running",
        "penstock_worker_connected",
        "penstock_decisions_total",
    ):
        assert f"# TYPE {name} " in text


def test_metrics_tell_of_the_process_and_nothing_of_when_series_began():
    metrics = Metrics()
    metrics.frontend.of("tiny").request_duration.observe(0.1)
    families = {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}
    (build,) = families["penstock_build_info"].samples
    assert build.labels == {"version": __version__, "python": platform.python_version()}
    assert families["process_resident_memory_bytes"].samples[0].value > 1e6
    assert "process_cpu_seconds" in families
    assert [name for name in families if name.endswith("_created")] == []


def test_metrics_have_base_units():
    names = [family.name for family in text_string_to_metric_families(Metrics().render().decode())]
    assert [name for name in names if re.search(r"_(ms|us|mib|kib|percent)(_|$)", name)] == []


def test_latencies_fall_into_buckets_by_upper_bound():
    metrics = Metrics()
    series = metrics.frontend.of("m").inter_token_latency
    series.observe(0.001, 1)
    series.observe(0.0015, 3)
    series.observe(99.0, 1)
    samples = _samples(metrics)
    name = "penstock_inter_token_latency_seconds"
    assert samples[name + "_bucket", "0.001", "m"] == 1
    assert samples[name + "_bucket", "0.002", "m"] == 4
    assert samples[name + "_bucket", "5.0", "m"] == 4
    assert samples[name + "_bucket", "+Inf", "m"] == samples[name + "_count", "m"] == 5
    assert samples[name + "_sum", "m"] == pytest.approx(0.001 + 0.0045 + 99.0)


def test_the_router_counts():
    metrics = Metrics()
    router = metrics.router
    router.decided("kv", "remote")
    router.overlap(7, 100)
    router.attempt_ended("decode", "stop")
    router.bounced("decode")
    router.retried()
    router.transferred(12)
    samples = _samples(metrics)
    assert samples["penstock_decisions_total", "kv", "remote"] == 1
    assert samples["penstock_predicted_cached_tokens_total",] == 7
    assert samples["penstock_actual_cached_tokens_total",] == 100
    assert samples["penstock_attempts_total", "decode", "stop"] == 1
    assert samples["penstock_bounces_total", "decode"] == 1
    assert samples["penstock_retries_total",] == 1
    assert samples["penstock_transfers_total",] == 1
    assert samples["penstock_transferred_blocks_total",] == 12


def test_a_worker_has_series_exactly_as_long_as_it_is_known():
    metrics = Metrics()
    router = metrics.router
    router.state("w-1", "decode", "ready")
    router.load("w-1", Load(running=3, used_blocks=40, total_blocks=100))
    samples = _samples(metrics)
    assert samples["penstock_worker_running", "decode", "w-1"] == 3
    assert samples["penstock_worker_used_blocks", "decode", "w-1"] == 40
    assert samples["penstock_worker_connected", "decode", "w-1"] == 1
    assert samples["penstock_worker_unpaired", "decode", "w-1"] == 0
    router.unpaired(["w-1"])
    assert _samples(metrics)["penstock_worker_unpaired", "decode", "w-1"] == 1
    causes = {"w-1": "events_off"}
    router.distrusted_from(causes)
    distrusted = ("penstock_worker_distrusted", "decode", "events_off", "w-1")
    assert _samples(metrics)[distrusted] == 1
    causes.clear()
    assert distrusted not in _samples(metrics)
    router.state("w-1", "decode", "connecting")
    samples = _samples(metrics)
    assert samples["penstock_worker_connected", "decode", "w-1"] == 0
    assert samples["penstock_instance_state", "connecting", "decode", "w-1"] == 1
    assert ("penstock_worker_running", "decode", "w-1") not in samples
    router.instance_gone("w-1")
    router.instance_gone("never-seen")
    assert not any("w-1" in key for key in _samples(metrics))


def test_discovery_is_asked_at_each_scrape() -> None:
    metrics = Metrics()
    trouble = ["etcd is not available"]
    metrics.watch_discovery(lambda: trouble[0])
    assert "penstock_discovery_up 0.0" in metrics.render().decode()
    trouble[0] = ""
    assert "penstock_discovery_up 1.0" in metrics.render().decode()


async def test_tasks_are_counted() -> None:
    metrics = Metrics()
    before = re.search(r"^penstock_tasks (\S+)$", metrics.render().decode(), re.MULTILINE)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(asyncio.sleep(0))
        during = re.search(r"^penstock_tasks (\S+)$", metrics.render().decode(), re.MULTILINE)
    assert float(during[1]) == float(before[1]) + 1
