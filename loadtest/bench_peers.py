"""What one would write by hand instead of a store worker: the peer that benchmarks compare with, in the same run.

`python -m loadtest.bench_peers` drains a topic with an aiokafka `getmany` loop, orjson, pyarrow and one DuckDB file:
rows and offsets in one transaction per fetch, upserts as DELETE and INSERT. It checks nothing, has no dead letters, no
snapshots and no queries. Its last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import duckdb
import orjson
import pyarrow as pa
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition

from schemas.arrow_schema import rows_schema
from schemas.catalog import load_catalog
from schemas.duckdb_ddl import create_table_sql, quote
from schemas.table import TableDefinition

_FETCH_BYTES_MAX = 32 * 1024 * 1024
_PARTITION_FETCH_BYTES_MAX = 4 * 1024 * 1024


class HandWrittenStore:
    """One DuckDB file for one table."""

    def __init__(self, path: Path, table: TableDefinition) -> None:
        self._table = table
        self._connection = duckdb.connect(str(path), config={"threads": 2, "memory_limit": "1GB"})
        self._connection.execute(create_table_sql(table, qualified_name=quote(table.name)))
        self._connection.execute("CREATE TABLE offsets (partition INTEGER, next_offset BIGINT)")
        # JSON has no timestamps: those are text until DuckDB casts them.
        self._schema = pa.schema(
            [
                pa.field(each.name, pa.string() if pa.types.is_timestamp(each.type) else each.type)
                for each in rows_schema(table)
            ]
        )

    def apply(self, fetched: Mapping[TopicPartition, Sequence[ConsumerRecord]]) -> None:
        """Everything fetched, in one transaction."""
        rows = [
            orjson.loads(record.value)
            | {"_partition": record.partition, "_offset": record.offset, "_timestamp": str(record.timestamp)}
            for records in fetched.values()
            for record in records
        ]
        if self._table.is_keyed:  # the last record of a key wins
            rows = list({row[self._table.primary_key[0]]: row for row in rows}.values())
        batch = pa.Table.from_pylist(rows, schema=self._schema)
        name, execute = quote(self._table.name), self._connection.execute
        self._connection.register("batch", batch)
        execute("BEGIN")
        if self._table.is_keyed:
            key = quote(self._table.primary_key[0])
            execute(f"DELETE FROM {name} WHERE {key} IN (SELECT {key} FROM batch)")
        timestamp = "to_timestamp(_timestamp::BIGINT / 1000) AS _timestamp"
        execute(f"INSERT INTO {name} BY NAME SELECT * REPLACE ({timestamp}) FROM batch")
        for topic_partition, records in fetched.items():
            execute("DELETE FROM offsets WHERE partition = $1", [topic_partition.partition])
            execute("INSERT INTO offsets VALUES ($1, $2)", [topic_partition.partition, records[-1].offset + 1])
        execute("COMMIT")
        self._connection.unregister("batch")

    def count(self) -> int:
        """Rows in the table."""
        row = self._connection.execute(f"SELECT count(*) FROM {quote(self._table.name)}").fetchone()
        assert row is not None
        return int(row[0])

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()


async def drain(kafka: str, table: TableDefinition, path: Path, events: int) -> dict[str, float]:
    """Applies `events` records of the table's topic from its start; seconds from the first fetch to the last commit."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=kafka,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        fetch_max_bytes=_FETCH_BYTES_MAX,
        max_partition_fetch_bytes=_PARTITION_FETCH_BYTES_MAX,
    )
    await consumer.start()
    store = HandWrittenStore(path, table)
    try:
        consumer.assign([TopicPartition(table.topic, partition) for partition in range(table.partitions)])
        started, applied = time.perf_counter(), 0
        while applied < events:
            fetched = await consumer.getmany(timeout_ms=1000)
            if fetched:
                store.apply(fetched)
                applied += sum(map(len, fetched.values()))
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "events_per_second": events / seconds, "rows": store.count()}
    finally:
        store.close()
        await consumer.stop()


def main() -> None:
    """Runs one drain and prints its result."""
    parser = argparse.ArgumentParser(description="Drain a topic into DuckDB with a loop written by hand.")
    parser.add_argument("--kafka", required=True)
    parser.add_argument("--tables", required=True, type=Path, help="folder of table files")
    parser.add_argument("--table", required=True)
    parser.add_argument("--path", required=True, type=Path, help="the DuckDB file to create")
    parser.add_argument("--events", required=True, type=int)
    options = parser.parse_args()
    table = load_catalog(options.tables).by_name(options.table)
    result = asyncio.run(drain(options.kafka, table, options.path, options.events))
    print(orjson.dumps(result).decode())


if __name__ == "__main__":
    main()
