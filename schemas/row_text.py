"""One text per row, the same on both sides of a comparison, so that digests of rows can be compared instead of rows.

A text is the row's columns, offset and timestamp, each as `length:text` or N for null, so no two different rows share
one. There are two spellings, because a store is asked in the dialect of queries, which has neither bits nor lambdas:

    of a store   DuckDB's own text of each value. Compared with what DuckDB makes of the same values elsewhere
    of a sink    exact in both engines: floats by their bits, times as microseconds, arrays and structs element by
                 element. ClickHouse has no null array or struct, so those count as empty ones here

Pure functions of the table's definition; used by the audit.
"""

from __future__ import annotations

from dataclasses import replace

from schemas.clickhouse_ddl import quote as quote_clickhouse
from schemas.clickhouse_ddl import quote_text as clickhouse_text
from schemas.duckdb_ddl import quote as quote_duckdb
from schemas.duckdb_ddl import quote_text as duckdb_text
from schemas.table import ArrayType, ColumnType, ScalarKind, ScalarType, StructType, TableDefinition

#: How a value that is not null becomes text, where it is not simply its digits or characters.
_DUCKDB: dict[ScalarKind, str] = {
    ScalarKind.REAL: "{}::BIT::UINTEGER::VARCHAR",
    ScalarKind.DOUBLE: "{}::BIT::UBIGINT::VARCHAR",
    ScalarKind.BOOLEAN: "{}::INTEGER::VARCHAR",
    ScalarKind.DATE: "({} - DATE '1970-01-01')::VARCHAR",
    ScalarKind.TIMESTAMP: "epoch_us({})::VARCHAR",
    ScalarKind.TIMESTAMPTZ: "epoch_us({})::VARCHAR",
}
_CLICKHOUSE: dict[ScalarKind, str] = {
    ScalarKind.REAL: "toString(reinterpretAsUInt32({}))",
    ScalarKind.DOUBLE: "toString(reinterpretAsUInt64({}))",
    ScalarKind.BOOLEAN: "toString(toUInt8({}))",
    ScalarKind.DATE: "toString(toInt32({}))",
    ScalarKind.TIMESTAMP: "toString(toUnixTimestamp64Micro({}))",
    ScalarKind.TIMESTAMPTZ: "toString(toUnixTimestamp64Micro({}))",
    ScalarKind.VARCHAR: "{}",
    ScalarKind.JSON: "{}",
}


def store_text(table: TableDefinition) -> str:
    """An expression in the dialect of queries, over the columns of the table."""
    names = [quote_duckdb(column.name) for column in table.columns]
    fields = [f"coalesce(strlen({name}::VARCHAR) || ':' || {name}::VARCHAR, 'N')" for name in names]
    if len(fields) > _TOGETHER_MAX:
        chunks = [fields[first : first + _TOGETHER_MAX] for first in range(0, len(fields), _TOGETHER_MAX)]
        fields = [f"md5(concat({', '.join(chunk)}))" for chunk in chunks]
    return f"concat({', '.join([*fields, _DUCKDB_METADATA])})"


def shared_columns(table: TableDefinition) -> TableDefinition:
    """The table with those columns only whose text for a sink the dialect of queries can spell as well."""
    shared = [column for column in table.columns if _is_shared(column.type)]
    return replace(table, columns=tuple(shared[:_TOGETHER_MAX]))


def _is_shared(kind: ColumnType) -> bool:
    match kind:
        case ScalarType():
            return kind.kind not in (ScalarKind.REAL, ScalarKind.DOUBLE)
        case StructType():
            return all(_is_shared(each.type) for each in kind.fields)
        case _:
            return False


def sink_text_in_duckdb(table: TableDefinition) -> str:
    """An expression over the columns of the table, in all of DuckDB's SQL."""
    fields = [_duckdb_field(quote_duckdb(column.name), column.type) for column in table.columns]
    return f"concat({', '.join([*fields, _DUCKDB_METADATA])})"


def sink_text_in_clickhouse(table: TableDefinition) -> str:
    """The same text, as ClickHouse computes it from its own rows."""
    fields = [
        _clickhouse_field(quote_clickhouse(column.name), column.type, is_nullable=column.nullable)
        for column in table.columns
    ]
    metadata = "'|', toString(_offset), '|', toString(toUnixTimestamp64Milli(_timestamp))"
    return f"concat({', '.join([*fields, metadata])})"


def key_text(table: TableDefinition) -> str:
    """Tells the keys of a keyed table apart; an expression in DuckDB over the key columns alone."""
    fields = [_duckdb_field(quote_duckdb(name), table.column(name).type) for name in table.primary_key]
    return f"concat({', '.join(fields)}, '')"


#: Columns whose texts one value may hold: the query guard bounds how large a value grows.
_TOGETHER_MAX = 50
_DUCKDB_METADATA = "'|', _offset::VARCHAR, '|', epoch_ms(_timestamp)::VARCHAR"


def _duckdb_field(value: str, kind: ColumnType, depth: int = 0) -> str:
    if isinstance(kind, ArrayType):
        element = f"e{depth}"
        texts = f"list_transform({value}, lambda {element}: {_duckdb_field(element, kind.element, depth + 1)})"
        return f"concat('[', coalesce(len({value}), 0), ':', array_to_string({texts}, ''), ']')"
    if isinstance(kind, StructType):
        fields = [
            _duckdb_field(f"struct_extract({value}, {duckdb_text(each.name)})", each.type, depth)
            for each in kind.fields
        ]
        return f"concat('(', {', '.join(fields)}, ')')"
    text = _DUCKDB.get(kind.kind, "{}::VARCHAR").format(value)
    return f"CASE WHEN {value} IS NULL THEN 'N' ELSE concat(strlen({text}), ':', {text}) END"


def _clickhouse_field(value: str, kind: ColumnType, *, is_nullable: bool = True, depth: int = 0) -> str:
    if isinstance(kind, ArrayType):
        element = f"e{depth}"
        texts = f"arrayMap({element} -> {_clickhouse_field(element, kind.element, depth=depth + 1)}, {value})"
        return f"concat('[', toString(length({value})), ':', arrayStringConcat({texts}), ']')"
    if isinstance(kind, StructType):
        fields = [
            _clickhouse_field(f"tupleElement({value}, {clickhouse_text(each.name)})", each.type, depth=depth)
            for each in kind.fields
        ]
        return f"concat('(', {', '.join(fields)}, ')')"
    if not is_nullable:
        return _clickhouse_text(value, kind)
    return f"if({value} IS NULL, 'N', {_clickhouse_text(f'assumeNotNull({value})', kind)})"


def _clickhouse_text(value: str, kind: ScalarType) -> str:
    if kind.kind is ScalarKind.DECIMAL:
        text = f"toDecimalString({value}, {kind.scale})"
    else:
        text = _CLICKHOUSE.get(kind.kind, "toString({})").format(value)
    return f"concat(toString(length({text})), ':', {text})"
