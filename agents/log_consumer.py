"""A consumer outside the group, on the caller's loop: reads what it is told to and delivers it at once.

The store worker reads its requests with one. The group's consumer gathers records before it hands them over, and gives
them up only as fast as they are stored; a request must wait for neither. Who owns which partition is still the group's
to say: the query topic is assigned with the tables' topics, and the group's consumer leaves it alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import aiokafka
from aiokafka.errors import CorruptRecordException, OffsetOutOfRangeError

from agents.fetched_batches import headers_of
from streams.batches import RecordBatch, size_of
from streams.ports import Watermarks
from streams.positions import TopicPartition
from streams.retry import Backoff, in_words, persisting

#: Records of one partition that are delivered together at most.
DELIVERED_TOGETHER_MAX = 500
_POLL_MS = 1_000
_RETRY_SECONDS_MAX = 5.0


class LogConsumer:
    """Implements streams.ports.PartitionLog, for one event loop. What is on its way when reading stops is dropped."""

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        deliver: Callable[[RecordBatch], None],
        on_out_of_range: Callable[[TopicPartition], None],
        on_unreadable: Callable[[TopicPartition, str], None],
    ) -> None:
        self._options = dict(options)
        self._deliver = deliver
        self._on_out_of_range = on_out_of_range
        self._on_unreadable = on_unreadable
        self._consumer: aiokafka.AIOKafkaConsumer | None = None
        self._reading: asyncio.Task[None] | None = None
        #: Where the next batch of each partition that is read starts.
        self._positions: dict[TopicPartition, int] = {}
        self._has_positions = asyncio.Event()

    async def start(self) -> None:
        """Connects. Raises KafkaError."""
        self._consumer = aiokafka.AIOKafkaConsumer(**self._options)
        await self._consumer.start()
        reading = persisting(self._read, what="reading the log", backoff=Backoff(ceiling_seconds=_RETRY_SECONDS_MAX))
        self._reading = asyncio.create_task(reading, name="log consumer")

    async def stop(self) -> None:
        """Idempotent."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])
            self._reading = None
        if self._consumer is not None:
            await self._consumer.stop()
            self._consumer = None

    async def watermarks(self, topic_partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, Watermarks]:
        """See streams.ports.PartitionLog."""
        marks = await read_watermarks(self._started(), [_aiokafka(each) for each in topic_partitions])
        return {TopicPartition(tp.topic, tp.partition): each for tp, each in marks.items()}

    async def read_from(self, positions: Mapping[TopicPartition, int]) -> None:
        """See streams.ports.PartitionLog."""
        self._positions |= positions
        self._point()

    def stop_reading(self, topic_partitions: Collection[TopicPartition]) -> None:
        """See streams.ports.PartitionLog."""
        if self._positions.keys() & set(topic_partitions):
            self._positions = {each: at for each, at in self._positions.items() if each not in topic_partitions}
            if self._consumer is not None:
                self._point()

    def _point(self) -> None:
        """Makes the consumer read exactly these positions."""
        consumer = self._started()
        consumer.assign([_aiokafka(each) for each in self._positions])
        for topic_partition, position in self._positions.items():
            consumer.seek(_aiokafka(topic_partition), position)
        if self._positions:
            self._has_positions.set()
        else:
            self._has_positions.clear()

    async def _read(self) -> None:
        self._point()  # after a fault, what was taken from the fetcher and not delivered is fetched again
        while True:
            await self._has_positions.wait()
            try:
                fetched = await self._started().getmany(timeout_ms=_POLL_MS, max_records=DELIVERED_TOGETHER_MAX)
            except OffsetOutOfRangeError as error:
                for tp in error.args[0]:
                    self._leave(TopicPartition(tp.topic, tp.partition), self._on_out_of_range)
                continue
            except CorruptRecordException as error:
                # It does not say of which partition, and may have cost another one its records: each is read again.
                self._point()
                for topic_partition in list(self._positions):
                    self._on_unreadable(topic_partition, in_words(error))
                continue
            for tp, records in fetched.items():
                topic_partition = TopicPartition(tp.topic, tp.partition)
                first_offset = self._positions.get(topic_partition)
                if first_offset is not None and records[0].offset >= first_offset:
                    self._positions[topic_partition] = records[-1].offset + 1
                    self._deliver(_batch(topic_partition, first_offset, records))

    def _leave(self, topic_partition: TopicPartition, why: Callable[[TopicPartition], None]) -> None:
        self.stop_reading([topic_partition])
        why(topic_partition)

    def _started(self) -> aiokafka.AIOKafkaConsumer:
        assert self._consumer is not None, "start first"
        return self._consumer


async def read_watermarks(consumer: aiokafka.AIOKafkaConsumer, tps: Collection[Any]) -> dict[Any, Watermarks]:
    """The low and high watermarks at this moment. Raises KafkaError."""
    low, high = await asyncio.gather(consumer.beginning_offsets(tps), consumer.end_offsets(tps))
    return {tp: Watermarks(low[tp], high[tp]) for tp in tps}


def _aiokafka(topic_partition: TopicPartition) -> aiokafka.TopicPartition:
    return aiokafka.TopicPartition(*topic_partition)


def _batch(topic_partition: TopicPartition, first_offset: int, records: Sequence[Any]) -> RecordBatch:
    """From where the fetch began, so that batches of which none is lost touch one another."""
    values, keys = [record.value for record in records], [record.key for record in records]
    return RecordBatch(
        *topic_partition,
        first_offset,
        records[-1].offset + 1,
        values,
        keys,
        [record.offset for record in records],
        [record.timestamp for record in records],
        headers={index: headers_of(record) for index, record in enumerate(records) if record.headers},
        size_bytes=size_of(values, keys),
    )
