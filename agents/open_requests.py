"""Where to go on with the query topic: at the oldest request that has no reply yet.

Committing that position means that a crash loses no request: what had no reply is read again. What had one may be read
again too, if it came after the oldest open one or after the newest commit, and then gets a second reply; askers match
by id. One object per assignment, so that what finishes late belongs to an old one and moves nothing. Used by the store
worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from streams.batches import RecordBatch
from streams.positions import TopicPartition


class OpenRequests:
    """The requests of one assignment that are read and not yet replied to. For one event loop."""

    def __init__(self, positions: Mapping[TopicPartition, int]) -> None:
        self._read_to = dict(positions)
        self._open: dict[TopicPartition, set[int]] = {topic_partition: set() for topic_partition in positions}
        self._closed = asyncio.Event()

    def begin(self, topic_partition: TopicPartition, position: int) -> None:
        """Requests are read from here on; what was open is no longer in the log."""
        self._read_to[topic_partition] = position
        self._open[topic_partition] = set()

    def read(self, batch: RecordBatch) -> None:
        """The requests of this batch are in hand."""
        if batch.topic_partition in self._read_to:
            self._read_to[batch.topic_partition] = batch.next_offset
            self._open[batch.topic_partition].update(batch.offsets)

    def replied(self, topic_partition: TopicPartition, offset: int) -> None:
        """This request has had its reply, or is parked."""
        self._open.get(topic_partition, set()).discard(offset)
        self._closed.set()

    def positions(self) -> dict[TopicPartition, int]:
        """What to commit."""
        return {
            topic_partition: min(self._open[topic_partition], default=read_to)
            for topic_partition, read_to in self._read_to.items()
        }

    async def wait_until_replied(self, seconds_max: float) -> bool:
        """Until no request is open; False if some still are after `seconds_max`."""
        try:
            async with asyncio.timeout(seconds_max):
                while any(self._open.values()):
                    self._closed.clear()
                    await self._closed.wait()
        except TimeoutError:
            return False
        return True
