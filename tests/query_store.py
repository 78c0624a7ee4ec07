"""A small real store for tests of queries: two tables over four partitions, filled through the decoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import orjson

from schemas.catalog import Catalog
from schemas.messages import ArrowAnswer, QueryRequest, RefusalCode
from schemas.table import ArrayType, Column, ScalarKind, ScalarType, StructField, StructType, TableDefinition
from streams.adapters.duckdb_decoder import DuckDBDecoder
from streams.adapters.duckdb_store import DuckDBStore
from streams.batches import RecordBatch
from streams.errors import QueryRefusedError

PARTITIONS = 4


async def asks_nobody(request: QueryRequest) -> ArrowAnswer:
    """`QueryService`'s `ask` of a worker without others."""
    raise QueryRefusedError(
        f"nobody serves partition {request.partition}", code=RefusalCode.NOT_SERVING, retriable=True
    )


def scalar(kind: ScalarKind) -> ScalarType:
    """A scalar type; DECIMAL is DECIMAL(12,2)."""
    return ScalarType(kind, 12, 2) if kind is ScalarKind.DECIMAL else ScalarType(kind)


FLIGHTS = TableDefinition(
    name="flights",
    topic="flights",
    partitions=PARTITIONS,
    primary_key=("id",),
    columns=(
        Column("id", scalar(ScalarKind.BIGINT), nullable=False),
        Column("carrier", scalar(ScalarKind.VARCHAR)),
        Column("delay", scalar(ScalarKind.DOUBLE)),
        Column("fare", scalar(ScalarKind.DECIMAL)),
        Column("departed", scalar(ScalarKind.TIMESTAMPTZ)),
        Column("day", scalar(ScalarKind.DATE)),
        Column("stops", ArrayType(scalar(ScalarKind.VARCHAR))),
        Column("plane", StructType((StructField("tail", scalar(ScalarKind.VARCHAR)),))),
        Column("extra", scalar(ScalarKind.JSON)),
    ),
)
AIRLINES = TableDefinition(
    name="airlines",
    topic="airlines",
    partitions=PARTITIONS,
    columns=(Column("carrier", scalar(ScalarKind.VARCHAR)), Column("name", scalar(ScalarKind.VARCHAR))),
)
CATALOG = Catalog((AIRLINES, FLIGHTS))


def flight(number: int) -> dict[str, Any]:
    """A flight whose fields follow from its number."""
    return {
        "id": number,
        "carrier": ("AA", "UA", "DL")[number % 3],
        "delay": number / 2,
        "fare": f"{number}.50",
        "departed": f"2026-03-{1 + number % 28:02d}T10:00:00Z",
        "day": f"2026-03-{1 + number % 28:02d}",
        "stops": ["JFK", "LAX"][: number % 3],
        "plane": {"tail": f"N{number}"},
        "extra": {"meal": number % 2 == 0},
    }


def batch_of(table: TableDefinition, partition: int, first: int, values: Iterable[Mapping[str, Any]]) -> RecordBatch:
    """The records as one fetch would deliver them, keyed where the table is."""
    records = list(values)
    encoded: list[bytes | None] = [orjson.dumps(record) for record in records]
    count = len(encoded)
    return RecordBatch(
        topic=table.topic,
        partition=partition,
        first_offset=first,
        next_offset=first + count,
        values=encoded,
        keys=[str(record["id"]).encode() if table.is_keyed else None for record in records],
        offsets=list(range(first, first + count)),
        timestamps_ms=[1_700_000_000_000] * count,
        size_bytes=sum(len(value) for value in encoded if value is not None),
    )


def write(store: DuckDBStore, table: TableDefinition, partition: int, first: int, values: Iterable[Any]) -> None:
    """Decodes and applies records, as ingestion does."""
    decoded = DuckDBDecoder().decode(table, batch_of(table, partition, first, values))
    assert not decoded.parked
    store.partitions()[partition].apply([decoded])


def filled_store(directory: Path, *, per_partition: int = 10) -> DuckDBStore:
    """Partition p holds flights with id = p (mod 4), at offsets 0 to per_partition - 1; all partitions are served."""
    store = DuckDBStore(directory, CATALOG, memory_limit="512MB", threads=2)
    for partition in range(PARTITIONS):
        store.open_partition(partition)
        flights = [flight(partition + PARTITIONS * index) for index in range(per_partition)]
        write(store, FLIGHTS, partition, 0, flights)
    write(store, AIRLINES, 0, 0, [{"carrier": "AA", "name": "American"}, {"carrier": "UA", "name": "United"}])
    store.publish_scopes(range(PARTITIONS))
    return store
