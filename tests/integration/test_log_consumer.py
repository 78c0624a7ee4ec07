"""Consumers outside the group on a real Kafka: any partitions, from any positions, changed at any time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from confluent_kafka import Producer

from agents.app import log_options
from agents.fetched_batches import ByteBudget
from agents.log_consumer import LogConsumer
from streams.adapters.kafka_librdkafka import RdKafkaLog, RdKafkaProducer, RdKafkaTail
from streams.batches import RecordBatch
from streams.config import Settings
from streams.errors import PublishingError
from streams.positions import TopicPartition
from tests.conftest import NewTopicMaker
from tests.watched_log import until


def gathering(settings: Settings, **callbacks: Any) -> LogConsumer:
    return LogConsumer(log_options(settings, "a-reader"), budget=ByteBudget(1), **callbacks)


def at_once(settings: Settings, **callbacks: Any) -> RdKafkaLog:
    return RdKafkaLog(settings, client_id="a-log", group="a-group", **callbacks)


@pytest.mark.parametrize("consumer", [gathering, at_once])
async def test_partitions_are_read_from_where_each_is_asked_for(
    kafka: str, new_topic: NewTopicMaker, consumer: Callable[..., LogConsumer | RdKafkaLog]
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
    log = consumer(
        Settings(kafka=kafka), deliver=deliver, on_out_of_range=out_of_range.append, on_unreadable=on_unreadable
    )
    await log.start()
    try:
        marks = (await log.watermarks([first]))[first]
        assert (marks.low, marks.high) == (0, 2)
        assert (marks.topic_id is not None) == isinstance(log, LogConsumer)
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


async def test_a_tail_misses_nothing_from_its_start_on(kafka: str, new_topic: NewTopicMaker) -> None:
    topic = new_topic("tail", partitions=1)
    settings, values = Settings(kafka=kafka), list[bytes | None]()
    producer = RdKafkaProducer(settings, client_id="a-producer", acks="all")
    producer.start()
    tail = RdKafkaTail(
        settings,
        TopicPartition(topic, 0),
        client_id="a-tail",
        group="a-group",
        deliver=lambda batch: values.extend(batch.values),
    )
    try:
        await producer.send(topic, value=b"before", partition=0)
        await tail.start()
        sent = await producer.send(topic, value=b"after", partition=0, headers=[("a", b"b")])
        assert sent == (topic, 0, 1)
        await until(lambda: values == [b"after"])
    finally:
        await tail.stop()
        await producer.stop()


async def test_what_cannot_be_sent_says_so(kafka: str, new_topic: NewTopicMaker) -> None:
    topic = new_topic("replies", partitions=1)
    producer = RdKafkaProducer(Settings(kafka=kafka), client_id="a-producer", acks="1")
    producer.start()
    try:
        for refused in (
            producer.send(topic, value=b"x", partition=7),
            producer.send(topic, value=b"x" * 2_000_000, partition=0),
        ):
            with pytest.raises(PublishingError, match=f"the record for {topic} was not acknowledged"):
                await refused
        assert (await producer.send(topic, value=b"x", partition=0)).offset == 0
    finally:
        await producer.stop()
        await producer.stop()
