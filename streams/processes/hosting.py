"""Hosts the partitions that the consumer group assigned to this worker: recover, replay, serve, let go.

    RECOVERING  the ladder of processes/recovery.py finds a store (D7)
    REPLAYING   the log is read from the store's next_offset up to the high watermark captured at the start
    SERVING     queries are answered (invariant 3)
    FAILED      a named fault that only an operator can end (LogGapError); nothing is applied or answered

Every assignment makes a new HostedPartition, so late results of an old one find nobody (invariant 5). All methods run
on the worker's event loop. Callers: agents/store_app.py (assignment, batches), processes/answering.py (ServingState).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

from schemas.catalog import Catalog
from streams import telemetry
from streams.adapters.duckdb_store import DuckDBStore, PartitionStore
from streams.batches import RecordBatch
from streams.errors import LogGapError, SchemaRegistryError, SnapshotError, StaleEpochError
from streams.ports import DeadLetters, Decoder, PartitionLog, Watermarks
from streams.positions import TopicPartition
from streams.processes.ingestion import PartitionIngestion
from streams.processes.recovery import Recovered, Recovery
from streams.processes.snapshotting import SnapshotInfo, Snapshotter
from streams.retry import Backoff

logger = logging.getLogger(__name__)


class PartitionState(StrEnum):
    """Where a hosted partition is on its way to answering."""

    RECOVERING = "recovering"
    REPLAYING = "replaying"
    SERVING = "serving"
    FAILED = "failed"


@dataclass(frozen=True)
class HostingParts:
    """What every hosted partition works with."""

    catalog: Catalog
    store: DuckDBStore
    recovery: Recovery
    snapshotter: Snapshotter | None
    decoder: Decoder
    dead_letters: DeadLetters


class HostedPartition:
    """One partition under one assignment.

    States: see the module. Every transition happens in `_supervise`, the one task of the object.
    """

    def __init__(self, partition: int, host: PartitionHost, parts: HostingParts, log: PartitionLog) -> None:
        self.partition = partition
        self.state = PartitionState.RECOVERING
        self.failure: LogGapError | None = None
        self.epoch = 0
        #: How the newest recovery went; None until the first one is done.
        self.recovered: Recovered | None = None
        self.store: PartitionStore | None = None
        #: topic -> next_offset, as of the newest transaction.
        self.positions: dict[str, int] = {}
        #: The newest snapshot published under this assignment.
        self.snapshot: SnapshotInfo | None = None
        self._host = host
        self._parts = parts
        self._log = log
        self._ingestion: PartitionIngestion | None = None
        self._capture: asyncio.Task[SnapshotInfo | None] | None = None
        self._expected: dict[str, int] = {}
        self._targets: dict[str, int] = {}
        self._high_watermarks: dict[str, int] = {}
        self._moved = asyncio.Condition()
        self._task = asyncio.create_task(self._supervise(), name=f"partition-{partition}")

    @property
    def topic_partitions(self) -> list[TopicPartition]:
        """This partition of every table topic that has it."""
        tables = self._parts.catalog.tables
        return [TopicPartition(table.topic, self.partition) for table in tables if self.partition < table.partitions]

    @property
    def obstacle(self) -> SchemaRegistryError | None:
        """What this partition waits for before it can decode what comes next; it goes on by itself."""
        return self._ingestion.obstacle if self._ingestion is not None else None

    def submit(self, batch: RecordBatch) -> None:
        """Queues a batch that continues where the last one ended; any other is left over from before a seek."""
        if self._ingestion is None or self._expected.get(batch.topic) != batch.first_offset:
            logger.debug("stale batch left out: %s", batch)
            return
        self._expected[batch.topic] = batch.next_offset
        self._high_watermarks[batch.topic] = batch.high_watermark or batch.next_offset
        self._ingestion.submit(batch)

    def fail(self, failure: LogGapError) -> None:
        """Ends this partition until an operator acts. Loud: it stays in the log, the metrics and the status."""
        if self._ingestion is not None:
            self._ingestion.break_off(failure)

    async def wait_until_applied(self, topic: str, offset: int) -> None:
        """Returns once the record at `offset` is applied. Raises StaleEpochError when the partition is let go."""
        async with self._moved:
            await self._moved.wait_for(lambda: self._task.done() or self.positions.get(topic, 0) > offset)
        if self.positions.get(topic, 0) <= offset:
            raise StaleEpochError(f"partition {self.partition} left this worker", hint="ask again")

    async def take_snapshot(self) -> None:
        """Publishes a snapshot if the partition serves and moved; a failure is counted and costs freshness only."""
        snapshotter = self._parts.snapshotter
        if snapshotter is None or self.store is None or self.state is not PartitionState.SERVING:
            return
        # In a task of its own, so that letting the partition go need not wait for a long capture.
        self._capture = asyncio.create_task(snapshotter.take(self.store, self.epoch))
        with telemetry.SNAPSHOT_SECONDS.time():
            await asyncio.wait({self._capture})
        if self._capture.cancelled():
            return
        try:
            info = self._capture.result()
        except (SnapshotError, StaleEpochError) as error:
            telemetry.SNAPSHOT_FAILURES.labels(self.partition).inc()
            logger.warning("snapshot of partition %d not taken: %s", self.partition, error)
        else:
            if info is not None:
                self.snapshot = info
                telemetry.SNAPSHOT_BYTES.labels(self.partition).inc(info.bytes_sent)

    async def stop(self) -> None:
        """Lets go: nothing is applied or answered afterwards; waits only for the transaction in flight."""
        if self._capture is not None:
            self._capture.cancel()
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        await self._release()

    async def _supervise(self) -> None:
        """Recovers and ingests; whatever breaks that short of a log gap is tried again from recovery on."""
        backoff = Backoff(first_seconds=1.0)
        while True:
            try:
                await self._recover_and_ingest(backoff)
            except LogGapError as gap:
                logger.critical("partition %d: %s", self.partition, gap)
                self.failure = gap
                await self._release()
                await self._enter(PartitionState.FAILED)
                return
            except Exception:  # the boundary of supervision: no fault of one partition ends the worker (invariant 10)
                logger.exception("partition %d stopped", self.partition)
            await self._release()
            await asyncio.sleep(backoff.next_delay_seconds())

    async def _recover_and_ingest(self, backoff: Backoff) -> None:
        await self._enter(PartitionState.RECOVERING)
        recovered = await self._parts.recovery.recover(self.partition)
        self.recovered, self.store, self.epoch = recovered, recovered.store, recovered.epoch
        telemetry.RECOVERY_SECONDS.labels(self.partition, recovered.rung).set(recovered.seconds)
        marks = await self._log.watermarks(self.topic_partitions)
        self.positions = {tp.topic: start_position(tp, self.store, marks[tp]) for tp in self.topic_partitions}
        self._targets = {tp.topic: marks[tp].high for tp in self.topic_partitions}
        self._expected = dict(self.positions)
        self._ingestion = PartitionIngestion(
            self.store,
            tables=self._parts.catalog.by_topic,
            decoder=self._parts.decoder,
            dead_letters=self._parts.dead_letters,
            announce=self._announce,
        )
        await self._enter(PartitionState.REPLAYING)
        await self._log.read_from({tp: self.positions[tp.topic] for tp in self.topic_partitions})
        await self._announce({})
        backoff.reset()
        await self._ingestion.run()

    async def _announce(self, positions: Mapping[str, int]) -> None:
        async with self._moved:
            self.positions.update(positions)
            self._moved.notify_all()
        for topic in positions:
            lag = max(0, self._high_watermarks.get(topic, 0) - self.positions[topic])
            telemetry.LAG_RECORDS.labels(topic, self.partition).set(lag)
        caught_up = all(self.positions[topic] >= target for topic, target in self._targets.items())
        if self.state is PartitionState.REPLAYING and caught_up:
            await self._enter(PartitionState.SERVING)

    async def _enter(self, state: PartitionState) -> None:
        self.state = state
        for each in PartitionState:
            telemetry.PARTITION_STATE.labels(self.partition, each).set(each is state)
        logger.info("partition %d is %s at %s", self.partition, state, self.positions)
        if state in (PartitionState.SERVING, PartitionState.FAILED):
            await self._host.publish_scopes()

    async def _release(self) -> None:
        """Gives up the store; waits for the transaction in flight."""
        self._ingestion = None
        self._log.stop_reading(self.topic_partitions)
        if self.state is PartitionState.SERVING:
            self.state = PartitionState.RECOVERING
            await self._host.publish_scopes()
        await self._host.before_closing([self.partition])
        self.store = None
        async with self._moved:
            self._moved.notify_all()
        await asyncio.to_thread(self._parts.store.close_partition, self.partition)


class PartitionHost:
    """All partitions of this worker. Implements agents.transport.PartitionOwner and streams.ports.ServingState."""

    def __init__(self, parts: HostingParts, log: PartitionLog) -> None:
        self._parts = parts
        self._log = log
        self._hosted: dict[int, HostedPartition] = {}
        self._scopes = asyncio.Lock()
        #: Ends what still reads partitions that no longer serve, so that their files can be closed.
        self.before_closing: Callable[[Collection[int]], Awaitable[None]] = _nothing_reads

    @property
    def partitions_total(self) -> int:
        """See streams.ports.ServingState."""
        return max((table.partitions for table in self._parts.catalog.tables), default=1)

    def serving(self) -> dict[int, int]:
        """See streams.ports.ServingState."""
        return {p: hosted.epoch for p, hosted in self._hosted.items() if hosted.state is PartitionState.SERVING}

    def hosted(self) -> Mapping[int, HostedPartition]:
        """Every partition of the current assignment, for status and metrics."""
        return self._hosted

    async def assign(self, partitions: Collection[int]) -> None:
        """A new assignment: starts afresh with these, in the background."""
        await self.revoke(list(self._hosted))
        for partition in sorted(partitions):
            self._hosted[partition] = HostedPartition(partition, self, self._parts, self._log)

    async def revoke(self, partitions: Collection[int]) -> None:
        """Lets go of these; when it returns their files are closed and unlocked (invariant 5)."""
        leaving = [self._hosted.pop(partition) for partition in partitions if partition in self._hosted]
        await asyncio.gather(*[hosted.stop() for hosted in leaving])

    def submit(self, batch: RecordBatch) -> None:
        """Hands a fetched batch to its partition."""
        hosted = self._hosted.get(batch.partition)
        if hosted is not None:
            hosted.submit(batch)

    def committable(self) -> dict[TopicPartition, int]:
        """Durable positions of every hosted partition."""
        return {
            TopicPartition(topic, partition): position
            for partition, hosted in self._hosted.items()
            for topic, position in hosted.positions.items()
        }

    def on_out_of_range(self, topic_partition: TopicPartition) -> None:
        """The log lost the position that was being read: never skip, fail loudly (D1)."""
        hosted = self._hosted.get(topic_partition.partition)
        if hosted is not None:
            position = hosted.positions.get(topic_partition.topic, 0)
            hosted.fail(log_gap(topic_partition, position, "Kafka answered that it is out of range"))

    async def wait_until_applied(self, partition: int, topic: str, offset: int) -> None:
        """See streams.ports.ServingState."""
        hosted = self._hosted.get(partition)
        if hosted is None:
            raise StaleEpochError(f"partition {partition} is not on this worker", hint="ask again")
        await hosted.wait_until_applied(topic, offset)

    async def publish_scopes(self) -> None:
        """Makes exactly the SERVING partitions visible to queries."""
        async with self._scopes:
            await asyncio.to_thread(self._parts.store.publish_scopes, sorted(self.serving()))

    async def take_snapshots(self) -> None:
        """Snapshots every SERVING partition that moved, one after the other."""
        for hosted in list(self._hosted.values()):
            await hosted.take_snapshot()

    async def delete_expired(self, now_ms: int) -> None:
        """Applies the tables' retention in every SERVING partition."""
        for hosted in list(self._hosted.values()):
            if hosted.state is PartitionState.SERVING and hosted.store is not None:
                await asyncio.to_thread(hosted.store.delete_expired, now_ms)


async def _nothing_reads(partitions: Collection[int]) -> None:
    del partitions


def start_position(topic_partition: TopicPartition, store: PartitionStore, log: Watermarks) -> int:
    """Where to read on: the store's next_offset, or the log's start for a topic it never read. Raises LogGapError."""
    stored = store.next_offsets().get(topic_partition.topic)
    if stored is None:
        return log.low
    if stored < log.low:
        raise log_gap(topic_partition, stored, f"the log starts at {log.low}: retention has deleted what lies between")
    if stored > log.high:
        raise log_gap(topic_partition, stored, f"the log ends at {log.high}: the topic was recreated or truncated")
    return stored


def log_gap(topic_partition: TopicPartition, position: int, why: str) -> LogGapError:
    """The loud state of D1, with the way out."""
    return LogGapError(
        f"log gap in {topic_partition}: the store continues at offset {position}, but {why}",
        hint="records would be lost silently, so the partition stopped: restore the topic, or remove this partition's "
        "store and snapshots to rebuild from what the log still holds",
    )
