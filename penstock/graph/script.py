"""Parses a shell script into statements of words and operators. Variables in them are not expanded yet.

`shell.py` interprets the statements.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import msgspec

from penstock.errors import ConfigError


def names(words: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(words.split())


_CONNECTORS = ("&&", "||", ";;", ";", "|&", "|", "&", "\n", "(", ")")
_REDIRECTIONS = ("&>>", "&>", "<<<", "<<", "<&", "<>", "<(", "<", ">>", ">&", ">|", ">(", ">")
_OPERATORS = tuple(sorted((*_CONNECTORS, *_REDIRECTIONS), key=len, reverse=True))
_GOES_ON = ("|", "|&", "&&", "||")  # after these, the statement continues in the next line
_PIPED_INTO = frozenset({"tee", "cat"})
_NOT_READ = ("(", ")", "<<", "<<<", "<(", ">(", ";;")

_OPENING = names("if for while until case select {")
_CLOSING = names("fi done esac }")
_BEFORE_A_COMMAND = names("if then else elif while until do { !")
"""Words after which a command begins."""

NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_BRACED = re.compile(r"([A-Za-z_]\w*(?:\[@\])?|[0-9]+|[@*#])(:?[-=?+])?", re.ASCII)
_ARRAY = re.compile(r"([A-Za-z_]\w*)(\+?)=", re.ASCII)
_DESCRIPTOR = re.compile(r"[0-9]+(?=[<>])", re.ASCII)
_DEPTH_MAX = 16  # of ${A:-${B:-...}}


class Text(msgspec.Struct, frozen=True):
    text: str
    quoted: bool


class Variable(msgspec.Struct, frozen=True):
    """`$NAME`, or `${NAME` + `operator` + `word` + `}`."""

    name: str  # or a position, or one of @ * #, or `NAME[@]`
    quoted: bool
    operator: str = ""
    word: tuple[Part, ...] = ()


class ShellOnly(msgspec.Struct, frozen=True):
    """A part whose value only a shell can determine. Using it is an error."""

    source: str
    quoted: bool = False


Part = Text | Variable | ShellOnly
Word = tuple[Part, ...]
Token = str | Word


def literal(word: Word) -> str:
    """The text of a word that needs no expansion; empty for other words."""
    texts = [part.text for part in word if isinstance(part, Text)]
    return "".join(texts) if len(texts) == len(word) else ""


class Statement(msgspec.Struct, frozen=True):
    """A statement of one or several lines: a command line, or a whole `if`, `for`, function or list."""

    tokens: list[Token]
    programs: list[str]  # the first words of the commands in it; empty for a word that needs expansion

    @property
    def shown(self) -> str:
        """The first word, for messages: `for`, `test`, `count=$(...)`."""
        first = self.tokens[0]
        if isinstance(first, str):
            return first
        return "".join(part.text if isinstance(part, Text) else "$(...)" for part in first)

    @property
    def words(self) -> list[Word]:
        """The words of the statement, without the operators."""
        return [token for token in self.tokens if not isinstance(token, str)]


def statements(script: str) -> list[Statement]:
    """Parse a script into statements.

    Raises:
        ConfigError: the script does not parse.
    """
    found: list[Statement] = []
    tokens: list[Token] = []
    programs: list[str] = []
    within: list[str] = []  # the constructs that have begun and not ended
    begins = True
    for token in (*_Reader(script).tokens(), "\n"):
        if token == "\n" and not within and not (tokens and tokens[-1] in _GOES_ON):
            if tokens:
                found.append(Statement(tokens, programs))
            tokens, programs, begins = [], [], True
            continue
        tokens.append(token)
        if isinstance(token, str):
            if token.endswith("("):
                within.append("(")
            elif token == ")" and within[-1:] == ["("]:  # the others end patterns of a `case`
                within.pop()
            begins = token in _CONNECTORS
        elif begins:
            word = literal(token)
            programs.append(word)
            if word in _OPENING:
                within.append(word)
            elif word in _CLOSING and within:
                within.pop()
            begins = word in _BEFORE_A_COMMAND
    if tokens:
        raise ConfigError("the shell script does not parse: it ends inside an unfinished command")
    return found


def simple_commands(tokens: Iterable[Token]) -> Iterator[list[Word]]:
    """The words of each command, without redirections.

    Raises:
        ConfigError: the statement is more than plain commands.
    """
    words: list[Word] = []
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
        if piped and (not words or literal(words[0]) not in _PIPED_INTO):
            where = literal(words[0]) if words else ""
            raise ConfigError(f"the shell script: a pipe into `{where}` is not understood, only into tee")
        if words and not piped:
            yield words
        words, piped = [], token in ("|", "|&")


def array_assignment(statement: Statement) -> tuple[str, bool, list[Word]] | None:
    """The name of `NAME=(...)`, whether it is `+=`, and the words. None for other statements."""
    first, *rest = statement.tokens
    match = None if isinstance(first, str) else _ARRAY.fullmatch(literal(first))
    if match is None or len(rest) < 2 or rest[0] != "(" or rest[-1] != ")":
        return None
    inside = [token for token in rest[1:-1] if token != "\n"]
    words = [token for token in inside if not isinstance(token, str)]
    return (match[1], bool(match[2]), words) if len(words) == len(inside) else None


class _Reader:
    """Splits a script into words and operators."""

    def __init__(self, script: str) -> None:
        self._text = script.replace("\\\n", "")
        self._at = 0
        self._depth = 0

    def tokens(self) -> Iterator[str | Word]:
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

    def _word(self, ends: str) -> Word:
        """A word: up to the first character in `ends` outside of quotes."""
        parts: list[Part] = []
        while self._at < len(self._text) and (sign := self._text[self._at]) not in ends:
            if sign == "'":
                parts.append(Text(self._until("'"), quoted=True))
            elif sign == '"':
                parts += self._quoted()
            elif sign == "\\":
                parts.append(Text(self._text[self._at + 1 : self._at + 2], quoted=True))
                self._at += 2
            elif sign in "$`":
                parts.append(self._expansion(quoted=False))
            else:
                start = self._at
                while self._at < len(self._text) and self._text[self._at] not in ends + "'\"\\$`":
                    self._at += 1
                parts.append(Text(self._text[start : self._at], quoted=False))
        return tuple(parts)

    def _until(self, quote: str) -> str:
        start = self._at + 1
        end = self._text.find(quote, start)
        if end < 0:
            raise ConfigError(f"the shell script does not parse: no closing {quote}")
        self._at = end + 1
        return self._text[start:end]

    def _quoted(self) -> list[Part]:
        """The parts of `"..."`, in which variables are expanded."""
        self._at += 1
        parts: list[Part] = [Text("", quoted=True)]
        while self._at < len(self._text):
            sign = self._text[self._at]
            if sign == '"':
                self._at += 1
                # `"$@"` without arguments is no word, `""` is an empty one.
                return parts if len(parts) == 1 else parts[1:]
            if sign in "$`":
                part = self._expansion(quoted=True)
                parts.append(ShellOnly(part.source, quoted=True) if isinstance(part, ShellOnly) else part)
                continue
            if sign == "\\" and self._text[self._at + 1 : self._at + 2] in ("$", "`", '"', "\\"):
                self._at += 1
                sign = self._text[self._at]
            parts.append(Text(sign, quoted=True))
            self._at += 1
        raise ConfigError('the shell script does not parse: no closing "')

    def _expansion(self, quoted: bool) -> Part:
        text, start = self._text, self._at
        if text[start] == "`":
            return ShellOnly(f"`{self._until('`')}`")
        self._at += 1
        following = text[self._at : self._at + 1]
        if following == "(":
            return self._substitution(start)
        if following == "{":
            return self._braced(start, quoted)
        if match := NAME.match(text, self._at):
            self._at = match.end()
            return Variable(match[0], quoted)
        if following and following in "@*#0123456789":
            self._at += 1
            return Variable(following, quoted)
        if following and following in "?$!-":
            self._at += 1
            return ShellOnly(f"${following}")
        if following and following in "'\"" and not quoted:
            return ShellOnly(f"${following}")
        return Text("$", quoted=True)

    def _substitution(self, start: int) -> ShellOnly:
        """`$(...)`, to its closing parenthesis."""
        depth = 0
        for at in range(self._at, len(self._text)):
            depth += {"(": 1, ")": -1}.get(self._text[at], 0)
            if depth == 0:
                self._at = at + 1
                return ShellOnly(self._text[start : self._at])
        raise ConfigError("the shell script does not parse: no closing )")

    def _braced(self, start: int, quoted: bool) -> Part:
        """`${...}`."""
        match = _BRACED.match(self._text, self._at + 1)
        self._depth += 1
        if match and self._depth <= _DEPTH_MAX:
            self._at = match.end()
            word = self._word("}")
            if self._text[self._at : self._at + 1] == "}" and (match[2] or not word):
                self._at += 1
                self._depth -= 1
                return Variable(match[1], quoted, match[2] or "", word)
        end = self._text.find("}", start)
        if end < 0:
            raise ConfigError("the shell script does not parse: no closing }")
        self._at = end + 1
        self._depth -= 1
        return ShellOnly(self._text[start : self._at])
