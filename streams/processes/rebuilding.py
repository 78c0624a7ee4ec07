"""Rebuilds a partition from what the sink delivered: the rung below snapshots and above the whole log (D7).

    1. positions  of each topic, the offset below which everything is delivered: from the BEFORE record and the table's
                  last offset, read in this order, by the rule of processes/delivery.py
    2. load       the rows of every table whose newest record is below that offset, in transactions
    3. begin      the positions become the store's next_offsets, in one transaction; until then the store counts as
                  empty, and recovery discards it
Replay goes on from there. Records at and above the positions do not matter, however many of them ClickHouse has, and
however late one of its inserts lands: an append table is read below the position only; a key whose newest record is at
or above it is left out, and replay brings that record, because it ends beyond everything that was delivered when it
began. So the store is exact once it SERVES (invariant 8), not before.

Called by processes/recovery.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol, TypeVar

import pyarrow as pa

from schemas.catalog import Catalog
from schemas.table import TableDefinition
from streams.adapters.duckdb_store import PartitionStore
from streams.errors import InexactRowsError
from streams.finishing import in_thread
from streams.limits import MIB, WAL_BYTES_MAX
from streams.ports import DeliveredRows, RecordedIntents
from streams.positions import TopicPartition, next_offset_after
from streams.processes.delivery import delivered_to
from streams.processes.progress import RecoveryProgress

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

#: What a page aims at, in memory. Pages grow tenfold at most, from this many rows, as rows may be large.
PAGE_BYTES = 32 * MIB
FIRST_PAGE_ROWS = 200
PAGE_ROWS_MAX = 250_000


class Patience(Protocol):
    """Repeats an action while a server is away, until a deadline; then raises what it raised."""

    async def __call__(self, action: Callable[[], Awaitable[Result]], /) -> Result: ...


class Rebuilding:
    """Fills empty partition stores from the sink."""

    def __init__(self, catalog: Catalog, rows: DeliveredRows, intents: RecordedIntents) -> None:
        self._catalog = catalog
        self._rows = rows
        self._intents = intents

    async def positions(self, partition: int, patiently: Patience) -> dict[str, int]:
        """Topic -> offset below which the sink has everything; topics of which it never had anything are absent.

        Raises InexactRowsError when the rows of one of the tables cannot come back exactly, SinkError."""
        found = {
            table.topic: await patiently(partial(self._position, table, TopicPartition(table.topic, partition)))
            for table in self._catalog.tables
            if partition < table.partitions
        }
        return {topic: position for topic, position in found.items() if position is not None}

    async def fill(
        self, store: PartitionStore, positions: dict[str, int], progress: RecoveryProgress, patiently: Patience
    ) -> None:
        """Loads every table with a position, then begins there. Raises SinkError or StoreError: discard the store."""
        tables = [
            (table, TopicPartition(table.topic, store.partition), positions[table.topic])
            for table in self._catalog.tables
            if table.topic in positions
        ]
        # 2. load
        counts = [
            await patiently(partial(in_thread, partial(self._rows.count, table, source, below=below)))
            for table, source, below in tables
        ]
        progress.begin("clickhouse", sum(counts), "rows")
        for table, source, below in tables:
            after, rows_max, has_more = None, FIRST_PAGE_ROWS, True
            while has_more:
                page = partial(self._rows.page, table, source, below=below, after=after, rows_max=rows_max)
                rows, after = await patiently(partial(in_thread, page))
                await in_thread(_load, store, table, rows)
                progress.reach(progress.done + len(rows))
                fitting = PAGE_BYTES * len(rows) // max(1, rows.nbytes)
                rows_max, has_more = max(1, min(10 * rows_max, fitting, PAGE_ROWS_MAX)), after is not None
        # 3. begin
        logger.info("partition %d: %d rows loaded from ClickHouse, at %s", store.partition, progress.done, positions)
        await in_thread(store.begin_at, positions)
        await in_thread(store.delete_expired, time.time_ns() // 1_000_000)
        progress.end()

    async def _position(self, table: TableDefinition, source: TopicPartition) -> int | None:
        if not await in_thread(self._rows.verify, table):
            return None
        intent = await self._intents.read(source)
        stored = await in_thread(self._rows.last_offset, table, source)
        if stored is None and intent is not None and intent.lo > 0 and table.retention_seconds is None:
            raise InexactRowsError(
                f"table {table.name!r} in ClickHouse has no row of {source}, although everything below offset "
                f"{intent.lo} was delivered",
                hint="was the table emptied or created anew? recover the partition from a snapshot or from the log",
            )
        return delivered_to(intent, None if stored is None else next_offset_after(stored))


def _load(store: PartitionStore, table: TableDefinition, rows: pa.Table) -> None:
    if rows.num_rows:
        store.load(table, rows)
    if store.wal_bytes() > WAL_BYTES_MAX:
        store.checkpoint()
