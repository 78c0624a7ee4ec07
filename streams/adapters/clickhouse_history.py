"""ClickHouseHistory: what the sink delivered, read back as the decoder made it. The inverse of clickhouse_rows.

Pages follow the table's sorting key, so each one reads only what it returns, and is a whole reply of its own that can
be asked for again. A keyed table is read with FINAL and without tombstones; a key whose newest record is not below the
bound is left out, as replay from there brings that record. Append tables are read by position.

Whatever ClickHouse cannot give back exactly is refused: it has no null array or struct, and the sink stored empty ones
instead. All methods block and are thread-safe; called by the recovery process from worker threads.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from schemas.arrow_schema import rows_schema
from schemas.clickhouse_ddl import clickhouse_type, expected_columns, quote
from schemas.table import (
    METADATA_COLUMNS,
    ArrayType,
    Column,
    ColumnType,
    ScalarKind,
    ScalarType,
    StructField,
    StructType,
    TableDefinition,
)
from streams.adapters.clickhouse_sink import ClickHouseSink
from streams.errors import InexactRowsError
from streams.ports import DeliveredPage
from streams.positions import TopicPartition

_KEY = "the key's text, part "
_SETTINGS: dict[str, Any] = {
    "output_format_arrow_string_as_string": 1,
    # An error in the middle of a page is an error, not a page that ends early.
    "wait_end_of_query": 1,
}


class ClickHouseHistory:
    """streams.ports.DeliveredRows over the sink's connection."""

    def __init__(self, sink: ClickHouseSink) -> None:
        self._sink = sink

    def last_offset(self, table: TableDefinition, topic_partition: TopicPartition) -> int | None:
        """See the port."""
        return self._sink.last_offset(table, topic_partition)

    def verify(self, table: TableDefinition) -> bool:
        """See the port."""
        found = self._sink.columns(table)
        if not found:
            return False
        for name, expected in expected_columns(table):
            if found.get(name) != expected:
                raise InexactRowsError(
                    f"column {name!r} of table {table.name!r} is {found.get(name, 'missing')} in ClickHouse instead of "
                    f"{expected}: its rows cannot come back exactly",
                    hint="let a sink worker of this version bring the table forward, then start again",
                )
        for column in table.columns:
            if nulls := _lost_nulls(column.name, column.type, is_nullable=column.nullable):
                raise InexactRowsError(
                    f"{nulls} of table {table.name!r} may be null, for which ClickHouse has an empty one: its rows "
                    "cannot come back exactly",
                    hint="recover the partition from a snapshot, or from what the log still holds",
                )
        return True

    def count(self, table: TableDefinition, topic_partition: TopicPartition, *, below: int) -> int:
        """See the port."""
        counted = self._sink.arrow(
            f"SELECT toInt64(count()) AS rows FROM {self._sink.qualified(table)} "
            "WHERE _partition = {partition:UInt32} AND _offset < {below:UInt64}",
            {"partition": topic_partition.partition, "below": below},
            _SETTINGS,
        )
        return int(counted["rows"][0].as_py())

    def page(
        self,
        table: TableDefinition,
        topic_partition: TopicPartition,
        *,
        below: int,
        after: tuple[str, ...] | None,
        rows_max: int,
    ) -> DeliveredPage:
        """See the port."""
        parameters: dict[str, Any] = {"partition": topic_partition.partition, "below": below, "rows_max": rows_max}
        parameters |= {f"after_{number}": text for number, text in enumerate(after or ())}
        found = self._sink.arrow(
            _page_sql(table, self._sink.qualified(table), is_first=after is None), parameters, _SETTINGS
        )
        schema = rows_schema(table)
        rows = pa.Table.from_arrays(
            [column.cast(field.type) for column, field in zip(found.columns[: len(schema)], schema, strict=True)],
            schema=schema,
        )
        keys = found.columns[len(schema) :]
        return DeliveredPage(rows, tuple(key[-1].as_py() for key in keys) if len(rows) == rows_max else None)


def _page_sql(table: TableDefinition, name: str, *, is_first: bool) -> str:
    """Keys travel as text, which every type of key can be read from again."""
    selected = [_as_arrow(column) for column in table.columns] + [quote(column) for column in METADATA_COLUMNS]
    keys = table.primary_key if table.is_keyed else ("_offset",)
    texts = [f"toString({quote(key)})" for key in keys]
    # Aliases that no column has: one that hides a column would change what it is compared with.
    aliases = [f"column {number}" for number in range(len(selected))] + [f"{_KEY}{n}" for n in range(len(keys))]
    columns = ", ".join(f"{sql} AS {quote(alias)}" for sql, alias in zip(selected + texts, aliases, strict=True))
    conditions = ["_partition = {partition:UInt32}", "_offset < {below:UInt64}"]
    if table.is_keyed:
        conditions.append("_deleted = 0")
    if not is_first:
        types = [clickhouse_type(table.column(key)) if table.is_keyed else "UInt64" for key in keys]
        bounds = [f"CAST({{after_{n}:String}} AS {kind})" for n, kind in enumerate(types)]
        conditions.append(f"({', '.join(map(quote, keys))}) > ({', '.join(bounds)})")
    return (
        f"SELECT {columns} FROM {name}{' FINAL' if table.is_keyed else ''} WHERE {' AND '.join(conditions)} "
        f"ORDER BY {', '.join(map(quote, keys))} LIMIT {{rows_max:UInt32}}"
    )


def _as_arrow(column: Column) -> str:
    """The column as Arrow has it: UUIDs as text, at any depth."""
    as_text = _with_uuids_as_text(column.type)
    if as_text == column.type:
        return quote(column.name)
    return f"CAST({quote(column.name)} AS {clickhouse_type(Column(column.name, as_text, column.nullable))})"


def _with_uuids_as_text(kind: ColumnType) -> ColumnType:
    if isinstance(kind, ArrayType):
        return ArrayType(_with_uuids_as_text(kind.element))
    if isinstance(kind, StructType):
        return StructType(tuple(StructField(field.name, _with_uuids_as_text(field.type)) for field in kind.fields))
    return ScalarType(ScalarKind.VARCHAR) if kind.kind is ScalarKind.UUID else kind


def _lost_nulls(name: str, kind: ColumnType, *, is_nullable: bool) -> str | None:
    """What of a column may be an array or a struct that is null; None if nothing may."""
    if isinstance(kind, ScalarType):
        return None
    if is_nullable:
        return f"{'array' if isinstance(kind, ArrayType) else 'struct'} {name!r}"
    if isinstance(kind, ArrayType):
        return _lost_nulls(f"{name}[]", kind.element, is_nullable=True)
    inner = (_lost_nulls(f"{name}.{field.name}", field.type, is_nullable=True) for field in kind.fields)
    return next(filter(None, inner), None)
