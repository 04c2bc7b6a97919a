"""What a shell script in a manifest would run: its commands, with their words and their environment.

No shell runs. What is read here is the part of its language that decides which program starts, and with
which words: quotes, assignments, `export`, `set --`, `$NAME`, `${NAME:-word}` and its kin, `"$@"`, `&&` and
`;`, redirections, and a pipe into `tee`. Everything else that a shell would replace or decide (`$(...)`,
backticks, file patterns, `if`, a pipe into another program) is refused by name: taken as text it would
start the wrong thing.

A word is only expanded when it is used. `echo "started at $(date)"` is no obstacle.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from penstock.errors import ConfigError


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


_CONNECTORS = ("&&", "||", ";;", ";", "|&", "|", "&", "\n", "(", ")")
_REDIRECTIONS = ("&>>", "&>", "<<<", "<<", "<&", "<>", "<(", "<", ">>", ">&", ">|", ">(", ">")
_OPERATORS = tuple(sorted((*_CONNECTORS, *_REDIRECTIONS), key=len, reverse=True))
_NOT_READ = ("(", ")", "<<", "<<<", "<(", ">(", ";;")

_KEYWORDS = _names(
    "if then else elif fi for while until do done case esac in function select { } ! [[ [ test eval source"
    " ."
)
_HARMLESS = _names(
    "cd date echo exit hostname ls mkdir nvidia-smi printf pwd sleep trap true ulimit umask wait"
)
"""Programs that change neither what is started after them nor its environment."""
_PIPED_INTO = frozenset({"tee", "cat"})

_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=", re.ASCII)
_BRACED = re.compile(r"([A-Za-z_]\w*|[0-9]+|[@*#])(:?[-=?+])?", re.ASCII)
_DESCRIPTOR = re.compile(r"[0-9]+(?=[<>])", re.ASCII)
_BRACES = re.compile(r"\{([^{}]*)\}")
_POSITIONAL = re.compile(r"[0-9]+", re.ASCII)
_DEPTH_MAX = 16  # of ${A:-${B:-...}}


class ShellCommand(msgspec.Struct, frozen=True):
    """A program's words, and the variables that the script sets for it."""

    words: list[str]
    env: dict[str, str]


class _Text(msgspec.Struct, frozen=True):
    text: str
    quoted: bool


class _Variable(msgspec.Struct, frozen=True):
    """`$NAME`, or `${NAME` + `operator` + `word` + `}`."""

    name: str  # or a position, or one of @ * #
    quoted: bool
    operator: str = ""
    word: tuple[_Part, ...] = ()


class _Refused(msgspec.Struct, frozen=True):
    """What only a shell can know. An error, once it is used."""

    source: str


_Part = _Text | _Variable | _Refused
_Word = tuple[_Part, ...]


def shell_commands(script: str, env: Mapping[str, str], arguments: Sequence[str]) -> list[ShellCommand]:
    """The commands of `sh -c script arguments...`, but for those that change nothing (`cd`, `echo`).

    Args:
        env: the container's environment.
        arguments: the words after the script: `$0`, `$1`, ...

    Raises:
        ConfigError: the script does not parse, or needs a shell to be understood.
    """
    shell = _Shell(env, arguments)
    found = [shell.run(command) for command in _simple_commands(_Reader(script).tokens())]
    return [command for command in found if command is not None]


class _Shell:
    """The variables of a script, as it goes on."""

    def __init__(self, env: Mapping[str, str], arguments: Sequence[str]) -> None:
        self._env = env
        self._exported: dict[str, str] = {}
        self._own: dict[str, str] = {}
        self._arguments = list(arguments)
        self._exports_all = False

    def run(self, command: list[_Word]) -> ShellCommand | None:
        """The command if it starts a program that matters; assignments and builtins have their effect."""
        before: dict[str, str] = {}
        while command and (assigned := self._assignment(command[0])):
            before |= dict([assigned])
            command = command[1:]
        if not command:
            for name, value in before.items():
                self._assign(name, value)
            return None
        program = _literal(command[0])
        if program in _KEYWORDS:
            raise ConfigError(f"the shell script: `{program}` is not understood, only plain commands are")
        if program in _HARMLESS:
            return None
        if program == "export":
            self._export(command[1:])
            return None
        words = [field for word in command for field in self.fields(word)]
        if words[:1] == ["set"]:
            self._set(words[1:])
        words = words[1:] if words[:1] == ["exec"] else words
        if not words or words[0] in ("set", ":"):
            return None
        return ShellCommand(words, self._exported | before)

    def _assign(self, name: str, value: str) -> None:
        exported = self._exports_all or name in self._env or name in self._exported
        (self._exported if exported else self._own)[name] = value

    def _export(self, words: list[_Word]) -> None:
        for word in words:
            if assigned := self._assignment(word):
                self._exported[assigned[0]] = assigned[1]
                continue
            for name in self.fields(word):
                if name in self._own:
                    self._exported[name] = self._own.pop(name)
                elif not _NAME.fullmatch(name):
                    raise ConfigError(f"the shell script: `export {name}` is not understood")

    def _set(self, words: list[str]) -> None:
        if "--" in words:
            self._arguments = [*self._arguments[:1], *words[words.index("--") + 1 :]]
        self._exports_all |= "-a" in words or "allexport" in words

    def _assignment(self, word: _Word) -> tuple[str, str] | None:
        """The name and value of `NAME=value`; None for other words."""
        first = word[0] if word else None
        if not isinstance(first, _Text) or first.quoted or not (match := _ASSIGNMENT.match(first.text)):
            return None
        rest = first.text[match.end() :]
        return match[1], self._joined((_Text(rest, quoted=False), *word[1:]))

    def _joined(self, word: _Word) -> str:
        """Where a shell splits nothing and knows no file patterns."""
        if word and isinstance(word[0], _Text) and not word[0].quoted and word[0].text.startswith("~"):
            raise ConfigError("the shell script: `~` is not understood, write the folder's path out")
        return "".join(
            part.text if isinstance(part, _Text) else " ".join(self._values(part)) for part in word
        )

    def fields(self, word: _Word) -> list[str]:
        """The words that one word becomes: none or several where variables stand outside of quotes."""
        fields: list[str] = []
        current: str | None = None
        bare = ""  # what is outside of quotes, with x for the rest
        for part in word:
            if isinstance(part, _Text):
                current = (current or "") + part.text
                bare += "x" if part.quoted else part.text
                continue
            values = self._values(part)
            if isinstance(part, _Variable) and not part.quoted:
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

    def _values(self, part: _Variable | _Refused) -> list[str]:
        """What stands for this part: one text, or all arguments."""
        if isinstance(part, _Refused):
            raise ConfigError(f"the shell script: {part.source} is not run here; write what it comes to")
        if part.name == "@" and not part.operator:
            return self._arguments[1:]
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


def _literal(word: _Word) -> str:
    """A word without anything to expand; empty for others."""
    texts = [part.text for part in word if isinstance(part, _Text)]
    return "".join(texts) if len(texts) == len(word) else ""


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


def _simple_commands(tokens: Iterator[str | _Word]) -> Iterator[list[_Word]]:
    """The words of each command. Redirections, and what a pipe into `tee` leads to, are left out."""
    words: list[_Word] = []
    piped = redirected = False
    for token in (*tokens, ";"):
        if not isinstance(token, str):
            if redirected:
                redirected = False
            else:
                words.append(token)
            continue
        if token in _NOT_READ:
            raise ConfigError(f"the shell script: `{token}` is not understood, only plain commands are")
        if redirected:
            raise ConfigError(f"the shell script does not parse: `{token}` after a redirection")
        if token in _REDIRECTIONS:
            redirected = True
            continue
        if piped and (not words or _literal(words[0]) not in _PIPED_INTO):
            where = _literal(words[0]) if words else ""
            raise ConfigError(f"the shell script: a pipe into `{where}` is not understood, only into tee")
        if words and not piped:
            yield words
        words, piped = [], token in ("|", "|&")


class _Reader:
    """A script as words and operators."""

    def __init__(self, script: str) -> None:
        self._text = script.replace("\\\n", "")
        self._at = 0
        self._depth = 0

    def tokens(self) -> Iterator[str | _Word]:
        text = self._text
        while self._at < len(text):
            sign = text[self._at]
            if sign in " \t\r":
                self._at += 1
            elif sign == "#":
                end = text.find("\n", self._at)
                self._at = len(text) if end < 0 else end
            elif match := _DESCRIPTOR.match(text, self._at):
                self._at = match.end()
            elif operator := self._operator():
                self._at += len(operator)
                yield operator
            else:
                yield self._word(" \t\r\n;&|<>()")

    def _operator(self) -> str:
        return next((one for one in _OPERATORS if self._text.startswith(one, self._at)), "")

    def _word(self, ends: str) -> _Word:
        """Up to the first of these signs outside of quotes."""
        parts: list[_Part] = []
        while self._at < len(self._text) and (sign := self._text[self._at]) not in ends:
            if sign == "'":
                parts.append(_Text(self._until("'"), quoted=True))
            elif sign == '"':
                parts += self._quoted()
            elif sign == "\\":
                parts.append(_Text(self._text[self._at + 1 : self._at + 2], quoted=True))
                self._at += 2
            elif sign in "$`":
                parts.append(self._expansion(quoted=False))
            else:
                start = self._at
                while self._at < len(self._text) and self._text[self._at] not in ends + "'\"\\$`":
                    self._at += 1
                parts.append(_Text(self._text[start : self._at], quoted=False))
        return tuple(parts)

    def _until(self, quote: str) -> str:
        start = self._at + 1
        end = self._text.find(quote, start)
        if end < 0:
            raise ConfigError(f"the shell script does not parse: no closing {quote}")
        self._at = end + 1
        return self._text[start:end]

    def _quoted(self) -> list[_Part]:
        """`"..."`, in which a shell still expands variables."""
        self._at += 1
        parts: list[_Part] = [_Text("", quoted=True)]
        while self._at < len(self._text):
            sign = self._text[self._at]
            if sign == '"':
                self._at += 1
                # `"$@"` without arguments is no word, `""` is an empty one.
                return parts if len(parts) == 1 else parts[1:]
            if sign in "$`":
                parts.append(self._expansion(quoted=True))
                continue
            if sign == "\\" and self._text[self._at + 1 : self._at + 2] in ("$", "`", '"', "\\"):
                self._at += 1
                sign = self._text[self._at]
            parts.append(_Text(sign, quoted=True))
            self._at += 1
        raise ConfigError('the shell script does not parse: no closing "')

    def _expansion(self, quoted: bool) -> _Part:
        text, start = self._text, self._at
        if text[start] == "`":
            return _Refused(f"`{self._until('`')}`")
        self._at += 1
        following = text[self._at : self._at + 1]
        if following == "(":
            return self._substitution(start)
        if following == "{":
            return self._braced(start, quoted)
        if match := _NAME.match(text, self._at):
            self._at = match.end()
            return _Variable(match[0], quoted)
        if following and following in "@*#0123456789":
            self._at += 1
            return _Variable(following, quoted)
        if following and following in "?$!-":
            self._at += 1
            return _Refused(f"${following}")
        if following and following in "'\"" and not quoted:
            return _Refused(f"${following}")
        return _Text("$", quoted=True)

    def _substitution(self, start: int) -> _Refused:
        """`$(...)`, to its closing parenthesis."""
        depth = 0
        for at in range(self._at, len(self._text)):
            depth += {"(": 1, ")": -1}.get(self._text[at], 0)
            if depth == 0:
                self._at = at + 1
                return _Refused(self._text[start : self._at])
        raise ConfigError("the shell script does not parse: no closing )")

    def _braced(self, start: int, quoted: bool) -> _Part:
        """`${...}`."""
        match = _BRACED.match(self._text, self._at + 1)
        self._depth += 1
        if match and self._depth <= _DEPTH_MAX:
            self._at = match.end()
            word = self._word("}")
            if self._text[self._at : self._at + 1] == "}" and (match[2] or not word):
                self._at += 1
                self._depth -= 1
                return _Variable(match[1], quoted, match[2] or "", word)
        end = self._text.find("}", start)
        if end < 0:
            raise ConfigError("the shell script does not parse: no closing }")
        self._at = end + 1
        self._depth -= 1
        return _Refused(self._text[start : self._at])
