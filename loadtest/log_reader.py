"""Reads a topic from its start to the end it has at that moment, as any consumer would. Used by oracles and peers."""

from __future__ import annotations

import time
from collections.abc import Iterator

from confluent_kafka import Consumer, Message, TopicPartition

from loadtest.preload import high_watermarks
from streams.errors import RequestTimeoutError

_CHUNK_RECORDS = 10_000
_SECONDS_MAX = 30.0
#: `consume` waits so long for a whole chunk, also when the log ends before.
_WAIT_SECONDS = 0.1


def read_log(bootstrap_servers: str, topic: str, *, each_partition_max: int | None = None) -> Iterator[Message]:
    """Every record, or the first so many of each partition; in order within a partition.

    Raises RequestTimeoutError if the log does not go on.
    """
    ends = high_watermarks(bootstrap_servers, topic)
    if each_partition_max is not None:
        ends = {partition: min(end, each_partition_max) for partition, end in ends.items()}
    missing = {partition: end for partition, end in ends.items() if end}
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": "unused",
            "enable.auto.commit": False,
            "fetch.min.bytes": 1,
            "queued.max.messages.kbytes": 128 * 1024,
            "isolation.level": "read_committed",
        }
    )
    try:
        progressed = time.monotonic()
        consumer.assign([TopicPartition(topic, partition, 0) for partition in missing])
        while missing:
            records = consumer.consume(_CHUNK_RECORDS, timeout=_WAIT_SECONDS)
            if records:
                progressed = time.monotonic()
            elif time.monotonic() - progressed > _SECONDS_MAX:
                raise RequestTimeoutError(
                    f"{topic} does not go on in partitions {sorted(missing)}", hint="check that the broker runs"
                )
            for record in records:
                if record.error() is not None:
                    raise RequestTimeoutError(f"{topic}: {record.error().str()}", hint="check that the broker runs")
                partition, offset = record.partition(), record.offset()
                if offset < ends[partition]:
                    yield record
                if partition in missing and offset + 1 >= ends[partition]:
                    del missing[partition]
    finally:
        consumer.close()
