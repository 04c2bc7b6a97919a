"""What a container runs, as a Penstock command.

Penstock's own commands are taken as they are. Dynamo's are translated by the tables below, also from inside
`/bin/sh -c "... 2>&1 | tee prefill.log"`, so that a manifest written for it runs unchanged:

    python3 -m dynamo.frontend --http-port 8000           frontend --http-port 8000
    python3 -m dynamo.vllm --model M --is-prefill-worker  worker --engine vllm --model M --role prefill

Flags of `dynamo.vllm` that are in no table go to vLLM as they are; it refuses what it does not know.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import PurePosixPath

import msgspec

from penstock.checked import suggestion
from penstock.errors import ConfigError
from penstock.structs import Role


class ServiceKind(StrEnum):
    """Which Penstock command a service runs."""

    FRONTEND = "frontend"
    WORKER = "worker"


class Command(msgspec.Struct):
    """A Penstock command: `penstock KIND --FLAG VALUE ... [-- ENGINE_ARGS]`."""

    kind: ServiceKind
    flags: dict[str, str] = {}  # names without the leading dashes
    engine_args: list[str] = []
    env: dict[str, str] = {}  # set by the shell around the command
    ignored: list[str] = []  # flags, with dashes, that mean nothing here
    decode_or_aggregated: bool = False  # Dynamo's name for both: the graph's other services tell


# Dynamo's flag -> ours; None: it tunes what Penstock measures, or wires what Penstock does not have.
_FRONTEND_FLAGS: dict[str, str | None] = {
    "http-host": "http-host",
    "http-port": "http-port",
    "router-mode": "router-mode",
    "tls-cert-path": "http-tls-cert",
    "tls-key-path": "http-tls-key",
    **dict.fromkeys(
        (
            "active-decode-blocks-threshold",
            "busy-threshold",
            "discovery-backend",
            "dyn-chat-processor",
            "event-plane",
            "kv-cache-block-size",
            "kv-events",
            "kv-overlap-score-weight",
            "migration-limit",
            "model-name",
            "model-path",
            "namespace",
            "no-kv-events",
            "request-plane",
            "router-replica-sync",
            "router-reset-states",
            "router-snapshot-threshold",
            "router-temperature",
            "router-ttl",
            "store-kv",
        )
    ),
}
_VLLM_FLAGS: dict[str, str | None] = {
    "block-size": "block-size",
    "max-model-len": "max-model-len",
    "max-num-batched-tokens": "max-batch-tokens",
    "max-num-seqs": "max-running",
    "model": "model",
    "served-model-name": "served-model-name",
    **dict.fromkeys(
        (
            "connector",
            "discovery-backend",
            "enable-local-indexer",
            "endpoint",
            "event-plane",
            "kv-events-config",
            "kv-transfer-config",
            "migration-limit",
            "request-plane",
            "store-kv",
        )
    ),
}
_DISAGGREGATION_MODES = {
    "prefill": Role.PREFILL,
    "decode": Role.DECODE,
    "agg": Role.AGGREGATED,
    "aggregated": Role.AGGREGATED,
}

_SHELLS = {"sh", "bash", "dash", "ash"}
_SEPARATORS = {"&&", "||", ";", ";;", "&"}
_HARMLESS = {"cd", "echo", "mkdir", "set", "sleep", "true", "ulimit", ":"}
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_DUPLICATED_STREAM = re.compile(r"(?<!\S)[0-2]?>&[0-2](?!\S)")  # 2>&1
_STREAM_NUMBER = re.compile(r"(?<!\S)[0-2](?=>)")  # the 2 of 2>errors.log
_KUBERNETES_VARIABLE = re.compile(r"\$\(([A-Za-z_][-.\w]*)\)")
_SHELL_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))")


def parse_command(argv: Sequence[str], env: Mapping[str, str]) -> Command:
    """Read a container's command and arguments.

    Args:
        argv: `command` and `args` together.
        env: the container's environment, for `$(NAME)` and, in a shell, `$NAME`.

    Raises:
        ConfigError: it runs nothing that Penstock knows, or has a flag that makes no sense.
    """
    words = [expand_references(word, env) for word in argv]
    if _is_shell(words):
        return _parse_script(words[2], env)
    return _parse_words(words)


def expand_references(text: str, env: Mapping[str, str]) -> str:
    """Kubernetes' `$(NAME)`; one that names nothing stays as it is."""
    return _KUBERNETES_VARIABLE.sub(lambda match: env.get(match[1], match[0]), text)


def _is_shell(words: Sequence[str]) -> bool:
    return (
        len(words) >= 3
        and PurePosixPath(words[0]).name in _SHELLS
        and words[1].startswith("-")
        and words[1].endswith("c")
    )


def _parse_script(script: str, env: Mapping[str, str]) -> Command:
    assigned: dict[str, str] = {}
    found: list[Command] = []
    for words in _simple_commands(script):
        exported = words[0] == "export"
        words = words[1:] if exported else words
        while words and (match := _ASSIGNMENT.fullmatch(words[0])):
            assigned[match[1]] = _expand_shell(match[2], {**env, **assigned})
            words = words[1:]
        words = words[1:] if words[:1] == ["exec"] else words
        if not words or exported or words[0] in _HARMLESS:
            continue
        found.append(_parse_words([_expand_shell(word, {**env, **assigned}) for word in words]))
    if len(found) != 1:
        raise ConfigError(f"expected one command in the shell script, found {len(found) or 'none'}")
    return msgspec.structs.replace(found[0], env=assigned)


def _simple_commands(script: str) -> Iterable[list[str]]:
    """The words of each command; what a pipe leads to and redirections are left out."""
    lines = (line for line in script.replace("\\\n", " ").splitlines() if not line.lstrip().startswith("#"))
    text = _STREAM_NUMBER.sub("", _DUPLICATED_STREAM.sub("", " ; ".join(lines)))
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.commenters = ""
    lexer.whitespace_split = True
    try:
        tokens = list(lexer)
    except ValueError as error:
        raise ConfigError(f"the shell script does not parse: {error}") from error
    words: list[str] = []
    piped = redirected = False
    for token in [*tokens, ";"]:
        if token in _SEPARATORS:
            if words:
                yield words
            words, piped = [], False
        elif token.startswith("|"):
            piped = True
        elif set(token) <= set("<>&"):
            redirected = True
        elif redirected:
            redirected = False
        elif not piped:
            words.append(token)


def _expand_shell(text: str, env: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in env:
            raise ConfigError(f"${name} is not set in the manifest")
        return env[name]

    return _SHELL_VARIABLE.sub(value, text)


def _parse_words(words: Sequence[str]) -> Command:
    program, *rest = words or [""]
    name = PurePosixPath(program).name
    if name.startswith("python"):
        rest = [word for word in rest if word not in ("-u", "-O")]
        if len(rest) >= 2 and rest[0] == "-m":
            name, rest = rest[1], rest[2:]
    if name == "penstock" and rest[:1] in (["frontend"], ["worker"]):
        return _own_command(ServiceKind(rest[0]), rest[1:])
    if name == "dynamo.frontend":
        return _translated(ServiceKind.FRONTEND, rest)
    if name == "dynamo.vllm":
        return _translated(ServiceKind.WORKER, rest)
    raise ConfigError(
        f"cannot run {' '.join(words) or 'nothing'!r}: expected penstock frontend, penstock worker,"
        " python3 -m dynamo.frontend or python3 -m dynamo.vllm"
    )


def _own_command(kind: ServiceKind, arguments: Sequence[str]) -> Command:
    command = Command(kind)
    for name, values in _flags(_before_dashes(arguments)):
        if len(values) != 1:
            raise ConfigError(f"--{name}: expected one value, got {len(values) or 'none'}")
        command.flags[name] = values[0]
    command.engine_args = list(arguments)[len(_before_dashes(arguments)) + 1 :]
    return command


def _before_dashes(arguments: Sequence[str]) -> list[str]:
    return list(arguments[: arguments.index("--")]) if "--" in arguments else list(arguments)


def _translated(kind: ServiceKind, arguments: Sequence[str]) -> Command:
    command = Command(kind)
    table = _FRONTEND_FLAGS if kind is ServiceKind.FRONTEND else _VLLM_FLAGS
    role: Role | None = None
    if kind is ServiceKind.WORKER:
        command.flags["engine"] = "vllm"
    for name, values in _flags(arguments):
        if kind is ServiceKind.WORKER and (told := _role_of(name, values)):
            role = told
        elif name in table:
            _translate(command, name, table[name], values)
        elif kind is ServiceKind.WORKER:
            command.engine_args += [_dashed(name), *values]
        else:
            raise ConfigError(f"--{name}: unknown flag of dynamo.frontend{suggestion(name, table)}")
    if role is not None:
        command.flags["role"] = role
    command.decode_or_aggregated = kind is ServiceKind.WORKER and role is None
    return command


def _translate(command: Command, name: str, ours: str | None, values: Sequence[str]) -> None:
    if ours is None:
        command.ignored.append(f"--{name}")
    elif len(values) != 1:
        raise ConfigError(f"--{name}: expected one value, got {len(values) or 'none'}")
    else:
        command.flags[ours] = values[0]


def _role_of(name: str, values: Sequence[str]) -> Role | None:
    """The role that a flag of `dynamo.vllm` gives; None for other flags."""
    if name == "is-prefill-worker":
        return Role.PREFILL
    if name == "is-decode-worker":
        return Role.DECODE
    if name == "disaggregation-mode":
        mode = " ".join(values)
        if mode not in _DISAGGREGATION_MODES:
            raise ConfigError(f"--{name}: expected one of {', '.join(_DISAGGREGATION_MODES)}, got {mode!r}")
        return _DISAGGREGATION_MODES[mode]
    return None


def _flags(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each flag's name and the words that follow it; `--name=value` counts as one word."""
    found: list[tuple[str, list[str]]] = []
    for word in arguments:
        if word.startswith("-") and not _is_number(word):
            name, equals, value = word.partition("=")
            if name.startswith("--"):
                name = name.removeprefix("--").replace("_", "-")
            found.append((name, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
        else:
            raise ConfigError(f"expected a flag, got {word!r}")
    return found


def _is_number(word: str) -> bool:
    return re.fullmatch(r"-\d+(\.\d+)?", word) is not None


def _dashed(name: str) -> str:
    return name if name.startswith("-") else f"--{name}"
