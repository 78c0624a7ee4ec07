"""Hosts the deliveries of the topic partitions that the sink's consumer group assigned to this worker.

Every assignment makes new PartitionDelivery objects (invariant 5). Each finds its own position, in the background, and
is read from there; a position that the log no longer holds is a named, loud state, never a jump (D1). What breaks is
started anew and shows meanwhile why it broke. All methods run on the worker's event loop. Caller: agents/sink_app.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import AsyncExitStack
from functools import partial

from schemas.catalog import Catalog
from streams import telemetry
from streams.batches import RecordBatch
from streams.errors import LogGapError
from streams.finishing import all_ended
from streams.ports import PartitionLog, Watermarks
from streams.positions import TopicPartition
from streams.processes.delivery import Delivery, DeliveryState, PartitionDelivery
from streams.processes.log_reading import LogReading
from streams.retry import Backoff, in_words

logger = logging.getLogger(__name__)


class HostedDelivery:
    """One topic partition under one assignment.

    `_supervise`, the one task of the object, starts a delivery and waits for its end. One that breaks is let go and a
    new one starts from the BEFORE record, after a pause that grows until records are delivered. A log gap is final.
    """

    def __init__(self, open_delivery: Callable[[], PartitionDelivery], log: PartitionLog) -> None:
        self.delivery = open_delivery()
        #: Why nothing is delivered: of a log gap for good, of any other fault until the next try runs.
        self.failure: str | None = None
        #: Offsets from what was read to the high watermark, as of the newest batch.
        self.lag = 0
        self._open_delivery = open_delivery
        self._log = log
        self._reading = LogReading(log)
        self._is_leaving = False
        self._task = asyncio.create_task(self._supervise(), name=f"supervise {self.delivery}")

    @property
    def is_running(self) -> bool:
        """True while it delivers what arrives."""
        return self.state is DeliveryState.RUNNING and self._reading.is_active

    @property
    def state(self) -> DeliveryState:
        """The delivery's state, or FAILED as long as there is a failure."""
        return DeliveryState.FAILED if self.failure else self.delivery.state

    async def submit(self, batch: RecordBatch) -> None:
        """Hands over what of the batch continues the log; where records are missing, the log is read again. Never
        raises because of what is in the batch or how the delivery fares."""
        fresh = self._reading.accept(batch)
        if fresh is None:
            return
        self.lag = max(0, (fresh.high_watermark or fresh.next_offset) - fresh.next_offset)
        telemetry.SINK_LAG_RECORDS.labels(fresh.topic, fresh.partition).set(self.lag)
        delivery = self.delivery
        try:
            await delivery.submit(fresh)
        except LogGapError as gap:
            delivery.break_off(gap.with_traceback(None))

    def fail(self, failure: LogGapError) -> None:
        """Ends this delivery until an operator acts."""
        self.delivery.break_off(failure)

    def read_again(self, why: str) -> None:
        """What Kafka delivered cannot be read: asks for it again."""
        self._reading.read_again(self.delivery.topic_partition, why)

    async def stop(self) -> None:
        """Nothing is delivered afterwards; waits only for the insert in flight."""
        self._is_leaving = True
        self._task.cancel()
        await asyncio.wait({self._task})
        await self._let_go()

    async def _supervise(self) -> None:
        backoff = Backoff(first_seconds=1.0)
        topic_partition = self.delivery.topic_partition
        while True:
            try:
                try:
                    await self._deliver()
                finally:
                    await self._let_go()
            except LogGapError as gap:
                logger.critical("%s", gap)
                self.failure = in_words(gap)
                return
            except Exception as error:  # the boundary of supervision: no fault of one ends the worker (invariant 10)
                logger.exception("%s stopped", self.delivery)
                telemetry.DELIVERY_FAULTS.labels(*topic_partition).inc()
                self.failure = in_words(error)
            else:
                return  # STOPPED or FENCED: the assignment has ended
            if self._is_leaving:
                return
            if self.delivery.inserts:
                backoff.reset()
            await asyncio.sleep(backoff.next_delay_seconds())
            self.delivery = self._open_delivery()

    async def _deliver(self) -> None:
        """Until the assignment ends. Raises what ends it sooner."""
        topic_partition = self.delivery.topic_partition
        resume = await self.delivery.start()
        marks = (await self._log.watermarks([topic_partition]))[topic_partition]
        await self._reading.start({topic_partition: resume_position(topic_partition, resume, marks)})
        self.failure = None
        await self.delivery.wait_until_ended()

    async def _let_go(self) -> None:
        """Nothing is read or delivered afterwards. Idempotent. The steps run in the reverse of the order here, the
        second one also when the first failed."""
        async with AsyncExitStack() as steps:
            steps.push_async_callback(self.delivery.stop)
            steps.push_async_callback(self._reading.stop)


class SinkHost:
    """All deliveries of this worker. Implements agents.transport.PartitionOwner."""

    def __init__(self, delivery: Delivery, catalog: Catalog, log: PartitionLog) -> None:
        self._delivery = delivery
        self._catalog = catalog
        self._log = log
        self._hosted: dict[TopicPartition, HostedDelivery] = {}
        self._assigning = asyncio.Lock()

    def hosted(self) -> Mapping[TopicPartition, HostedDelivery]:
        """Every delivery of the current assignment, for status."""
        return self._hosted

    async def on_assigned(self, assigned: Collection[TopicPartition], generation: int) -> None:
        """Starts the deliveries in the background; each is read once it knows its position."""
        del generation
        async with self._assigning:
            await self._let_go(list(self._hosted))
            for topic_partition in sorted(assigned):
                table = self._catalog.by_topic[topic_partition.topic]
                open_delivery = partial(self._delivery.open, topic_partition, table)
                self._hosted[topic_partition] = HostedDelivery(open_delivery, self._log)

    async def revoke(self, topic_partitions: Collection[TopicPartition]) -> None:
        """Lets go; when it returns nothing more is recorded or inserted under the old assignment."""
        async with self._assigning:
            await self._let_go(topic_partitions)

    async def _let_go(self, topic_partitions: Collection[TopicPartition]) -> None:
        leaving = [self._hosted.pop(tp) for tp in topic_partitions if tp in self._hosted]
        await all_ended([hosted.stop() for hosted in leaving])

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

    def on_unreadable(self, topic_partition: TopicPartition, why: str) -> None:
        """What Kafka delivered is damaged: nothing of it is used, and it is read again."""
        hosted = self._hosted.get(topic_partition)
        if hosted is not None:
            hosted.read_again(why)


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
