"""What one fetch of one partition becomes, and how many bytes of such batches may wait.

Called by agents/transport.py on the consumer's thread; a batch may be dropped on any thread.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from typing import Any

from aiokafka.consumer.fetcher import READ_COMMITTED, FetchResult
from aiokafka.errors import CorruptRecordException
from faust.types import TP

from streams.batches import RecordBatch
from streams.limits import MIB

#: A batch ends at the first log batch that takes it over this, so that no fetch holds the thread for long.
FETCHED_BATCH_BYTES_MAX = 4 * MIB


class ByteBudget:
    """Bounds the bytes of live batches. Taken when a batch is fetched, given back when the batch is garbage."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.bytes_used = 0
        self._lock = threading.Lock()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    @property
    def is_full(self) -> bool:
        """True while no further batch may be fetched."""
        return self.bytes_used >= self.bytes_max

    def take(self, batch: RecordBatch) -> None:
        """Counts the batch until nothing refers to it any more."""
        with self._lock:
            self.bytes_used += batch.size_bytes
        weakref.finalize(batch, self._give_back, batch.size_bytes)

    async def wait_for_room(self) -> None:
        """Returns once less than half of the budget is used; one waiter at a time."""
        room = asyncio.Event()
        with self._lock:
            if self.bytes_used <= self.bytes_max // 2:
                return
            self._waiter = (asyncio.get_running_loop(), room)
        await room.wait()

    def _give_back(self, size_bytes: int) -> None:
        with self._lock:
            self.bytes_used -= size_bytes
            if self._waiter is None or self.bytes_used > self.bytes_max // 2:
                return
            (loop, room), self._waiter = self._waiter, None
        if not loop.is_closed():
            loop.call_soon_threadsafe(room.set)


def drain(result: FetchResult, topic_partition: TP, generation: int) -> RecordBatch | None:
    """The records of a fetch as one batch of about FETCHED_BATCH_BYTES_MAX; None when the position did not move.
    What is left of the fetch stays in `result` for the next call.

    Mirrors aiokafka's PartitionRecords._unpack_records (CRC, aborted transactions, control batches, records below the
    position) without building a ConsumerRecord per record.
    """
    fetched = result._partition_records
    log_batches = fetched._records
    state = result._assignment.state_value(topic_partition)
    batch = RecordBatch(
        topic=topic_partition.topic,
        partition=topic_partition.partition,
        first_offset=fetched.next_fetch_offset,
        next_offset=fetched.next_fetch_offset,
        generation=generation,
    )
    while log_batches.has_next() and batch.size_bytes < FETCHED_BATCH_BYTES_MAX:
        log_batch = log_batches.next_batch()
        if fetched._check_crcs and not log_batch.validate_crc():
            raise CorruptRecordException(f"invalid CRC in {topic_partition} at {fetched.next_fetch_offset}")
        if not _is_hidden(fetched, log_batch):
            _append_records(batch, log_batch, fetched.next_fetch_offset)
        fetched.next_fetch_offset = log_batch.next_offset
    if not log_batches.has_next():
        result._partition_records = None
    batch.next_offset = fetched.next_fetch_offset
    state.consumed_to(batch.next_offset)
    batch.high_watermark = state.highwater
    return batch if batch.next_offset > batch.first_offset else None


def _is_hidden(fetched: Any, log_batch: Any) -> bool:
    """True for control batches and for batches of aborted transactions."""
    if fetched._isolation_level == READ_COMMITTED and log_batch.producer_id is not None:
        fetched._consume_aborted_up_to(log_batch.base_offset)
        if log_batch.is_control_batch and fetched._contains_abort_marker(log_batch):
            fetched._aborted_producers.discard(log_batch.producer_id)
        if log_batch.is_transactional and log_batch.producer_id in fetched._aborted_producers:
            return True
    return bool(log_batch.is_control_batch)


def _append_records(batch: RecordBatch, log_batch: Any, position: int) -> None:
    """A list at a time: a step per record and list would cost as much as decoding the record."""
    records = list(log_batch)
    if records and records[0].offset < position:
        records = [record for record in records if record.offset >= position]
    if not records:
        return
    appended_from, first_offset, last_offset = len(batch), records[0].offset, records[-1].offset
    is_dense = last_offset - first_offset == len(records) - 1
    values = [record.value for record in records]
    keys = [record.key for record in records]
    batch.values += values
    batch.keys += keys
    batch.offsets += range(first_offset, last_offset + 1) if is_dense else [record.offset for record in records]
    batch.timestamps_ms += [record.timestamp for record in records]
    batch.size_bytes += sum(map(len, filter(None, values))) + sum(map(len, filter(None, keys)))
    for index, record in enumerate(records, appended_from):
        if record.headers:
            batch.headers[index] = tuple((name, value or b"") for name, value in record.headers)
