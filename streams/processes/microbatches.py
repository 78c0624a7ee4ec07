"""Fetched batches of a partition, gathered into micro-batches: when the next one is due, and where it ends.

A micro-batch is one contiguous offset range. It is due by rows, by bytes, or when the one before it is so long ago,
whichever comes first: so nothing waits longer than that, and what comes after a pause does not wait at all. A replay is
due when exactly its range is there, however the fetches that bring it are cut. Where ClickHouse splits parts by time,
a micro-batch ends before the first record of another day or month, so that its insert stays one part. Called by
processes/delivery.py.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import lru_cache

from schemas.table import PartitionBy
from streams.batches import RecordBatch, joined
from streams.config import Settings
from streams.positions import OffsetRange

#: A micro-batch gathers no longer than this, however ClickHouse fares.
GATHERING_SECONDS_MAX = 10.0
_DAY_MS = 86_400_000
_EPOCH_DAY = date(1970, 1, 1).toordinal()
#: Rows and bytes of a micro-batch grow to so many times what is configured.
SIZE_FACTOR_MAX = 4.0


@lru_cache(maxsize=1024)
def _month_of_day(day: int) -> tuple[int, int]:
    """Of a day since 1970. Years that no calendar holds are those of records that are parked."""
    found = date.fromordinal(min(max(day + _EPOCH_DAY, 1), date.max.toordinal()))
    return found.year, found.month


_PERIOD_OF_DAY: dict[PartitionBy | None, Callable[[int], object]] = {
    PartitionBy.DAY: lambda day: day,
    PartitionBy.MONTH: _month_of_day,
}


@dataclass(frozen=True)
class FlushLimits:
    """A micro-batch is due when it reaches any of these; its age counts from the moment the one before it was taken."""

    rows_max: int = 50_000
    bytes_max: int = 16 * 1024 * 1024
    age_seconds_max: float = 0.2

    @classmethod
    def of(cls, settings: Settings) -> FlushLimits:
        """As configured."""
        return cls(settings.sink_flush_rows_max, settings.sink_flush_bytes_max, settings.sink_flush_interval_ms / 1000)


class Pace:
    """How much the micro-batches of one table gather: the configured limits while ClickHouse keeps up, more while it
    has too many parts or takes longer for an insert than the configured age. Shared by the table's partitions."""

    def __init__(self, configured: FlushLimits) -> None:
        self._configured = configured
        #: What the limits are multiplied by; grows with "too many parts" and shrinks with every insert.
        self._factor = 1.0
        self._insert_seconds = 0.0

    @property
    def limits(self) -> FlushLimits:
        """The limits at present."""
        configured = self._configured
        size_factor = min(self._factor, SIZE_FACTOR_MAX)
        age = max(configured.age_seconds_max * self._factor, self._insert_seconds)
        return FlushLimits(
            int(configured.rows_max * size_factor),
            int(configured.bytes_max * size_factor),
            max(configured.age_seconds_max, min(age, GATHERING_SECONDS_MAX)),
        )

    def slow_down(self) -> None:
        """ClickHouse had too many parts: half as many inserts, or the largest that are allowed."""
        self._factor = min(2 * self._factor, GATHERING_SECONDS_MAX / self._configured.age_seconds_max)

    def inserted(self, seconds: float) -> None:
        """An insert took that long."""
        self._factor = max(1.0, 0.9 * self._factor)
        self._insert_seconds += 0.2 * (seconds - self._insert_seconds)


class BufferBudget:
    """Bounds the bytes that wait for their delivery or are under way, over all partitions of a worker."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.bytes_used = 0
        self._room = asyncio.Event()

    async def take(self, size_bytes: int) -> None:
        """Waits for room; what is larger than the whole budget gets in when nothing else is there."""
        while self.bytes_used and self.bytes_used + size_bytes > self.bytes_max:
            self._room.clear()
            await self._room.wait()
        self.bytes_used += size_bytes

    def give_back(self, size_bytes: int) -> None:
        """Lets waiting ones in."""
        self.bytes_used -= size_bytes
        self._room.set()


@dataclass(frozen=True)
class MicroBatch:
    """Records of exactly `offsets`, and the bytes that the budget counts for them."""

    batch: RecordBatch
    counted_bytes: int

    @property
    def offsets(self) -> OffsetRange:
        """Every offset it accounts for."""
        return OffsetRange(self.batch.first_offset, self.batch.next_offset)


@dataclass
class _Waiting:
    batch: RecordBatch
    counted_bytes: int


class MicroBatchBuffer:
    """The batches of one partition that wait, each starting where the one before it ends."""

    def __init__(self, pace: Pace, partition_by: PartitionBy | None = None) -> None:
        self._pace = pace
        self._partition_by = partition_by
        self._waiting: deque[_Waiting] = deque()
        self._rows = 0
        self._size_bytes = 0
        self._taken_at = -math.inf
        #: The range that the next micro-batch must have; None once it is taken.
        self.replay: OffsetRange | None = None

    def put(self, batch: RecordBatch, *, counted_bytes: int) -> None:
        """Adds a batch that accounts for at least one offset."""
        assert not self._waiting or self._waiting[-1].batch.next_offset == batch.first_offset
        self._waiting.append(_Waiting(batch, counted_bytes))
        self._rows += len(batch)
        self._size_bytes += batch.size_bytes

    def due_in_seconds(self) -> float | None:
        """Until the next micro-batch is due, 0 or less if it is; None if that depends on what arrives."""
        if not self._waiting:
            return None
        if self.replay is not None:
            return 0 if self._waiting[-1].batch.next_offset >= self.replay.hi else None
        limits = self._pace.limits
        if self._rows >= limits.rows_max or self._size_bytes >= limits.bytes_max:
            return 0
        return self._taken_at + limits.age_seconds_max - time.monotonic()

    def take(self) -> MicroBatch:
        """The next micro-batch. Cut exactly at a replay's edge and at the limit of rows; bytes may go over theirs by
        one batch."""
        whole = self._edge()
        edge = whole if self.replay is not None else self._end_of_part(whole)
        taken: list[RecordBatch] = []
        counted_bytes = 0
        while self._waiting and self._waiting[0].batch.first_offset < edge:
            waiting = self._waiting.popleft()
            head, rest = waiting.batch.ending_at(edge), waiting.batch.starting_at(edge)
            if waiting.batch.next_offset > edge:
                rest_counted = min(rest.size_bytes, waiting.counted_bytes)
                self._waiting.appendleft(_Waiting(rest, rest_counted))
                waiting.counted_bytes -= rest_counted
            taken.append(head)
            counted_bytes += waiting.counted_bytes
        self.replay = None
        # What was cut off by its time is due at once.
        self._taken_at = time.monotonic() if edge == whole else -math.inf
        self._rows = sum(len(waiting.batch) for waiting in self._waiting)
        self._size_bytes = sum(waiting.batch.size_bytes for waiting in self._waiting)
        return MicroBatch(joined(taken), counted_bytes)

    def clear(self) -> int:
        """Drops everything; returns the bytes that the budget counts for it."""
        counted_bytes = sum(waiting.counted_bytes for waiting in self._waiting)
        self._waiting.clear()
        return counted_bytes

    def _end_of_part(self, edge: int) -> int:
        """`edge`, or the offset of the first record before it that ClickHouse would put into another part."""
        if self._partition_by not in _PERIOD_OF_DAY:
            return edge
        period_of_day = _PERIOD_OF_DAY[self._partition_by]
        first: object = None
        for batch in (waiting.batch for waiting in self._waiting):
            for offset, timestamp_ms in zip(batch.offsets, batch.timestamps_ms, strict=True):
                if offset >= edge:
                    return edge
                period = period_of_day(timestamp_ms // _DAY_MS)
                if first is None:
                    first = period
                elif period != first:
                    return offset
        return edge

    def _edge(self) -> int:
        """The offset at which the next micro-batch ends, by its size."""
        if self.replay is not None:
            return self.replay.hi
        limits = self._pace.limits
        rows = size_bytes = edge = 0
        for waiting in self._waiting:
            batch = waiting.batch
            if rows + len(batch) > limits.rows_max:
                return batch.offsets[limits.rows_max - rows]
            rows += len(batch)
            size_bytes += batch.size_bytes
            edge = batch.next_offset
            if size_bytes >= limits.bytes_max:
                break
        return edge
