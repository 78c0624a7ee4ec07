"""`python -m loadtest.peers.ceiling`: the most that this design could do on this machine.

The topic's own bytes are read into memory first, in batches as large as Pintail's transactions. Then one thread per
core takes partition after partition, and decodes and applies its batches: the same decoder, the same stores, the same
durability, but no Kafka, no Faust, no parking and no queries. Only the second part is timed.
"""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from loadtest.fingerprints import Fingerprint, duckdb_fingerprint_sql
from loadtest.log_reader import read_log
from loadtest.peers.drain import Drained, DrainOptions, drain_options, say
from loadtest.preload import high_watermarks
from schemas.catalog import Catalog
from streams.adapters.duckdb_decoder import DuckDBDecoder
from streams.adapters.duckdb_store import DuckDBStore, PartitionStore
from streams.batches import RecordBatch
from streams.limits import WAL_BYTES_MAX

#: About what a transaction of a worker takes under backlog, with events of 100 bytes.
_BATCH_RECORDS = 65_536


def drain(options: DrainOptions) -> Drained:
    """`options.path` becomes the folder of the partition files; it is removed, since nothing else can read it."""
    batches = in_memory(options)
    gc.freeze()  # the batches outlive the run: the collector need not look at them
    store = DuckDBStore(options.path, Catalog((options.table,)))
    decoder = DuckDBDecoder()
    try:
        stores = {partition: store.open_partition(partition) for partition in batches}

        def apply(partition: int) -> int:
            for batch in batches[partition]:
                stores[partition].apply([decoder.decode(options.table, batch)])
                fold(stores[partition])
            return sum(map(len, batches[partition]))

        started = time.monotonic()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            events = sum(pool.map(apply, batches))
        finished = time.monotonic()
        store.publish_scopes(stores)
        with store.query_cursor(None) as cursor:
            row = cursor.execute(duckdb_fingerprint_sql(options.table)).fetchone()
        assert row is not None
        next_offsets = {partition: batches[partition][-1].next_offset for partition in batches}
        return Drained(events, started, finished, next_offsets, Fingerprint.of(row))
    finally:
        store.close()
        shutil.rmtree(options.path)


def fold(store: PartitionStore) -> None:
    """As a worker does."""
    if store.wal_bytes() > WAL_BYTES_MAX:
        store.checkpoint_unless_frozen()


def in_memory(options: DrainOptions) -> dict[int, list[RecordBatch]]:
    """Partition -> its records: all of them, or as many of each partition as makes `options.events`."""
    topic, partitions = options.table.topic, options.table.partitions
    whole: dict[int, list[RecordBatch]] = {partition: [] for partition in range(partitions)}
    for partition, offset, timestamp_ms, key, value in _records(options):
        batches = whole[partition]
        if not batches or len(batches[-1]) >= _BATCH_RECORDS:
            batches.append(RecordBatch(topic, partition, offset, offset))
        batch = batches[-1]
        batch.values.append(value)
        batch.keys.append(key)
        batch.offsets.append(offset)
        batch.timestamps_ms.append(timestamp_ms)
        batch.size_bytes += len(value or b"") + len(key or b"")
        batch.next_offset = offset + 1
    return {partition: batches for partition, batches in whole.items() if batches}


def _records(options: DrainOptions) -> Iterator[tuple[int, int, int, bytes | None, bytes | None]]:
    topic = options.table.topic
    whole = options.events >= sum(high_watermarks(options.kafka, topic).values())
    each_partition_max = None if whole else -(-options.events // options.table.partitions)
    for record in read_log(options.kafka, topic, each_partition_max=each_partition_max):
        yield record.partition(), record.offset(), record.timestamp()[1], record.key(), record.value()


if __name__ == "__main__":
    say(drain(drain_options()))
