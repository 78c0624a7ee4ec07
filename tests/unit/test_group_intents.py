"""The BEFORE records of a sink worker: what waits for a commit shares the next one."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from agents.sink_app import GroupIntents
from streams.errors import SinkError, SinkFencedError, SinkUnavailableError
from streams.positions import OffsetRange, TopicPartition

Records = Mapping[TopicPartition, tuple[int, str]]
FIRST, SECOND, THIRD, FOURTH = (TopicPartition("flights", partition) for partition in range(4))
RANGE = OffsetRange(5, 9)


class Group:
    """Keeps what it is asked to commit, and answers when it is let."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[Records] = asyncio.Queue()
        self.failures: dict[TopicPartition, SinkError] = {}
        self.answers = asyncio.Semaphore(0)

    async def commit_records(self, records: Records) -> Mapping[TopicPartition, SinkError]:
        self.asked.put_nowait(records)
        await self.answers.acquire()
        return {each: failure for each, failure in self.failures.items() if each in records}


def intents_of(group: Group) -> GroupIntents:
    app: Any = SimpleNamespace(log_reader=group)
    return GroupIntents(app)


async def test_what_waits_for_a_commit_shares_the_next_one_and_fails_alone() -> None:
    group = Group()
    intents = intents_of(group)
    first, second, third, fourth = (
        asyncio.create_task(intents.record(each, RANGE)) for each in (FIRST, SECOND, THIRD, FOURTH)
    )
    assert await group.asked.get() == {FIRST: (5, "5:9")}
    fourth.cancel()  # its assignment has ended: nobody may commit for it
    await asyncio.wait({fourth})
    group.failures[THIRD] = SinkFencedError("it belongs to another member")
    group.answers.release()
    await first
    assert await group.asked.get() == {SECOND: (5, "5:9"), THIRD: (5, "5:9")}
    assert not second.done()
    group.answers.release()
    await second
    with pytest.raises(SinkFencedError):
        await third
    assert group.asked.empty()


async def test_a_commit_that_its_partition_gives_up_is_tried_again_by_the_others_of_it() -> None:
    group = Group()
    intents = intents_of(group)
    tasks = [asyncio.create_task(intents.record(each, RANGE)) for each in (FIRST, SECOND, THIRD)]
    await group.asked.get()
    group.answers.release()
    await tasks[0]
    await group.asked.get()
    tasks[1].cancel()
    with pytest.raises(SinkUnavailableError):
        await tasks[2]
    group.answers.release()
    await intents.record(THIRD, RANGE)
    assert await group.asked.get() == {THIRD: (5, "5:9")}
