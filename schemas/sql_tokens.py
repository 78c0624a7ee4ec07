"""Tokens of a table file, each with its place, and a reader that says what it expected.

sqlglot tells text, quotes and comments apart. Its syntax tree is not used: it keeps no places for types and options,
which faults must point at, and it accepts far more than a table file may say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from sqlglot import Tokenizer, TokenType
from sqlglot.errors import TokenError

from schemas.errors import TableFileError

_STRINGS_AND_COMMENTS = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|--[^\n]*|/\*.*?\*/|(?P<unclosed>['"]|/\*)""", re.S)
_WORDS = re.compile(r"[^\W\d]\w*(?:\s+\w+)*")


class Position(NamedTuple):
    """A place in a file; line and column count from 1."""

    file: str
    line: int
    column: int

    def error(self, message: str, *, hint: str) -> TableFileError:
        """The error to raise for a fault at this place."""
        return TableFileError(message, file=self.file, line=self.line, column=self.column, hint=hint)


class Kind(Enum):
    """What a token is to the grammar; a bare word may be a keyword or a name."""

    WORD = "word"
    QUOTED = "quoted name"
    STRING = "string"
    NUMBER = "number"
    SYMBOL = "symbol"
    END = "end of file"


_KINDS = {
    TokenType.IDENTIFIER: Kind.QUOTED,
    TokenType.STRING: Kind.STRING,
    TokenType.NUMBER: Kind.NUMBER,
}


@dataclass(frozen=True)
class Token:
    """One token. `text` is without quotes."""

    kind: Kind
    text: str
    at: Position

    def __str__(self) -> str:
        return "the end of the file" if self.kind is Kind.END else repr(self.text)


class TokenReader:
    """Reads tokens forward. Keywords are given in upper case and match in any case, but never a quoted name."""

    def __init__(self, file: str, sql: str) -> None:
        self._tokens = _tokenize(file, sql)
        self._index = 0

    @property
    def next(self) -> Token:
        """The token to be read next; END at the end."""
        return self._tokens[self._index]

    @property
    def at_end(self) -> bool:
        """True when all tokens are read."""
        return self.next.kind is Kind.END

    def take(self) -> Token:
        """Reads one token; END is never passed."""
        token = self.next
        if token.kind is not Kind.END:
            self._index += 1
        return token

    def accept(self, *words: str) -> bool:
        """Reads these keywords or symbols if exactly they come next, else nothing."""
        upcoming = self._tokens[self._index : self._index + len(words)]
        if len(upcoming) == len(words) and all(map(_is, upcoming, words)):
            self._index += len(words)
            return True
        return False

    def expect(self, *words: str, hint: str) -> None:
        """Reads these keywords or symbols; TableFileError at the first that is something else."""
        for word in words:
            if not self.accept(word):
                raise self.next.at.error(f"expected {word}, found {self.next}", hint=hint)

    def expect_name(self, what: str) -> Token:
        """Reads a name, bare or in double quotes."""
        if self.next.kind not in (Kind.WORD, Kind.QUOTED):
            raise self.next.at.error(
                f"expected {what}, found {self.next}", hint='names are bare words, or anything "in double quotes"'
            )
        return self.take()


def read_tokens(path: Path) -> TokenReader:
    """The tokens of a file. Raises TableFileError if it cannot be read as SQL text at all."""
    try:
        sql = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Position(str(path), 1, 1).error(f"not UTF-8: {error.reason}", hint="save the file as UTF-8") from None
    return TokenReader(str(path), sql)


def _is(token: Token, word: str) -> bool:
    return token.kind in (Kind.WORD, Kind.SYMBOL) and token.text.upper() == word


def _tokenize(file: str, sql: str) -> list[Token]:
    try:
        raw = Tokenizer().tokenize(sql)
    except TokenError:
        raise _position(file, sql, _unclosed(sql)).error(
            "a quote or comment opens here and never closes", hint="close it; a quote inside a string is written twice"
        ) from None
    tokens = []
    for token in raw:
        source, at = sql[token.start : token.end + 1], _position(file, sql, token.start)
        if _WORDS.fullmatch(source):
            # Several words: sqlglot joins keywords such as PRIMARY KEY into one token.
            tokens += [Token(Kind.WORD, word, at) for word in source.split()]
        else:
            tokens.append(Token(_KINDS.get(token.token_type, Kind.SYMBOL), token.text, at))
    return [*tokens, Token(Kind.END, "", _position(file, sql, len(sql.rstrip())))]


def _unclosed(sql: str) -> int:
    return next((m.start() for m in _STRINGS_AND_COMMENTS.finditer(sql) if m["unclosed"]), 0)


def _position(file: str, sql: str, offset: int) -> Position:
    return Position(file, sql.count("\n", 0, offset) + 1, offset - sql.rfind("\n", 0, offset))
