"""One folder of SQL files -> one TableDefinition.

    001_create.sql    CREATE TABLE flights (id VARCHAR NOT NULL, ..., PRIMARY KEY (id))
                      WITH (topic='flights', partitions=4, retention='30 days', format='json')
    002_gate.sql      ALTER TABLE flights ADD COLUMN gate VARCHAR

Later files only add nullable columns, so that old and new workers can run side by side. Every fault is a TableFileError
with file, line, column and the way out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from schemas.clickhouse_options import clickhouse_options, parse_codec
from schemas.sql_tokens import Kind, Position, Token, TokenReader, read_tokens
from schemas.sql_types import check_name, parse_type
from schemas.table import Column, Migration, ScalarKind, ScalarType, TableDefinition
from schemas.table_options import Options, parse_options

_MIGRATION_FILE = re.compile(r"(\d{3,})_\w+\.sql")
_CREATE_HINT = "write CREATE TABLE name (column TYPE, ..., PRIMARY KEY (column)) WITH (topic='...')"
_COLUMN_HINT = (
    "after a column's type may stand NOT NULL, PRIMARY KEY or CODEC(...); then a comma or the closing parenthesis"
)
_ALTER_HINT = (
    "write ALTER TABLE name ADD COLUMN column TYPE. Anything else would break workers that run the older version: "
    "make a new table with a topic of its own instead, publish to both, then drop the old one"
)


@dataclass(frozen=True)
class ParsedTable:
    """A table, and where the facts stand that other tables can contradict."""

    table: TableDefinition
    topic_at: Position
    partitions_at: Position


@dataclass
class _Create:
    """What 001 says; later files append to `columns` and `taken`."""

    columns: list[Column]
    taken: dict[str, str]
    primary_key: tuple[str, ...]
    options: Options


def parse_table(folder: Path) -> ParsedTable:
    """The table of that folder, as its newest file leaves it. Raises TableFileError."""
    files = _migration_files(folder)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", folder.name):
        raise Position(str(files[0]), 1, 1).error(
            f"{folder.name!r} cannot be a table name",
            hint="name the folder in lower case letters, digits and _, beginning with a letter",
        )
    create = _parse_create(read_tokens(files[0]), folder.name)
    migrations = [Migration(1, files[0].name, tuple(create.columns))]
    for number, file in enumerate(files[1:], start=2):
        added = _parse_additions(read_tokens(file), folder.name, create.taken)
        create.columns += added
        migrations.append(Migration(number, file.name, tuple(added)))
    table = TableDefinition(
        name=folder.name,
        topic=create.options.topic,
        columns=tuple(create.columns),
        primary_key=create.primary_key,
        partitions=create.options.partitions,
        retention_seconds=create.options.retention_seconds,
        format=create.options.format,
        extra_fields=create.options.extra_fields,
        extra_column=create.options.extra_column,
        migrations=tuple(migrations),
    )
    _check_extra_column(table, create.options)
    table = replace(table, clickhouse=clickhouse_options(create.options.clickhouse, table))
    return ParsedTable(table, create.options.topic_at, create.options.partitions_at)


def _check_extra_column(table: TableDefinition, options: Options) -> None:
    """The column that keeps extra fields, which any of the files may add, can hold them. Raises TableFileError."""
    if table.extra_column is None:
        return
    if table.extra_column not in table.column_names:
        raise options.extra_column_at.error(
            f"extra_column {table.extra_column!r} is not a column of the table",
            hint=f"declare it: {table.extra_column} JSON",
        )
    column = table.column(table.extra_column)
    if column.type != ScalarType(ScalarKind.JSON) or not column.nullable:
        raise options.extra_column_at.error(
            f"extra_column {table.extra_column!r} cannot hold extra fields",
            hint=f"declare it as {table.extra_column} JSON, without NOT NULL: it is null where there are none",
        )


def _migration_files(folder: Path) -> list[Path]:
    numbered: dict[int, Path] = {}
    for file in sorted(folder.glob("*.sql")):
        at = Position(str(file), 1, 1)
        match = _MIGRATION_FILE.fullmatch(file.name)
        if not match:
            raise at.error("not a migration's file name", hint="name it NNN_what.sql, such as 002_add_gate.sql")
        earlier = numbered.setdefault(int(match[1]), file)
        if earlier is not file:
            raise at.error(f"{earlier.name} has the same number", hint="give each file a number of its own")
    for expected, number in enumerate(sorted(numbered), start=1):
        if number != expected:
            raise Position(str(numbered[number]), 1, 1).error(
                f"there is no file with number {expected:03}",
                hint="number the files 001, 002, ... without gaps; never remove one that has been deployed",
            )
    if not numbered:
        raise Position(str(folder), 1, 1).error("no table file", hint=f"add 001_create.sql: {_CREATE_HINT}")
    return [numbered[number] for number in sorted(numbered)]


def _parse_create(reader: TokenReader, table_name: str) -> _Create:
    reader.expect("CREATE", "TABLE", hint=_CREATE_HINT)
    reader.accept("IF", "NOT", "EXISTS")
    name_at = reader.next.at
    _expect_table_name(reader, table_name)
    reader.expect("(", hint=_CREATE_HINT)
    columns: list[Column] = []
    taken: dict[str, str] = {}
    key: list[Token] = []
    while True:
        key_at = reader.next.at
        if reader.accept("PRIMARY", "KEY"):
            key_tokens = _parse_key(reader)
        else:
            column, key_tokens = _parse_column(reader, taken)
            columns.append(column)
        if key and key_tokens:
            raise key_at.error("a second PRIMARY KEY", hint="name all key columns in one: PRIMARY KEY (a, b)")
        key = key or key_tokens
        if not reader.accept(","):
            break
    reader.expect(")", hint=_COLUMN_HINT)
    options = parse_options(reader, table_name, name_at)
    reader.accept(";")
    if not reader.at_end:
        raise reader.next.at.error(f"expected the end of the file, found {reader.next}", hint=_CREATE_HINT)
    if not columns:
        raise name_at.error("a table needs at least one column", hint=_CREATE_HINT)
    return _Create(_with_key(columns, key), taken, tuple(token.text for token in key), options)


def _parse_column(reader: TokenReader, taken: dict[str, str]) -> tuple[Column, list[Token]]:
    """A column, and itself as the key if it says PRIMARY KEY."""
    token = reader.expect_name("a column name")
    if token.text.startswith("_"):
        raise token.at.error(
            f"column {token.text!r}: names that begin with _ are Pintail's own", hint="rename the column"
        )
    name = check_name(token, "column", taken=taken)
    column_type, nullable, key = parse_type(reader), True, []
    codec: tuple[str, ...] = ()
    while reader.next.text not in (",", ")", ";") and not reader.at_end:
        if reader.accept("NOT", "NULL"):
            nullable = False
        elif reader.accept("PRIMARY", "KEY"):
            reader.accept("NOT", "ENFORCED")
            key = [token]
        elif not codec and reader.accept("CODEC"):
            codec = parse_codec(reader)
        elif not reader.accept("NULL"):
            raise reader.next.at.error(f"column {name!r}: unexpected {reader.next}", hint=_COLUMN_HINT)
    return Column(name, column_type, nullable, codec), key


def _parse_key(reader: TokenReader) -> list[Token]:
    reader.expect("(", hint="write PRIMARY KEY (column)")
    key: list[Token] = []
    while not key or reader.accept(","):
        token = reader.expect_name("a key column")
        if any(token.text == earlier.text for earlier in key):
            raise token.at.error(f"{token.text!r} is in the key twice", hint="name each key column once")
        key.append(token)
    reader.expect(")", hint="write PRIMARY KEY (column, ...)")
    reader.accept("NOT", "ENFORCED")
    return key


def _with_key(columns: Sequence[Column], key: Sequence[Token]) -> list[Column]:
    """The columns with those of the key made NOT NULL; TableFileError if one is missing or cannot be a key."""
    by_name = {column.name: column for column in columns}
    for token in key:
        column = by_name.get(token.text)
        if column is None:
            raise token.at.error(
                f"key column {token.text!r} is not a column of the table",
                hint=f"columns: {', '.join(by_name)} (upper and lower case matter here)",
            )
        if not _can_be_key(column):
            raise token.at.error(
                f"column {column.name!r} has a type that cannot be a key",
                hint="keys are compared exactly: use an integer, VARCHAR, UUID, DECIMAL, BOOLEAN, DATE or TIMESTAMP",
            )
    names = {token.text for token in key}
    return [replace(column, nullable=column.nullable and column.name not in names) for column in columns]


def _can_be_key(column: Column) -> bool:
    inexact = (ScalarKind.REAL, ScalarKind.DOUBLE, ScalarKind.JSON)
    return isinstance(column.type, ScalarType) and column.type.kind not in inexact


def _parse_additions(reader: TokenReader, table_name: str, taken: dict[str, str]) -> list[Column]:
    added: list[Column] = []
    while not reader.at_end:
        reader.expect("ALTER", "TABLE", hint=_ALTER_HINT)
        _expect_table_name(reader, table_name)
        added.append(_parse_addition(reader, taken))
        while reader.accept(","):
            added.append(_parse_addition(reader, taken))
        if not reader.accept(";"):
            break
    if not reader.at_end:
        raise reader.next.at.error(f"expected ; or the end of the file, found {reader.next}", hint=_ALTER_HINT)
    if not added:
        raise reader.next.at.error("the file adds no column", hint=_ALTER_HINT)
    return added


def _parse_addition(reader: TokenReader, taken: dict[str, str]) -> Column:
    reader.expect("ADD", hint=_ALTER_HINT)
    reader.accept("COLUMN")
    at = reader.next.at
    column, key = _parse_column(reader, taken)
    if key or not column.nullable:
        raise at.error(
            f"column {column.name!r} cannot be {'part of the key' if key else 'NOT NULL'}",
            hint="rows stored before have no value for it: add it as a nullable column",
        )
    return column


def _expect_table_name(reader: TokenReader, table_name: str) -> None:
    token = reader.expect_name("the table's name")
    if token.text != table_name:
        raise token.at.error(
            f"table {token.text!r} in the folder of {table_name!r}", hint="table and folder have the same name"
        )
    if reader.next.kind is Kind.SYMBOL and reader.next.text == ".":
        raise reader.next.at.error("table names have one part", hint=f"write {table_name}")
