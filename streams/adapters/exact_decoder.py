"""The exact, slow path of decoding: one record at a time, in Python. What it says is what decoding means.

A record becomes a row, a delete (a tombstone in a keyed table) or a parked record with the reason in words. The fast
path of duckdb_decoder hands over only what it is not sure of, and must agree with this module on everything else.

Keys: a keyed table needs a Kafka key on every record, because only partitioning by key makes the last offset win. For
an upsert the key's content is not compared with the row. For a tombstone the key says which row goes: the key column's
value as plain text (a key of one column), or a JSON object with all key columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from schemas.arrow_schema import deletes_schema, rows_schema
from schemas.table import Column, ScalarKind, ScalarType, TableDefinition
from streams.adapters.exact_json import FaultError, Number, described, read_json, shortened
from streams.adapters.exact_values import MICROS_MAX, MICROS_MIN, convert
from streams.batches import RecordBatch
from streams.ports import DecodedBatch, Decoder, ParkedRecord, ParkReason

_TEXT_KINDS = frozenset({ScalarKind.VARCHAR, ScalarKind.DATE, ScalarKind.UUID})


@dataclass
class ExactOutcome:
    """Decoded records: index in the batch -> typed values in column order, and what was parked."""

    rows: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    deletes: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    parked: list[ParkedRecord] = field(default_factory=list)


def decode_records(table: TableDefinition, batch: RecordBatch, indices: Iterable[int]) -> ExactOutcome:
    """Decodes the records at `indices`. Never raises because of what they contain."""
    outcome = ExactOutcome()
    for index in indices:
        value, key = batch.values[index], batch.keys[index]
        try:
            if has_odd_timestamp(batch.timestamps_ms[index]):
                detail = f"the record's Kafka timestamp, {batch.timestamps_ms[index]} ms, is not in the years 1 to 9999"
                raise FaultError(ParkReason.OUT_OF_RANGE, detail)
            if value is None:
                outcome.deletes[index] = _delete(table, key)
            else:
                outcome.rows[index] = _row(table, key, value)
        except FaultError as fault:
            outcome.parked.append(ParkedRecord(index, fault.reason, fault.detail))
    return outcome


def metadata_arrays(batch: RecordBatch, indices: Sequence[int] | None) -> list[pa.Array]:
    """The metadata columns of the records at `indices`, or of all records; none of them may be `has_odd_timestamp`."""
    offsets, timestamps_ms = pa.array(batch.offsets, pa.int64()), pa.array(batch.timestamps_ms, pa.int64())
    if indices is not None:
        taken = pa.array(indices, pa.int64())
        offsets, timestamps_ms = offsets.take(taken), timestamps_ms.take(taken)
    return [
        pa.repeat(pa.scalar(batch.partition, pa.int32()), len(offsets)),
        offsets,
        pc.multiply_checked(timestamps_ms, 1000).cast(pa.timestamp("us", "UTC")),
    ]


def has_odd_timestamp(timestamp_ms: int) -> bool:
    """Whether a record's Kafka timestamp lies outside the years 1 to 9999, so that `_timestamp` could not hold it."""
    return not MICROS_MIN <= timestamp_ms * 1000 <= MICROS_MAX


def to_table(schema: pa.Schema, decoded: Mapping[int, tuple[Any, ...]], batch: RecordBatch) -> pa.Table:
    """Typed values as a table of `schema`, ascending by index."""
    indices = sorted(decoded)
    metadata = metadata_arrays(batch, indices)
    declared = len(schema) - len(metadata)
    columns = [
        pa.array([decoded[index][position] for index in indices], schema.field(position).type)
        for position in range(declared)
    ]
    return pa.Table.from_arrays(columns + metadata, schema=schema)


class ExactDecoder(Decoder):
    """Every record through the slow path: the reference that the fast path is tested against."""

    def decode(self, table: TableDefinition, batch: RecordBatch) -> DecodedBatch:
        """See Decoder."""
        outcome = decode_records(table, batch, range(len(batch)))
        return DecodedBatch(
            table=table,
            source=batch,
            rows=to_table(rows_schema(table), outcome.rows, batch),
            deletes=to_table(deletes_schema(table), outcome.deletes, batch),
            parked=tuple(outcome.parked),
        )


def _row(table: TableDefinition, key: bytes | None, value: bytes) -> tuple[Any, ...]:
    document = read_json(value)
    if not isinstance(document, dict):
        raise FaultError(ParkReason.NOT_AN_OBJECT, f"expected a JSON object, got {described(document)}")
    if key is None and table.is_keyed:
        raise FaultError(ParkReason.MISSING_KEY, "the record has no Kafka key, and the table has a primary key")
    return tuple(_column_value(table, column, document) for column in table.columns)


def _column_value(table: TableDefinition, column: Column, document: dict[str, object]) -> Any:
    typed = convert(document.get(column.name), column.type, column.name)
    if typed is None:
        problem = "is null" if column.name in document else "is missing"
        if column.name in table.primary_key:
            raise FaultError(ParkReason.MISSING_KEY, f"key column {column.name!r} {problem}")
        if not column.nullable:
            raise FaultError(ParkReason.MISSING_VALUE, f"column {column.name!r} {problem}, and it is NOT NULL")
    return typed


def _delete(table: TableDefinition, key: bytes | None) -> tuple[Any, ...]:
    if not table.is_keyed:
        raise FaultError(ParkReason.NULL_IN_APPEND_TABLE, "the value is null, and the table has no primary key")
    if key is None:
        raise FaultError(ParkReason.MISSING_KEY, "a tombstone without a Kafka key deletes nothing")
    columns = [table.column(name) for name in table.primary_key]
    try:
        document = _key_object(columns, key)
        typed = tuple(convert(document.get(column.name), column.type, column.name) for column in columns)
    except FaultError as fault:
        raise FaultError(ParkReason.BAD_KEY, f"Kafka key: {fault.detail}") from None
    for column, item in zip(columns, typed, strict=True):
        if item is None:
            raise FaultError(ParkReason.BAD_KEY, f"Kafka key: column {column.name!r} is missing or null")
    return typed


def _key_object(columns: list[Column], key: bytes) -> dict[str, object]:
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
