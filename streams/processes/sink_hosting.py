"""Hosts the deliveries of the topic partitions that the sink's consumer group assigned to this worker.

Every assignment makes new PartitionDelivery objects (invariant 5). Each finds its own position, in the background, and
is read from there; a position that the log no longer holds is a named, loud state, never a jump (D1). All methods run
on the worker's event loop. Caller: agents/sink_app.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping
from contextlib import suppress

from schemas.catalog import Catalog
from streams import telemetry
from streams.batches import RecordBatch
from streams.errors import LogGapError, StaleEpochError
from streams.ports import PartitionLog, Watermarks
from streams.positions import TopicPartition
from streams.processes.delivery import Delivery, DeliveryState, PartitionDelivery

logger = logging.getLogger(__name__)


class HostedDelivery:
    """One topic partition under one assignment."""

    def __init__(self, delivery: PartitionDelivery, log: PartitionLog) -> None:
        self.delivery = delivery
        self.failure: LogGapError | None = None
        self._log = log
        self._expected: int | None = None
        self._task = asyncio.create_task(self._start(), name=f"start {delivery}")

    @property
    def is_running(self) -> bool:
        """True once it delivers what arrives."""
        return self.failure is None and self.delivery.state is DeliveryState.RUNNING and self._expected is not None

    async def submit(self, batch: RecordBatch) -> None:
        """Hands over a batch that continues where the last one ended; any other is left over from before a seek."""
        if self.failure is not None or self._expected != batch.first_offset:
            logger.debug("stale batch left out: %s", batch)
            return
        self._expected = batch.next_offset
        lag = max(0, (batch.high_watermark or batch.next_offset) - batch.next_offset)
        telemetry.SINK_LAG_RECORDS.labels(batch.topic, batch.partition).set(lag)
        try:
            await self.delivery.submit(batch)
        except LogGapError as gap:
            self.fail(gap)

    def fail(self, failure: LogGapError) -> None:
        """Ends this delivery until an operator acts."""
        logger.critical("%s", failure)
        self.failure = failure
        self._log.stop_reading([self.delivery.topic_partition])

    async def stop(self) -> None:
        """Nothing is delivered afterwards; waits only for the insert in flight."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        await self.delivery.stop()

    async def _start(self) -> None:
        topic_partition = self.delivery.topic_partition
        try:
            resume = await self.delivery.start()
            marks = (await self._log.watermarks([topic_partition]))[topic_partition]
            self._expected = resume_position(topic_partition, resume, marks)
        except LogGapError as gap:
            self.fail(gap)
        except StaleEpochError:
            logger.debug("%s: the assignment ended before it started", self.delivery)
        else:
            await self._log.read_from({topic_partition: self._expected})


class SinkHost:
    """All deliveries of this worker. Implements agents.transport.PartitionOwner."""

    def __init__(self, delivery: Delivery, catalog: Catalog, log: PartitionLog) -> None:
        self._delivery = delivery
        self._catalog = catalog
        self._log = log
        self._hosted: dict[TopicPartition, HostedDelivery] = {}

    def hosted(self) -> Mapping[TopicPartition, HostedDelivery]:
        """Every delivery of the current assignment, for status."""
        return self._hosted

    async def on_assigned(self, assigned: Collection[TopicPartition], generation: int) -> Mapping[TopicPartition, int]:
        """Starts the deliveries in the background; each is read once it knows its position."""
        del generation
        await self.revoke(list(self._hosted))
        for topic_partition in sorted(assigned):
            delivery = self._delivery.open(topic_partition, self._catalog.by_topic[topic_partition.topic])
            self._hosted[topic_partition] = HostedDelivery(delivery, self._log)
        return {}

    async def revoke(self, topic_partitions: Collection[TopicPartition]) -> None:
        """Lets go; when it returns nothing more is recorded or inserted under the old assignment."""
        leaving = [self._hosted.pop(tp) for tp in topic_partitions if tp in self._hosted]
        await asyncio.gather(*[hosted.stop() for hosted in leaving])

    async def submit(self, batch: RecordBatch) -> None:
        """Hands a fetched batch to its delivery."""
        hosted = self._hosted.get(batch.topic_partition)
        if hosted is not None:
            await hosted.submit(batch)

    def committable(self) -> Mapping[TopicPartition, int]:
        """Nothing: the group's committed position IS the BEFORE record, and only deliveries write it."""
        return {}

    def on_out_of_range(self, topic_partition: TopicPartition) -> None:
        """The log lost the position that was being read: never skip, fail loudly (D1)."""
        hosted = self._hosted.get(topic_partition)
        if hosted is not None:
            hosted.fail(_log_gap(topic_partition, "Kafka answered that the position being read is out of range"))


def resume_position(topic_partition: TopicPartition, resume: int | None, log: Watermarks) -> int:
    """Where to read on; the log's start when nothing was ever delivered. Raises LogGapError."""
    if resume is None:
        return log.low
    if resume < log.low:
        raise _log_gap(topic_partition, f"ClickHouse continues at {resume}, but the log starts at {log.low}")
    if resume > log.high:
        raise _log_gap(topic_partition, f"ClickHouse continues at {resume}, but the log ends at {log.high}")
    return resume


def _log_gap(topic_partition: TopicPartition, why: str) -> LogGapError:
    return LogGapError(
        f"log gap in {topic_partition}: {why}",
        hint="records would be missing in ClickHouse, so this delivery stopped: restore the topic, or, to go on "
        "without them, reset the sink's consumer group for this partition",
    )
