"""Finds the commands that a shell script in a manifest would run, with their words and environment.

No shell runs. This module interprets the part of the language that decides which program starts, and with
which words: quotes, assignments, `export`, `set --`, `$NAME`, `${NAME:-word}` and similar, `"$@"`, `&&` and
`;`, redirections, and a pipe into `tee`. Everything else that a shell would replace or decide (`$(...)`,
backticks, file patterns, a pipe into another program) is an error that names it: taken as text, it would
start the wrong program.

A word is expanded only when it is used, so `echo "started at $(date)"` is no error. A statement that only a
shell can run is no error either, if the script starts something else and uses nothing that the statement
sets: scripts often check the machine first (`if [ ... ]; then exit 1; fi`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import msgspec

from penstock.errors import ConfigError
from penstock.graph.script import (
    NAME,
    ShellOnly,
    Statement,
    Text,
    Variable,
    Word,
    array_assignment,
    literal,
    names,
    simple_commands,
    statements,
)

_KEYWORDS = names(
    "if then else elif fi for while until do done case esac in function select { } ! [[ [ test eval source"
    " ."
)
_HARMLESS = names(
    "cd date echo exit hostname ls mkdir nvidia-smi printf pwd sleep trap true ulimit umask wait"
)
"""Programs that affect neither the commands after them nor their environment."""
_NEVER_LEFT_OUT = names(". eval exec source")
"""Programs that can change the meaning of any later command."""
_OURS = re.compile(r"\bdynamo\.\w|\bpenstock\b")

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=", re.ASCII)
_ASSIGNED = re.compile(r"([A-Za-z_]\w*)\+?=", re.ASCII)
_BRACES = re.compile(r"\{([^{}]*)\}")
_MARK = "\ue002"  # a private-use character, which no manifest contains
_POSITIONAL = re.compile(r"[0-9]+", re.ASCII)


class ShellCommand(msgspec.Struct, frozen=True):
    """A program's words, and the variables that the script sets for it."""

    words: list[str]
    env: dict[str, str]
    left_out: tuple[str, ...] = ()  # first words of earlier statements that only a shell could run
    unknown: dict[str, str] = {}  # placeholders of words that only a shell can determine, with the errors


def shell_commands(script: str, env: Mapping[str, str], arguments: Sequence[str]) -> list[ShellCommand]:
    """The commands of `sh -c script arguments...`, without those that do not matter, such as `cd` and
    `echo`.

    Args:
        env: the container's environment.
        arguments: the words after the script: `$0`, `$1`, ...

    Raises:
        ConfigError: the script does not parse, or needs a shell to be understood.
    """
    shell = _Shell(env, arguments)
    found: list[ShellCommand] = []
    left_out: list[str] = []  # the first word of each statement
    last_error: ConfigError | None = None
    for statement in statements(script):
        try:
            commands = shell.run_statement(statement)
        except ConfigError as error:
            if not _can_be_left_out(statement):
                raise
            shell.forget(statement)
            left_out.append(statement.shown)
            last_error = error
            continue
        found += [
            msgspec.structs.replace(command, left_out=tuple(dict.fromkeys(left_out)))
            for command in commands
        ]
    if last_error is not None and not found:
        raise last_error
    return found


def _can_be_left_out(statement: Statement) -> bool:
    """Whether the statement can be skipped: apart from variables, it does not affect later commands."""
    if "<<" in statement.tokens or _NEVER_LEFT_OUT.intersection(statement.programs):
        return False
    texts = [part.text for word in statement.words for part in word if isinstance(part, Text)]
    return bool(statement.programs) and not any(_OURS.search(text) for text in texts)


class _Shell:
    """The variables of a script while it is interpreted."""

    def __init__(self, env: Mapping[str, str], arguments: Sequence[str]) -> None:
        self._env = env
        self._exported: dict[str, str] = {}
        self._own: dict[str, str] = {}
        self._arguments = list(arguments)
        self._arrays: dict[str, list[str]] = {}
        self._unknown: set[str] = set()  # variables and functions that skipped statements set
        self._exports_all = False

    def run_statement(self, statement: Statement) -> list[ShellCommand]:
        """The programs that a statement starts, without those that do not matter."""
        if array := array_assignment(statement):
            name, is_added, words = array
            values = [field for word in words for field in self.fields(word)]
            before = self._arrays.get(name, []) if is_added else []
            self._arrays[name] = [*before, *values]
            return []
        found = [self.run(command) for command in simple_commands(statement.tokens)]
        return [command for command in found if command is not None]

    def forget(self, statement: Statement) -> None:
        """Mark what a skipped statement sets as unknown."""
        words = statement.words
        for word, following in zip(words, [*words[1:], ()], strict=True):
            first = word[0] if word else None
            if isinstance(first, Text) and (match := _ASSIGNED.match(first.text)):
                self._unknown.add(match[1])
            if literal(word) in ("for", "read", "select"):
                self._unknown.add(literal(following))
        for token, following_token in zip(statement.tokens, statement.tokens[1:], strict=False):
            if following_token == "(" and not isinstance(token, str):
                self._unknown.add(literal(token))
        for name in self._unknown:
            self._arrays.pop(name, None)

    def run(self, command: list[Word]) -> ShellCommand | None:
        """Interpret a command. Returns it if it starts a program that matters, else None."""
        before: dict[str, str] = {}
        while command and (assigned := self._assignment(command[0])):
            before |= dict([assigned])
            command = command[1:]
        if not command:
            for name, value in before.items():
                self._assign(name, value)
            return None
        program = literal(command[0])
        if program in self._unknown:
            raise ConfigError(f"the shell script: the function `{program}` is not run here")
        if program in _KEYWORDS:
            raise ConfigError(f"the shell script: `{program}` is not understood, only plain commands are")
        if program in _HARMLESS:
            return None
        if program == "export":
            self._export(command[1:])
            return None
        words, unknown = self._words(command)
        if words[:1] == ["set"]:
            self._set(words[1:])
        words = words[1:] if words[:1] == ["exec"] else words
        if not words or words[0] in ("set", ":"):
            return None
        return ShellCommand(words, self._exported | before, unknown=unknown)

    def _words(self, command: list[Word]) -> tuple[list[str], dict[str, str]]:
        """The words of a command. If only a shell can determine a word, a placeholder stands for it,
        provided the command is Dynamo's or Penstock's and the word is surely a single one. It may be the
        value of a flag that is ignored."""
        words: list[str] = []
        unknown: dict[str, ConfigError] = {}
        for word in command:
            try:
                words += self.fields(word)
            except ConfigError as error:
                if not all(part.quoted for part in word if not isinstance(part, Text)):
                    raise
                mark = f"{_MARK}{len(unknown)}{_MARK}"
                unknown[mark] = error
                words.append(mark)
        if unknown and not any(_OURS.search(word) for word in words):
            raise next(iter(unknown.values()))
        return words, {mark: str(error) for mark, error in unknown.items()}

    def _assign(self, name: str, value: str) -> None:
        self._unknown.discard(name)
        exported = self._exports_all or name in self._env or name in self._exported
        (self._exported if exported else self._own)[name] = value

    def _export(self, words: list[Word]) -> None:
        for word in words:
            if assigned := self._assignment(word):
                self._exported[assigned[0]] = assigned[1]
                self._unknown.discard(assigned[0])
                continue
            for name in self.fields(word):
                if name in self._own:
                    self._exported[name] = self._own.pop(name)
                elif not NAME.fullmatch(name):
                    raise ConfigError(f"the shell script: `export {name}` is not understood")

    def _set(self, words: list[str]) -> None:
        if "--" in words:
            self._arguments = [*self._arguments[:1], *words[words.index("--") + 1 :]]
        self._exports_all |= "-a" in words or "allexport" in words

    def _assignment(self, word: Word) -> tuple[str, str] | None:
        """The name and value of `NAME=value`; None for other words."""
        first = word[0] if word else None
        if not isinstance(first, Text) or first.quoted or not (match := _ASSIGNMENT.match(first.text)):
            return None
        rest = first.text[match.end() :]
        return match[1], self._joined((Text(rest, quoted=False), *word[1:]))

    def _joined(self, word: Word) -> str:
        """The text of a word in a place where a shell does not split words or expand file patterns."""
        if word and isinstance(word[0], Text) and not word[0].quoted and word[0].text.startswith("~"):
            raise ConfigError("the shell script: `~` is not understood, write the folder's path out")
        return "".join(
            part.text if isinstance(part, Text) else " ".join(self._values(part)) for part in word
        )

    def fields(self, word: Word) -> list[str]:
        """The words that a word expands to: none or several if it has variables outside of quotes."""
        fields: list[str] = []
        current: str | None = None
        bare = ""  # the text outside of quotes, with x for the rest
        for part in word:
            if isinstance(part, Text):
                current = (current or "") + part.text
                bare += "x" if part.quoted else part.text
                continue
            values = self._values(part)
            if isinstance(part, Variable) and not part.quoted:
                text = " ".join(values)
                bare += text.replace("{", "x")
                values = text.split()
                if current is not None and text[:1].isspace():
                    fields.append(current)
                    current = None
            for index, value in enumerate(values):
                if index and current is not None:
                    fields.append(current)
                    current = None
                current = (current or "") + value
        _refuse_patterns(bare)
        return fields if current is None else [*fields, current]

    def _values(self, part: Variable | ShellOnly) -> list[str]:
        """The values of a part: a single text, or all arguments."""
        if isinstance(part, ShellOnly):
            raise ConfigError(f"the shell script: {part.source} is not run here; write its value")
        if part.name == "@" and not part.operator:
            return self._arguments[1:]
        if part.name.endswith("[@]") and not part.operator and part.name[:-3] in self._arrays:
            return self._arrays[part.name[:-3]]
        value = self._value(part.name)
        present = value is not None and (value != "" or not part.operator.startswith(":"))
        match part.operator[-1:]:
            case "+":
                return [self._joined(part.word)] if present else [""]
            case "-" | "=" if not present:
                value = self._joined(part.word)
                if part.operator.endswith("="):
                    self._assign(part.name, value)
            case "?" if not present:
                value = None
        if value is None:
            raise ConfigError(f"${part.name} is not set in the manifest")
        return [value]

    def _value(self, name: str) -> str | None:
        if name.removesuffix("[@]") in self._unknown:
            raise ConfigError(
                f"the shell script: ${name} is set by commands that are not run here; write its value"
            )
        if name in ("@", "*"):
            return " ".join(self._arguments[1:])
        if name == "#":
            return str(max(0, len(self._arguments) - 1))
        if _POSITIONAL.fullmatch(name):
            position = int(name)
            return self._arguments[position] if position < len(self._arguments) else None
        for variables in (self._own, self._exported, self._env):
            if name in variables:
                return variables[name]
        return None


def _refuse_patterns(bare: str) -> None:
    if bare.startswith("~"):
        raise ConfigError("the shell script: `~` is not understood, write the folder's path out")
    for sign in "*?[":
        if sign in bare:
            raise ConfigError(
                f"the shell script: `{sign}` outside of quotes stands for files that only the container"
                " knows; put it in quotes if it is text"
            )
    if any("," in inside or ".." in inside for inside in _BRACES.findall(bare)):
        raise ConfigError(
            "the shell script: `{a,b}` outside of quotes stands for several words; put it in quotes"
        )
