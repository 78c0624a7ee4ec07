"""The servers of the local stack are what the rest of Pintail relies on them to be."""

from __future__ import annotations

import uuid

import redis
from confluent_kafka import Consumer, Producer

from streams.limits import DEAD_LETTER_BYTES_MAX
from tests.conftest import NewTopicMaker


def test_kafka_keeps_a_dead_letter_of_the_largest_size(kafka: str, new_topic: NewTopicMaker) -> None:
    topic = new_topic(configuration={"max.message.bytes": str(DEAD_LETTER_BYTES_MAX + 1024)})
    payload = b"x" * (DEAD_LETTER_BYTES_MAX - 1024)
    producer = Producer({"bootstrap.servers": kafka, "message.max.bytes": DEAD_LETTER_BYTES_MAX, "acks": "all"})
    producer.produce(topic, payload)
    assert producer.flush(30) == 0

    (message,) = _read(kafka, topic, count=1)
    assert message == payload


def test_a_kafka_client_can_use_a_topic_that_nobody_created(kafka: str) -> None:
    topic = f"reply-{uuid.uuid4().hex}"
    producer = Producer({"bootstrap.servers": kafka})
    producer.produce(topic, b"hello")
    assert producer.flush(30) == 0
    assert _read(kafka, topic, count=1) == [b"hello"]


def test_redis_is_safe_for_snapshots(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        assert client.config_get("appendfsync") == {"appendfsync": "everysec"}


def _read(kafka: str, topic: str, *, count: int) -> list[bytes]:
    consumer = Consumer(
        {
            "bootstrap.servers": kafka,
            "group.id": uuid.uuid4().hex,
            "auto.offset.reset": "earliest",
            "fetch.message.max.bytes": DEAD_LETTER_BYTES_MAX,
        }
    )
    try:
        consumer.subscribe([topic])
        messages = consumer.consume(count, timeout=30)
        return [value for message in messages if (value := message.value()) is not None]
    finally:
        consumer.close()
