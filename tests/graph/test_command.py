from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ConfigError
from penstock.graph.command import Command, ServiceKind, parse_command


def shell(script: str, env: dict[str, str] | None = None, program: str = "/bin/sh") -> Command:
    return parse_command([program, "-c", script], env or {})


def test_a_script_is_read_to_its_command() -> None:
    script = """\
# warm up
set -e
cd /workspace && export NCCL_DEBUG=WARN;
MODEL_LEN=32 exec python3 -u -m dynamo.vllm \\
  --model "Qwen/Qwen3 0.6B" --max-num-seqs 2 2>&1 >out.log | tee -a $LOGS | cat
"""
    command = shell(script)
    assert command.flags == {"engine": "vllm", "model": "Qwen/Qwen3 0.6B", "max-running": "2"}
    assert command.env == {"NCCL_DEBUG": "WARN", "MODEL_LEN": "32"}
    assert command.engine_args == []
    assert command.decode_or_aggregated


def test_variables_come_from_the_manifest() -> None:
    command = shell(
        "penstock worker --model ${DIR}/$NAME --role $(ROLE)", {"DIR": "/m", "NAME": "q", "ROLE": "decode"}
    )
    assert command.flags == {"model": "/m/q", "role": "decode"}
    assert shell("A=1 penstock worker --model $A").flags == {"model": "1"}
    with pytest.raises(ConfigError, match=r"^\$NAME is not set in the manifest$"):
        shell("penstock worker --model $NAME")


@pytest.mark.parametrize("program", ["sh", "/bin/bash", "/usr/bin/dash"])
def test_all_shells_are_known(program: str) -> None:
    assert shell("penstock frontend", program=program).kind is ServiceKind.FRONTEND
    assert parse_command([program, "-ec", "penstock frontend"], {}).kind is ServiceKind.FRONTEND


def test_own_commands_are_taken_as_they_are() -> None:
    words = ["/opt/bin/penstock", "worker", "--model=a=b", "--sim-speedup", "-2.5", "--", "--x", "1", "-O3"]
    command = parse_command(words, {})
    assert command.flags == {"model": "a=b", "sim-speedup": "-2.5"}
    assert command.engine_args == ["--x", "1", "-O3"]
    assert not command.decode_or_aggregated
    assert parse_command(["python3.11", "-m", "penstock", "frontend"], {}).kind is ServiceKind.FRONTEND


def test_vllm_roles() -> None:
    base = ["python3", "-m", "dynamo.vllm", "--model", "m"]
    assert parse_command([*base, "--is-prefill-worker"], {}).flags["role"] == "prefill"
    assert parse_command([*base, "--is-decode-worker"], {}).flags["role"] == "decode"
    assert parse_command([*base, "--disaggregation-mode", "agg"], {}).flags["role"] == "aggregated"
    with pytest.raises(ConfigError, match=r"--disaggregation-mode: expected one of .* got 'pre'"):
        parse_command([*base, "--disaggregation-mode", "pre"], {})


def test_flags_without_meaning_here_are_told() -> None:
    words = [
        "python3",
        "-m",
        "dynamo.frontend",
        "--router_temperature",
        "0.5",
        "--no-kv-events",
        "--http-port=1",
    ]
    command = parse_command(words, {})
    assert command.ignored == ["--router-temperature", "--no-kv-events"]
    assert command.flags == {"http-port": "1"}


def test_engine_arguments_keep_their_form() -> None:
    words = [
        "python3",
        "-m",
        "dynamo.vllm",
        "--model",
        "m",
        "-tp",
        "2",
        "--enforce-eager",
        "--cuda-graph-sizes",
    ]
    assert parse_command([*words, "1", "2"], {}).engine_args == [
        *("-tp", "2", "--enforce-eager", "--cuda-graph-sizes", "1", "2")
    ]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "cannot run 'nothing'"),
        (["python3", "serve.py"], "cannot run 'python3 serve.py'"),
        (["python3", "-m", "dynamo.sglang"], "cannot run 'python3 -m dynamo.sglang'"),
        (["penstock"], "cannot run 'penstock'"),
        (["penstock", "worker", "tiny"], "expected a flag, got 'tiny'"),
        (["penstock", "worker", "--model"], "--model: expected one value, got none"),
        (["penstock", "worker", "--model", "a", "b"], "--model: expected one value, got 2"),
        (["python3", "-m", "dynamo.vllm", "--model"], "--model: expected one value, got none"),
        (["sh", "-c", "penstock frontend 'x"], "the shell script does not parse: No closing quotation"),
        (["sh", "-c", "cd /"], "expected one command in the shell script, found none"),
        (
            ["sh", "-c", "penstock frontend & penstock worker"],
            "expected one command in the shell script, found 2",
        ),
        (["sh", "-c", "rm -rf x; penstock frontend"], "cannot run 'rm -rf x'"),
    ],
)
def test_what_makes_no_sense_is_named(words: list[str], error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_command(words, {})
    assert str(caught.value).startswith(error)


@given(st.lists(st.text(max_size=20), max_size=6))
def test_no_command_line_breaks_the_parser(words: list[str]) -> None:
    for argv in (words, ["sh", "-c", " ".join(words)], ["penstock", "worker", *words]):
        with contextlib.suppress(ConfigError):
            parse_command(argv, {})
