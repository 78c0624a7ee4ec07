"""Exactly-once delivery of a partition's records to ClickHouse, one micro-batch at a time, under one assignment.

A micro-batch is exactly one contiguous offset range [lo, hi). Order of effects, which is the exactness:
    1. record    the BEFORE record [lo, hi) is durable, fenced by the group's generation
    2. decode    the range's records become rows; a pure function of the range; repeated while a schema cannot be had
    3. insert    all rows or none, under the token of [lo, hi); repeated until it succeeds
    4. advance   in memory only: the next BEFORE record carries the position on
When ClickHouse refuses the insert because of what a row holds, nothing of [lo, hi) is there, and its two halves take
its place as micro-batches of their own, down to the one record at fault, which is parked before the position moves on.
Too many of them in a row speak against the table's rules, not the rows: then nothing more is parked until they change.
A new owner reads the newest BEFORE record and w, the highest offset in the table. As an insert is all or nothing,
w >= lo proves that [lo, hi) is complete. Otherwise it may be missing or still under way, so exactly [lo, hi) is
replayed first: whichever insert lands second is dropped by its token. docs/adr/0008 has the reasoning.
Called by the sink agent, which makes a new PartitionDelivery for each assignment.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from enum import StrEnum
from typing import TypeVar

import pyarrow as pa

from schemas.table import TableDefinition
from streams import telemetry
from streams.adapters.clickhouse_rows import delivery_table
from streams.batches import RecordBatch
from streams.errors import (
    DeliveryBrokenError,
    LogGapError,
    PintailError,
    RowsRefusedError,
    SchemaRegistryError,
    SinkError,
    SinkFencedError,
    SinkOverloadedError,
    SinkRejectedError,
    StaleEpochError,
)
from streams.limits import INGEST_BUFFER_BYTES_MAX, REFUSED_IN_A_ROW_MAX
from streams.ports import DeadLetter, DeadLetters, Decoder, DeliveryIntents, ParkedRecord, ParkReason, Sink
from streams.positions import OffsetRange, TopicPartition, next_offset_after
from streams.processes.microbatches import BufferBudget, FlushLimits, MicroBatchBuffer, Pace
from streams.retry import Backoff, in_words, retrying

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

#: Decoding and inserting that may run at once, per worker.
THREADS_MAX = 8
BACKOFF_SECONDS_MAX = 10.0
#: How long a revoked partition waits for its insert in flight; one that takes longer may land later, harmlessly.
STOP_SECONDS_MAX = 5.0
#: A partition idle for this long records that nothing is under way, so that its committed offset shows no lag.
IDLE_SECONDS = 1.0


class DeliveryState(StrEnum):
    """Where a PartitionDelivery is: NEW -> RUNNING -> STOPPED, or FENCED when another member owns the partition, or
    FAILED by what only starting anew or an operator can mend."""

    NEW = "new"
    RUNNING = "running"
    FENCED = "fenced"
    FAILED = "failed"
    STOPPED = "stopped"


_ALIVE = (DeliveryState.NEW, DeliveryState.RUNNING)


class Circuit(StrEnum):
    """CLOSED while tries succeed; OPEN in the pause after one that failed; HALF_OPEN while the next is under way."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Delivery:
    """What the partitions of one sink worker share: the sink, threads, and a bound on the bytes that wait."""

    def __init__(
        self,
        *,
        sink: Sink,
        intents: DeliveryIntents,
        decoder: Decoder,
        dead_letters: DeadLetters,
        limits: FlushLimits,
        buffer_bytes_max: int = INGEST_BUFFER_BYTES_MAX,
        refused_in_a_row_max: int = REFUSED_IN_A_ROW_MAX,
    ) -> None:
        self.sink = sink
        self.intents = intents
        self.decoder = decoder
        self.dead_letters = dead_letters
        self.budget = BufferBudget(buffer_bytes_max)
        self.refused_in_a_row_max = refused_in_a_row_max
        self.threads = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="delivery")
        self._limits = limits
        self._paces: dict[str, Pace] = {}

    def pace_of(self, table: TableDefinition) -> Pace:
        """The one that the table's partitions share."""
        return self._paces.setdefault(table.name, Pace(self._limits))

    def open(self, topic_partition: TopicPartition, table: TableDefinition) -> PartitionDelivery:
        """The delivery of a partition under a new assignment; `start` it next."""
        return PartitionDelivery(self, topic_partition, table)

    def close(self) -> None:
        """After every partition is stopped. Does not wait for an insert that outlived its partition."""
        self.threads.shutdown(wait=False, cancel_futures=True)


class PartitionDelivery:
    """Delivers one partition in order. States: see DeliveryState. A new object per assignment makes late results of
    an old one recognisable: they belong to an object that has ended, and change nothing."""

    def __init__(self, shared: Delivery, topic_partition: TopicPartition, table: TableDefinition) -> None:
        self.topic_partition = topic_partition
        self.table = table
        self.state = DeliveryState.NEW
        #: Everything below is delivered; None until the first batch shows where the log begins.
        self.next_offset: int | None = None
        self.rows_delivered = 0
        self.inserts = 0
        #: Records that the decoder parks; the store worker writes their dead letters.
        self.records_left_out = 0
        #: Records that ClickHouse refused and that were parked here.
        self.records_refused = 0
        #: Why the newest try failed, or why it is FENCED or FAILED; None while deliveries succeed.
        self.failure: PintailError | None = None
        #: Delay until the next try; 0 while deliveries succeed.
        self.backoff_seconds = 0.0
        self._shared = shared
        self._refused_in_a_row = 0
        self._backoff = Backoff(ceiling_seconds=BACKOFF_SECONDS_MAX)
        self._failing_since = 0.0
        self._is_pausing = False
        self._pace = shared.pace_of(table)
        self._buffer = MicroBatchBuffer(self._pace, table.clickhouse.partition_by)
        self._buffered_to: int | None = None
        self._arrived = asyncio.Event()
        self._advanced = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_inserting = False
        self._is_settled = True

    @property
    def failures(self) -> int:
        """Consecutive failed tries."""
        return self._backoff.failures

    @property
    def failing_seconds(self) -> float:
        """Since the first of them; 0 while tries succeed."""
        return time.monotonic() - self._failing_since if self.failures else 0.0

    @property
    def circuit(self) -> Circuit:
        """Whether tries succeed."""
        if not self.failures:
            return Circuit.CLOSED
        return Circuit.OPEN if self._is_pausing else Circuit.HALF_OPEN

    async def start(self) -> int | None:
        """Finds where to go on and starts delivering. The caller lets the next batch start at the returned offset; None
        means nothing was ever delivered: the beginning of the log.

        Waits for as long as ClickHouse is away; cancel it to give up. Raises StaleEpochError if stopped meanwhile."""
        assert self.state is DeliveryState.NEW, "a PartitionDelivery serves one assignment"
        intent = await self._until_done(lambda: self._shared.intents.read(self.topic_partition), "reading the position")
        stored = await self._until_done(self._read_last_offset, "reading the last offset")
        stored_to = None if stored is None else next_offset_after(stored)
        resume = delivered_to(intent, stored_to)
        if intent is not None and resume == intent.lo < intent.hi:
            self._buffer.replay = intent
        # A predecessor may have ended between its last insert and the record that nothing is under way.
        self._is_settled = resume is None or (intent is not None and resume == intent.lo)
        self.next_offset = self._buffered_to = resume
        logger.info("%s: goes on at %s, replays %s", self, resume, self._buffer.replay)
        self.state = DeliveryState.RUNNING
        self._task = asyncio.create_task(self._run(), name=f"delivery {self.topic_partition}")
        return resume

    async def submit(self, batch: RecordBatch) -> None:
        """Hands over the next batch, one at a time; waits while too many bytes are buffered. Records that were handed
        over before are skipped; what comes after the end of the delivery is dropped.

        Raises LogGapError when records are missing in front of the batch."""
        if self._buffered_to is not None:
            batch = batch.starting_at(self._buffered_to)
            if batch.first_offset > self._buffered_to:
                raise LogGapError(
                    f"{self.topic_partition}: the log goes on at {batch.first_offset}, "
                    f"but records from {self._buffered_to} on are not in ClickHouse yet",
                    hint="retention removed them before they were delivered; to go on without them, reset the sink's "
                    "consumer group for this partition to the earliest offset",
                )
        if batch.first_offset == batch.next_offset:
            return
        counted_bytes = 0
        if self._buffer.replay is None:
            await self._shared.budget.take(batch.size_bytes)
            counted_bytes = batch.size_bytes
        else:
            # Half a replay can never be delivered, so it must not wait for room that only deliveries make: neither
            # here nor in a budget that the transport keeps on the batch it fetched.
            batch = replace(batch)
        if self.state is not DeliveryState.RUNNING:
            self._shared.budget.give_back(counted_bytes)
            return
        if self._buffered_to is None:
            self.next_offset = batch.first_offset
        self._buffered_to = batch.next_offset
        self._buffer.put(batch, counted_bytes=counted_bytes)
        self._arrived.set()

    async def stop(self, *, wait_seconds_max: float = STOP_SECONDS_MAX) -> None:
        """Ends the assignment: nothing more is recorded or inserted. Waits only for an insert in flight. Idempotent."""
        if self.state in _ALIVE:
            self.state = DeliveryState.STOPPED
        self._advanced.set()
        if self._task is None:
            return
        if self._is_inserting:
            await asyncio.wait({self._task}, timeout=wait_seconds_max)
        self._task.cancel()
        await asyncio.wait({self._task})

    def break_off(self, fault: PintailError) -> None:
        """Ends the delivery with a fault that was found outside of it; an insert in flight may still land."""
        if self.state is DeliveryState.RUNNING:
            self.state, self.failure = DeliveryState.FAILED, fault
            self._arrived.set()

    async def wait_until_ended(self) -> None:
        """Returns once it is STOPPED or FENCED. Raises the fault that made it FAILED."""
        assert self._task is not None, "start it first"
        await asyncio.wait({self._task})
        self._raise_if_failed()

    async def wait_until_delivered(self, next_offset: int) -> None:
        """Returns once everything below `next_offset` is delivered. Raises StaleEpochError if that will not happen, or
        the fault that made it FAILED."""
        while self.next_offset is None or self.next_offset < next_offset:
            self._raise_if_failed()
            self._raise_if_stale(*_ALIVE)
            self._advanced.clear()
            await self._advanced.wait()

    def __str__(self) -> str:
        return f"delivery of {self.topic_partition}"

    async def _run(self) -> None:
        try:
            while self.state is DeliveryState.RUNNING:
                due_in = self._buffer.due_in_seconds()
                if due_in is None:
                    if not await self._has_arrived(None if self._is_settled else IDLE_SECONDS):
                        await self._settle()
                elif due_in > 0:
                    await self._has_arrived(due_in)
                else:
                    micro_batch = self._buffer.take()
                    try:
                        await self._deliver(micro_batch.batch)
                    finally:
                        self._shared.budget.give_back(micro_batch.counted_bytes)
        except SinkFencedError as error:
            logger.warning("%s: %s", self, error)
            if self.state is DeliveryState.RUNNING:
                self.state, self.failure = DeliveryState.FENCED, error.with_traceback(None)
        except StaleEpochError:
            logger.debug("%s: ended between two effects", self)
        except Exception as error:  # the boundary of one partition: its host starts a new delivery (invariant 10)
            logger.exception("%s broke", self)
            # A new error without the traceback, whose frames would keep the batch.
            self.break_off(DeliveryBrokenError(in_words(error)))
        finally:
            self._shared.budget.give_back(self._buffer.clear())
            telemetry.DELIVERY_CIRCUIT_OPEN.labels(*self.topic_partition).set(0)
            telemetry.DELIVERY_BACKOFF_SECONDS.labels(*self.topic_partition).set(0)
            self._advanced.set()

    async def _deliver(self, batch: RecordBatch) -> None:
        """The four effects, in the order of the module's docstring."""
        offsets = OffsetRange(batch.first_offset, batch.next_offset)
        started = time.perf_counter()
        # A range without records only moves the position on.
        if len(batch):
            # 1. record
            await self._until_done(lambda: self._record(offsets), f"recording {offsets}")
            self._is_settled = False
            # 2. decode
            rows, left_out = await self._until_done(
                lambda: self._in_thread(lambda: self._decode(batch)), f"decoding {offsets}"
            )
            # 3. insert
            if rows.num_rows:
                refusal = await self._insert_unless_refused(offsets, rows)
                if refusal is not None:
                    del rows
                    await self._deliver_around(batch, refusal)
                    return
                self._count_insert(rows.num_rows, time.perf_counter() - started)
            self.records_left_out += left_out
        # 4. advance
        self._advance_to(offsets.hi)

    async def _insert_unless_refused(self, offsets: OffsetRange, rows: pa.Table) -> RowsRefusedError | None:
        """None once the rows are there; else why none of them is."""
        try:
            await self._until_done(lambda: self._insert(offsets, rows), f"inserting {offsets}")
        except RowsRefusedError as refusal:
            # An earlier try may have been taken, its answer lost, and the table's rules changed since.
            stored = await self._until_done(self._read_last_offset, "reading the last offset")
            if stored is None or stored < offsets.lo:
                return refusal.with_traceback(None)
        return None

    async def _deliver_around(self, batch: RecordBatch, refusal: RowsRefusedError) -> None:
        """The halves of a range that ClickHouse refused, each under its own record and token; one record is parked."""
        if len(batch) > 1:
            middle = batch.offsets[len(batch) // 2]
            await self._deliver(batch.ending_at(middle))
            await self._deliver(batch.starting_at(middle))
            return
        self._raise_if_stale(DeliveryState.RUNNING)
        logger.error("%s: parks the record at offset %d: %s", self, batch.offsets[0], refusal)
        parked = ParkedRecord(0, ParkReason.REFUSED_BY_SINK, refusal.message)
        letter = DeadLetter.of(self.table, batch, parked)
        await retrying(lambda: self._shared.dead_letters.park([letter]), what="parking", backoff=Backoff())
        telemetry.RECORDS_PARKED.labels(self.table.name, letter.reason).inc()
        self.records_refused += 1
        self._refused_in_a_row += 1
        self._advance_to(batch.next_offset)

    def _advance_to(self, next_offset: int) -> None:
        self.next_offset = next_offset
        self._advanced.set()

    async def _record(self, offsets: OffsetRange) -> None:
        self._raise_if_stale(DeliveryState.RUNNING)
        await self._shared.intents.record(self.topic_partition, offsets)

    def _decode(self, batch: RecordBatch) -> tuple[pa.Table, int]:
        decoded = self._shared.decoder.decode(self.table, batch)
        return delivery_table([decoded]), len(decoded.parked)

    async def _insert(self, offsets: OffsetRange, rows: pa.Table) -> None:
        self._raise_if_stale(DeliveryState.RUNNING)
        self._is_inserting = True
        try:
            await self._in_thread(lambda: self._shared.sink.insert(self.table, self.topic_partition, offsets, rows))
        except RowsRefusedError as refusal:
            if self._refused_in_a_row >= self._shared.refused_in_a_row_max:
                raise self._wrong_rule(refusal) from refusal
            raise
        finally:
            self._is_inserting = False

    def _wrong_rule(self, refusal: RowsRefusedError) -> SinkRejectedError:
        return SinkRejectedError(
            f"ClickHouse refused {self._refused_in_a_row} records in a row, which are parked, and refuses the next: "
            f"{refusal.message}",
            code=refusal.code,
            hint=f"if a rule of table {self.table.name!r} or of a view behind it is wrong, correct it: this goes on by "
            "itself; if it is right, raise PINTAIL_SINK_REFUSED_IN_A_ROW_MAX, and the records are parked",
        )

    async def _read_last_offset(self) -> int | None:
        return await self._in_thread(lambda: self._shared.sink.last_offset(self.table, self.topic_partition))

    async def _settle(self) -> None:
        """Record that nothing is under way. Only a courtesy to lag monitoring and to the next owner."""
        assert self.next_offset is not None
        offsets = OffsetRange(self.next_offset, self.next_offset)
        await self._until_done(lambda: self._record(offsets), f"recording {offsets}")
        self._is_settled = True

    async def _until_done(self, action: Callable[[], Awaitable[Result]], what: str) -> Result:
        """Repeats `action` until it succeeds, however long that takes. Raises SinkFencedError, StaleEpochError."""
        while True:
            try:
                result = await action()
            except SinkFencedError:
                raise
            except RowsRefusedError:
                self._raise_if_stale(*_ALIVE)
                self._note_success()
                raise
            except (SinkError, SchemaRegistryError) as error:
                self._raise_if_stale(*_ALIVE)
                if isinstance(error, SinkOverloadedError):
                    self._pace.slow_down()
                self._note_failure(error)
                # What an operator has to correct is retried as well: it goes on by itself once it is corrected.
                level = logging.WARNING if error.retriable else logging.ERROR
                logger.log(level, "%s: %s failed, again in %.1f s: %s", self, what, self.backoff_seconds, error)
                await self._pause()
            else:
                self._raise_if_stale(*_ALIVE)
                self._note_success()
                return result

    def _count_insert(self, rows: int, seconds: float) -> None:
        self.rows_delivered += rows
        self.inserts += 1
        self._refused_in_a_row = 0
        self._pace.inserted(seconds)
        telemetry.ROWS_DELIVERED.labels(self.table.name, self.topic_partition.partition).inc(rows)
        telemetry.DELIVERY_SECONDS.observe(seconds)
        telemetry.SINK_GATHERING_SECONDS.labels(self.table.name).set(self._pace.limits.age_seconds_max)

    def _note_failure(self, failure: SinkError | SchemaRegistryError) -> None:
        if not self.failures:
            self._failing_since = time.monotonic()
        self.backoff_seconds = self._backoff.next_delay_seconds()
        self.failure = failure
        telemetry.DELIVERY_FAILURES.labels(self.table.name).inc()
        telemetry.DELIVERY_CIRCUIT_OPEN.labels(*self.topic_partition).set(1)
        telemetry.DELIVERY_BACKOFF_SECONDS.labels(*self.topic_partition).set(self.backoff_seconds)

    def _note_success(self) -> None:
        if self.failures:
            logger.info("%s: goes on after %d failures in %.1f s", self, self.failures, self.failing_seconds)
        self._backoff.reset()
        self.failure = None
        self.backoff_seconds = 0.0
        telemetry.DELIVERY_CIRCUIT_OPEN.labels(*self.topic_partition).set(0)
        telemetry.DELIVERY_BACKOFF_SECONDS.labels(*self.topic_partition).set(0)

    async def _pause(self) -> None:
        self._is_pausing = True
        try:
            await asyncio.sleep(self.backoff_seconds)
        finally:
            self._is_pausing = False

    def _raise_if_failed(self) -> None:
        if self.state is DeliveryState.FAILED:
            assert self.failure is not None
            raise self.failure

    def _raise_if_stale(self, *allowed: DeliveryState) -> None:
        if self.state not in allowed:
            raise StaleEpochError(f"{self}: the assignment has ended", hint="the partition's new owner goes on")

    async def _has_arrived(self, seconds: float | None) -> bool:
        """Waits for another batch; False if none came in time."""
        self._arrived.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._arrived.wait()
        except TimeoutError:
            return False
        return True

    def _in_thread(self, action: Callable[[], Result]) -> Awaitable[Result]:
        return asyncio.get_running_loop().run_in_executor(self._shared.threads, action)


def delivered_to(intent: OffsetRange | None, stored_to: int | None) -> int | None:
    """Everything below this offset is delivered, from the BEFORE record and the position after the table's last row,
    read in this order; None if nothing ever was. An empty range is the record of an idle partition."""
    if intent is None:
        return stored_to
    if stored_to is not None and stored_to > intent.lo:
        return max(intent.hi, stored_to)
    return intent.lo
