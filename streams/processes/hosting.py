"""Hosts the partitions that the consumer group assigned to this worker: recover, replay, serve, let go.

    RECOVERING  the ladder of processes/recovery.py finds a store (D7)
    REPLAYING   the log is read from the store's next_offset up to the high watermark captured at the start
    SERVING     queries are answered (invariant 3)
    FAILED      a named fault that only an operator can end (LogGapError); nothing is applied or answered

An operator ends it with an order to recover (processes/recovery_orders.py), which also makes a SERVING partition start
from RECOVERING. Any other fault lets the store go and starts from RECOVERING again, after a pause that grows until
records are applied. Every assignment makes a new HostedPartition, so late results of an old one find nobody (invariant
5). All methods run on the worker's event loop. Callers: agents/store_app.py (assignment, batches),
processes/answering.py (ServingState).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from concurrent.futures import Executor
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial

from schemas.catalog import Catalog
from streams import telemetry
from streams.adapters.duckdb_store import DuckDBStore, PartitionStore
from streams.batches import RecordBatch
from streams.errors import (
    LogGapError,
    LogGapKind,
    PintailError,
    RecoveryOrderedError,
    SchemaRegistryError,
    StaleEpochError,
    StoreError,
)
from streams.finishing import all_ended, in_thread
from streams.ports import DeadLetters, Decoder, PartitionLog, Watermarks
from streams.positions import TopicPartition
from streams.processes.drill import DrillReport
from streams.processes.ingestion import PartitionIngestion, ingestion_threads, nobody_to_ask
from streams.processes.log_gaps import check_position, check_uncut, check_unknown, closes_gap, log_gap
from streams.processes.log_reading import LogReading
from streams.processes.progress import RecoveryProgress
from streams.processes.recovery import Recovered, Recovery, Rung
from streams.processes.recovery_orders import OrderOutcome, RecoveryOrder, RecoveryOrders
from streams.processes.snapshotting import SnapshotInfo, SnapshotSchedule, Snapshotter
from streams.retry import Backoff, in_words

logger = logging.getLogger(__name__)


class PartitionState(StrEnum):
    """Where a hosted partition is on its way to answering."""

    RECOVERING = "recovering"
    REPLAYING = "replaying"
    SERVING = "serving"
    FAILED = "failed"


#: Gives the position that a partition's owner committed, up to which it has applied or parked everything, with
#: metadata; None if there never was one.
CommittedRecord = Callable[[TopicPartition], Awaitable[tuple[int, str] | None]]


async def none_committed(topic_partition: TopicPartition) -> None:
    """For a partition that no group assigns."""
    del topic_partition


@dataclass(frozen=True)
class HostingParts:
    """What every hosted partition works with."""

    catalog: Catalog
    store: DuckDBStore
    recovery: Recovery
    snapshotter: Snapshotter | None
    decoder: Decoder
    dead_letters: DeadLetters
    orders: RecoveryOrders
    snapshot_schedule: SnapshotSchedule = field(default_factory=SnapshotSchedule)
    #: Restores a partition's newest snapshot beside the live store; its report, or None if there is no snapshot.
    drill: Callable[[int], Awaitable[DrillReport | None]] | None = None
    threads: Executor = field(default_factory=ingestion_threads)
    #: Returns while the worker is sure to be a member of its group, and waits while it is not.
    confirmed: Callable[[], Awaitable[None]] = nobody_to_ask
    committed_record: CommittedRecord = none_committed

    def topic_partitions(self, partition: int) -> list[TopicPartition]:
        """The partition of every table topic that has it."""
        tables = self.catalog.tables
        return [TopicPartition(table.topic, partition) for table in tables if partition < table.partitions]


class HostedPartition:
    """One partition under one assignment.

    States: see the module. Every transition happens in `_supervise`, the one task of the object.
    """

    def __init__(self, partition: int, host: PartitionHost, parts: HostingParts, log: PartitionLog) -> None:
        self.partition = partition
        self.state = PartitionState.RECOVERING
        #: Why it is FAILED, or why it recovers anew; None while all is well.
        self.failure: str | None = None
        self.epoch = 0
        #: How the newest recovery went; None until the first one is done.
        self.recovered: Recovered | None = None
        #: Of the recovery and the replay under way, or of the newest one.
        self.progress = RecoveryProgress(partition)
        self.store: PartitionStore | None = None
        #: True while queries may see the file: from just before SERVING until just after.
        self.is_visible = False
        #: topic -> next_offset, as of the newest transaction.
        self.positions: dict[str, int] = {}
        #: The newest snapshot published under this assignment.
        self.snapshot: SnapshotInfo | None = None
        #: When the newest snapshot was tried (monotonic seconds), and the bytes of records that came since.
        self._snapshot_tried = time.monotonic()
        self._bytes_since_snapshot = 0
        self._host = host
        self._parts = parts
        self._log = log
        self._reading = LogReading(log)
        self._ingestion: PartitionIngestion | None = None
        self._capture: asyncio.Task[SnapshotInfo | None] | None = None
        self._targets: dict[str, int] = {}
        #: Sum of the positions from which the log is replayed.
        self._started = 0
        self._high_watermarks: dict[str, int] = {}
        #: topic -> id of the topic that its position is of, where it is known.
        self._topic_ids: dict[str, str] = {}
        self._moved = asyncio.Condition()
        self._is_leaving = False
        #: The order being carried out: until the partition serves, or shows that it cannot.
        self._order: RecoveryOrder | None = None
        self._ordered = asyncio.Event()
        self._is_kept = False
        self._has_let_go = False
        self._task = asyncio.create_task(self._supervise(), name=f"partition-{partition}")

    @property
    def topic_partitions(self) -> list[TopicPartition]:
        """This partition of every table topic that has it."""
        return self._parts.topic_partitions(self.partition)

    @property
    def lag(self) -> int:
        """Offsets between the store and the newest high watermarks that were seen, over all topics."""
        marks = self._high_watermarks
        return sum(max(0, mark - self.positions.get(topic, 0)) for topic, mark in marks.items())

    @property
    def obstacle(self) -> SchemaRegistryError | None:
        """What this partition waits for before it can decode what comes next; it goes on by itself."""
        return self._ingestion.obstacle if self._ingestion is not None else None

    def submit(self, batch: RecordBatch) -> None:
        """Queues what of the batch continues the log; where records are missing, the log is read again."""
        fresh = self._reading.accept(batch)
        if fresh is None or self._ingestion is None:
            return
        self._high_watermarks[fresh.topic] = fresh.high_watermark or fresh.next_offset
        self._bytes_since_snapshot += fresh.size_bytes
        self._ingestion.submit(fresh)

    def fail(self, failure: LogGapError) -> None:
        """Ends this partition until an operator acts. Loud: it stays in the log, the metrics and the status."""
        if self._ingestion is not None:
            self._ingestion.break_off(failure)

    async def check_log(self) -> None:
        """Fails if the log no longer is the one that was read so far. Raises what the log raises."""
        ingestion, topic_ids = self._ingestion, self._topic_ids
        positions = dict(self.positions)  # before the marks: records that arrive meanwhile must not look like a gap
        if ingestion is None or not self._reading.is_active:
            return
        marks = await self._log.watermarks(self.topic_partitions)
        for topic_partition in self.topic_partitions:
            topic = topic_partition.topic
            self._high_watermarks[topic] = max(marks[topic_partition].high, self._high_watermarks.get(topic, 0))
            try:
                check_position(topic_partition, positions.get(topic), topic_ids.get(topic), marks[topic_partition])
            except LogGapError as gap:
                ingestion.break_off(gap.with_traceback(None))
                return

    def obey(self, order: RecoveryOrder) -> None:
        """Starts anew from RECOVERING to carry out an order, unless that is under way."""
        if self._order is not None and self._order.id == order.id:
            return
        self._ordered.set()
        if self._ingestion is not None:
            self._ingestion.break_off(RecoveryOrderedError(f"recovery from {order.source} was ordered"))

    def read_again(self, topic_partition: TopicPartition, why: str) -> None:
        """What Kafka delivered for this topic cannot be read: asks for it again."""
        self._reading.read_again(topic_partition, why)

    async def wait_until_applied(self, topic: str, offset: int) -> None:
        """Returns once the record at `offset` is applied. Raises StoreError when that will not happen here."""

        def is_decided() -> bool:
            return is_applied() or self._is_leaving or self.state is PartitionState.FAILED

        def is_applied() -> bool:
            return self.positions.get(topic, 0) > offset

        async with self._moved:
            await self._moved.wait_for(is_decided)
        if is_applied():
            return
        if self.state is PartitionState.FAILED:
            raise StoreError(f"partition {self.partition} has failed", hint="its worker's status says why")
        raise StaleEpochError(f"partition {self.partition} left this worker", hint="ask again")

    @property
    def is_snapshot_due(self) -> bool:
        """True when enough time or records have passed since the last try."""
        seconds = time.monotonic() - self._snapshot_tried
        return self._parts.snapshot_schedule.is_due(seconds=seconds, record_bytes=self._bytes_since_snapshot)

    async def take_snapshot(self, *, hashed: bool = False) -> None:
        """Publishes a snapshot if the partition serves and moved; a failure is counted and costs freshness only. With
        the content's hash also if it did not move, unless the newest one has it."""
        snapshotter = self._parts.snapshotter
        if snapshotter is None or self.store is None or self.state is not PartitionState.SERVING:
            return
        self._snapshot_tried, self._bytes_since_snapshot = time.monotonic(), 0
        # In a task of its own, so that letting the partition go ends it.
        self._capture = capture = asyncio.create_task(snapshotter.take(self.store, self.epoch, hashed=hashed))
        with telemetry.SNAPSHOT_SECONDS.time():
            await asyncio.wait({capture})
        if capture.cancelled():
            return
        try:
            info = capture.result()
        except PintailError as error:
            logger.warning("snapshot of partition %d not taken: %s", self.partition, error)
            telemetry.SNAPSHOT_FAILURES.labels(self.partition).inc()
            if isinstance(error, StoreError) and self._ingestion is not None:
                # After a CHECKPOINT that failed, as on a full disk, DuckDB refuses the file until it is opened anew.
                self._ingestion.break_off(error)
        except Exception:  # the boundary of one partition: the next one's snapshot and the timer go on (invariant 10)
            logger.exception("snapshot of partition %d not taken", self.partition)
            telemetry.SNAPSHOT_FAILURES.labels(self.partition).inc()
        else:
            if info is not None:
                self.snapshot = info
                telemetry.SNAPSHOT_BYTES.labels(self.partition).inc(info.bytes_sent)
                if info.memory_bytes is not None:
                    telemetry.SNAPSHOT_MEMORY_BYTES.labels(self.partition).set(info.memory_bytes)

    async def drill(self) -> None:
        """Takes a snapshot that knows its content's hash, restores it beside the live store and compares (invariant 8).
        A failure is counted and logged: the snapshots cannot be relied on until a drill succeeds."""
        if self._parts.drill is None or self.state is not PartitionState.SERVING:
            return
        await self.take_snapshot(hashed=True)
        try:
            report = await self._parts.drill(self.partition)
        except Exception as error:  # noqa: BLE001  # the boundary of one partition: the timer goes on (invariant 10)
            level = logging.WARNING if isinstance(error, PintailError) and error.retriable else logging.ERROR
            logger.log(level, "drill of partition %d FAILED: %s", self.partition, in_words(error))
            telemetry.DRILL_FAILURES.labels(self.partition).inc()
        else:
            if report is not None:
                version = report.manifest.version
                logger.info("drill of partition %d: version %d holds what it should", self.partition, version)
                telemetry.DRILL_SUCCESS.labels(self.partition).set_to_current_time()

    async def delete_expired(self, now_ms: int) -> None:
        """Applies the tables' retention if the partition serves; a failure is counted and costs freshness only."""
        if self.store is None or self.state is not PartitionState.SERVING:
            return
        try:
            await in_thread(self.store.delete_expired, now_ms)
        except StaleEpochError:
            logger.debug("partition %d left before its rows expired", self.partition)
        except Exception:  # the boundary of one partition: the next one's rows and the timer go on (invariant 10)
            logger.exception("expired rows of partition %d stay until the next sweep", self.partition)
            telemetry.RETENTION_FAILURES.labels(self.partition).inc()

    async def stop(self, *, is_kept: bool = False) -> None:
        """Lets go: when it returns nothing is applied or answered any more, and the file is closed and unlocked, unless
        it `is_kept`.

        Waits for the transaction in flight, and for opening or restoring the file if that is under way. Raises what
        closing the file raised."""
        self._is_leaving, self._is_kept = True, is_kept
        self._task.cancel()
        await asyncio.wait({self._task})
        await self._release()
        self._has_let_go = True
        for state in PartitionState:
            telemetry.PARTITION_STATE.labels(self.partition, state).set(0)

    def hurry(self) -> None:
        """Called when `stop` takes too long: gives up the transaction in flight. The log still has its records."""
        if self._has_let_go:
            return
        logger.error("partition %d is not let go of in time: its transaction is rolled back", self.partition)
        telemetry.REVOKE_OVERRUNS.inc()
        self._parts.store.interrupt(self.partition)

    async def _supervise(self) -> None:
        """Recovers and ingests; whatever breaks that is tried again from recovery on: a log gap once that is ordered,
        anything else by itself."""
        backoff = Backoff(first_seconds=1.0)
        while True:
            reached = dict(self.positions)
            try:
                try:
                    await self._recover_and_ingest()
                finally:
                    await self._release()
            except LogGapError as gap:
                logger.critical("partition %d: %s", self.partition, gap)
                telemetry.LOG_GAPS.labels(self.partition, gap.kind).inc()
                self.failure = in_words(gap)
                await self._enter(PartitionState.FAILED)
                await self._finish_order(self.failure)
                await self._ordered.wait()
                continue
            except RecoveryOrderedError as order:
                logger.warning("partition %d: %s", self.partition, order)
                continue
            except (
                Exception
            ) as error:  # the boundary of supervision: no partition's fault ends the worker (invariant 10)
                logger.exception("partition %d stopped", self.partition)
                telemetry.PARTITION_FAULTS.labels(self.partition).inc()
                self.failure = in_words(error)
            if self._is_leaving:
                return
            if self.positions != reached:
                backoff.reset()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ordered.wait(), backoff.next_delay_seconds())

    async def _recover_and_ingest(self) -> None:
        await self._enter(PartitionState.RECOVERING)
        before = await self._log.watermarks(self.topic_partitions)
        recovered = await self._recover(before)
        # Anew: what was recovered may be newer than these, and a store ahead of the log counts as a gap.
        marks = await self._log.watermarks(self.topic_partitions)
        if self._order is None:
            check_uncut(recovered.store.next_offsets(), before, marks)
        recovered, positions, self._topic_ids = await continued_by_log(
            self._parts, recovered, marks, self.progress, is_ordered=self._order is not None
        )
        self.recovered, self.store, self.epoch = recovered, recovered.store, recovered.epoch
        for rung in Rung:
            telemetry.RECOVERY_SECONDS.remove(self.partition, rung)
        telemetry.RECOVERY_SECONDS.labels(self.partition, recovered.rung).set(recovered.seconds)
        self.positions = positions
        self._targets = {tp.topic: marks[tp].high for tp in self.topic_partitions}
        self._high_watermarks = dict(self._targets)
        self._ingestion = PartitionIngestion(
            self.store,
            tables=self._parts.catalog.by_topic,
            decoder=self._parts.decoder,
            dead_letters=self._parts.dead_letters,
            announce=self._announce,
            threads=self._parts.threads,
            confirmed=self._parts.confirmed,
        )
        self._started = sum(self.positions.values())
        self.progress.begin("replay", max(0, sum(self._targets.values()) - self._started), "offsets")
        await self._enter(PartitionState.REPLAYING)
        await self._reading.start({tp: self.positions[tp.topic] for tp in self.topic_partitions})
        await self._announce({})
        await self._ingestion.run()

    async def _recover(self, marks: Mapping[TopicPartition, Watermarks]) -> Recovered:
        """As ordered, if there is an order that can be carried out; else by the ladder."""
        self._ordered.clear()
        self._order = order = await in_thread(self._parts.orders.pending, self.partition)
        try:
            recovered = await self._parts.recovery.recover(self.partition, marks, self.progress, order)
        except PintailError as error:
            if order is None or error.retriable:
                raise
            logger.error("partition %d: recovery from %s: %s", self.partition, order.source, error)
            await self._finish_order(in_words(error))
            recovered = await self._parts.recovery.recover(self.partition, marks, self.progress)
        if self._order is not None and not self._order.is_begun:
            await in_thread(self._parts.orders.begin, self._order)
        return recovered

    async def _finish_order(self, failure: str | None) -> None:
        """Says what became of the order that is being carried out, if there is one."""
        order, self._order = self._order, None
        if order is None:
            return
        path = self._parts.store.path_of(self.partition)
        kept = sorted(aside.name for aside in path.parent.glob(f"{path.name}.replaced-*"))
        outcome = OrderOutcome(order.id, failure, dict(self.positions), tuple(kept))
        await in_thread(self._parts.orders.finish, order, outcome)

    async def _announce(self, positions: Mapping[str, int]) -> None:
        async with self._moved:
            self.positions.update(positions)
            self._moved.notify_all()
        for topic in positions:
            lag = max(0, self._high_watermarks.get(topic, 0) - self.positions[topic])
            telemetry.LAG_RECORDS.labels(topic, self.partition).set(lag)
        if self.state is not PartitionState.REPLAYING:
            return
        self.progress.reach(sum(min(self.positions[topic], to) for topic, to in self._targets.items()) - self._started)
        if all(self.positions[topic] >= target for topic, target in self._targets.items()):
            # Visible first: an answer over the whole table must never leave out a partition that counts as SERVING.
            self.is_visible = True
            await self._host.publish_scopes()
            self.failure = None
            await self._enter(PartitionState.SERVING)
            await self._finish_order(None)

    async def _enter(self, state: PartitionState) -> None:
        self._set_state(state)
        logger.info("partition %d is %s at %s", self.partition, state, self.positions)
        async with self._moved:
            self._moved.notify_all()

    def _set_state(self, state: PartitionState) -> None:
        self.state = state
        for each in PartitionState:
            telemetry.PARTITION_STATE.labels(self.partition, each).set(each is state)

    async def _release(self) -> None:
        """Gives up the store; waits for the transaction in flight. Idempotent.

        The steps run in the reverse of the order here, each also when one before it failed; closing the file ends them.
        """
        if self.state is not PartitionState.FAILED:
            self._set_state(PartitionState.RECOVERING)
        self.store, self.is_visible = None, False
        if self._ingestion is not None:
            self._ingestion.discard_queued()
            self._ingestion = None
        if self._capture is not None:
            self._capture.cancel()
        store = self._parts.store
        let_go = store.release_partition if self._is_kept else store.close_partition
        async with AsyncExitStack() as steps:
            steps.push_async_callback(in_thread, let_go, self.partition)
            steps.push_async_callback(self._host.before_closing, [self.partition])
            steps.push_async_callback(self._reading.stop)
        async with self._moved:
            self._moved.notify_all()


class PartitionHost:
    """All partitions of this worker. Implements agents.transport.PartitionOwner and streams.ports.ServingState."""

    def __init__(self, parts: HostingParts, log: PartitionLog, *, revoke_seconds_max: float = 8.0) -> None:
        self._parts = parts
        self._log = log
        self._revoke_seconds_max = revoke_seconds_max
        self._hosted: dict[int, HostedPartition] = {}
        self._assigning = asyncio.Lock()
        self._scopes = asyncio.Lock()
        self._drill_due: dict[int, float] = {}
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

    async def assign(self, partitions: Collection[int], *, kept: Collection[int] = ()) -> None:
        """A new assignment: starts afresh with these, in the background. Of the files that `suspend` left open, those
        that belong neither to these nor to the `kept` partitions are closed."""
        async with self._assigning:
            await self._let_go(list(self._hosted), are_kept=True)
            strangers = self._parts.store.partitions().keys() - {*partitions, *kept}
            await all_ended([in_thread(self._parts.store.close_partition, partition) for partition in strangers])
            for partition in sorted(partitions):
                self._hosted[partition] = HostedPartition(partition, self, self._parts, self._log)

    async def revoke(self, partitions: Collection[int]) -> None:
        """Lets go of these; when it returns their files are closed and unlocked (invariant 5). Transactions that take
        longer than the budget are rolled back: the group waits for this worker, and forgets it after a while.

        Cancelled, it lets go of them all the same before it ends. Raises what closing a file raised, after every other
        one is closed."""
        async with self._assigning:
            await self._let_go(partitions)

    async def suspend(self, partitions: Collection[int]) -> None:
        """As `revoke`, but the files stay open until the next `assign`, though nobody writes to them: most partitions
        of a rebalance stay where they are, and to replay the write-ahead log of a file takes seconds."""
        async with self._assigning:
            await self._let_go(partitions, are_kept=True)

    async def leave(self) -> None:
        """The worker ends: a last snapshot of what moved, as far as time allows, so that an owner on another machine
        has seconds to replay; then lets go of everything. Nothing may be submitted any more."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._revoke_seconds_max):
                await self.take_snapshots()
        await self.revoke(list(self._hosted))

    async def _let_go(self, partitions: Collection[int], *, are_kept: bool = False) -> None:
        leaving = [self._hosted.pop(partition) for partition in partitions if partition in self._hosted]
        loop = asyncio.get_running_loop()
        overruns = [loop.call_later(self._revoke_seconds_max, hosted.hurry) for hosted in leaving]
        try:
            with telemetry.REVOKE_SECONDS.time():
                await all_ended([hosted.stop(is_kept=are_kept) for hosted in leaving])
        finally:
            for overrun in overruns:
                overrun.cancel()

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
            why = "Kafka answered that it is out of range"
            hosted.fail(log_gap(LogGapKind.OUT_OF_RANGE, topic_partition, position, why))

    def on_unreadable(self, topic_partition: TopicPartition, why: str) -> None:
        """What Kafka delivered is damaged: nothing of it is used, and it is read again."""
        hosted = self._hosted.get(topic_partition.partition)
        if hosted is not None:
            hosted.read_again(topic_partition, why)

    async def wait_until_applied(self, partition: int, topic: str, offset: int) -> None:
        """See streams.ports.ServingState."""
        hosted = self._hosted.get(partition)
        if hosted is None:
            raise StaleEpochError(f"partition {partition} is not on this worker", hint="ask again")
        await hosted.wait_until_applied(topic, offset)

    async def publish_scopes(self) -> None:
        """Makes exactly the visible partitions visible to queries."""
        async with self._scopes:
            visible = [partition for partition, hosted in self._hosted.items() if hosted.is_visible]
            await in_thread(self._parts.store.publish_scopes, visible)

    async def check_logs(self) -> None:
        """Finds partitions whose log was replaced or cut under them; a log that cannot be asked is asked next time."""
        for hosted in list(self._hosted.values()):
            try:
                await hosted.check_log()
            except Exception as error:  # noqa: BLE001  # the boundary of one partition: the timer goes on (invariant 10)
                logger.warning("the log of partition %d was not checked: %s", hosted.partition, in_words(error))

    async def carry_out_orders(self) -> None:
        """Hands the orders of operators to the partitions that they are about."""
        for order in await in_thread(self._parts.orders.all_pending):
            hosted = self._hosted.get(order.partition)
            if hosted is not None:
                hosted.obey(order)

    async def take_due_snapshots(self) -> None:
        """Snapshots every SERVING partition that is due by time or by bytes, one after the other."""
        for hosted in list(self._hosted.values()):
            if hosted.is_snapshot_due:
                await hosted.take_snapshot()

    async def drill_next(self, interval_seconds: float) -> None:
        """Runs the drill of one partition whose last one is longer ago than the interval, if there is any. The first
        drills come after a 24th of it, so that a worker that is restarted every day has its drills."""
        now = time.monotonic()
        for partition, hosted in list(self._hosted.items()):
            if now >= self._drill_due.setdefault(partition, now + interval_seconds / 24):
                self._drill_due[partition] = now + interval_seconds
                await hosted.drill()
                return

    async def take_snapshots(self) -> None:
        """Snapshots every SERVING partition that moved, one after the other."""
        for hosted in list(self._hosted.values()):
            await hosted.take_snapshot()

    async def delete_expired(self, now_ms: int) -> None:
        """Applies the tables' retention in every SERVING partition."""
        for hosted in list(self._hosted.values()):
            await hosted.delete_expired(now_ms)


#: The store may be one of before a topic was read; those of the other rungs are as whole as they can be.
_RUNGS_OF_SOME_TIME = (Rung.WARM, Rung.LOCAL_FILE, Rung.SNAPSHOT)


async def continued_by_log(
    parts: HostingParts,
    recovered: Recovered,
    marks: Mapping[TopicPartition, Watermarks],
    progress: RecoveryProgress | None = None,
    *,
    is_ordered: bool = False,
) -> tuple[Recovered, dict[str, int], dict[str, str]]:
    """A store that the log continues, where to read each topic on, and the ids of these topics. With an order the
    operator has decided what of topics that the store does not know may be missing.

    A local file that the log no longer reaches back to may be older than a snapshot that it does reach, which is taken
    instead. Raises LogGapError where there is none."""
    known, committed = recovered.store.next_offsets().keys(), dict[TopicPartition, int]()
    if recovered.rung in _RUNGS_OF_SOME_TIME and not is_ordered:
        for topic_partition, log in marks.items():
            if topic_partition.topic not in known and log.low:
                record = await parts.committed_record(topic_partition)
                if record is not None:
                    committed[topic_partition] = record[0]
    try:
        for topic_partition, position in committed.items():
            check_unknown(topic_partition, position, marks[topic_partition])
        return recovered, *await _start_positions(recovered.store, marks)
    except LogGapError as gap:
        if gap.kind is not LogGapKind.DELETED or recovered.rung not in (Rung.WARM, Rung.LOCAL_FILE):
            raise
        partition = recovered.store.partition
        logger.warning("partition %d: %s; looking for a newer snapshot", partition, gap.message)
        await in_thread(parts.store.close_partition, partition)
        applied = {*known, *(topic_partition.topic for topic_partition in committed)}
        is_in_log = partial(closes_gap, partition=partition, log=marks, applied=applied)
        newer = await parts.recovery.recover_beyond(partition, is_in_log, progress)
        if newer is None:
            raise
    return newer, *await _start_positions(newer.store, marks)


async def _start_positions(
    store: PartitionStore, marks: Mapping[TopicPartition, Watermarks]
) -> tuple[dict[str, int], dict[str, str]]:
    """Where to read each topic on, and its id. From then on the store is one of these very topics. Raises
    LogGapError."""
    next_offsets, topic_ids = store.next_offsets(), await in_thread(store.topic_ids)
    positions = {
        tp.topic: check_position(tp, next_offsets.get(tp.topic), topic_ids.get(tp.topic), log)
        for tp, log in marks.items()
    }
    found = {tp.topic: log.topic_id for tp, log in marks.items() if log.topic_id is not None}
    if new := {topic: topic_id for topic, topic_id in found.items() if topic_ids.get(topic) != topic_id}:
        await in_thread(store.set_topic_ids, new)
    return positions, topic_ids | found


async def _nothing_reads(partitions: Collection[int]) -> None:
    del partitions
