"""What an aiokafka consumer has fetched, as batches, and how many bytes of such batches may wait.

Called by agents/transport.py on the consumer's thread and by agents/log_consumer.py; a batch may be dropped on any
thread.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections import deque
from collections.abc import Collection
from typing import Any, Protocol

import aiokafka
from aiokafka.consumer.fetcher import READ_COMMITTED, Fetcher, FetchError, FetchResult
from aiokafka.errors import ConsumerStoppedError, CorruptRecordException, KafkaError, OffsetOutOfRangeError
from faust.types import TP

from streams.batches import RecordBatch, headers_of, size_of
from streams.limits import GATHERED_BYTES, MIB
from streams.retry import in_words

logger = logging.getLogger(__name__)

#: A batch ends at the first log batch that takes it over this, so that no fetch holds the thread for long.
FETCHED_BATCH_BYTES_MAX = 8 * MIB
#: How long the broker gathers for a fetch that follows another one, unless GATHERED_BYTES are there. It is most of what
#: a steady trickle waits to become visible: a transaction costs milliseconds however small it is, so a trickle must not
#: make one of every record.
FETCH_WAIT_MS_MAX = 40
#: When nothing was fetched for so many times as long, the next fetch brings the first record that comes.
PAUSE_WAITS = 2


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


class FetchReports(Protocol):
    """Who is told what could not be fetched, on the loop that fetches."""

    def report_out_of_range(self, tp: TP) -> None:
        """The log does not hold the position."""
        ...

    def report_unreadable(self, tp: TP, why: str) -> None:
        """What was fetched is damaged and was dropped; the position stays where it is."""
        ...


class Fetches:
    """What an aiokafka consumer has fetched, in place of its `getmany`; the broker gathers what trickles in."""

    def __init__(
        self,
        consumer: aiokafka.AIOKafkaConsumer,
        reports: FetchReports,
        *,
        budget: ByteBudget,
    ) -> None:
        self._consumer = consumer
        self._reports = reports
        self._budget = budget

    async def next_batches(self, active: Collection[TP], timeout_seconds: float) -> dict[TP, list[RecordBatch]]:
        """The next batch of each active partition that has one, at once if there is any; empty after the time-out.

        Then the broker gathers for the next fetch; after a pause it does not, so that a record that comes alone does
        not wait for company. Raises ConsumerStoppedError."""
        fetcher = self._consumer._fetcher
        if self._consumer._closed or fetcher._closed:
            raise ConsumerStoppedError
        with fetcher._subscriptions.fetch_context():
            return await self._wait_for_batches(fetcher, active, timeout_seconds)

    async def _wait_for_batches(
        self, fetcher: Fetcher, active: Collection[TP], timeout_seconds: float
    ) -> dict[TP, list[RecordBatch]]:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
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
                waiting.append(asyncio.ensure_future(self._budget.wait_for_room()))
            pause = min(remaining, PAUSE_WAITS * fetcher._fetch_max_wait_ms / 1000)
            done, pending = await asyncio.wait(waiting, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            for task in pending:
                task.cancel()
            if fetcher._closed:
                return {}
            if not done:
                fetcher._fetch_min_bytes = 1
            for task in done:
                task.result()

    def _drain_fetched(self, fetcher: Fetcher, active: Collection[TP]) -> tuple[dict[TP, list[RecordBatch]], bool]:
        """What is fetched for active partitions and within the budget; True if the budget holds something back."""
        batches: dict[TP, list[RecordBatch]] = {}
        is_holding_back = False
        for topic_partition, result in list(fetcher._records.items()):
            tp = TP(topic_partition.topic, topic_partition.partition)
            if tp not in active:
                if not fetcher._subscriptions.is_assigned(topic_partition):
                    del fetcher._records[topic_partition]
                continue
            if not self._budget.admits(tp, partitions=len(active)):
                is_holding_back = True
                continue
            if isinstance(result, FetchError):
                self._report(tp, result)
            elif result.check_assignment(topic_partition) and result.has_more():
                batch = self._drain_one(result, tp)
                if batch is not None:
                    self._budget.take(tp, batch)
                    batches[tp] = [batch]
            if isinstance(result, FetchError) or not result.has_more():
                del fetcher._records[topic_partition]
                fetcher._notify(fetcher._wait_consume_future)
        return batches, is_holding_back

    def _drain_one(self, result: FetchResult, tp: TP) -> RecordBatch | None:
        """The next batch of this fetch; None if it brings none, or cannot be read. Then nothing of what is left of it
        is used, and the position stays where it is."""
        generation = getattr(self._consumer._coordinator, "generation", 0)  # outside of a group there is none
        try:
            return drain(result, tp, generation)
        except Exception as error:  # noqa: BLE001  # the boundary of one partition: the others' batches are drained
            result._partition_records = None
            self._reports.report_unreadable(tp, in_words(error))
            return None

    def _report(self, tp: TP, failure: FetchError) -> None:
        try:
            failure.check_raise()
        except OffsetOutOfRangeError:
            self._reports.report_out_of_range(tp)
        except KafkaError as error:
            logger.error("fetching %s: %r; trying again", tp, error)


def drain(
    result: FetchResult, topic_partition: TP, generation: int, bytes_max: int = FETCHED_BATCH_BYTES_MAX
) -> RecordBatch | None:
    """The records of a fetch as one batch of about `bytes_max`; None when the position did not move. What is left of
    the fetch stays in `result` for the next call.

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
    while log_batches.has_next() and batch.size_bytes < bytes_max:
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
            batch.headers[index] = headers_of(record.headers)
