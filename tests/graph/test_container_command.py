from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ConfigError
from penstock.graph.container_command import Command, ServiceKind, parse_command
from penstock.graph.dynamo import FRONTEND_FLAGS, MOCKER_FLAGS, WORKER_FLAGS, meaning_of


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
    assert shell("A=1; penstock worker --model $A").flags == {"model": "1"}
    with pytest.raises(ConfigError, match=r"^\$NAME is not set in the manifest$"):
        shell("penstock worker --model $NAME")
    for word in ("$(NAME)", "m-${NAME}"):
        with pytest.raises(ConfigError, match=r"^\$.NAME. in '.*' is not set in the manifest$"):
            parse_command(["penstock", "worker", "--model", word], {})
    assert parse_command(["penstock", "worker", "--model", "$$A"], {"A": "1"}).flags == {"model": "$A"}


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


def test_a_program_that_starts_another_is_looked_through() -> None:
    penstock = ["penstock", "worker", "--model", "m"]
    assert parse_command(["env", "A=0", "A=1", "DYN_B=2", *penstock], {}).env == {"A": "1", "DYN_B": "2"}
    with pytest.raises(ConfigError, match="the command is missing"):
        parse_command(["env", "A=1"], {})
    assert parse_command(["/usr/bin/tini", "--", *penstock], {}).flags == {"model": "m"}
    nested = parse_command(
        ["bash", "-euo", "pipefail", "-c", "A=1 exec sh -c 'exec penstock worker --model $A'"], {}
    )
    assert (nested.flags, nested.env) == ({"model": "1"}, {"A": "1"})


def test_the_words_after_a_script_stand_for_its_arguments() -> None:
    script = 'export A=1; exec python3 -m dynamo.vllm "$@"'
    command = parse_command(["bash", "-c", script, "dynamo.vllm", "--model", "a b"], {})
    assert command.flags == {"engine": "vllm", "model": "a b"}
    assert command.env == {"A": "1"}


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
    assert command.ignored == {"no meaning here": ["--router-temperature", "--no-kv-events"]}
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
        ([], "the command is missing"),
        (["python3", "serve.py"], "cannot run 'python3 serve.py'"),
        (["python3", "-m", "dynamo.sglang"], "cannot run 'python3 -m dynamo.sglang'"),
        (["penstock"], "cannot run 'penstock'"),
        (["penstock", "worker", "tiny"], "expected a flag, got 'tiny'"),
        (["penstock", "worker", "--model"], "--model: expected one value, got none"),
        (["penstock", "worker", "--model", "a", "b"], "--model: expected one value, got 2"),
        (["python3", "-m", "dynamo.vllm", "--model"], "--model: expected one value, got none"),
        (["sh", "-c", "penstock frontend 'x"], "the shell script does not parse: no closing '"),
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
    for argv in (
        words,
        ["sh", "-c", " ".join(words)],
        ["penstock", "worker", *words],
        ["python3", "-m", "dynamo.vllm", *words],
        ["python3", "-m", "dynamo.frontend", *words],
    ):
        with contextlib.suppress(ConfigError):
            parse_command(argv, {})


VLLM = ["python3", "-m", "dynamo.vllm", "--model", "m"]
FRONTEND = ["python3", "-m", "dynamo.frontend"]


def test_parsers_of_answers_are_vllms_under_its_names() -> None:
    flags = ["--dyn-tool-call-parser", "harmony", "--dyn-reasoning-parser=qwen3"]
    told = ["--tool-call-parser", "openai", "--reasoning-parser", "qwen3"]
    assert parse_command([*VLLM, *flags], {}).engine_args == told
    env = {"DYN_TOOL_CALL_PARSER": "harmony", "DYN_REASONING_PARSER": "qwen3"}
    assert parse_command(VLLM, env).engine_args == told
    processor = [*FRONTEND, "--dyn-chat-processor", "vllm", "--tool-call-parser", "hermes"]
    assert parse_command(processor, {}).workers_args == ["--tool-call-parser", "hermes"]


def test_variables_stand_for_flags_which_win() -> None:
    env = {"DYN_TLS_CERT_PATH": "c", "DYN_TLS_KEY_PATH": "k", "DYN_HTTP_PORT": "9000", "DYN_NEW": "1"}
    command = parse_command([*FRONTEND, "--tls-key-path", "other"], env)
    assert command.flags == {"http-tls-cert": "c", "http-tls-key": "other"}
    assert command.ignored == {"no meaning here": ["DYN_NEW"]}  # the port is read by the frontend
    assert parse_command(VLLM, {"DYN_VLLM_DISAGGREGATION_MODE": "prefill"}).flags["role"] == "prefill"
    role = {"DYN_VLLM_DISAGGREGATION_MODE": "prefill"}
    assert parse_command([*VLLM, "--is-decode-worker"], role).flags["role"] == "decode"
    both = parse_command([*FRONTEND, "--no-router-kv-events"], {"DYN_ROUTER_USE_KV_EVENTS": "true"})
    assert both.ignored == {"no meaning here": ["--no-router-kv-events"]}
    assert parse_command(["penstock", "frontend"], env).ignored == {
        "no meaning here": ["DYN_TLS_CERT_PATH", "DYN_TLS_KEY_PATH", "DYN_NEW"]
    }


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        ([*FRONTEND, "--tls-client-ca-cert-path", "ca.pem"], "--tls-client-ca-cert-path: clients' cert"),
        ([*FRONTEND, "-i"], "-i: a frontend has no chat"),
        ([*FRONTEND, "--kserve-grpc-server"], "--kserve-grpc-server: only HTTP is served"),
        ([*FRONTEND, "--reasoning-field-name", "thought"], "--reasoning-field-name: the field is called"),
        (
            [*FRONTEND, "--router-kv-event"],
            "--router-kv-event: unknown flag of dynamo.frontend (did you mean --router-kv-events?)",
        ),
        ([*FRONTEND, "--no-router-kv-event"], "--no-router-kv-event: unknown flag of dynamo.frontend"),
        ([*VLLM, "--custom-encoder-class", "x"], "--custom-encoder-class: images are not served"),
        ([*VLLM, "--endpoint-types", "chat,embedding"], "--endpoint-types: only chat and completions"),
        ([*VLLM, "--custom-jinja-template", "t"], "--custom-jinja-template: a model's own template"),
        ([*VLLM, "--disaggregation-mode", "encoder"], "--disaggregation-mode: expected one of"),
        (
            [*VLLM, "--dyn-tool-call-parsr", "x"],
            "--dyn-tool-call-parsr: unknown flag of dynamo.vllm (did you mean --dyn-tool-call-parser?)",
        ),
        (
            [*VLLM, "--served-model-name", "a,b"],
            "--served-model-name: a name with a comma is not supported, got 'a,b'",
        ),
        ([*VLLM, "--served-model-name"], "--served-model-name: expected one or more names, got none"),
        ([*VLLM, "--tool-call-parser"], None),
    ],
)
def test_what_would_change_the_answers_is_refused(argv: list[str], error: str | None) -> None:
    if error is None:
        assert parse_command(argv, {}).engine_args == ["--tool-call-parser"]  # vLLM says what is wrong
        return
    with pytest.raises(ConfigError) as caught:
        parse_command(argv, {})
    assert str(caught.value).startswith(error)
    assert "did you mean --no-" not in str(caught.value)


@pytest.mark.parametrize("program", [VLLM, ["penstock", "worker", "--model", "m"]])
def test_several_served_names_are_one_flag(program: list[str]) -> None:
    command = parse_command(
        [*program, "--served-model-name", "org/m", "chat", "gpt", "--block-size", "16"], {}
    )
    assert command.flags["served-model-name"] == "org/m,chat,gpt"
    assert command.flags["block-size"] == "16"


def test_what_asks_for_how_it_is_anyhow_is_fine() -> None:
    fine = ["--endpoint-types", "chat,completions", "--no-omni", "--output-modalities", "text"]
    command = parse_command([*VLLM, *fine], {"DYN_VLLM_REALTIME": "false"})
    assert (command.engine_args, command.ignored) == ([], {})


def test_numbers_may_be_written_as_vllm_reads_them() -> None:
    flags = ["--max-model-len", "32K", "--max-num-batched-tokens", "8k", "--max-num-seqs", "1.5k"]
    command = parse_command([*VLLM, *flags], {})
    assert command.flags["max-model-len"] == "32768"
    assert (command.flags["max-batch-tokens"], command.flags["max-running"]) == ("8000", "1500")
    assert parse_command([*VLLM, "--max-model-len", "auto"], {}).engine_args == ["--max-model-len", "auto"]


@pytest.mark.parametrize(
    "flags", [["--multimodal-encode-worker"], ["--disaggregation-mode", "encode"], ["--ec-processor"]]
)
def test_workers_that_are_only_for_images_are_left_out(flags: list[str]) -> None:
    assert parse_command([*VLLM, "--enable-multimodal", *flags], {}).not_run == "it is only for images"
    both = parse_command([*VLLM, "--multimodal-worker", "--disaggregation-mode", "decode"], {})
    assert (both.not_run, both.flags["role"]) == ("", "decode")


def test_what_only_a_shell_can_know_may_be_the_value_of_an_ignored_flag() -> None:
    command = shell('python3 -m dynamo.vllm --model m --kv-transfer-config "$(cat /etc/connector.json)" -x')
    assert (command.flags["model"], command.engine_args) == ("m", ["-x"])
    assert command.ignored == {"no meaning here": ["--kv-transfer-config"]}
    for script in (
        'python3 -m dynamo.vllm --model "$(cat /etc/model)"',
        'python3 -m dynamo.vllm --model m --own-flag="$(cat /etc/model)"',
        'python3 -m dynamo.vllm --model m --max-num-seqs "$(cat /etc/model)"',
        'python3 -m dynamo.vllm --model m --disaggregation-mode "$(cat /etc/model)"',
        'python3 -m dynamo.vllm --model m "--$(cat /etc/model)"',
        '"$(cat /etc/model)" -m dynamo.vllm --model m',
        "python3 -m dynamo.vllm --model m --kv-transfer-config $(cat /etc/model)",
        'X="$(cat /etc/model)" python3 -m dynamo.vllm --model m',
    ):
        with pytest.raises(ConfigError, match=r"^the shell script: \$\(cat /etc/model\) is not run here"):
            shell(script)


MOCKER = ["python3", "-m", "dynamo.mocker", "--model-path", "Qwen/Qwen3-0.6B"]


def test_dynamos_mocker_is_the_sim_engine() -> None:
    flags = ["--model-name", "qwen", "--speedup-ratio", "10", "--block-size", "16", "--is-prefill-worker"]
    command = parse_command([*MOCKER, *flags], {"DYN_MODEL_PATH": "not a flag of the mocker's"})
    assert command.kind is ServiceKind.WORKER
    assert command.flags == {
        "engine": "sim",
        "model": "Qwen/Qwen3-0.6B",
        "served-model-name": "qwen",
        "sim-speedup": "10",
        "block-size": "16",
        "role": "prefill",
    }
    assert command.engine_args == []
    assert parse_command(MOCKER, {}).decode_or_aggregated
    assert parse_command([*MOCKER, "--speedup-ratio", "0.0"], {}).flags["sim-cost-model"] == "zero"


def test_what_tunes_the_mocker_is_ignored_and_what_changes_answers_is_refused() -> None:
    tuning = ["--num-workers", "4", "--num-gpu-blocks-override=8192", "--no-enable-prefix-caching"]
    ignored = parse_command([*MOCKER, *tuning], {}).ignored
    assert ignored["a replica is one worker; replicas sets how many there are"] == ["--num-workers"]
    assert sorted(flag for flags in ignored.values() for flag in flags) == [
        "--no-enable-prefix-caching",
        "--num-gpu-blocks-override",
        "--num-workers",
    ]
    with pytest.raises(ConfigError, match=r"^--reasoning: simulated answers have no reasoning$"):
        parse_command([*MOCKER, "--reasoning", "{}"], {})
    with pytest.raises(ConfigError, match=r"^--speedup: unknown flag of dynamo.mocker"):
        parse_command([*MOCKER, "--speedup", "2"], {})


def test_every_flag_of_dynamos_has_one_meaning() -> None:
    for table in (FRONTEND_FLAGS, MOCKER_FLAGS, WORKER_FLAGS):
        for name, meaning in table.items():
            fates = [meaning.ours, meaning.engine, meaning.ignored, meaning.refused, meaning.not_run]
            assert len([fate for fate in fates if fate]) == 1, name
            assert meaning_of(table, name) == (meaning, False)
            assert (meaning_of(table, f"no-{name}") is not None) == meaning.switch, name
