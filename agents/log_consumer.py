"""A consumer outside the group, on the caller's loop: reads what it is told to and delivers it.

The store worker reads with one for its standbys, of which the group knows nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from typing import Any

import aiokafka
from faust.types import TP

from agents.fetched_batches import ByteBudget, Fetches
from streams.adapters.kafka_watermarks import read_watermarks
from streams.batches import RecordBatch
from streams.ports import Watermarks
from streams.positions import TopicPartition
from streams.retry import Backoff, persisting

_POLL_SECONDS = 1.0
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
        budget: ByteBudget,
    ) -> None:
        self._options = dict(options)
        self._deliver = deliver
        self._on_out_of_range = on_out_of_range
        self._on_unreadable = on_unreadable
        self._budget = budget
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
        return await read_watermarks(self._started(), topic_partitions)

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
        fetches = Fetches(self._started(), self, budget=self._budget)
        while True:
            await self._has_positions.wait()
            for batches in (await fetches.next_batches(self._positions, _POLL_SECONDS)).values():
                for batch in batches:
                    if self._positions.get(batch.topic_partition) == batch.first_offset:
                        self._positions[batch.topic_partition] = batch.next_offset
                        self._deliver(batch)
            await asyncio.sleep(0)  # what is fetched already is given without waiting

    def report_out_of_range(self, tp: TP) -> None:
        """See agents.fetched_batches.FetchReports."""
        self.stop_reading([TopicPartition(*tp)])
        self._on_out_of_range(TopicPartition(*tp))

    def report_unreadable(self, tp: TP, why: str) -> None:
        """See agents.fetched_batches.FetchReports."""
        self._on_unreadable(TopicPartition(*tp), why)

    def _started(self) -> aiokafka.AIOKafkaConsumer:
        assert self._consumer is not None, "start first"
        return self._consumer


def _aiokafka(topic_partition: TopicPartition) -> aiokafka.TopicPartition:
    return aiokafka.TopicPartition(*topic_partition)
