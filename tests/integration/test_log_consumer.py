"""A consumer outside the group on a real Kafka: any partitions, from any positions, changed at any time."""

from __future__ import annotations

import pytest
from confluent_kafka import Producer

from agents.app import log_options
from agents.fetched_batches import ByteBudget
from agents.log_consumer import LogConsumer
from streams.batches import RecordBatch
from streams.config import Settings
from streams.positions import TopicPartition
from tests.conftest import NewTopicMaker
from tests.watched_log import until


@pytest.mark.parametrize("gathers", [False, True])
async def test_partitions_are_read_from_where_each_is_asked_for(
    kafka: str, new_topic: NewTopicMaker, *, gathers: bool
) -> None:
    topic = new_topic("log", partitions=2)
    first, second = TopicPartition(topic, 0), TopicPartition(topic, 1)
    producer = Producer({"bootstrap.servers": kafka})
    values: dict[TopicPartition, list[bytes | None]] = {}
    out_of_range: list[TopicPartition] = []

    def publish(*texts: str) -> None:
        for text in texts:
            for partition in (0, 1):
                producer.produce(topic, text, partition=partition)
        assert producer.flush(30) == 0

    def deliver(batch: RecordBatch) -> None:
        values.setdefault(batch.topic_partition, []).extend(batch.values)

    def on_unreadable(topic_partition: TopicPartition, why: str) -> None:
        raise AssertionError(f"{topic_partition}: {why}")

    publish("a", "b")
    log = LogConsumer(
        log_options(Settings(kafka=kafka), "a-reader"),
        deliver=deliver,
        on_out_of_range=out_of_range.append,
        on_unreadable=on_unreadable,
        gathers=gathers,
        budget=ByteBudget(1) if gathers else None,
    )
    await log.start()
    try:
        marks = (await log.watermarks([first]))[first]
        assert (marks.low, marks.high) == (0, 2)
        assert marks.topic_id is not None
        await log.read_from({first: 1})
        await until(lambda: values == {first: [b"b"]})
        await log.read_from({second: 0})
        await until(lambda: values == {first: [b"b"], second: [b"a", b"b"]})
        publish("c")
        await until(lambda: values == {first: [b"b", b"c"], second: [b"a", b"b", b"c"]})
        log.stop_reading([first])
        publish("d")
        await until(lambda: values[second][-1] == b"d")
        log.stop_reading([second])
        await log.read_from({first: 0, second: 99})
        await until(lambda: out_of_range == [second])
        await until(lambda: values[first] == [b"b", b"c", b"a", b"b", b"c", b"d"])
    finally:
        await log.stop()
        await log.stop()
