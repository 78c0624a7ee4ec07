"""`python -m loadtest.peers.sink_insert`: the CPU of one row on its way into ClickHouse, Pintail's and the driver's.

The topic's own bytes are read into memory first. Then batch after batch goes into ClickHouse twice, by turns: through
Pintail's decoder, delivery table and sink, and as rows of Python objects through `insert()` of clickhouse-connect,
column types given, into a table of the same shape. Counted is the CPU of this process, all its threads, in two steps:
bytes to rows, and rows to ClickHouse. No Kafka and no Faust on either side.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import clickhouse_connect
import orjson

from loadtest.peers.ceiling import in_memory
from loadtest.peers.drain import DrainOptions
from schemas.catalog import Catalog, load_catalog
from schemas.clickhouse_ddl import create_table_sql, expected_columns
from schemas.table import TableDefinition
from streams.adapters.clickhouse_rows import delivery_table
from streams.adapters.clickhouse_sink import ClickHouseSink
from streams.adapters.duckdb_decoder import DuckDBDecoder
from streams.batches import RecordBatch
from streams.positions import OffsetRange

DATABASE = "inserts"
Made = TypeVar("Made")


class CpuPerRow:
    """Sums up the CPU of steps, by name."""

    def __init__(self) -> None:
        self.rows = 0
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def timed(self, name: str, step: Callable[[], Made]) -> Made:
        """What the step returns."""
        started = time.process_time()
        made = step()
        self.seconds[name] += time.process_time() - started
        return made

    def microseconds(self) -> dict[str, float]:
        """Of one row, by step."""
        return {name: round(seconds / self.rows * 1e6, 3) for name, seconds in self.seconds.items()}


def measure(options: DrainOptions, clickhouse: str) -> dict[str, float]:
    """Microseconds of CPU per row of `pintail_decode`, `pintail_insert`, `rows_decode` and `rows_insert`."""
    table, batches = options.table, [batch for some in in_memory(options).values() for batch in some]
    decoder, sink = DuckDBDecoder(), ClickHouseSink(f"{clickhouse}/{DATABASE}")
    sink.ensure_tables(Catalog((table,)))
    client = clickhouse_connect.get_client(dsn=clickhouse, autogenerate_session_id=False, compress="lz4")
    client.command("CREATE DATABASE IF NOT EXISTS by_rows")
    client.command(create_table_sql(table, database="by_rows"))
    names, types = zip(*expected_columns(table), strict=True)
    cpu = CpuPerRow()

    def pintail(batch: RecordBatch) -> None:
        decoded = cpu.timed("pintail_decode", lambda: decoder.decode(table, batch))
        assert not decoded.parked
        offsets = OffsetRange(batch.first_offset, batch.next_offset)
        cpu.timed(
            "pintail_insert",
            lambda: sink.insert(table, batch.topic_partition, offsets, delivery_table([decoded])),
        )

    def by_rows(batch: RecordBatch) -> None:
        rows = cpu.timed("rows_decode", lambda: as_rows(table, batch))
        cpu.timed(
            "rows_insert",
            lambda: client.insert(table.name, rows, names, "by_rows", column_type_names=types),
        )

    try:
        for number, batch in enumerate(batches):
            # The first pair warms everything up; afterwards who goes first changes, so that neither has the caches.
            pair = (pintail, by_rows) if number % 2 else (by_rows, pintail)
            for side in pair:
                side(batch)
            cpu.rows += len(batch)
            if not number and len(batches) > 1:
                cpu = CpuPerRow()
        _assert_same(client, table)
    finally:
        client.close()
        sink.close()
    return cpu.microseconds()


def as_rows(table: TableDefinition, batch: RecordBatch) -> list[tuple[Any, ...]]:
    """As written by hand for the table of orders: every value an object of the type that the driver takes."""
    rows = []
    for value, offset, timestamp_ms in zip(batch.values, batch.offsets, batch.timestamps_ms, strict=True):
        fields = orjson.loads(value or b"")
        rows.append(
            (
                fields["id"],
                fields["customer"],
                Decimal(str(fields["amount"])),
                fields["country"],
                datetime.fromisoformat(fields["at"]),
                table.topic,
                batch.partition,
                offset,
                datetime.fromtimestamp(timestamp_ms / 1000, UTC),
            )
        )
    return rows


def _assert_same(client: Any, table: TableDefinition) -> None:
    totals = "SELECT count(), sum(id), sum(amount), sum(toUnixTimestamp64Micro(at)), uniq(customer) FROM"
    ours, theirs = (client.query(f"{totals} {database}.{table.name}").result_rows for database in (DATABASE, "by_rows"))
    assert ours == theirs, f"{ours} is not {theirs}"


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description="Measure the CPU of one row into ClickHouse.")
    parser.add_argument("--kafka", required=True)
    parser.add_argument("--clickhouse", required=True)
    parser.add_argument("--tables", required=True, type=Path, help="folder of table files")
    parser.add_argument("--table", required=True)
    parser.add_argument("--events", required=True, type=int)
    given = parser.parse_args()
    table = load_catalog(given.tables).by_name(given.table)
    options = DrainOptions(given.kafka, table, Path(), given.events, float("inf"), "")
    print(orjson.dumps(measure(options, given.clickhouse)).decode())


if __name__ == "__main__":
    main()
