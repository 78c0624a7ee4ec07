"""Column types as table files spell them -> ColumnType. Called by the parser for columns and, nested, for fields.

Spellings that mean different things in different databases (INT8, FLOAT, DECIMAL without digits) are refused with the
unambiguous ones, because a wrong guess would damage numbers silently.
"""

from __future__ import annotations

import re
from difflib import get_close_matches

from schemas.sql_tokens import Kind, Token, TokenReader
from schemas.table import ArrayType, ColumnType, ScalarKind, ScalarType, StructField, StructType

DECIMAL_PRECISION_MAX = 38
_TIMESTAMP_DIGITS_MAX = 6

_SPELLINGS: dict[str, ScalarKind] = {
    **{kind.value: kind for kind in ScalarKind if kind is not ScalarKind.DECIMAL},
    "INT": ScalarKind.INTEGER,
    "INT2": ScalarKind.SMALLINT,
    "INT4": ScalarKind.INTEGER,
    "FLOAT4": ScalarKind.REAL,
    "FLOAT8": ScalarKind.DOUBLE,
    "BOOL": ScalarKind.BOOLEAN,
    "TEXT": ScalarKind.VARCHAR,
    "STRING": ScalarKind.VARCHAR,
    "DATETIME": ScalarKind.TIMESTAMP,
}
_DECIMALS = ("DECIMAL", "NUMERIC", "DEC")
_STRUCTS = ("STRUCT", "ROW")
_UNSIGNED: dict[ScalarKind, ScalarKind] = {
    ScalarKind.TINYINT: ScalarKind.UTINYINT,
    ScalarKind.SMALLINT: ScalarKind.USMALLINT,
    ScalarKind.INTEGER: ScalarKind.UINTEGER,
    ScalarKind.BIGINT: ScalarKind.UBIGINT,
}
_KNOWN = sorted({*_SPELLINGS, *_DECIMALS, *_STRUCTS, "ARRAY"})

_REFUSED = {
    "INT8": "it is 8 bytes in some databases and 8 bits in others: write BIGINT or TINYINT",
    "FLOAT": "it is 4 bytes in some databases and 8 in others: write REAL (4) or DOUBLE (8)",
    "HUGEINT": "write DECIMAL(38, 0)",
    "CHAR": "write VARCHAR",
    "CHARACTER": "write VARCHAR",
    "BLOB": "JSON has no bytes: write VARCHAR and publish them as base64",
    "BYTEA": "JSON has no bytes: write VARCHAR and publish them as base64",
    "BYTES": "JSON has no bytes: write VARCHAR and publish them as base64",
    "MAP": "write STRUCT(...) if the keys are known, else JSON",
    "ENUM": "write VARCHAR",
    "TIME": "write VARCHAR, or TIMESTAMP if there is a date",
    "INTERVAL": "write BIGINT and say the unit in the column's name",
}


def parse_type(reader: TokenReader) -> ColumnType:
    """Reads one type, with any number of [] behind it. Raises TableFileError."""
    column_type = _parse_base(reader)
    while reader.accept("["):
        reader.expect("]", hint="arrays have any length: write INTEGER[]")
        column_type = ArrayType(column_type)
    return column_type


def check_name(token: Token, what: str, *, taken: dict[str, str]) -> str:
    """The name, checked to be usable in every target, and added to `taken` (folded name -> name)."""
    name = token.text
    if not name or re.search(r"""["'`\\.\x00-\x1f\x7f]""", name):
        raise token.at.error(
            f"{what} name {name!r} holds a quote, backslash, dot or control character, or nothing",
            hint="rename the field where it is published: not every target can name it",
        )
    earlier = taken.get(name.casefold())
    if earlier is not None:
        raise token.at.error(
            f"{what} {name!r} is there already" + (f", as {earlier!r}" if earlier != name else ""),
            hint="remove or rename one; upper and lower case make no difference in DuckDB",
        )
    taken[name.casefold()] = name
    return name


def _parse_base(reader: TokenReader) -> ColumnType:
    token = reader.next
    spelled = token.text.upper() if token.kind is Kind.WORD else ""
    if not spelled:
        raise token.at.error(f"expected a type, found {token}", hint=f"types: {', '.join(_KNOWN)}")
    if reader.accept("CHARACTER", "VARYING"):
        return _plain(reader, token, ScalarKind.VARCHAR)
    reader.take()
    if spelled == "ARRAY":
        reader.expect("<", hint="write ARRAY<INTEGER> or INTEGER[]")
        element = parse_type(reader)
        reader.expect(">", hint="close ARRAY<...>")
        return ArrayType(element)
    if spelled in _STRUCTS:
        return _parse_struct(reader)
    if spelled in _DECIMALS:
        return _parse_decimal(reader, token)
    kind = _SPELLINGS.get(spelled)
    if kind is None:
        raise _unknown_type(token, spelled)
    if kind is ScalarKind.TIMESTAMP:
        return _parse_timestamp(reader)
    if kind is ScalarKind.DOUBLE:
        reader.accept("PRECISION")
    if kind in _UNSIGNED and reader.accept("UNSIGNED"):
        kind = _UNSIGNED[kind]
    return _plain(reader, token, kind)


def _plain(reader: TokenReader, token: Token, kind: ScalarKind) -> ScalarType:
    if reader.next.text == "(":
        raise reader.next.at.error(
            f"{token.text} takes no length or precision", hint=f"write {kind.value}: it holds any length"
        )
    return ScalarType(kind)


def _parse_struct(reader: TokenReader) -> StructType:
    close = ">" if reader.accept("<") else ")"
    if close == ")":
        reader.expect("(", hint="write STRUCT(a INTEGER, b VARCHAR)")
    fields: list[StructField] = []
    taken: dict[str, str] = {}
    while not fields or reader.accept(","):
        token = reader.expect_name("a field name")
        name = check_name(token, "field", taken=taken)
        if name.casefold() == "null":
            raise token.at.error(
                f"a field cannot be called {name!r}", hint="rename it: ClickHouse keeps this word for itself"
            )
        fields.append(StructField(name, parse_type(reader)))
    reader.expect(close, hint="fields are a name and a type, separated by commas")
    return StructType(tuple(fields))


def _parse_decimal(reader: TokenReader, token: Token) -> ScalarType:
    hint = f"write DECIMAL(18, 3): up to {DECIMAL_PRECISION_MAX} digits, 3 of them after the point"
    if not reader.accept("("):
        raise token.at.error(f"{token.text} without digits differs from database to database", hint=hint)
    precision, scale = _parse_digits(reader, 1, DECIMAL_PRECISION_MAX, hint), 0
    if reader.accept(","):
        scale = _parse_digits(reader, 0, precision, hint)
    reader.expect(")", hint=hint)
    return ScalarType(ScalarKind.DECIMAL, precision, scale)


def _parse_timestamp(reader: TokenReader) -> ScalarType:
    hint = f"write TIMESTAMP or TIMESTAMP({_TIMESTAMP_DIGITS_MAX}): microseconds are the finest"
    if reader.accept("("):
        _parse_digits(reader, 0, _TIMESTAMP_DIGITS_MAX, hint)
        reader.expect(")", hint=hint)
    if reader.next.text.upper() == "WITH":
        reader.expect("WITH", "TIME", "ZONE", hint="write TIMESTAMP WITH TIME ZONE, or TIMESTAMPTZ")
        return ScalarType(ScalarKind.TIMESTAMPTZ)
    if reader.next.text.upper() == "WITHOUT":
        reader.expect("WITHOUT", "TIME", "ZONE", hint="write TIMESTAMP")
    return ScalarType(ScalarKind.TIMESTAMP)


def _parse_digits(reader: TokenReader, low: int, high: int, hint: str) -> int:
    token = reader.take()
    if token.kind is not Kind.NUMBER or not token.text.isdigit() or not low <= int(token.text) <= high:
        raise token.at.error(f"expected a whole number from {low} to {high}, found {token}", hint=hint)
    return int(token.text)


def _unknown_type(token: Token, spelled: str) -> Exception:
    if spelled in _REFUSED:
        return token.at.error(f"type {token.text} is not supported", hint=_REFUSED[spelled])
    near = get_close_matches(spelled, _KNOWN, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"types: {', '.join(_KNOWN)}"
    return token.at.error(f"there is no type {token.text}", hint=hint)
