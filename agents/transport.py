"""Faust transport driver: one fetched partition batch is one Faust event (D3).

Faust keeps its job (group membership, assignment, flow control, agents); this driver replaces how records are read and
where reading starts:
    - a fetch of one partition becomes one RecordBatch, without a Python object per record left behind
    - positions come from the partition's owner, never from committed offsets
    - commits tell monitoring how far the owner is, and nothing else
    - the broker gathers what trickles in (fetch.min.bytes), except after a pause
    - bytes fetched but not yet durable are bounded by a ByteBudget

Topics are declared with `acks=False`, so Faust's own per-offset bookkeeping stays out of the way.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Mapping
from typing import Any, Protocol

import aiokafka
import faust
from aiokafka.consumer.fetcher import Fetcher, FetchError, FetchResult
from aiokafka.errors import (
    CommitFailedError,
    ConsumerStoppedError,
    IllegalStateError,
    KafkaError,
    OffsetOutOfRangeError,
)
from aiokafka.structs import OffsetAndMetadata
from faust.transport import drivers
from faust.transport.drivers import aiokafka as faust_aiokafka
from faust.transport.drivers.aiokafka import ensure_aiokafka_TP
from faust.types import TP, ConsumerMessage
from mode import Service

from agents.fetched_batches import ByteBudget, drain
from agents.group_watch import CHECK_SECONDS, GroupWatch
from agents.log_consumer import read_watermarks
from streams.adapters.kafka_topic_ids import read_topic_ids
from streams.batches import RecordBatch
from streams.errors import SinkFencedError, SinkUnavailableError
from streams.limits import GATHERED_BYTES
from streams.ports import Watermarks
from streams.positions import TopicPartition
from streams.retry import in_words

logger = logging.getLogger(__name__)

SCHEME = "pintail"
#: How long the broker gathers for a fetch that follows another one, unless GATHERED_BYTES are there. It is most of what
#: a steady trickle waits to become visible: a transaction costs milliseconds however small it is, so a trickle must not
#: make one of every record.
FETCH_WAIT_MS_MAX = 40
#: When nothing was fetched for so many times as long, the next fetch brings the first record that comes.
PAUSE_WAITS = 2


class PartitionOwner(Protocol):
    """The process that owns the state behind the assigned partitions."""

    async def on_assigned(self, assigned: Collection[TopicPartition], generation: int) -> None:
        """Each partition is silent until the owner calls `read_from` for it, which it may do before this returns."""
        ...

    def committable(self) -> Mapping[TopicPartition, int]:
        """Positions to commit for monitoring; partitions left out are not committed."""
        ...

    def on_out_of_range(self, topic_partition: TopicPartition) -> None:
        """The log no longer holds (or never held) the position that was read from."""
        ...

    def on_unreadable(self, topic_partition: TopicPartition, why: str) -> None:
        """What was fetched is damaged and was dropped. It is fetched again at once, until the owner says otherwise."""
        ...


class BatchSchema(faust.Schema):  # type: ignore[misc]
    """Hands the RecordBatch to the agent as it is."""

    def compile(self, app: Any, **_: Any) -> Any:
        """The decoder Faust calls for each message."""

        async def decode(message: Any, *, propagate: bool = False) -> Any:
            del propagate
            return app.create_event(None, message.value, None, message)

        return decode


class BatchConsumerThread(faust_aiokafka.AIOKafkaConsumerThread):  # type: ignore[misc]
    """Runs the aiokafka consumer on a thread of its own."""

    #: How long the broker gathers for this consumer.
    fetch_wait_ms = FETCH_WAIT_MS_MAX

    def _create_worker_consumer(self, transport: Any) -> aiokafka.AIOKafkaConsumer:
        del transport
        self.fetch_wait_ms = self.app.consumer_options["fetch_max_wait_ms"]
        return aiokafka.AIOKafkaConsumer(**self.app.consumer_options)

    @Service.task  # type: ignore[untyped-decorator]
    async def _watch_group(self) -> None:
        """Ends the worker when its consumer has silently dropped out of the group."""
        watch: GroupWatch | None = None
        async for _ in self.itertimer(CHECK_SECONDS, name="group"):
            consumer = self._consumer
            if consumer is not None and not consumer._closed and consumer._coordinator is not None:
                watch = watch or GroupWatch(consumer._coordinator)
                watch.check()

    async def _fetch_records(
        self, consumer: Any, active_partitions: Any, timeout: float | None = None, max_records: int | None = None
    ) -> dict[TP, list[RecordBatch]]:
        del max_records
        if not self.consumer.flow_active:
            return {}
        fetcher = consumer._fetcher
        if consumer._closed or fetcher._closed:
            raise ConsumerStoppedError
        with fetcher._subscriptions.fetch_context():
            return await self._next_batches(fetcher, active_partitions, timeout or 0.0)

    async def _next_batches(self, fetcher: Fetcher, active: Any, timeout: float) -> dict[TP, list[RecordBatch]]:
        """What is fetched, at once if there is something. After that the broker gathers for the next fetch; after a
        pause it does not, so that a record that comes alone does not wait for company."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while True:
            if fetcher._subscriptions.reassignment_in_progress:
                await fetcher._subscriptions.wait_for_assignment()
            batches, is_holding_back = self._drain_fetched(fetcher, active)
            if batches:
                fetcher._fetch_min_bytes = GATHERED_BYTES
                return batches
            remaining = deadline - loop.time()
            if remaining <= 0:
                return {}
            waiting = [asyncio.ensure_future(fetcher._create_fetch_waiter())]
            if is_holding_back:
                waiting.append(asyncio.ensure_future(self.consumer.budget.wait_for_room()))
            pause = min(remaining, PAUSE_WAITS * self.fetch_wait_ms / 1000)
            done, pending = await asyncio.wait(waiting, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            for task in pending:
                task.cancel()
            if fetcher._closed:
                return {}
            if not done:
                fetcher._fetch_min_bytes = 1
            for task in done:
                task.result()

    def _drain_fetched(self, fetcher: Fetcher, active: Any) -> tuple[dict[TP, list[RecordBatch]], bool]:
        """What is fetched for active partitions and within the budget; True if the budget holds something back."""
        budget: ByteBudget = self.consumer.budget
        batches: dict[TP, list[RecordBatch]] = {}
        is_holding_back = False
        for topic_partition, result in list(fetcher._records.items()):
            tp = TP(topic_partition.topic, topic_partition.partition)
            if tp not in active:
                if not fetcher._subscriptions.is_assigned(topic_partition):
                    del fetcher._records[topic_partition]
                continue
            if not budget.admits(tp, partitions=len(active)):
                is_holding_back = True
                continue
            if isinstance(result, FetchError):
                self._report(tp, result)
            elif result.check_assignment(topic_partition) and result.has_more():
                batch = self._drain_one(result, tp)
                if batch is not None:
                    budget.take(tp, batch)
                    batches[tp] = [batch]
            if isinstance(result, FetchError) or not result.has_more():
                del fetcher._records[topic_partition]
                fetcher._notify(fetcher._wait_consume_future)
        return batches, is_holding_back

    def _drain_one(self, result: FetchResult, tp: TP) -> RecordBatch | None:
        """The next batch of this fetch; None if it brings none, or cannot be read. Then nothing of what is left of it
        is used, and the position stays where it is."""
        try:
            return drain(result, tp, self._consumer._coordinator.generation)
        except Exception as error:  # noqa: BLE001  # the boundary of one partition: the others' batches are drained
            result._partition_records = None
            self.consumer.report_unreadable(tp, in_words(error))
            return None

    def _report(self, tp: TP, failure: FetchError) -> None:
        try:
            failure.check_raise()
        except OffsetOutOfRangeError:
            self.consumer.report_out_of_range(tp)
        except KafkaError as error:
            logger.error("fetching %s: %r; trying again", tp, error)

    async def leave_alone(self, topic_partitions: Collection[TopicPartition]) -> None:
        """Fetches nothing of these under this assignment: fetched records that nobody takes hold up the others'."""
        await self.call_thread(self._leave_alone, topic_partitions)

    async def _leave_alone(self, topic_partitions: Collection[TopicPartition]) -> None:
        consumer = self._ensure_consumer()
        consumer.pause(*({ensure_aiokafka_TP(tp) for tp in topic_partitions} & consumer.assignment()))

    async def commit_for_monitoring(self, positions: Mapping[TP, int]) -> bool:
        """Commits what it can; a failure costs a lag reading and nothing else. Faust commits also after a crash of this
        thread, which would never answer."""
        if self.crashed:
            return False
        return await self.call_thread(self._commit_quietly, positions)  # type: ignore[no-any-return]

    async def _commit_quietly(self, positions: Mapping[TP, int]) -> bool:
        consumer = self._ensure_consumer()
        assigned = consumer.assignment()
        offsets = {
            ensure_aiokafka_TP(tp): OffsetAndMetadata(offset, "") for tp, offset in positions.items() if tp in assigned
        }
        try:
            if offsets:
                await consumer.commit(offsets)
        except (KafkaError, IllegalStateError) as error:
            logger.info("positions not committed (only monitoring sees them): %r", error)
            return False
        return bool(offsets)

    async def commit_record(self, tp: TP, offset: int, metadata: str) -> None:
        """Commits one position with metadata, fenced by the group's generation.

        Raises SinkFencedError when another member owns the partition, SinkUnavailableError when Kafka is away."""
        await self.call_thread(self._commit_record, tp, offset, metadata)

    async def _commit_record(self, tp: TP, offset: int, metadata: str) -> None:
        try:
            await self._ensure_consumer().commit({ensure_aiokafka_TP(tp): OffsetAndMetadata(offset, metadata)})
        except (CommitFailedError, IllegalStateError) as error:
            raise SinkFencedError(f"{tp} now belongs to another member: {error}") from error
        except KafkaError as error:
            raise SinkUnavailableError(
                f"the position of {tp} could not be committed: {error!r}", hint="check the Kafka brokers"
            ) from error

    async def committed_record(self, tp: TP) -> tuple[int, str] | None:
        """The committed position and its metadata; None if there is none."""
        read = self._ensure_consumer()._coordinator.fetch_committed_offsets
        record = (await self.call_thread(read, [ensure_aiokafka_TP(tp)])).get(tp)
        return None if record is None or record.offset < 0 else (record.offset, record.metadata)

    async def read_watermarks(self, tps: Collection[TP]) -> dict[TP, Watermarks]:
        """Low and high watermark of each partition, and the id of its topic."""
        return await self.call_thread(self._read_watermarks, list(tps))  # type: ignore[no-any-return]

    async def _read_watermarks(self, tps: list[TP]) -> dict[TP, Watermarks]:
        consumer = self._ensure_consumer()
        # The ids first: a topic that is created anew in between shows by its offsets, or the next time.
        topic_ids = await read_topic_ids(consumer._client, {tp.topic for tp in tps})
        marks = await read_watermarks(consumer, tps)
        return {tp: each._replace(topic_id=topic_ids.get(tp.topic)) for tp, each in marks.items()}


class BatchConsumer(faust_aiokafka.Consumer):  # type: ignore[misc]
    """Faust's consumer for RecordBatches. Implements streams.ports.PartitionLog for the owner of the partitions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.budget = ByteBudget(self.app.buffer_bytes_max)

    @property
    def owner(self) -> PartitionOwner:
        """The process that owns the partitions' state."""
        return self.app.owner  # type: ignore[no-any-return]

    def _new_consumer_thread(self) -> BatchConsumerThread:
        return BatchConsumerThread(self, loop=self.loop, beacon=self.beacon)

    def _to_message(self, tp: TP, record: RecordBatch) -> ConsumerMessage:
        """One message a batch; its offset is the last one the batch accounts for."""
        return ConsumerMessage(
            record.topic,
            record.partition,
            record.next_offset - 1,
            None,
            0,
            None,
            None,
            record,
            None,
            0,
            0,
            tp,
            generation_id=record.generation,
        )

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, ConsumerMessage]]:
        """Faust's fetch loop, without its seek back to committed offsets while the flow is stopped: `perform_seek`
        always runs before the flow resumes, so what was fetched meanwhile is read again."""
        batches, _active = await self._wait_next_records(timeout)
        if not batches or self.should_stop:
            return
        for tp, batch in self.scheduler.iterate(batches):
            if not self.flow_active or self.app.consumer_generation_id != batch.generation:
                break
            yield tp, self._to_message(tp, batch)

    async def perform_seek(self) -> None:
        """Silences every partition, then lets the owner begin: whatever it starts to read from then on is read."""
        assigned = {TopicPartition(*tp) for tp in self.assignment()}
        self.stop_reading(assigned)
        await self._thread.leave_alone([tp for tp in assigned if tp.topic in self.app.assigned_only])
        await self.owner.on_assigned(assigned, self.app.consumer_generation_id)

    async def read_from(self, positions: Mapping[TopicPartition, int]) -> None:
        """See streams.ports.PartitionLog."""
        tps = {TP(*topic_partition): offset for topic_partition, offset in positions.items()}
        current = self.assignment()
        tps = {tp: offset for tp, offset in tps.items() if tp in current}
        if tps:
            await self.seek_wait(tps)
            self.resume_partitions(set(tps))

    def stop_reading(self, topic_partitions: Collection[TopicPartition]) -> None:
        """See streams.ports.PartitionLog."""
        self.pause_partitions({TP(*topic_partition) for topic_partition in topic_partitions})

    async def watermarks(self, topic_partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, Watermarks]:
        """See streams.ports.PartitionLog."""
        read = await self._thread.read_watermarks([TP(*topic_partition) for topic_partition in topic_partitions])
        return {TopicPartition(*tp): watermarks for tp, watermarks in read.items()}

    async def commit_record(self, topic_partition: TopicPartition, offset: int, metadata: str) -> None:
        """See BatchConsumerThread.commit_record."""
        await self._thread.commit_record(TP(*topic_partition), offset, metadata)

    async def committed_record(self, topic_partition: TopicPartition) -> tuple[int, str] | None:
        """See BatchConsumerThread.committed_record."""
        return await self._thread.committed_record(TP(*topic_partition))  # type: ignore[no-any-return]

    def report_out_of_range(self, tp: TP) -> None:
        """Called on the consumer's thread; tells the owner on its own loop."""
        self.loop.call_soon_threadsafe(self.owner.on_out_of_range, TopicPartition(*tp))

    def report_unreadable(self, tp: TP, why: str) -> None:
        """Called on the consumer's thread; tells the owner on its own loop."""
        self.loop.call_soon_threadsafe(self.owner.on_unreadable, TopicPartition(*tp), why)

    async def commit(self, topics: Any = None, start_new_transaction: bool = True) -> bool:
        """Commits the owner's positions, for monitoring only."""
        del topics, start_new_transaction
        positions = {TP(*topic_partition): offset for topic_partition, offset in self.owner.committable().items()}
        return await self._thread.commit_for_monitoring(positions)  # type: ignore[no-any-return]

    async def verify_all_partitions_active(self) -> None:
        """Faust's livelock detector measures acknowledgements, which this driver does not use."""


class Transport(faust_aiokafka.Transport):  # type: ignore[misc]
    """Faust's transport with the batch consumer; `pintail://host:port`."""

    Consumer = BatchConsumer
    driver_version = f"pintail/{faust_aiokafka.Transport.driver_version}"


drivers.TRANSPORTS.aliases[SCHEME] = "agents.transport:Transport"
