"""DecodedBatch -> the Arrow table that is inserted into ClickHouse.

Every column has exactly the declared type before it leaves the process, because ClickHouse itself wraps, truncates and
fills silently. Arrays and structs, which ClickHouse has no null of, become empty arrays and structs of nulls; every
other null stays a null and is refused by the insert if its column has none. Deletes of keyed tables become rows with
`_deleted` = 1: key and metadata are theirs, other columns hold null or their type's zero value. A pure function of the
decoded records: the same range of the log always gives the same rows.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from schemas.arrow_schema import arrow_type, deletes_schema, rows_schema
from schemas.table import ArrayType, Column, ColumnType, ScalarKind, ScalarType, StructType, TableDefinition
from streams.ports import DecodedBatch

_TOPIC_TYPE = pa.dictionary(pa.int32(), pa.string())
_EPOCH = datetime.fromtimestamp(0, UTC)
#: [first, end) of the days that ClickHouse before 26.8 holds.
_SHORT_CALENDAR = (date(1900, 1, 1), date(2300, 1, 1))
_ZERO_OF_KIND: dict[ScalarKind, Any] = {
    ScalarKind.BOOLEAN: False,
    ScalarKind.DECIMAL: Decimal(0),
    ScalarKind.VARCHAR: "",
    ScalarKind.JSON: "null",
    ScalarKind.UUID: str(uuid.UUID(int=0)),
    ScalarKind.DATE: _EPOCH.date(),
    ScalarKind.TIMESTAMP: _EPOCH.replace(tzinfo=None),
    ScalarKind.TIMESTAMPTZ: _EPOCH,
}


def delivery_schema(table: TableDefinition) -> pa.Schema:
    """The declared columns in order, then `_topic`, `_partition`, `_offset`, `_timestamp` and, if keyed, `_deleted`."""
    fields = [pa.field(column.name, arrow_type(column.type), nullable=column.nullable) for column in table.columns]
    fields += [
        pa.field("_topic", _TOPIC_TYPE, nullable=False),
        pa.field("_partition", pa.uint32(), nullable=False),
        pa.field("_offset", pa.uint64(), nullable=False),
        pa.field("_timestamp", pa.timestamp("ms", "UTC"), nullable=False),
    ]
    if table.is_keyed:
        fields.append(pa.field("_deleted", pa.uint8(), nullable=False))
    return pa.schema(fields)


def delivery_table(decoded: Sequence[DecodedBatch]) -> pa.Table:
    """Rows and deletes of one table's batches in ascending `_offset` order; parked records are left out.

    One chunk per column. Raises pyarrow.ArrowInvalid rather than change a value.
    """
    assert decoded, "at least one batch"
    table = decoded[0].table
    parts = []
    for batch in decoded:
        assert batch.rows.schema.equals(rows_schema(table)), f"{batch.source}: rows are not in the declared schema"
        parts.append(_with_metadata(table, batch, batch.rows, deleted=False))
        if batch.deletes.num_rows:
            assert batch.deletes.schema.equals(deletes_schema(table)), f"{batch.source}: deletes are not"
            parts.append(_with_metadata(table, batch, batch.deletes, deleted=True))
    whole = pa.concat_tables(parts)
    if any(batch.deletes.num_rows for batch in decoded):
        whole = whole.sort_by("_offset")
    return whole.combine_chunks()


def beyond_the_short_calendar(rows: pa.Table) -> tuple[str, int] | None:
    """Column and `_offset` of a date or time outside 1900 to 2299; None if there is none. These are the years that
    ClickHouse before 26.8 holds."""
    for name, kind in zip(rows.schema.names, rows.schema.types, strict=True):
        if not (pa.types.is_temporal(kind) or pa.types.is_nested(kind)):
            continue
        found = _rows_beyond(_one_chunk(rows.column(name)))
        if len(found):
            return name, rows.column("_offset")[found[0].as_py()].as_py()
    return None


def _rows_beyond(array: pa.Array) -> pa.Array:
    """Indices of the rows that hold a date or time outside the short calendar, at any depth."""
    if pa.types.is_list(array.type):
        return pc.list_parent_indices(array).take(_rows_beyond(array.flatten()))
    if pa.types.is_struct(array.type):
        return pa.concat_arrays(
            [pa.array([], pa.uint64()), *(_rows_beyond(child).cast(pa.uint64()) for child in array.flatten())]
        )
    if not pa.types.is_temporal(array.type):
        return pa.array([], pa.uint64())
    first, end = _short_calendar(array.type)
    return pc.indices_nonzero(pc.fill_null(pc.or_(pc.less(array, first), pc.greater_equal(array, end)), False))


@lru_cache(maxsize=64)
def _short_calendar(kind: pa.DataType) -> tuple[pa.Scalar, pa.Scalar]:
    """Its bounds in that type. Casting them would cost more than comparing a small micro-batch with them."""
    first, end = (pa.scalar(day).cast(kind) for day in _SHORT_CALENDAR)
    return first, end


def _with_metadata(table: TableDefinition, batch: DecodedBatch, records: pa.Table, *, deleted: bool) -> pa.Table:
    count = records.num_rows
    columns: dict[str, Any] = {
        column.name: _without_null_containers(_one_chunk(records.column(column.name)), column.type)
        if column.name in records.column_names
        else _absent(column, count)
        for column in table.columns
    }
    columns["_topic"] = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), count), [batch.source.topic])
    columns["_partition"] = records.column("_partition").cast(pa.uint32())
    columns["_offset"] = records.column("_offset").cast(pa.uint64())
    columns["_timestamp"] = records.column("_timestamp").cast(pa.timestamp("ms", "UTC"))
    if table.is_keyed:
        columns["_deleted"] = pa.repeat(pa.scalar(int(deleted), pa.uint8()), count)
    return pa.Table.from_pydict(columns, schema=delivery_schema(table))


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """Also for a column without chunks."""
    combined = column.combine_chunks()
    return combined if isinstance(combined, pa.Array) else pa.concat_arrays(combined.chunks)


def _without_null_containers(array: pa.Array, kind: ColumnType) -> pa.Array:
    if isinstance(kind, ArrayType):
        lengths = pc.fill_null(pc.list_value_length(array), 0)
        ends = pc.cumulative_sum(lengths).cast(pa.int32())
        offsets = pa.concat_arrays([pa.array([0], pa.int32()), ends])
        return pa.ListArray.from_arrays(offsets, _without_null_containers(array.flatten(), kind.element))
    if isinstance(kind, StructType):
        # flatten() carries the struct's own nulls over to its fields.
        children = [
            _without_null_containers(child, declared.type)
            for child, declared in zip(array.flatten(), kind.fields, strict=True)
        ]
        return pa.StructArray.from_arrays(children, fields=list(array.type))
    return array


def _absent(column: Column, count: int) -> pa.Array:
    """A column that a delete says nothing about."""
    kind = column.type
    if isinstance(kind, ScalarType) and not column.nullable:
        return pa.array([_ZERO_OF_KIND.get(kind.kind, 0)] * count, arrow_type(kind))
    return _without_null_containers(pa.nulls(count, arrow_type(kind)), kind)
