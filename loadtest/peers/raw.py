"""`python -m loadtest.peers.raw`: an aiokafka `getmany` loop, orjson, pyarrow and DuckDB; a transaction per fetch."""

from __future__ import annotations

import asyncio

from aiokafka import AIOKafkaConsumer, TopicPartition

from loadtest.peers.drain import Drained, DrainOptions, Progress, drain_options, say
from loadtest.peers.store import HandWrittenStore

_FETCH_BYTES_MAX = 32 * 1024 * 1024
_PARTITION_FETCH_BYTES_MAX = 4 * 1024 * 1024


async def drain(options: DrainOptions) -> Drained:
    """From the start of the table's topic."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=options.kafka,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        fetch_max_bytes=_FETCH_BYTES_MAX,
        max_partition_fetch_bytes=_PARTITION_FETCH_BYTES_MAX,
    )
    await consumer.start()
    store, progress = HandWrittenStore(options.path, options.table), Progress(options)
    try:
        topic = options.table.topic
        consumer.assign([TopicPartition(topic, partition) for partition in range(options.table.partitions)])
        progress.start()
        while not progress.is_over:
            fetched = await consumer.getmany(timeout_ms=1000)
            if not fetched:
                continue
            rows = [
                store.row(record.value, partition=record.partition, offset=record.offset, timestamp_ms=record.timestamp)
                for records in fetched.values()
                for record in records
            ]
            store.apply(rows, {where.partition: records[-1].offset + 1 for where, records in fetched.items()})
            progress.applied(len(rows))
    finally:
        store.close()
        await consumer.stop()
    return progress.report()


if __name__ == "__main__":
    say(asyncio.run(drain(drain_options())))
