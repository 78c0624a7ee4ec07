"""Tables and batches that the tests of the store and the decoder share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from schemas.table import (
    ArrayType,
    Column,
    ColumnType,
    ScalarKind,
    ScalarType,
    StructField,
    StructType,
    TableDefinition,
)
from streams.adapters.duckdb_decoder import DuckDBDecoder
from streams.batches import RecordBatch
from streams.ports import DecodedBatch

TIMESTAMP_MS = 1_700_000_000_000
DECODER = DuckDBDecoder()


def scalar(kind: str) -> ScalarType:
    """BIGINT, or DECIMAL(10,2)."""
    if kind.startswith("DECIMAL"):
        precision, scale = kind.removeprefix("DECIMAL(").rstrip(")").split(",")
        return ScalarType(ScalarKind.DECIMAL, int(precision), int(scale))
    return ScalarType(ScalarKind(kind))


def table(name: str, key: tuple[str, ...] = (), /, **columns: str | ColumnType) -> TableDefinition:
    """A table; a type that ends in `!` is NOT NULL, as key columns are."""
    built = []
    for column, kind in columns.items():
        required = column in key or (isinstance(kind, str) and kind.endswith("!"))
        column_type = scalar(kind.rstrip("!")) if isinstance(kind, str) else kind
        built.append(Column(column, column_type, nullable=not required))
    return TableDefinition(name=name, topic=f"{name}-events", columns=tuple(built), primary_key=key)


FLIGHTS = table("flights", ("id",), id="BIGINT", carrier="VARCHAR", delay="DOUBLE")
SEATS = table("seats", ("flight", "seat"), flight="INTEGER", seat="VARCHAR", passenger="VARCHAR")
EVENTS = table("events", what="VARCHAR!", at="TIMESTAMPTZ", tag="UUID", extra="JSON")
EVERYTHING = table(
    "everything",
    (),
    **{kind.lower(): kind.value for kind in ScalarKind if kind not in (ScalarKind.DECIMAL, ScalarKind.JSON)},
    money="DECIMAL(10,2)",
    numbers=ArrayType(scalar("INTEGER")),
    place=StructType((StructField("name", scalar("VARCHAR")), StructField("height", scalar("DOUBLE")))),
)


def batch(
    definition: TableDefinition,
    values: Sequence[Any],
    *,
    first: int = 0,
    keys: Sequence[bytes | None] | None = None,
    partition: int = 0,
) -> RecordBatch:
    """Consecutive records; a value that is no bytes is sent as JSON, except None, which is a tombstone."""
    raw = [value if value is None or isinstance(value, bytes) else json.dumps(value).encode() for value in values]
    return RecordBatch(
        topic=definition.topic,
        partition=partition,
        first_offset=first,
        next_offset=first + len(raw),
        values=raw,
        keys=list(keys) if keys is not None else [b"key"] * len(raw),
        offsets=list(range(first, first + len(raw))),
        timestamps_ms=[TIMESTAMP_MS + first + index for index in range(len(raw))],
    )


def decoded(definition: TableDefinition, values: Sequence[Any], **where: Any) -> DecodedBatch:
    """The same, decoded."""
    return DECODER.decode(definition, batch(definition, values, **where))
