"""TableDefinition -> Arrow: the form rows have between decoding, the store and the sink.

Integers, floats, booleans, dates and decimals are their Arrow namesakes. TIMESTAMP is microseconds without a zone,
TIMESTAMPTZ microseconds in UTC. UUID and JSON travel as strings, which DuckDB and ClickHouse both cast on insert.
"""

from __future__ import annotations

from functools import lru_cache

import pyarrow as pa

from schemas.table import ArrayType, Column, ColumnType, ScalarKind, StructType, TableDefinition

_SCALARS: dict[ScalarKind, pa.DataType] = {
    ScalarKind.TINYINT: pa.int8(),
    ScalarKind.SMALLINT: pa.int16(),
    ScalarKind.INTEGER: pa.int32(),
    ScalarKind.BIGINT: pa.int64(),
    ScalarKind.UTINYINT: pa.uint8(),
    ScalarKind.USMALLINT: pa.uint16(),
    ScalarKind.UINTEGER: pa.uint32(),
    ScalarKind.UBIGINT: pa.uint64(),
    ScalarKind.REAL: pa.float32(),
    ScalarKind.DOUBLE: pa.float64(),
    ScalarKind.BOOLEAN: pa.bool_(),
    ScalarKind.VARCHAR: pa.string(),
    ScalarKind.DATE: pa.date32(),
    ScalarKind.TIMESTAMP: pa.timestamp("us"),
    ScalarKind.TIMESTAMPTZ: pa.timestamp("us", "UTC"),
    ScalarKind.UUID: pa.string(),
    ScalarKind.JSON: pa.string(),
}

METADATA_FIELDS: tuple[pa.Field, ...] = (
    pa.field("_partition", pa.int32(), nullable=False),
    pa.field("_offset", pa.int64(), nullable=False),
    pa.field("_timestamp", pa.timestamp("us", "UTC"), nullable=False),
)


@lru_cache(maxsize=1024)
def arrow_type(column_type: ColumnType) -> pa.DataType:
    """The Arrow type of values of that type."""
    if isinstance(column_type, ArrayType):
        return pa.list_(arrow_type(column_type.element))
    if isinstance(column_type, StructType):
        return pa.struct([pa.field(f.name, arrow_type(f.type)) for f in column_type.fields])
    if column_type.kind is ScalarKind.DECIMAL:
        return pa.decimal128(column_type.precision, column_type.scale)
    return _SCALARS[column_type.kind]


@lru_cache(maxsize=256)
def rows_schema(table: TableDefinition) -> pa.Schema:
    """Schema of decoded rows: the declared columns in order, then the metadata columns."""
    return pa.schema([*map(_field, table.columns), *METADATA_FIELDS])


@lru_cache(maxsize=256)
def deletes_schema(table: TableDefinition) -> pa.Schema:
    """Schema of decoded tombstones: the key columns in the order of the key, then the metadata columns."""
    return pa.schema([*(_field(table.column(name)) for name in table.primary_key), *METADATA_FIELDS])


def _field(column: Column) -> pa.Field:
    return pa.field(column.name, arrow_type(column.type), nullable=column.nullable)
