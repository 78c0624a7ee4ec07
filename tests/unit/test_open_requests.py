"""Where a worker goes on with the query topic after a crash: no request is skipped, and few are answered twice."""

from __future__ import annotations

import asyncio

import pytest

from agents.open_requests import OpenRequests
from streams.batches import RecordBatch
from streams.positions import TopicPartition

SOURCE = TopicPartition("pintail.query", 0)


def batch(*offsets: int, partition: int = 0) -> RecordBatch:
    count = len(offsets)
    return RecordBatch(
        "pintail.query",
        partition,
        offsets[0],
        offsets[-1] + 1,
        values=[b"{}"] * count,
        keys=[None] * count,
        offsets=list(offsets),
        timestamps_ms=[0] * count,
    )


@pytest.mark.invariant(9, place="checkpoint")
def test_a_request_without_reply_is_read_again() -> None:
    requests = OpenRequests({SOURCE: 10})
    assert requests.positions() == {SOURCE: 10}
    requests.read(batch(10, 11, 12))
    assert requests.positions() == {SOURCE: 10}
    requests.replied(SOURCE, 10)
    requests.replied(SOURCE, 12)
    assert requests.positions() == {SOURCE: 11}
    requests.replied(SOURCE, 11)
    assert requests.positions() == {SOURCE: 13}


@pytest.mark.invariant(9, place="rebalance")
def test_what_finishes_after_a_reassignment_moves_nothing() -> None:
    before = OpenRequests({SOURCE: 0})
    before.read(batch(0))
    after = OpenRequests({SOURCE: 0})
    after.read(batch(0))
    before.replied(SOURCE, 0)
    assert after.positions() == {SOURCE: 0}


def test_a_batch_of_a_partition_that_has_left_is_not_committed() -> None:
    requests = OpenRequests({SOURCE: 0})
    requests.read(batch(7, partition=1))
    requests.replied(TopicPartition("pintail.query", 1), 7)
    assert requests.positions() == {SOURCE: 0}


async def test_waiting_ends_with_the_last_reply() -> None:
    requests = OpenRequests({SOURCE: 0})
    requests.read(batch(0, 1))
    waiting = asyncio.create_task(requests.wait_until_replied(60))
    for offset in (0, 1):
        await asyncio.sleep(0)
        assert not waiting.done()
        requests.replied(SOURCE, offset)
    assert await waiting
    requests.read(batch(2))
    assert not await requests.wait_until_replied(0)
