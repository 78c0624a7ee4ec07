"""The data path of one partition: fetched batches in, one durable transaction out, under one assignment.

Everything queued for the partition goes into one transaction (group commit): small ones when idle, large ones under
backlog. Order of effects, which is the crash safety:
    0. confirm      the group has known this worker within a session; one that was stopped for longer waits here
    1. decode       records become typed columns, or parked records
    2. park         dead letters are durable in Kafka
    3. apply        rows, deletes and next_offset: ONE DuckDB transaction
    4. announce     waiters and the partition's state learn the new position
A crash before 3 repeats 1 and 2 (a dead letter may repeat, with the same provenance); after 3 nothing repeats.
While the schema registry cannot give what 1 needs, the partition waits there, with everything behind it in the log.
Called by processes/hosting.py, which makes a new object for each assignment.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from functools import partial

from schemas.table import TableDefinition
from streams import telemetry
from streams.adapters.duckdb_store import PartitionStore
from streams.batches import RecordBatch, contiguous
from streams.errors import SchemaRegistryError, StoreError
from streams.limits import (
    GATHERED_BYTES,
    GATHERING_SECONDS,
    IDLE_SECONDS,
    IDLE_WAL_BYTES_MAX,
    PARKED_TOGETHER_MAX,
    TRANSACTION_BYTES_MAX,
    WAL_BYTES_MAX,
)
from streams.ports import DeadLetter, DeadLetters, DecodedBatch, Decoder
from streams.retry import Backoff, retrying

logger = logging.getLogger(__name__)

DECODE_BACKOFF_SECONDS_MAX = 10.0


def ingestion_threads() -> Executor:
    """Where the partitions of a worker decode and apply: as many threads as cores. More would take turns at the
    interpreter's lock with the loops that fetch and answer, which then come to their turn a second late."""
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="ingestion")


async def nobody_to_ask() -> None:
    """For a partition that no group assigns."""


class PartitionIngestion:
    """Applies the batches of one partition, in order, until it is cancelled."""

    def __init__(
        self,
        store: PartitionStore,
        *,
        tables: Mapping[str, TableDefinition],
        decoder: Decoder,
        dead_letters: DeadLetters,
        announce: Callable[[Mapping[str, int]], Awaitable[None]],
        threads: Executor,
        is_counted: bool = True,
        confirmed: Callable[[], Awaitable[None]] = nobody_to_ask,
    ) -> None:
        self._store = store
        self._tables = tables
        self._decoder = decoder
        self._dead_letters = dead_letters
        self._announce = announce
        self._confirmed = confirmed
        self._is_counted = is_counted  # False for a copy, whose records another worker counts
        self._in_thread = partial(asyncio.get_running_loop().run_in_executor, threads)
        self._queue: deque[RecordBatch] = deque()
        self._queued_bytes = 0
        self._arrived = asyncio.Event()
        #: Set while as much is queued as is worth a transaction of its own.
        self._pressing = asyncio.Event()
        self._fault: StoreError | None = None
        self._broken_off = asyncio.Event()
        #: Why the partition waits before it decodes; None while it goes on.
        self.obstacle: SchemaRegistryError | None = None

    def submit(self, batch: RecordBatch) -> None:
        """Queues a batch of any of the partition's topics. The transport bounds the bytes that can wait here."""
        self._queue.append(batch)
        self._queued_bytes += batch.size_bytes
        self._arrived.set()
        if self._queued_bytes >= GATHERED_BYTES:
            self._pressing.set()

    def break_off(self, fault: StoreError) -> None:
        """Makes `run` raise `fault` instead of starting another transaction."""
        self._fault = fault
        self._arrived.set()
        self._pressing.set()
        self._broken_off.set()

    def discard_queued(self) -> None:
        """Lets go of what waits, and of its bytes; the log still has it."""
        self._queue.clear()
        self._queued_bytes = 0

    async def run(self) -> None:
        """Group commits until cancelled. Raises what the store raises, and the fault of `break_off`.

        A transaction in flight outlives the cancellation; closing the store waits for it."""
        while True:
            await self._arrival()
            await self._gather()
            if self._fault is not None:
                raise self._fault
            await self._commit(self._take_queued())

    async def _arrival(self) -> None:
        """Waits for what comes next, and uses a longer wait to fold what is there."""
        with suppress(TimeoutError):
            async with asyncio.timeout(IDLE_SECONDS):
                await self._arrived.wait()
                return
        if self._store.wal_bytes() > IDLE_WAL_BYTES_MAX:
            await self._in_thread(self._fold)
        await self._arrived.wait()

    async def _gather(self) -> None:
        """Lets what the same fetch brought of the partition's other topics arrive, unless enough is there."""
        with suppress(TimeoutError):
            async with asyncio.timeout(GATHERING_SECONDS):
                await self._pressing.wait()

    def _take_queued(self) -> list[RecordBatch]:
        batches: list[RecordBatch] = []
        size_bytes = 0
        while self._queue and size_bytes < TRANSACTION_BYTES_MAX:
            batches.append(self._queue.popleft())
            size_bytes += batches[-1].size_bytes
        self._queued_bytes -= size_bytes
        if self._queued_bytes < GATHERED_BYTES:
            self._pressing.clear()
        if not self._queue:
            self._arrived.clear()
        return batches

    async def _commit(self, batches: Sequence[RecordBatch]) -> None:
        # 0. confirm
        await self._confirmed()
        started = time.perf_counter()
        # 1. decode
        decoded, is_applied = await self._decoded(batches)
        if not is_applied:
            # 2. park
            for batch in decoded:
                await self._park(dead_letters_of(batch))
            # 3. apply
            await self._in_thread(self._apply, decoded)
        # 4. announce
        await self._announce({batch.topic: batch.next_offset for batch in batches})
        if self._is_counted:
            _count(decoded, seconds=time.perf_counter() - started)

    async def _decoded(self, batches: Sequence[RecordBatch]) -> tuple[list[DecodedBatch], bool]:
        """Decodes once every schema can be had, however long that takes. Where nothing is to be parked it also applies,
        and says so: a second visit to a thread would cost a small transaction much. Raises the fault of `break_off`."""
        backoff = Backoff(ceiling_seconds=DECODE_BACKOFF_SECONDS_MAX)
        partition = self._store.partition
        waiting = telemetry.DECODE_BACKOFF_SECONDS.labels(partition)
        try:
            while True:
                try:
                    return await self._in_thread(self._decode_and_apply_unless_parked, batches)
                except SchemaRegistryError as error:
                    self.obstacle = error
                    delay = backoff.next_delay_seconds()
                    waiting.set(delay)
                    # What an operator has to correct is tried again as well: it goes on by itself once it is corrected.
                    level = logging.WARNING if error.retriable else logging.ERROR
                    logger.log(level, "partition %d waits, again in %.1f s: %s", partition, delay, error)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._broken_off.wait(), delay)
                if self._fault is not None:
                    raise self._fault
        finally:
            self.obstacle = None
            waiting.set(0)

    def _decode_and_apply_unless_parked(self, batches: Sequence[RecordBatch]) -> tuple[list[DecodedBatch], bool]:
        decoded = self._decode(batches)
        if any(batch.parked for batch in decoded):
            return decoded, False
        self._apply(decoded)
        return decoded, True

    def _decode(self, batches: Sequence[RecordBatch]) -> list[DecodedBatch]:
        positions = self._store.next_offsets()
        # Re-reads below the stored position are left out before they are decoded, so that they are not parked again.
        fresh = [batch.starting_at(positions.get(batch.topic, 0)) for batch in batches]
        return [self._decoder.decode(self._tables[batch.topic], batch) for batch in contiguous(fresh)]

    async def _park(self, letters: Sequence[DeadLetter]) -> None:
        """A few at a time, so that a batch of poison costs neither much memory nor the others their turn."""
        for start in range(0, len(letters), PARKED_TOGETHER_MAX):
            together = letters[start : start + PARKED_TOGETHER_MAX]
            await retrying(partial(self._dead_letters.park, together), what="parking dead letters", backoff=Backoff())

    def _apply(self, decoded: Sequence[DecodedBatch]) -> None:
        self._store.apply(decoded)
        if self._store.wal_bytes() > WAL_BYTES_MAX:
            self._fold()

    def _fold(self) -> None:
        with telemetry.CHECKPOINT_SECONDS.time():
            self._store.checkpoint_unless_frozen()


def dead_letters_of(decoded: DecodedBatch) -> list[DeadLetter]:
    """The parked records of a batch, with their provenance."""
    return [DeadLetter.of(decoded.table, decoded.source, parked) for parked in decoded.parked]


def _count(decoded: Sequence[DecodedBatch], *, seconds: float) -> None:
    telemetry.TRANSACTION_SECONDS.observe(seconds)
    for batch in decoded:
        labels = (batch.table.name, str(batch.source.partition))
        telemetry.RECORDS_APPLIED.labels(*labels).inc(batch.rows.num_rows + batch.deletes.num_rows)
        for parked in batch.parked:
            telemetry.RECORDS_PARKED.labels(batch.table.name, parked.reason).inc()
