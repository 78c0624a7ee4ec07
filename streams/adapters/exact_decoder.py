"""The exact, slow path of decoding: one record at a time, in Python. What it says is what decoding means.

A record becomes a row, a delete (a tombstone in a keyed table) or a parked record with the reason in words. The fast
path of duckdb_decoder hands over only what it is not sure of, and must agree with this module on everything else. The
other formats come this way too: they differ only in how a record is read to a Change.

Keys: a keyed table needs a Kafka key on every record, because only partitioning by key makes the last offset win. For
an upsert the key's content is not compared with the row. For a tombstone the key says which row goes: the key column's
value as plain text (a key of one column), or a JSON object with all key columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from schemas.arrow_schema import METADATA_FIELDS, deletes_schema, rows_schema
from schemas.table import Column, ExtraFields, ScalarKind, ScalarType, TableDefinition
from streams.adapters.exact_extras import extra_fields, path_of_first
from streams.adapters.exact_json import FaultError, Number, described, read_json, shortened
from streams.adapters.exact_values import MICROS_MAX, MICROS_MIN, convert
from streams.batches import RecordBatch
from streams.ports import DecodedBatch, Decoder, ParkedRecord, ParkReason

_TEXT_KINDS = frozenset({ScalarKind.VARCHAR, ScalarKind.DATE, ScalarKind.UUID})


class Change(NamedTuple):
    """What one record says, before its values have the columns' types."""

    #: The fields of the row, or of the key of the row that goes.
    fields: Mapping[str, object]
    is_delete: bool = False


#: (table, Kafka key, value) -> what the record says. Raises FaultError.
ChangeReader = Callable[[TableDefinition, bytes | None, bytes | None], Change]
#: (key columns, Kafka key) -> the fields that the key names. Raises FaultError.
KeyReader = Callable[[list[Column], bytes], Mapping[str, object]]


@dataclass
class ExactOutcome:
    """Decoded records: index in the batch -> typed values in column order, and what was parked."""

    rows: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    deletes: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    parked: list[ParkedRecord] = field(default_factory=list)


def json_change(table: TableDefinition, key: bytes | None, value: bytes | None) -> Change:
    """Reads a record of the JSON format."""
    if value is None:
        return tombstone(table, key, json_key)
    if not value and table.is_keyed:
        raise FaultError(ParkReason.NOT_JSON, "empty, not null; to delete send a null value (kcat -Z)")
    document = read_json(value)
    if not isinstance(document, dict):
        raise FaultError(ParkReason.NOT_AN_OBJECT, f"expected a JSON object, got {described(document)}")
    return Change(document)


def decode_records(
    table: TableDefinition, batch: RecordBatch, indices: Iterable[int], read: ChangeReader = json_change
) -> ExactOutcome:
    """Decodes the records at `indices`. Never raises because of what they contain."""
    outcome = ExactOutcome()
    for index in indices:
        value, key = batch.values[index], batch.keys[index]
        try:
            if has_odd_timestamp(batch.timestamps_ms[index]):
                detail = f"the record's Kafka timestamp, {batch.timestamps_ms[index]} ms, is not in the years 1 to 9999"
                raise FaultError(ParkReason.OUT_OF_RANGE, detail)
            change = read(table, key, value)
            if key is None and table.is_keyed:
                raise FaultError(ParkReason.MISSING_KEY, "the record has no Kafka key, and the table has a primary key")
            if change.is_delete:
                outcome.deletes[index] = typed_key(table, change.fields)
            else:
                outcome.rows[index] = typed_row(table, change.fields)
        except FaultError as fault:
            outcome.parked.append(ParkedRecord(index, fault.reason, fault.detail))
    return outcome


def metadata_arrays(batch: RecordBatch, indices: Sequence[int] | None) -> list[pa.Array]:
    """The metadata columns of the records at `indices`, or of all records; none of them may be `has_odd_timestamp`."""
    offsets = np.array(batch.offsets, np.int64)
    timestamps_ms = np.array(batch.timestamps_ms, np.int64)
    if indices is not None:
        offsets, timestamps_ms = offsets[indices], timestamps_ms[indices]
    return [
        pa.array(np.full(len(offsets), batch.partition, np.int32)),
        pa.array(offsets),
        pa.array(timestamps_ms * 1000).view(METADATA_FIELDS[-1].type),
    ]


def has_odd_timestamp(timestamp_ms: int) -> bool:
    """Whether a record's Kafka timestamp lies outside the years 1 to 9999, so that `_timestamp` could not hold it."""
    return not MICROS_MIN <= timestamp_ms * 1000 <= MICROS_MAX


def to_table(schema: pa.Schema, decoded: Mapping[int, tuple[Any, ...]], batch: RecordBatch) -> pa.Table:
    """Typed values as a table of `schema`, ascending by index."""
    if not decoded:
        return schema.empty_table()
    indices = sorted(decoded)
    metadata = metadata_arrays(batch, indices)
    declared = len(schema) - len(metadata)
    columns = [
        pa.array([decoded[index][position] for index in indices], schema.field(position).type)
        for position in range(declared)
    ]
    return pa.Table.from_arrays(columns + metadata, schema=schema)


def decode_one_by_one(table: TableDefinition, batch: RecordBatch, read: ChangeReader) -> DecodedBatch:
    """The whole batch through the slow path."""
    outcome = decode_records(table, batch, range(len(batch)), read)
    return DecodedBatch(
        table=table,
        source=batch,
        rows=to_table(rows_schema(table), outcome.rows, batch),
        deletes=to_table(deletes_schema(table), outcome.deletes, batch),
        parked=tuple(outcome.parked),
    )


class ExactDecoder(Decoder):
    """Every record of a JSON table through the slow path: the reference that the fast path is tested against."""

    def decode(self, table: TableDefinition, batch: RecordBatch) -> DecodedBatch:
        """See Decoder."""
        return decode_one_by_one(table, batch, json_change)


def typed_row(table: TableDefinition, fields: Mapping[str, object]) -> tuple[Any, ...]:
    """The values of the columns, in their order. Raises FaultError."""
    row = [_column_value(table, column, fields) for column in table.columns if column.name != table.extra_column]
    if table.extra_fields is ExtraFields.IGNORE:
        return tuple(row)
    extra = extra_fields(table, fields)
    if table.extra_fields is ExtraFields.PARK:
        if extra:
            raise FaultError(ParkReason.EXTRA_FIELD, f"field {path_of_first(table, extra)!r} is not declared")
        return tuple(row)
    assert table.extra_column is not None
    place = table.column_names.index(table.extra_column)
    row.insert(place, convert(extra or None, table.columns[place].type, table.extra_column))
    return tuple(row)


def typed_key(table: TableDefinition, fields: Mapping[str, object]) -> tuple[Any, ...]:
    """The values of the key columns of a row that goes, in the order of the key. Raises FaultError."""
    columns = [table.column(name) for name in table.primary_key]
    try:
        typed = tuple(convert(fields.get(column.name), column.type, column.name) for column in columns)
    except FaultError as fault:
        raise FaultError(ParkReason.BAD_KEY, f"key of the row to delete: {fault.detail}") from None
    for column, item in zip(columns, typed, strict=True):
        if item is None:
            raise FaultError(ParkReason.BAD_KEY, f"key of the row to delete: column {column.name!r} is missing or null")
    return typed


def tombstone(table: TableDefinition, key: bytes | None, read_key: KeyReader) -> Change:
    """A record without a value: its Kafka key says which row goes. Raises FaultError."""
    if not table.is_keyed:
        raise FaultError(ParkReason.NULL_IN_APPEND_TABLE, "the value is null, and the table has no primary key")
    if key is None:
        raise FaultError(ParkReason.MISSING_KEY, "a tombstone without a Kafka key deletes nothing")
    try:
        return Change(read_key([table.column(name) for name in table.primary_key], key), is_delete=True)
    except FaultError as fault:
        raise FaultError(ParkReason.BAD_KEY, f"Kafka key: {fault.detail}") from None


def _column_value(table: TableDefinition, column: Column, document: Mapping[str, object]) -> Any:
    typed = convert(document.get(column.name), column.type, column.name)
    if typed is None:
        problem = "is null" if column.name in document else "is missing"
        if column.name in table.primary_key:
            raise FaultError(ParkReason.MISSING_KEY, f"key column {column.name!r} {problem}")
        if not column.nullable:
            raise FaultError(ParkReason.MISSING_VALUE, f"column {column.name!r} {problem}, and it is NOT NULL")
    return typed


def json_key(columns: list[Column], key: bytes) -> dict[str, object]:
    """The key as an object of column values: itself if it is one that names all key columns, else its plain text."""
    if key.lstrip()[:1] == b"{":
        try:
            document = read_json(key)
        except FaultError:
            document = None
        if isinstance(document, dict) and all(column.name in document for column in columns):
            return document
    if len(columns) > 1:
        names = ", ".join(column.name for column in columns)
        raise FaultError(ParkReason.BAD_KEY, f"expected a JSON object with {names}")
    (column,) = columns
    try:
        text = key.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FaultError(ParkReason.BAD_KEY, f"not UTF-8 at byte {error.start}") from None
    return {column.name: _plain(column, text)}


def _plain(column: Column, text: str) -> object:
    """Plain text as the JSON value that stands for it in that column."""
    assert isinstance(column.type, ScalarType), "key columns are scalars"
    kind = column.type.kind
    if kind in _TEXT_KINDS or (kind in (ScalarKind.TIMESTAMP, ScalarKind.TIMESTAMPTZ) and not _is_number(text)):
        return text
    if kind is ScalarKind.DECIMAL:
        return text
    try:
        return read_json(text.encode("utf-8"))
    except FaultError:
        raise FaultError(ParkReason.BAD_KEY, f"{shortened(text)} is not a {kind}") from None


def _is_number(text: str) -> bool:
    try:
        return isinstance(read_json(text.encode("utf-8")), Number)
    except FaultError:
        return False
