"""Translates a container's command into a Penstock command.

Penstock's commands stay as they are. Dynamo's commands are translated by the tables of dynamo.py, also
inside `/bin/sh -c "... 2>&1 | tee prefill.log"` (shell.py), so that a manifest written for Dynamo runs
unchanged:

    python3 -m dynamo.frontend --http-port 8000           frontend --http-port 8000
    python3 -m dynamo.vllm --model M --is-prefill-worker  worker --engine vllm --model M --role prefill
    python3 -m dynamo.mocker --model-path M               worker --engine sim --model M

Flags of `dynamo.vllm` that are in no table are passed to vLLM unchanged; vLLM refuses those it does not
know.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import PurePosixPath

import msgspec

from penstock.checked import suggestion
from penstock.errors import ConfigError
from penstock.graph.dynamo import (
    ENCODE,
    NO_MEANING,
    ONLY_IMAGES,
    PROGRAMS,
    READ_VARIABLES,
    ROLE_FLAGS,
    ROLES,
    Meaning,
    flags_from,
    meaning_of,
)
from penstock.graph.shell import ShellCommand, shell_commands
from penstock.shapes import Role


class ServiceKind(StrEnum):
    """Which Penstock command a service runs."""

    FRONTEND = "frontend"
    WORKER = "worker"


class Command(msgspec.Struct):
    """A Penstock command: `penstock KIND --FLAG VALUE ... [-- ENGINE_ARGS]`."""

    kind: ServiceKind
    flags: dict[str, str] = {}  # names without the leading dashes
    engine_args: list[str] = []
    env: dict[str, str] = {}  # variables that the shell script sets
    ignored: dict[str, list[str]] = {}  # reason -> the flags and variables that are ignored for it
    decode_or_aggregated: bool = False  # Dynamo's command is the same for both; the other services decide
    not_run: str = ""  # why the service is left out of the graph; empty: it is not
    workers_args: list[str] = []  # of a frontend: what every worker's vLLM is to be told
    translated: bool = False  # from a command of Dynamo's


_SHELLS = {"sh", "bash", "dash", "ash"}
_WRAPPERS = {"nohup", "tini", "dumb-init"}  # they start the words after them
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL | re.ASCII)
_REFERENCE = re.compile(r"\$(\$|\(([A-Za-z_][-.\w]*)\))", re.ASCII)
_LEFT_OVER = re.compile(r"\$\([^)]*\)|\$\{[^}]*\}")
_HUMAN_NUMBER = re.compile(r"(\d+(?:\.\d+)?)([kmgtKMGT])", re.ASCII)
_POWERS = "kmgt"
_ONLY_A_SHELL = "the script is not run by a shell here"


def parse_command(argv: Sequence[str], env: Mapping[str, str]) -> Command:
    """Read a container's command and arguments.

    Args:
        argv: `command` and `args` together.
        env: the container's environment, for `$(NAME)` and, in a shell, `$NAME`.

    Raises:
        ConfigError: it runs nothing that Penstock knows, or has a flag that makes no sense.
    """
    return _parse([expand_references(word, env) for word in argv], env)


def expand_references(text: str, env: Mapping[str, str]) -> str:
    """Kubernetes' `$(NAME)`; one that names nothing stays as it is, and `$$` is a dollar sign."""

    def value(match: re.Match[str]) -> str:
        return "$" if match[1] == "$" else env.get(match[2], match[0])

    return _REFERENCE.sub(value, text)


def unresolved_reference(text: str) -> str:
    """The first `$(...)` or `${...}` that is left in a text; empty when there is none."""
    match = _LEFT_OVER.search(text)
    return match[0] if match else ""


def _parse(words: Sequence[str], env: Mapping[str, str]) -> Command:
    script = _script_at(words)
    if script is None:
        for word in words:
            if left := unresolved_reference(word):
                raise ConfigError(f"{left} in {word!r} is not set in the manifest")
        return _parse_words(words, env)
    found = []
    for told in shell_commands(words[script], env, words[script + 1 :]):
        command = _parse_known(told, {**env, **told.env})
        found.append(msgspec.structs.replace(command, env=told.env | command.env))
        if told.left_out:
            command.ignored.setdefault(_ONLY_A_SHELL, []).extend(
                f"`{program}`" for program in told.left_out
            )
    if len(found) != 1:
        raise ConfigError(f"expected one command in the shell script, found {len(found) or 'none'}")
    return found[0]


def _parse_known(told: ShellCommand, env: Mapping[str, str]) -> Command:
    """A command out of a script. Words that only a shell can know must not matter."""
    try:
        command = _parse(told.words, env)
    except ConfigError as error:
        for reason in told.unknown.values():
            raise ConfigError(reason) from error
        raise
    used = [*command.flags.values(), *command.engine_args, *command.workers_args]
    for mark, reason in told.unknown.items():
        if any(mark in text for text in used):
            raise ConfigError(reason)
    return command


def _script_at(words: Sequence[str]) -> int | None:
    """Where among a shell's words its script is; None: they start no shell with a script."""
    if not words or PurePosixPath(words[0]).name not in _SHELLS:
        return None
    at = 1
    while at < len(words) and words[at][:1] in ("-", "+"):
        option = words[at]
        at += 1
        if option.startswith("--"):
            continue
        at += "o" in option  # -o pipefail
        if option.startswith("-") and "c" in option:
            return at if at < len(words) else None
    return None


def _parse_words(words: Sequence[str], env: Mapping[str, str]) -> Command:
    program, *rest = words or [""]
    name = PurePosixPath(program).name
    if name in _WRAPPERS and rest:
        return _parse(rest[1:] if rest[0] == "--" else rest, env)
    if name == "env":
        return _with_env(rest, env)
    if name.startswith("python"):
        rest = [word for word in rest if word not in ("-u", "-O")]
        if len(rest) >= 2 and rest[0] == "-m":
            name, rest = rest[1], rest[2:]
    if name == "penstock" and rest[:1] in (["frontend"], ["worker"]):
        return _own_command(ServiceKind(rest[0]), rest[1:], env)
    if name in PROGRAMS:
        return _translated(name, rest, env)
    if not words:
        raise ConfigError("the command is missing: expected penstock frontend or penstock worker")
    raise ConfigError(
        f"cannot run {' '.join(words)!r}: expected penstock frontend, penstock worker,"
        f" or python3 -m {', '.join([*PROGRAMS][:-1])} or {[*PROGRAMS][-1]}"
    )


def _with_env(words: Sequence[str], env: Mapping[str, str]) -> Command:
    """`env NAME=VALUE ... COMMAND`."""
    assigned: dict[str, str] = {}
    for at, word in enumerate(words):
        if not (match := _ASSIGNMENT.fullmatch(word)):
            words = words[at:]
            break
        assigned[match[1]] = match[2]
    else:
        words = []
    command = _parse(words, {**env, **assigned})
    return msgspec.structs.replace(command, env=assigned | command.env)


def _own_command(kind: ServiceKind, arguments: Sequence[str], env: Mapping[str, str]) -> Command:
    command = Command(kind)
    for name, values in _flags(_before_dashes(arguments)):
        command.flags[name] = _value(_dashed(name), name, values)
    command.engine_args = list(arguments)[len(_before_dashes(arguments)) + 1 :]
    _ignore_other_variables(command, env, set())
    return command


def _before_dashes(arguments: Sequence[str]) -> list[str]:
    return list(arguments[: arguments.index("--")]) if "--" in arguments else list(arguments)


def _translated(name: str, arguments: Sequence[str], env: Mapping[str, str]) -> Command:
    """Translate a command of one of Dynamo's programs."""
    program = PROGRAMS[name]
    is_worker = bool(program.engine)
    command = Command(ServiceKind.WORKER if is_worker else ServiceKind.FRONTEND, translated=True)
    if is_worker:
        command.flags["engine"] = program.engine
    table = program.flags
    given = _flags(arguments)
    names = {flag.removeprefix("no-") for flag, _ in given}
    from_env = flags_from(table, env)
    flags = [  # a flag follows its variable, and so overrides it
        *(
            (variable, flag, values)
            for flag, (variable, values) in from_env.items()
            if flag.removeprefix("no-") not in names
        ),
        *((_dashed(flag), flag, values) for flag, values in given),
    ]
    for source, flag, values in flags:
        if is_worker and (role := _role_of(source, flag, values)):
            command.flags["role"] = role
        elif is_worker and flag == "disaggregation-mode":
            command.not_run = ONLY_IMAGES
        elif known := meaning_of(table, flag):
            _translate(command, source, known, values)
        elif program.hands_on and not flag.startswith("dyn-"):
            command.engine_args += [_dashed(flag), *values]
        else:
            hint = suggestion(source, map(_dashed, table))
            raise ConfigError(f"{source}: unknown flag of {name}{hint}")
    command.decode_or_aggregated = is_worker and "role" not in command.flags
    _ignore_other_variables(command, env, {variable for variable, _ in from_env.values()})
    return command


def _translate(command: Command, source: str, known: tuple[Meaning, bool], values: Sequence[str]) -> None:
    meaning, is_opposite = known
    if meaning.ignored:
        command.ignored.setdefault(meaning.ignored, []).append(source)
    elif meaning.refused:
        parts = set(re.split(r"[\s,]+", " ".join(values).strip()))
        if not is_opposite and not (meaning.fine and parts <= meaning.fine):
            raise ConfigError(f"{source}: {meaning.refused}")
    elif meaning.not_run:
        command.not_run = "" if is_opposite else meaning.not_run
    elif meaning.engine:
        value = _one_value(source, values)
        words = [meaning.engine, meaning.values.get(value, value)]
        if command.kind is ServiceKind.WORKER:
            command.engine_args += words
        else:
            command.workers_args += words
    else:
        if meaning.ours == "served-model-name" and any("," in name for name in values):
            raise ConfigError(f"{source}: a name with a comma is not supported, got {' '.join(values)!r}")
        _set(command, source, meaning.ours, _value(source, meaning.ours, values))


def _set(command: Command, source: str, ours: str, value: str) -> None:
    """Set one of Penstock's flags. Converts vLLM's numbers, such as `32k` and `auto`."""
    if ours == "sim-speedup" and _is_zero(value):  # Dynamo's word for no waiting at all
        command.flags["sim-cost-model"] = "zero"
        return
    if ours in ("max-model-len", "max-batch-tokens", "max-running"):
        if value in ("auto", "-1"):
            command.engine_args += [source, value]
            return
        if match := _HUMAN_NUMBER.fullmatch(value):
            base = 1000 if match[2].islower() else 1024
            value = str(int(float(match[1]) * base ** (_POWERS.index(match[2].lower()) + 1)))
    command.flags[ours] = value


def _ignore_other_variables(command: Command, env: Mapping[str, str], known: set[str]) -> None:
    """Note Dynamo's variables that Penstock does not read."""
    others = [name for name in env if name.startswith("DYN_") and name not in READ_VARIABLES | known]
    if others:
        command.ignored.setdefault(NO_MEANING, []).extend(others)


def _value(source: str, ours: str, values: Sequence[str]) -> str:
    """The words of a flag as the value of one of Penstock's flags."""
    if ours != "served-model-name":
        return _one_value(source, values)
    if not values:
        raise ConfigError(f"{source}: expected one or more names, got none")
    return ",".join(values)


def _one_value(source: str, values: Sequence[str]) -> str:
    if len(values) != 1:
        raise ConfigError(f"{source}: expected one value, got {len(values) or 'none'}")
    return values[0]


def _role_of(source: str, name: str, values: Sequence[str]) -> Role | None:
    """The role that a flag of `dynamo.vllm` sets; None for other flags."""
    if name != "disaggregation-mode" or list(values) == [ENCODE]:
        return ROLE_FLAGS.get(name)
    mode = " ".join(values)
    if mode not in ROLES:
        raise ConfigError(f"{source}: expected one of {', '.join(ROLES)}, got {mode!r}")
    return ROLES[mode]


def _flags(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The name of each flag and the words that follow it. `--name=value` is a flag with one word."""
    found: list[tuple[str, list[str]]] = []
    for word in arguments:
        if word.startswith("-") and not _is_number(word):
            name, equals, value = word.partition("=")
            if name.startswith("--") and "." in name:  # vLLM's --config.key+=value, passed on unchanged
                found.append((word.removeprefix("--"), []))
                continue
            if name.startswith("--"):
                name = name.removeprefix("--").replace("_", "-")
            found.append((name, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
        else:
            raise ConfigError(f"expected a flag, got {word!r}")
    return found


def _is_zero(word: str) -> bool:
    return re.fullmatch(r"0+(\.0*)?", word) is not None


def _is_number(word: str) -> bool:
    return re.fullmatch(r"-\d+(\.\d+)?", word) is not None


def _dashed(name: str) -> str:
    return name if name.startswith("-") else f"--{name}"
