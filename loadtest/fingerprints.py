"""Content fingerprints that DuckDB and ClickHouse compute alike, in SQL, each from its own copy of the rows.

A fingerprint is the number of rows and two exact sums over the halves of every row's MD5, so it needs no order and
notices any row that is missing, doubled or changed. A row's text is its columns, and the offsets and times that Pintail
adds, each as `length:text` or N for null, which no two different rows share. Used by the demo and the load tests.

Doubles are written in the shortest digits that read back the same. Both engines choose the same digits; they spell the
exponents of values below 1e-4 and from 1e16 on differently, which shows as a difference where there is none, never the
other way round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from schemas.clickhouse_ddl import quote as quote_clickhouse
from schemas.duckdb_ddl import quote as quote_duckdb
from schemas.errors import ConfigurationError
from schemas.table import Column, ScalarKind, ScalarType, TableDefinition

#: How a value that is not null becomes text, where it is not simply its digits or characters.
_DUCKDB_TEXT: Mapping[ScalarKind, str] = {
    ScalarKind.REAL: "regexp_replace({}::VARCHAR, '[.]0$', '')",
    ScalarKind.DOUBLE: "regexp_replace({}::VARCHAR, '[.]0$', '')",
    ScalarKind.BOOLEAN: "{}::INTEGER::VARCHAR",
    ScalarKind.TIMESTAMP: "epoch_us({})::VARCHAR",
    ScalarKind.TIMESTAMPTZ: "epoch_us({})::VARCHAR",
}
_CLICKHOUSE_TEXT: Mapping[ScalarKind, str] = {
    ScalarKind.BOOLEAN: "toString(toUInt8({}))",
    ScalarKind.TIMESTAMP: "toString(toUnixTimestamp64Micro({}))",
    ScalarKind.TIMESTAMPTZ: "toString(toUnixTimestamp64Micro({}))",
}


class Fingerprint(NamedTuple):
    """What a table holds, in three numbers."""

    rows: int
    upper: int
    lower: int

    @classmethod
    def of(cls, row: Sequence[object]) -> Fingerprint:
        """From the one row that the SQL of this module yields: a number and two texts of digits."""
        rows, upper, lower = row
        return cls(int(str(rows)), int(str(upper)), int(str(lower)))

    def __str__(self) -> str:
        return f"{self.rows:,} rows {(self.upper ^ self.lower) & 0xFFFFFFFFFFFF:012x}"


def duckdb_fingerprint_sql(table: TableDefinition, *, below: Mapping[int, int] | None = None) -> str:
    """A statement for the query topic; `below` (partition -> offset) leaves out the rows at these offsets and above."""
    fields = [
        _duckdb_field(quote_duckdb(column.name), _text(_DUCKDB_TEXT, "{}::VARCHAR", column), column.nullable)
        for column in table.columns
    ]
    metadata = ("_partition::VARCHAR", "_offset::VARCHAR", "epoch_ms(_timestamp)::VARCHAR")
    text = ", ".join([*fields, *(f"'|', {value}" for value in metadata)])
    sums = ", ".join(f"coalesce(sum(md5_number_{half}(t)), 0)::VARCHAR" for half in ("upper", "lower"))
    source = quote_duckdb(table.name)
    if below is not None:
        parts = [f"(_partition = {partition} AND _offset < {offset})" for partition, offset in sorted(below.items())]
        source += f" WHERE {' OR '.join(parts) or 'false'}"
    return f"SELECT count(*), {sums} FROM (SELECT concat({text}) AS t FROM {source})"


def clickhouse_fingerprint_sql(table: TableDefinition) -> str:
    """A statement for ClickHouse's default database: the newest row of each key, without those that were deleted."""
    fields = [
        _clickhouse_field(quote_clickhouse(column.name), _text(_CLICKHOUSE_TEXT, "toString({})", column), column)
        for column in table.columns
    ]
    metadata = ("toString(_partition)", "toString(_offset)", "toString(toUnixTimestamp64Milli(_timestamp))")
    text = ", ".join([*fields, *(f"'|', {value}" for value in metadata)])
    source = (
        f"{quote_clickhouse(table.name)} FINAL WHERE _deleted = 0" if table.is_keyed else quote_clickhouse(table.name)
    )
    sums = ", ".join(f"toString(sum(toUInt128(reinterpretAsUInt64(substring(h, {first}, 8)))))" for first in (1, 9))
    return f"SELECT count(), {sums} FROM (SELECT MD5(concat({text})) AS h FROM {source})"


def _text(spellings: Mapping[ScalarKind, str], otherwise: str, column: Column) -> str:
    """The expression of a column's text, `{}` being the value."""
    kind = column.type
    if not isinstance(kind, ScalarType):
        raise ConfigurationError(
            f"column {column.name!r} is an array or a struct, which the two engines store differently",
            hint="fingerprint tables of scalar columns",
        )
    if kind.kind is ScalarKind.DECIMAL and spellings is _CLICKHOUSE_TEXT:
        return f"toDecimalString({{}}, {kind.scale})"
    return spellings.get(kind.kind, otherwise)


def _duckdb_field(name: str, text: str, nullable: bool) -> str:
    value = text.format(name)
    field = f"strlen({value}), ':', {value}"
    return f"CASE WHEN {name} IS NULL THEN 'N' ELSE concat({field}) END" if nullable else field


def _clickhouse_field(name: str, text: str, column: Column) -> str:
    value = text.format(f"assumeNotNull({name})" if column.nullable else name)
    field = f"toString(length({value})), ':', {value}"
    return f"if({name} IS NULL, 'N', concat({field}))" if column.nullable else field
