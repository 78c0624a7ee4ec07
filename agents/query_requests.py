"""The query topic of the store worker: from where its requests are read, and their way to an answer.

Requests are read while their partition recovers, since each deserves at least a refusal. The group's committed offset
says where to go on; what the log no longer holds is skipped, because the askers' deadlines have long passed. A reply
that cannot be sent is covered by the asker's deadline; a dead letter is tried until it is durable (invariant 6).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from typing import Protocol

from agents.open_requests import OpenRequests
from streams.batches import Headers, RecordBatch
from streams.finishing import all_ended
from streams.ports import DeadLetter, DeadLetters, PartitionLog
from streams.positions import TopicPartition
from streams.processes.answering import IncomingRequest, Reply
from streams.processes.hosting import CommittedRecord
from streams.processes.log_reading import LogReading
from streams.retry import Backoff, persisting

logger = logging.getLogger(__name__)

#: How long a stopping worker waits for refusals and dead letters that are on their way.
DRAIN_SECONDS_MAX = 5.0
RETRY_SECONDS_MAX = 5.0


class Replies(Protocol):
    """Where replies go."""

    async def send(
        self, topic: str, *, value: bytes, key: bytes | None, partition: int | None, headers: Headers
    ) -> None:
        """Never raises for what the asker asked for."""
        ...


class RequestReading:
    """Reads the assigned partitions of the query topic, each from its own position, in the background."""

    def __init__(self, log: PartitionLog, committed: CommittedRecord) -> None:
        self._log = log
        self._committed = committed
        self._readings: dict[TopicPartition, LogReading] = {}
        self._starting: dict[TopicPartition, asyncio.Task[None]] = {}
        #: Everything below is in hand.
        self._positions: dict[TopicPartition, int] = {}
        #: What of this assignment is read and has no reply yet.
        self.open = OpenRequests({})

    async def assign(self, topic_partitions: Collection[TopicPartition]) -> None:
        """A new assignment: finds out anew where to go on."""
        await self.revoke(list(self._readings))
        self.open = OpenRequests({})
        for topic_partition in topic_partitions:
            self._readings[topic_partition] = LogReading(self._log)
            self.start(topic_partition)

    async def revoke(self, topic_partitions: Collection[TopicPartition]) -> None:
        """Nothing of these is read any more when it returns."""
        await all_ended([self._stop(each) for each in topic_partitions if each in self._readings])

    def start(self, topic_partition: TopicPartition) -> None:
        """Finds the position and reads from there, until that succeeds. Also when Kafka answered that the position is
        out of range; once, however often it answers so meanwhile."""
        if topic_partition not in self._readings or topic_partition in self._starting:
            return
        what = f"starting to read {topic_partition}"
        backoff = Backoff(ceiling_seconds=RETRY_SECONDS_MAX)
        starting = asyncio.create_task(persisting(partial(self._start, topic_partition), what=what, backoff=backoff))
        self._starting[topic_partition] = starting
        starting.add_done_callback(lambda _: self._starting.pop(topic_partition, None))

    def accept(self, batch: RecordBatch) -> RecordBatch | None:
        """What of the batch comes next, and is in hand from here on; None if it is not wanted."""
        reading = self._readings.get(batch.topic_partition)
        fresh = None if reading is None else reading.accept(batch)
        if fresh is not None:
            self._positions[fresh.topic_partition] = fresh.next_offset
            self.open.read(fresh)
        return fresh

    def read_again(self, topic_partition: TopicPartition, why: str) -> None:
        """What Kafka delivered cannot be read: asks for it again."""
        if topic_partition in self._readings:
            self._readings[topic_partition].read_again(topic_partition, why)

    async def _start(self, topic_partition: TopicPartition) -> None:
        marks = (await self._log.watermarks([topic_partition]))[topic_partition]
        wanted = self._positions.get(topic_partition)
        if wanted is None:
            committed = await self._committed(topic_partition)
            wanted = marks.low if committed is None else committed[0]
        position = min(max(wanted, marks.low), marks.high)
        if position != wanted:
            logger.warning("%s goes on at %d: the log does not hold offset %d", topic_partition, position, wanted)
        self._positions[topic_partition] = position
        self.open.begin(topic_partition, position)
        reading = self._readings.get(topic_partition)
        if reading is not None:  # else it was revoked meanwhile
            await reading.start({topic_partition: position})

    async def _stop(self, topic_partition: TopicPartition) -> None:
        reading = self._readings.pop(topic_partition, None)
        if starting := self._starting.get(topic_partition):
            starting.cancel()
            await asyncio.wait([starting])
        if reading is not None:  # else another revoke is at it
            await reading.stop()
            self._positions.pop(topic_partition, None)


class RequestAnswers:
    """Answers each request in a task of its own: a slow one never holds up the next."""

    def __init__(
        self,
        answer: Callable[[IncomingRequest], Awaitable[Reply | DeadLetter | None]],
        *,
        replies: Replies,
        dead_letters: DeadLetters,
    ) -> None:
        self._answer = answer
        self._replies = replies
        self._dead_letters = dead_letters
        self._under_way: set[asyncio.Task[None]] = set()

    def begin(self, batch: RecordBatch, open_requests: OpenRequests) -> None:
        """Answers the requests of this batch, in the background."""
        for request in requests_of(batch):
            task = asyncio.create_task(self._finish(request, batch.topic_partition, open_requests))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    async def drain(self, *, seconds_max: float = DRAIN_SECONDS_MAX) -> None:
        """Waits for what is under way, before the producers stop; the caller hands in no more. What takes too long is
        given up: the next owner reads it again."""
        tasks = set(self._under_way)
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=seconds_max)
        for task in late:
            task.cancel()
        if late:
            logger.error("%d requests were given up when the worker stopped", len(late))
            await asyncio.wait(late)

    async def _finish(self, request: IncomingRequest, source: TopicPartition, open_requests: OpenRequests) -> None:
        try:
            outcome = await self._answer(request)
            if isinstance(outcome, DeadLetter):
                await persisting(
                    lambda: self._dead_letters.park([outcome]),
                    what=f"parking the request at offset {request.offset} of {source}",
                    backoff=Backoff(ceiling_seconds=RETRY_SECONDS_MAX),
                )
            elif outcome is not None:
                for value, headers in outcome.records():
                    await self._replies.send(
                        outcome.topic, value=value, key=outcome.key, partition=outcome.partition, headers=headers
                    )
        except Exception:  # the boundary of one request (invariant 10)
            logger.exception("the request at offset %d of %s has no reply", request.offset, source)
        # Also after an exception: reading it again after a crash would repeat that, and hold back the position.
        open_requests.replied(source, request.offset)


def requests_of(batch: RecordBatch) -> list[IncomingRequest]:
    """The records of the query topic, one request each."""
    return [
        IncomingRequest(
            value=batch.values[index],
            key=batch.keys[index],
            headers=batch.headers.get(index, ()),
            partition=batch.partition,
            offset=batch.offsets[index],
            timestamp_ms=batch.timestamps_ms[index],
        )
        for index in range(len(batch))
    ]
