"""When a micro-batch is due and where it ends: by rows, bytes, age, or a replay's exact range."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from schemas.table import PartitionBy
from streams.batches import RecordBatch, joined
from streams.positions import OffsetRange, TopicPartition
from streams.processes.microbatches import BufferBudget, FlushLimits, MicroBatchBuffer, Pace
from tests.sink_log import PartitionLog

NEVER = 1e6


@pytest.fixture
def log() -> PartitionLog:
    log = PartitionLog(TopicPartition("t", 0))
    log.fill(Random(1), 1000)
    return log


def buffer_of(
    *batches: RecordBatch, rows: int = 10**6, size_bytes: int = 10**9, age: float = NEVER
) -> MicroBatchBuffer:
    buffer = MicroBatchBuffer(Pace(FlushLimits(rows_max=rows, bytes_max=size_bytes, age_seconds_max=age)))
    for batch in batches:
        buffer.put(batch, counted_bytes=batch.size_bytes)
    return buffer


def test_joining_what_was_cut_gives_the_whole_back(log: PartitionLog) -> None:
    whole = log.batch(0, log.next_offset)
    whole.headers = {3: (("a", b"1"),), 900: (("b", b"2"),)}
    random = Random(2)
    for _ in range(50):
        first, second = sorted(random.randint(0, log.next_offset) for _ in range(2))
        parts = [whole.ending_at(first), whole.starting_at(first).ending_at(second), whole.starting_at(second)]
        assert [part.next_offset for part in parts] == [first, second, log.next_offset]
        assert joined(parts) == whole


def test_nothing_is_due_without_records() -> None:
    assert buffer_of().due_in_seconds() is None


def test_age_counts_from_the_micro_batch_before_so_that_what_follows_a_pause_does_not_wait(log: PartitionLog) -> None:
    buffer = buffer_of(log.batch(0, 10), age=100.0)
    assert due_in(buffer) <= 0
    buffer.take()
    buffer.put(log.batch(10, 20), counted_bytes=0)
    first = due_in(buffer)
    buffer.put(log.batch(20, 30), counted_bytes=0)
    assert 90 < due_in(buffer) <= first <= 100
    assert buffer.take().offsets == (10, 30)


def due_in(buffer: MicroBatchBuffer) -> float:
    seconds = buffer.due_in_seconds()
    assert seconds is not None
    return seconds


@pytest.mark.parametrize("limit", [{"rows": 100}, {"size_bytes": 12_000}])
def test_rows_and_bytes_make_it_due_at_once(limit: dict[str, int], log: PartitionLog) -> None:
    buffer = buffer_of(log.batch(0, 1), **limit)
    buffer.take()
    buffer.put(log.batch(1, 50), counted_bytes=0)
    assert due_in(buffer) > 0
    buffer.put(log.batch(50, 250), counted_bytes=0)
    assert due_in(buffer) == 0


def test_taking_everything_loses_no_record_and_no_counted_byte(log: PartitionLog) -> None:
    buffer = buffer_of(*log.fetches(0, Random(3)), rows=64, age=0.0)
    taken = []
    while buffer.due_in_seconds() is not None:
        taken.append(buffer.take())
    assert joined([each.batch for each in taken]) == log.batch(0, log.next_offset)
    assert max(len(each.batch) for each in taken) == 64
    assert sum(each.counted_bytes for each in taken) == log.batch(0, log.next_offset).size_bytes
    assert [a.offsets.hi for a in taken[:-1]] == [b.offsets.lo for b in taken[1:]]


@pytest.mark.parametrize("seed", range(20))
def test_a_replay_is_cut_at_its_edges_however_fetches_are_cut(seed: int, log: PartitionLog) -> None:
    random = Random(seed)
    lo, hi = sorted(random.sample(range(log.next_offset), 2))
    buffer = buffer_of(rows=10, age=0.0)
    buffer.replay = OffsetRange(lo, hi)
    fetches = log.fetches(lo, random)
    while buffer.due_in_seconds() is None:
        buffer.put(next(fetches), counted_bytes=0)
    replay = buffer.take()
    assert replay.offsets == (lo, hi)
    assert replay.batch == log.batch(lo, hi)
    assert buffer.replay is None
    if buffer.due_in_seconds() is not None:
        assert buffer.take().offsets.lo == hi


DAY_MS = 86_400_000


def stamped(days: list[float], first_offset: int = 0) -> RecordBatch:
    """One record per entry, so many days after 2026-01-31."""
    start_ms, next_offset = 1_769_817_600_000, first_offset + len(days)
    return RecordBatch(
        "t",
        0,
        first_offset,
        next_offset,
        values=[b"{}"] * len(days),
        keys=[None] * len(days),
        offsets=list(range(first_offset, next_offset)),
        timestamps_ms=[start_ms + int(day * DAY_MS) for day in days],
    )


@pytest.mark.parametrize(
    ("partition_by", "ends"),
    [
        (None, [8]),
        (PartitionBy.PARTITION, [8]),
        (PartitionBy.DAY, [1, 3, 4, 5, 7, 8]),
        (PartitionBy.MONTH, [1, 3, 4, 8]),
    ],
)
def test_a_micro_batch_ends_where_clickhouse_would_begin_another_part(
    partition_by: PartitionBy | None, ends: list[int]
) -> None:
    buffer = MicroBatchBuffer(Pace(FlushLimits(age_seconds_max=NEVER)), partition_by)
    for batch in (stamped([0.9, 1.0, 1.5]), stamped([0.5, 1.5, 2.0, 2.9, 3.0], first_offset=3)):
        buffer.put(batch, counted_bytes=0)
    taken = []
    while buffer.due_in_seconds() is not None:
        assert due_in(buffer) <= 0, "what was cut off by its time waits for nothing"
        taken.append(buffer.take().offsets)
    assert [offsets.hi for offsets in taken] == ends


def test_a_replay_is_not_cut_by_time() -> None:
    buffer = MicroBatchBuffer(Pace(FlushLimits()), PartitionBy.DAY)
    buffer.replay = OffsetRange(0, 3)
    buffer.put(stamped([0, 1, 2, 3]), counted_bytes=0)
    assert [buffer.take().offsets.hi, buffer.take().offsets.hi] == [3, 4]


async def test_the_budget_admits_what_fits_and_one_that_never_would() -> None:
    budget = BufferBudget(100)
    await budget.take(1000)
    waiting = asyncio.create_task(budget.take(60))
    second = asyncio.create_task(budget.take(60))
    await asyncio.sleep(0)
    assert not waiting.done()
    budget.give_back(1000)
    await asyncio.wait_for(waiting, 5)
    assert budget.bytes_used == 60
    assert not second.done()
    budget.give_back(60)
    await asyncio.wait_for(second, 5)


def test_too_many_parts_make_inserts_fewer_and_larger_until_clickhouse_keeps_up() -> None:
    configured = FlushLimits(rows_max=100, bytes_max=1_000, age_seconds_max=0.2)
    pace = Pace(configured)
    assert pace.limits == configured
    pace.slow_down()
    assert pace.limits == FlushLimits(rows_max=200, bytes_max=2_000, age_seconds_max=0.4)
    for _ in range(20):
        pace.slow_down()
    assert pace.limits == FlushLimits(rows_max=400, bytes_max=4_000, age_seconds_max=10.0)
    for _ in range(100):
        pace.inserted(0.01)
    assert pace.limits == configured


def test_slow_inserts_are_not_sent_more_often_than_they_take() -> None:
    pace = Pace(FlushLimits(age_seconds_max=0.2))
    for _ in range(50):
        pace.inserted(1.5)
    assert pace.limits.age_seconds_max == pytest.approx(1.5, rel=0.01)
    assert pace.limits.rows_max == FlushLimits.rows_max
    for _ in range(50):
        pace.inserted(60.0)
    assert pace.limits.age_seconds_max == 10.0


def test_an_age_above_the_ceiling_is_kept_as_configured() -> None:
    pace = Pace(FlushLimits(age_seconds_max=60.0))
    pace.slow_down()
    assert pace.limits.age_seconds_max == 60.0
