"""Batches are taken without a hole: what is missing is read again, what a seek left over is not taken."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from aiokafka.errors import KafkaTimeoutError

from streams.batches import RecordBatch
from streams.positions import TopicPartition
from streams.processes import log_reading
from streams.processes.log_reading import LogReading
from tests.watched_log import WatchedLog, until

TP = TopicPartition("flights", 0)


def batch(first: int, end: int) -> RecordBatch:
    count = end - first
    return RecordBatch(*TP, first, end, [b"{}"] * count, [None] * count, list(range(first, end)), [0] * count)


@pytest.fixture
def log() -> WatchedLog:
    return WatchedLog()


@pytest.fixture
async def reading(log: WatchedLog, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LogReading]:
    monkeypatch.setattr(log_reading, "REREAD_SECONDS_MIN", 0.01)
    reading = LogReading(log)
    await reading.start({TP: 10})
    yield reading
    await reading.stop()


def taken(reading: LogReading, first: int, end: int) -> list[int]:
    fresh = reading.accept(batch(first, end))
    return [] if fresh is None else fresh.offsets


async def test_batches_that_continue_each_other_are_taken_whole(reading: LogReading, log: WatchedLog) -> None:
    assert taken(reading, 10, 12) == [10, 11]
    assert taken(reading, 12, 13) == [12]
    assert log.reads == [(TP, 10)]


async def test_what_is_left_over_from_before_a_seek_is_not_taken_again(reading: LogReading, log: WatchedLog) -> None:
    assert taken(reading, 5, 10) == []
    assert taken(reading, 8, 12) == [10, 11]
    assert log.reads == [(TP, 10)]


@pytest.mark.invariant(6, place="input")
async def test_invariant_6_missing_records_are_read_again_from_where_they_are_missing(
    reading: LogReading, log: WatchedLog
) -> None:
    assert taken(reading, 10, 12) == [10, 11]
    assert taken(reading, 15, 17) == []
    assert taken(reading, 17, 19) == []
    await until(lambda: log.reads == [(TP, 10), (TP, 12)])
    assert log.active == {TP}
    assert taken(reading, 12, 16) == [12, 13, 14, 15]


async def test_reading_again_is_tried_until_it_succeeds(reading: LogReading, log: WatchedLog) -> None:
    log.faults = [KafkaTimeoutError(), TimeoutError()]
    reading.read_again(TP, "damaged")
    reading.read_again(TP, "damaged")
    await until(lambda: log.reads == [(TP, 10), (TP, 10)])
    assert log.faults == []


async def test_nothing_is_read_or_taken_after_stop(reading: LogReading, log: WatchedLog) -> None:
    assert taken(reading, 15, 17) == []
    await reading.stop()
    assert taken(reading, 10, 12) == []
    reading.read_again(TP, "damaged")
    assert not reading.is_active
    assert log.active == set()
    assert log.reads == [(TP, 10)]
