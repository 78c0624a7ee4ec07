"""What is made of what librdkafka hands over, and of a Kafka that is away."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError

from streams.adapters.kafka_librdkafka import RdKafkaLog, RdKafkaProducer, _Assignment, _read_of
from streams.adapters.kafka_producers import REPLY_TOPICS_MAX, KafkaReplies
from streams.batches import RecordBatch
from streams.config import Settings
from streams.errors import KafkaUnavailableError, PublishingError
from streams.positions import TopicPartition

FIRST, SECOND = TopicPartition("requests", 0), TopicPartition("requests", 1)


def record(source: TopicPartition, offset: int, *, fault: int | None = None) -> Any:
    """A confluent_kafka.Message."""
    return SimpleNamespace(
        topic=lambda: source.topic,
        partition=lambda: source.partition,
        offset=lambda: offset,
        value=lambda: b"%d" % offset,
        key=lambda: None,
        headers=lambda: None,
        timestamp=lambda: (1, 5),
        error=lambda: None if fault is None else KafkaError(fault),
    )


class Reading:
    """A log whose reader thread is played by the test."""

    def __init__(self) -> None:
        self.batches: list[RecordBatch] = []
        self.out_of_range: list[TopicPartition] = []
        self.unreadable: list[TopicPartition] = []
        self.log = RdKafkaLog(
            Settings(kafka="127.0.0.1:9"),
            client_id="a-log",
            group="a-group",
            deliver=self.batches.append,
            on_out_of_range=self.out_of_range.append,
            on_unreadable=lambda source, _: self.unreadable.append(source),
        )
        self.assigned = _Assignment({})
        self._positions: dict[TopicPartition, int] = {}

    async def begin(self, positions: dict[TopicPartition, int]) -> None:
        await self.log.read_from(positions)
        self.assigned, self._positions = self.log._wanted, dict(positions)

    def poll(self, *messages: Any) -> None:
        assert self.log._room.acquire(blocking=False)
        self.log._take(self.assigned, _read_of(list(messages), self._positions))

    @property
    def spans(self) -> list[tuple[int, int, list[int]]]:
        return [(batch.partition, batch.first_offset, batch.offsets) for batch in self.batches]


@pytest.fixture
async def reading() -> Reading:
    reading = Reading()
    await reading.begin({FIRST: 5, SECOND: 0})
    return reading


async def test_a_batch_starts_where_the_one_before_it_ended_also_where_the_log_has_holes(reading: Reading) -> None:
    reading.poll(record(FIRST, 7), record(SECOND, 0), record(FIRST, 8))
    reading.poll(record(FIRST, 11))
    assert reading.spans == [(0, 5, [7, 8]), (1, 0, [0]), (0, 9, [11])]


async def test_nothing_behind_a_damaged_record_is_taken_before_it_was_read_again(reading: Reading) -> None:
    reading.poll(record(FIRST, 5), record(FIRST, 6, fault=KafkaError._BAD_MSG), record(FIRST, 8))
    reading.poll(record(FIRST, 9))
    assert reading.spans == [(0, 5, [5])]
    assert reading.unreadable == [FIRST]
    await reading.begin({FIRST: 6, SECOND: 0})
    reading.poll(record(FIRST, 6))
    assert reading.spans[1:] == [(0, 6, [6])]


async def test_every_fault_is_reported(reading: Reading) -> None:
    reading.poll(record(FIRST, 5, fault=KafkaError._TRANSPORT), record(FIRST, 5, fault=KafkaError._AUTO_OFFSET_RESET))
    assert reading.out_of_range == [FIRST]


async def test_a_batch_that_was_lost_on_the_way_leaves_a_hole_that_shows(reading: Reading) -> None:
    deliver, reading.log._deliver = reading.log._deliver, lambda _: 1 / 0  # type: ignore[assignment]
    with pytest.raises(ZeroDivisionError):
        reading.poll(record(FIRST, 5), record(SECOND, 0))
    reading.log._deliver = deliver
    reading.poll(record(SECOND, 1))
    assert reading.spans == [(1, 1, [1])], "it says that it starts at 1, where 0 comes next"


def nowhere() -> Settings:
    """A Kafka that refuses connections."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return Settings(kafka=f"127.0.0.1:{free.getsockname()[1]}")


async def test_without_kafka_everything_that_was_sent_fails_when_the_producer_stops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("streams.adapters.kafka_librdkafka._FLUSH_SECONDS_MAX", 0.1)
    producer = RdKafkaProducer(nowhere(), client_id="a-producer", acks="1")
    producer.start()
    sent = producer.send("replies", value=b"x", partition=0)
    await producer.stop()
    with pytest.raises(PublishingError, match="the record for replies was not acknowledged"):
        await sent


async def test_without_kafka_watermarks_fail_and_a_log_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.adapters.kafka_librdkafka._WATERMARK_SECONDS_MAX", 0.1)
    log = RdKafkaLog(
        nowhere(),
        client_id="a-log",
        group="a-group",
        deliver=print,
        on_out_of_range=print,
        on_unreadable=lambda *_: None,
    )
    await log.start()
    with pytest.raises(KafkaUnavailableError, match="does not say what requests"):
        await log.watermarks([FIRST])
    await log.stop()
    with pytest.raises(KafkaUnavailableError):
        await log.watermarks([FIRST])


async def test_whoever_names_ever_more_reply_topics_costs_no_more_than_some(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Producer:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.topics: set[str] = set()
            self.is_running = False
            made.append(self)

        def start(self) -> None:
            self.is_running = True

        async def stop(self) -> None:
            self.is_running = False

        async def send(self, topic: str, **_: Any) -> None:
            assert self.is_running
            self.topics.add(topic)

    monkeypatch.setattr("streams.adapters.kafka_producers.RdKafkaProducer", Producer)
    replies = KafkaReplies(Settings(kafka="127.0.0.1:9"), client_id="replies")
    await replies.start()
    for number in range(3 * REPLY_TOPICS_MAX):
        await replies.send(f"replies-{number}", value=b"x")
    await asyncio.sleep(0)
    assert [len(producer.topics) for producer in made] == [REPLY_TOPICS_MAX] * 3
    assert [producer.is_running for producer in made] == [False, False, True]
    await replies.stop()
    assert not made[-1].is_running
