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

import logging
import os
from collections.abc import AsyncIterator, Collection, Mapping
from typing import Any, Protocol

import aiokafka
import faust
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError
from aiokafka.structs import OffsetAndMetadata
from faust.transport import drivers
from faust.transport.drivers import aiokafka as faust_aiokafka
from faust.transport.drivers.aiokafka import ensure_aiokafka_TP
from faust.types import TP, ConsumerMessage
from mode import Service

from agents.fetched_batches import ByteBudget, Fetches
from agents.group_watch import CHECK_SECONDS, GroupWatch, end_for_sure
from agents.worker_name import note_fenced
from streams.adapters.kafka_watermarks import read_watermarks
from streams.batches import RecordBatch
from streams.errors import GroupSilentError, SinkError, SinkFencedError, SinkUnavailableError, WorkerNameTakenError
from streams.ports import Watermarks
from streams.positions import TopicPartition

logger = logging.getLogger(__name__)

SCHEME = "pintail"


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

    _fetches: Fetches | None = None

    def _create_worker_consumer(self, transport: Any) -> aiokafka.AIOKafkaConsumer:
        del transport
        return aiokafka.AIOKafkaConsumer(**self.app.consumer_options)

    @Service.task  # type: ignore[untyped-decorator]
    async def _watch_group(self) -> None:
        """Ends the worker when its consumer has silently dropped out of the group."""
        watch: GroupWatch | None = None
        async for _ in self.itertimer(CHECK_SECONDS, name="group"):
            consumer = self._consumer
            if consumer is not None and not consumer._closed and consumer._coordinator is not None:
                watch = watch or GroupWatch(consumer._coordinator, self.app.membership.confirm)
                try:
                    watch.check()
                except GroupSilentError:
                    end_for_sure()
                    raise
                except WorkerNameTakenError as error:
                    note_fenced(self.app.settings, consumer._group_id)
                    logger.critical("the worker ends at once: %s", error)
                    os._exit(1)  # in order it would go on for a while with what another process does now

    async def _fetch_records(
        self, consumer: Any, active_partitions: Any, timeout: float | None = None, max_records: int | None = None
    ) -> dict[TP, list[RecordBatch]]:
        del max_records
        if not self.consumer.flow_active:
            return {}
        if self._fetches is None:
            self._fetches = Fetches(consumer, self.consumer, budget=self.consumer.budget)
        return await self._fetches.next_batches(active_partitions, timeout or 0.0)

    def join_again(self) -> None:
        """Asks the group to assign anew."""
        self.thread_loop.call_soon_threadsafe(self._ensure_consumer()._coordinator.request_rejoin)

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
        if _is_joining(consumer):
            return False
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

    async def commit_records(self, records: Mapping[TP, tuple[int, str]]) -> Mapping[TP, SinkError]:
        """Commits positions with metadata in one request, fenced by the group's generation. Returns why some failed:
        SinkFencedError when another member owns the partition, SinkUnavailableError when Kafka is away."""
        return await self.call_thread(self._commit_records, records)  # type: ignore[no-any-return]

    async def _commit_records(self, records: Mapping[TP, tuple[int, str]]) -> Mapping[TP, SinkError]:
        consumer = self._ensure_consumer()
        if _is_joining(consumer):
            return {tp: SinkFencedError(f"{tp} is being assigned anew") for tp in records}
        assigned = consumer.assignment()
        failures: dict[TP, SinkError] = {
            tp: SinkFencedError(f"{tp} now belongs to another member") for tp in records if tp not in assigned
        }
        owned = {tp: record for tp, record in records.items() if tp not in failures}
        try:
            if owned:
                await consumer.commit({ensure_aiokafka_TP(tp): OffsetAndMetadata(*at) for tp, at in owned.items()})
        except (CommitFailedError, IllegalStateError) as error:
            failures |= {tp: SinkFencedError(f"{tp} now belongs to another member: {error}") for tp in owned}
        except KafkaError as error:
            if len(owned) > 1:  # it may be about the topic of one of them
                for tp, record in owned.items():
                    failures |= await self._commit_records({tp: record})
                return failures
            why = f"could not be committed: {error!r}"
            failures |= {
                tp: SinkUnavailableError(f"the position of {tp} {why}", hint="check the Kafka brokers") for tp in owned
            }
        return failures

    async def committed_record(self, tp: TP) -> tuple[int, str] | None:
        """The committed position and its metadata; None if there is none."""
        read = self._ensure_consumer()._coordinator.fetch_committed_offsets
        record = (await self.call_thread(read, [ensure_aiokafka_TP(tp)])).get(tp)
        return None if record is None or record.offset < 0 else (record.offset, record.metadata)

    async def read_watermarks(
        self, topic_partitions: Collection[TopicPartition]
    ) -> Mapping[TopicPartition, Watermarks]:
        """Low and high watermark of each partition, and the id of its topic."""
        return await self.call_thread(self._read_watermarks, topic_partitions)  # type: ignore[no-any-return]

    async def _read_watermarks(
        self, topic_partitions: Collection[TopicPartition]
    ) -> Mapping[TopicPartition, Watermarks]:
        return await read_watermarks(self._ensure_consumer(), topic_partitions)


def _is_joining(consumer: aiokafka.AIOKafkaConsumer) -> bool:
    """True from the end of a revoke until the group has assigned anew. A commit would reach the broker behind the
    request to join, on the same connection and under a generation that has passed by then; aiokafka answers that by
    joining once more, which starts every partition of every worker anew."""
    return bool(consumer._coordinator._performed_join_prepare)


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

    async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
        """Faust seeks only where there is something to seek; the owner hears of an assignment of nothing as well."""
        await super().on_partitions_assigned(assigned, generation_id)
        if not assigned:
            await self.owner.on_assigned(set(), generation_id)

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
        return await self._thread.read_watermarks(topic_partitions)  # type: ignore[no-any-return]

    async def commit_records(
        self, records: Mapping[TopicPartition, tuple[int, str]]
    ) -> Mapping[TopicPartition, SinkError]:
        """See BatchConsumerThread.commit_records."""
        failures = await self._thread.commit_records({TP(*each): record for each, record in records.items()})
        return {TopicPartition(*tp): failure for tp, failure in failures.items()}

    async def committed_record(self, topic_partition: TopicPartition) -> tuple[int, str] | None:
        """See BatchConsumerThread.committed_record."""
        return await self._thread.committed_record(TP(*topic_partition))  # type: ignore[no-any-return]

    def join_again(self) -> None:
        """Asks the group to assign anew."""
        self._thread.join_again()

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
