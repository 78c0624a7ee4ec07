"""A PartitionLog under the test's control: what was asked of it, in order, and the faults it answers with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from streams.ports import Watermarks
from streams.positions import TopicPartition

SECONDS_MAX = 20.0


@dataclass
class WatchedLog:
    """Every topic partition holds [0, 0) unless `marks` says otherwise."""

    marks: dict[TopicPartition, Watermarks] = field(default_factory=dict)
    committed: dict[TopicPartition, tuple[int, str]] = field(default_factory=dict)
    #: Raised one per call of `watermarks` or `read_from`.
    faults: list[Exception] = field(default_factory=list)
    #: Every position that was read from, in order.
    reads: list[tuple[TopicPartition, int]] = field(default_factory=list)
    #: What is being read now.
    active: set[TopicPartition] = field(default_factory=set)

    async def watermarks(self, topic_partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, Watermarks]:
        """See streams.ports.PartitionLog."""
        self._fail()
        return {each: self.marks.get(each, Watermarks(0, 0)) for each in topic_partitions}

    async def read_from(self, positions: Mapping[TopicPartition, int]) -> None:
        """See streams.ports.PartitionLog."""
        self._fail()
        self.reads += positions.items()
        self.active |= positions.keys()

    def stop_reading(self, topic_partitions: Collection[TopicPartition]) -> None:
        """See streams.ports.PartitionLog."""
        self.active -= set(topic_partitions)

    async def committed_record(self, topic_partition: TopicPartition) -> tuple[int, str] | None:
        """See agents.query_requests.RequestLog."""
        return self.committed.get(topic_partition)

    def _fail(self) -> None:
        if self.faults:
            raise self.faults.pop(0)


async def until(condition: Callable[[], bool]) -> None:
    """Waits, with a deadline, for what no event announces."""
    async with asyncio.timeout(SECONDS_MAX):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)
