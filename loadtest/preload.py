"""Fills topics before a measurement, as fast as librdkafka takes records: batches without callbacks, several processes.

Nothing is reported per record; what counts is what the log holds afterwards, which `preload` compares with what was
sent. Keys choose partitions by murmur2, unless the maker of the records names them.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from loadtest.publisher import PublishingError

#: topic -> key, value of a record, or key, value, partition.
Records = Iterable[tuple[bytes | None, bytes | None] | tuple[bytes | None, bytes | None, int]]
_BATCH_RECORDS = 10_000
_QUEUE_RECORDS_MAX = 200_000
_FIELDS = ("key", "value", "partition")
_TOPIC_SECONDS_MAX = 30.0


def producer_options(bootstrap_servers: str) -> dict[str, Any]:
    """A producer for throughput: large LZ4 batches, idempotent, acknowledged by all, murmur2."""
    return {
        "bootstrap.servers": bootstrap_servers,
        "partitioner": "murmur2_random",
        "compression.type": "lz4",
        "acks": "all",
        "enable.idempotence": True,
        # Kafka's own client waits 5 ms, then sends the records of all partitions in one request. librdkafka sends one
        # request per partition: at 5 ms, 20,000 events/s into 16 partitions are 3,200 of them a second, and take the
        # broker 0.75 of a core (0.38 at 20 ms). Where latency counts, what an event waits here is part of it.
        "linger.ms": 20,
        "batch.size": 1024 * 1024,
        "queue.buffering.max.messages": _QUEUE_RECORDS_MAX,
        "queue.buffering.max.kbytes": 256 * 1024,
        "log_level": 3,
    }


def create_topics(bootstrap_servers: str, partitions: Mapping[str, int]) -> None:
    """Creates topics, name -> partitions, that do not exist yet."""
    admin = AdminClient({"bootstrap.servers": bootstrap_servers})
    existing = admin.list_topics(timeout=_TOPIC_SECONDS_MAX).topics
    missing = [NewTopic(name, count, 1) for name, count in partitions.items() if name not in existing]
    for created in admin.create_topics(missing).values() if missing else ():
        created.result(_TOPIC_SECONDS_MAX)


def preload(
    bootstrap_servers: str, topic: str, parts: Sequence[tuple[Callable[..., Records], tuple[Any, ...]]], events: int
) -> None:
    """Publishes the records of every part, each (maker, arguments), in a process of its own.

    Raises PublishingError unless the log then holds `events` records more than before.
    """
    before = sum(high_watermarks(bootstrap_servers, topic).values())
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_publish, args=(bootstrap_servers, topic, maker, arguments))
        for maker, arguments in parts
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    published = sum(high_watermarks(bootstrap_servers, topic).values()) - before
    if any(process.exitcode for process in processes) or published != events:
        raise PublishingError(
            f"{topic} took {published:,} records instead of {events:,}", hint="check that the broker has room and runs"
        )


def high_watermarks(bootstrap_servers: str, topic: str) -> dict[int, int]:
    """Partition -> the position after its last record."""
    consumer = Consumer({"bootstrap.servers": bootstrap_servers, "group.id": "unused", "enable.auto.commit": False})
    try:
        partitions = consumer.list_topics(topic, timeout=_TOPIC_SECONDS_MAX).topics[topic].partitions
        return {
            partition: consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=_TOPIC_SECONDS_MAX)[1]
            for partition in partitions
        }
    finally:
        consumer.close()


def _publish(bootstrap_servers: str, topic: str, maker: Callable[..., Records], arguments: tuple[Any, ...]) -> None:
    producer = Producer(producer_options(bootstrap_servers))
    records = iter(maker(*arguments))
    while batch := [dict(zip(_FIELDS, record, strict=False)) for record in islice(records, _BATCH_RECORDS)]:
        while len(producer) > _QUEUE_RECORDS_MAX - _BATCH_RECORDS:  # a batch that does not fit would lose its order
            producer.poll(0.01)
        queued = producer.produce_batch(topic, batch)
        if queued != len(batch):
            raise PublishingError(f"{len(batch) - queued} records were not queued", hint="allow a longer queue")
    if producer.flush():
        raise PublishingError("the broker did not take all records", hint="check that it runs")
