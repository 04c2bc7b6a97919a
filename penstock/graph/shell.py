"""What a shell script in a manifest would run: its commands, with their words and their environment.

No shell runs. What is read here is the part of its language that decides which program starts, and with
which words: quotes, assignments, `export`, `set --`, `$NAME`, `${NAME:-word}` and its kin, `"$@"`, `&&` and
`;`, redirections, and a pipe into `tee`. Everything else that a shell would replace or decide (`$(...)`,
backticks, file patterns, a pipe into another program) is refused by name: taken as text it would start the
wrong thing.

A word is only expanded when it is used. `echo "started at $(date)"` is no obstacle. Neither is a statement
that only a shell can run, if the script starts something else and uses nothing that was set there: scripts
often check the machine first (`if [ ... ]; then exit 1; fi`).
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
"""Programs that change neither what is started after them nor its environment."""
_NEVER_LEFT_OUT = names(". eval exec source")
"""Programs that can change what any later command means."""
_OURS = re.compile(r"\bdynamo\.\w|\bpenstock\b")

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=", re.ASCII)
_ASSIGNED = re.compile(r"([A-Za-z_]\w*)\+?=", re.ASCII)
_BRACES = re.compile(r"\{([^{}]*)\}")
_MARK = "\ue002"  # for private use: no manifest has it
_POSITIONAL = re.compile(r"[0-9]+", re.ASCII)


class ShellCommand(msgspec.Struct, frozen=True):
    """A program's words, and the variables that the script sets for it."""

    words: list[str]
    env: dict[str, str]
    left_out: tuple[str, ...] = ()  # what the script does before, and only a shell can
    unknown: dict[str, str] = {}  # words that only a shell can know, each with what to say if it matters


def shell_commands(script: str, env: Mapping[str, str], arguments: Sequence[str]) -> list[ShellCommand]:
    """The commands of `sh -c script arguments...`, but for those that change nothing (`cd`, `echo`).

    Args:
        env: the container's environment.
        arguments: the words after the script: `$0`, `$1`, ...

    Raises:
        ConfigError: the script does not parse, or needs a shell to be understood.
    """
    shell = _Shell(env, arguments)
    found: list[ShellCommand] = []
    left_out: list[str] = []  # what each statement begins with
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
    """Whether what a shell would do there says nothing about what is started later, but for variables."""
    if "<<" in statement.tokens or _NEVER_LEFT_OUT.intersection(statement.programs):
        return False
    texts = [part.text for word in statement.words for part in word if isinstance(part, Text)]
    return bool(statement.programs) and not any(_OURS.search(text) for text in texts)


class _Shell:
    """The variables of a script, as it goes on."""

    def __init__(self, env: Mapping[str, str], arguments: Sequence[str]) -> None:
        self._env = env
        self._exported: dict[str, str] = {}
        self._own: dict[str, str] = {}
        self._arguments = list(arguments)
        self._arrays: dict[str, list[str]] = {}
        self._unknown: set[str] = set()  # variables and functions that are set where only a shell can run
        self._exports_all = False

    def run_statement(self, statement: Statement) -> list[ShellCommand]:
        """The programs that it starts and that matter."""
        if array := array_assignment(statement):
            name, is_added, words = array
            values = [field for word in words for field in self.fields(word)]
            before = self._arrays.get(name, []) if is_added else []
            self._arrays[name] = [*before, *values]
            return []
        found = [self.run(command) for command in simple_commands(statement.tokens)]
        return [command for command in found if command is not None]

    def forget(self, statement: Statement) -> None:
        """Nothing that a statement sets is known any more."""
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
        """The command if it starts a program that matters; assignments and builtins have their effect."""
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
        """A command's words. One that only a shell can know is no error yet in a command of Dynamo's or
        Penstock's, if it is surely a single word: it may be the value of a flag that is ignored."""
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
        """Where a shell splits nothing and knows no file patterns."""
        if word and isinstance(word[0], Text) and not word[0].quoted and word[0].text.startswith("~"):
            raise ConfigError("the shell script: `~` is not understood, write the folder's path out")
        return "".join(
            part.text if isinstance(part, Text) else " ".join(self._values(part)) for part in word
        )

    def fields(self, word: Word) -> list[str]:
        """The words that one word becomes: none or several where variables stand outside of quotes."""
        fields: list[str] = []
        current: str | None = None
        bare = ""  # what is outside of quotes, with x for the rest
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
        """What stands for this part: one text, or all arguments."""
        if isinstance(part, ShellOnly):
            raise ConfigError(f"the shell script: {part.source} is not run here; write what it comes to")
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
                f"the shell script: ${name} is set by commands that are not run here;"
                " write what it comes to"
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
