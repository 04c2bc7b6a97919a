"""What a script is read as, against what a shell makes of it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ConfigError
from penstock.graph.shell import shell_commands

ENV = {"MODEL": "Qwen/Qwen3 0.6B", "ARGS": "--a 1  --b 2", "EMPTY": "", "DIR": "/models"}
ARGUMENTS = ["zero", "--model", "a b", ""]

_PROGRAM = """#!{python}
import json, os, sys
words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
env = {{name: value for name, value in os.environ.items() if name.startswith("X")}}
with open({out!r}, "a") as out:
    out.write(json.dumps([words, env]) + "\\n")
"""

SCRIPTS = [
    "run a 'b c' \"d e\" f\\ g",
    "run $MODEL",
    'run "$MODEL" --x="$DIR/m"',
    'run \'$MODEL\' \\$MODEL "\\$MODEL" "a\\b"',
    "run $ARGS x$ARGS",
    'run $EMPTY "$EMPTY" x$EMPTY',
    "run ${DIR}/${MODEL:-none} ${NONE:-qwen} ${NONE-a b} ${EMPTY:-e} ${EMPTY-e} ${DIR:+yes} ${NONE:+no}",
    'run "${NONE:-a b}" "${NONE:-$MODEL}" "${NONE:-${EMPTY:-deep er}}"',
    'run "$@"',
    "run $@ end",
    'run a"$@"b',
    'run $* "$*" $# $1 "$2" ${1}x $0',
    'set -- one "two three"; run "$@"',
    ": ${NONE:=made}; run $NONE",
    "run ${NONE:=made} $NONE",
    "export X1=a X2='b c'; X3=no; X4=$X3; export X4; X5=e run $X1$X3",
    "set -a; X1=a; run $X1",
    "X1=$MODEL run",
    'cd / && mkdir -p /tmp; echo "at $(date) `date`" >/dev/null; exec run a 2>&1 | tee /dev/null',
    "run a >/dev/null 2>/dev/null </dev/null; :",
    "# run not\nrun a # not b\nsleep 0",
    "run a \\\n  b",
    "true; run a#b # c",
    "run 'it'\"'\"'s' --json='{\"a\": [1, 2]}'",
    "run a & wait",
    "run 2 2>/dev/null",
    "run a;sleep 0",
    'exec run --n "${1}" "${@}"',
    'run cost$ $ "$"',
    "test -r / || { echo no; exit 42; }\nrun a",
    "n=$(echo 3)\nif [ $n -ne 3 ]; then\n  X1=2\n  exit 9\nfi\nexec run b",
    "for x in 1 2; do\n  y=$x\ndone\ntest -n y &&\n  echo ok\nrun c",
    "check() {\n  echo $1\n}\ncheck x\nX1=1\nexport X1\nrun d",
    "echo a |\n  grep a\ncase a in\n  a) echo a ;;\nesac\nrun e",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_read_as_a_shell_reads_it(tmp_path: Path, script: str) -> None:
    assert found_and_real(tmp_path, script, "sh")


def found_and_real(tmp_path: Path, script: str, shell: str) -> bool:
    """Whether what was found in a script is what a shell runs."""
    program, out = tmp_path / "run", tmp_path / "out"
    program.write_text(_PROGRAM.format(python=sys.executable, out=str(out)))
    program.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.defpath}", **ENV}
    command = [shell, "-c", script, *ARGUMENTS]
    subprocess.run(command, env=env, stdout=subprocess.DEVNULL, timeout=60, check=True)
    real = [json.loads(line) for line in out.read_text().splitlines()]
    found = [[told.words, told.env] for told in shell_commands(script, ENV, ARGUMENTS)]
    assert [words for words, _ in found] == [words for words, _ in real]
    for (_, ours), (_, theirs) in zip(found, real, strict=True):
        assert {name: value for name, value in ours.items() if name.startswith("X")} == theirs
    return bool(found)


BASH = [
    "words=(--a 'b c' $MODEL)\nrun \"${words[@]}\" end",
    'words=(\n  --a\n  "$MODEL" # why\n)\nwords+=(b)\nrun ${words[@]} x"${words[@]}"y',
    'none=()\nrun "${none[@]}" ${none[@]}',
    "[[ -r / ]] || exit 3\n(( 1 + 1 ))\nrun a",
]


@pytest.mark.parametrize("script", BASH)
def test_a_script_is_read_as_bash_reads_it(tmp_path: Path, script: str) -> None:
    assert found_and_real(tmp_path, script, "bash")


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("n=$(a)\nrun $n", "$n is set by commands that are not run here"),
        ("if a; then\n  n=1\nfi\nn=2\nif b; then\n  n=3\nfi\nrun ${n:-4}", "$n is set by commands that"),
        ("for n in 1 2; do\n echo\ndone\nrun $n", "$n is set by commands that"),
        ('w=($(a))\nrun "${w[@]}"', "$w[@] is set by commands that"),
        ('run "${none[@]}"', "$none[@] is not set in the manifest"),
        (". ./env.sh\nrun", "`.` is not understood"),
        ("test -r x && exec other\nrun", "`test` is not understood"),
        ("if a; then\n  dynamo.vllm\nfi\nrun", "`if` is not understood"),
        ("cat <<E\nrun not\nE\nrun", "`<<` is not understood"),
        ("if a\nrun", "does not parse: it ends inside an unfinished command"),
        ("run $(hostname -i)", "$(hostname -i) is not run here"),
        ("run $(a $(b) c) d", "$(a $(b) c) is not run here"),
        ("run `hostname`", "`hostname` is not run here"),
        ('run "--ip=$(hostname)"', "$(hostname) is not run here"),
        ("export IP=$(hostname); run", "$(hostname) is not run here"),
        ("run $((1 + 1))", "$((1 + 1)) is not run here"),
        ("run ${DIR%/*}", "${DIR%/*} is not run here"),
        ("run ${#DIR}", "${#DIR} is not run here"),
        ("run $?", "$? is not run here"),
        ("run $'a'", "$' is not run here"),
        ("run $NONE", "$NONE is not set in the manifest"),
        ("run ${NONE:?say which}", "$NONE is not set in the manifest"),
        ("A=1 run $A", "$A is not set in the manifest"),
        ("run *.yaml", "`*` outside of quotes"),
        ("run model-?", "`?` outside of quotes"),
        ("run [ab]", "`[` outside of quotes"),
        ("run {a,b}", "`{a,b}` outside of quotes"),
        ("run ~/m", "`~` is not understood"),
        ("A=~/m; run $A", "`~` is not understood"),
        ("run a | grep b", "a pipe into `grep` is not understood"),
        ("run a |& tee x | sort", "a pipe into `sort` is not understood"),
        ("yes | run", "a pipe into `run` is not understood"),
        ("(run a)", "`(` is not understood"),
        ("run <(cat x)", "`<(` is not understood"),
        ("run <<E\nx\nE", "`<<` is not understood"),
        ("if true; then run; fi", "`if` is not understood"),
        ("test -r x && run", "`test` is not understood"),
        ("[ -r x ] && run", "`[` is not understood"),
        ("{ run a; }", "`{` is not understood"),
        (". ./env.sh; run", "`.` is not understood"),
        ("run 'a", "does not parse: no closing '"),
        ('run "a', 'does not parse: no closing "'),
        ("run $(a", "does not parse: no closing )"),
        ("run ${a", "does not parse: no closing }"),
        ("run >", "does not parse: `;` after a redirection"),
    ],
)
def test_what_only_a_shell_can_know_is_refused_by_name(script: str, error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        shell_commands(script, ENV, ARGUMENTS)
    assert error in str(caught.value)


@given(st.text(alphabet="ab $\"'`\\{}()[]<>|&;:-=?+@*#1~\n", max_size=40))
def test_no_script_breaks_the_reader(script: str) -> None:
    with contextlib.suppress(ConfigError):
        shell_commands(script, ENV, ARGUMENTS)
