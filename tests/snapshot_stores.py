"""Partition stores with rows in them, for tests of snapshots and recovery: no broker and no JSON needed."""

from __future__ import annotations

import random
import uuid
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from schemas.arrow_schema import deletes_schema, rows_schema
from schemas.catalog import Catalog
from schemas.table import Column, ScalarKind, ScalarType, TableDefinition
from streams.adapters.duckdb_store import DuckDBStore, PartitionStore
from streams.adapters.snapshot_codec import SnapshotCodec
from streams.batches import RecordBatch
from streams.ports import DecodedBatch
from streams.ports_snapshots import SnapshotRepository, digest_of

CODEC = SnapshotCodec(bytes(range(32)), application="test")
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def _column(name: str, kind: ScalarKind, *, nullable: bool = True) -> Column:
    return Column(name, ScalarType(kind), nullable=nullable)


PLAYERS = TableDefinition(
    name="players",
    topic="players",
    primary_key=("id",),
    columns=(
        _column("id", ScalarKind.BIGINT, nullable=False),
        _column("badge", ScalarKind.UUID),
        _column("score", ScalarKind.DOUBLE),
    ),
)
MOVES = TableDefinition(
    name="moves",
    topic="moves",
    columns=(_column("player", ScalarKind.BIGINT), _column("note", ScalarKind.VARCHAR)),
)
CATALOG = Catalog((MOVES, PLAYERS))


def open_store(directory: Path) -> DuckDBStore:
    return DuckDBStore(directory, CATALOG, memory_limit="256MB", threads=1)


def decoded(table: TableDefinition, partition: int, first_offset: int, rows: Sequence[dict[str, Any]]) -> DecodedBatch:
    """What a decoder makes of records with these values, from `first_offset` on."""
    source = RecordBatch(
        topic=table.topic,
        partition=partition,
        first_offset=first_offset,
        next_offset=first_offset + len(rows),
        offsets=list(range(first_offset, first_offset + len(rows))),
    )
    full = [
        {**row, "_partition": partition, "_offset": first_offset + index, "_timestamp": NOW}
        for index, row in enumerate(rows)
    ]
    return DecodedBatch(
        table=table,
        source=source,
        rows=pa.Table.from_pylist(full, schema=rows_schema(table)),
        deletes=deletes_schema(table).empty_table(),
        parked=(),
    )


def append(store: PartitionStore, table: TableDefinition, rows: Sequence[dict[str, Any]]) -> None:
    """Applies rows at the store's next offset."""
    store.apply([decoded(table, store.partition, store.next_offsets().get(table.topic, 0), rows)])


def player(number: int, *, badge: str | None = None, seed: int = 0) -> dict[str, Any]:
    """A player whose badge and score do not compress."""
    rng = random.Random(number * 1_000_003 + seed)
    return {"id": number, "badge": badge or str(uuid.UUID(int=rng.getrandbits(128))), "score": rng.random()}


@cache
def players(count: int) -> tuple[dict[str, Any], ...]:
    """The first players, made once per test run."""
    return tuple(player(number) for number in range(count))


def move(number: int) -> dict[str, Any]:
    return {"player": number % 97, "note": f"move number {number}"}


async def lose_blocks(repository: SnapshotRepository, partition: int, names: Collection[str]) -> None:
    """As if somebody had found all of these damaged."""
    stored = await repository.load_blocks(partition, names)
    await repository.discard_blocks(partition, {name: digest_of(sealed) for name, sealed in stored.items()})
