"""What one fetch of one partition becomes, and how many bytes of such batches may wait.

Called by agents/transport.py on the consumer's thread; a batch may be dropped on any thread.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from typing import Any

from aiokafka.consumer.fetcher import READ_COMMITTED, FetchResult
from aiokafka.errors import CorruptRecordException
from faust.types import TP

from streams.batches import Headers, RecordBatch, size_of
from streams.limits import MIB

#: A batch ends at the first log batch that takes it over this, so that no fetch holds the thread for long.
FETCHED_BATCH_BYTES_MAX = 8 * MIB


class ByteBudget:
    """Bounds the bytes of live batches. Taken when a batch is fetched, given back when the batch is garbage. Everything
    but giving back happens on the consumer's thread.

    No partition may hold more than its share, so that a hot one cannot keep the others from being read; two batches
    are anybody's share. A partition with one live batch or none is always within it, and so is the whole: a batch
    larger than the budget, or one that a stream remembers as its last, stops nothing.
    """

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self._live: dict[TP, list[int]] = {}  # the sizes of the live batches of each partition that has any
        #: Filled by finalizers, which may run on any thread and between any two steps of this one: so without a lock.
        self._given_back: deque[tuple[TP, int]] = deque()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    @property
    def bytes_used(self) -> int:
        """Bytes of live batches."""
        self._settle()
        return sum(map(sum, self._live.values()))

    def admits(self, tp: TP, *, partitions: int) -> bool:
        """Whether another batch of this partition, one of so many, may be fetched."""
        is_full = self.bytes_used >= self.bytes_max and sum(map(len, self._live.values())) > 1
        live = self._live.get(tp, [])
        share = max(2 * FETCHED_BATCH_BYTES_MAX, self.bytes_max // max(1, partitions))
        return not is_full and (len(live) <= 1 or sum(live) < share)

    def take(self, tp: TP, batch: RecordBatch) -> None:
        """Counts the batch until nothing refers to it any more."""
        self._live.setdefault(tp, []).append(batch.size_bytes)
        weakref.finalize(batch, self._give_back, tp, batch.size_bytes)

    async def wait_for_room(self) -> None:
        """Returns once a live batch is given back, at once if there is none; one waiter at a time."""
        room = asyncio.Event()
        self._waiter = (asyncio.get_running_loop(), room)
        if self._live and not self._given_back:
            await room.wait()

    def _settle(self) -> None:
        while self._given_back:
            tp, size_bytes = self._given_back.popleft()
            self._live[tp].remove(size_bytes)
            if not self._live[tp]:
                del self._live[tp]

    def _give_back(self, tp: TP, size_bytes: int) -> None:
        self._given_back.append((tp, size_bytes))
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter[0].is_closed():
            waiter[0].call_soon_threadsafe(waiter[1].set)


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
            if fetched.next_fetch_offset > batch.first_offset:  # the next fetch starts at the damage, and reports it
                result._partition_records = None
                break
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


def headers_of(record: Any) -> Headers:
    """Of a record of aiokafka; values may be null in Kafka."""
    return tuple((name, value or b"") for name, value in record.headers)


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
    batch.size_bytes += size_of(values, keys)
    for index, record in enumerate(records, appended_from):
        if record.headers:
            batch.headers[index] = headers_of(record)
