"""Reading some topic partitions of the log without a hole, under one assignment.

A batch starts at the position that its fetch started from, so batches of which none is lost touch one another. One that
starts beyond the expected position proves that records went missing on the way here: it is not taken, and the log is
read again from the expected position (invariant 6). One that ends below it is left over from before a seek. The pauses
between readings grow until a batch fits.

Callers: processes/hosting.py, processes/standby.py, processes/sink_hosting.py and agents/query_requests.py, on the
worker's event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from streams import telemetry
from streams.batches import RecordBatch
from streams.finishing import all_ended
from streams.ports import PartitionLog
from streams.positions import TopicPartition
from streams.retry import Backoff, persisting

logger = logging.getLogger(__name__)

REREAD_SECONDS_MIN = 0.1
REREAD_SECONDS_MAX = 10.0


class LogReading:
    """Where the next batch of each topic partition must start. Nothing is taken before `start` and after `stop`."""

    def __init__(self, log: PartitionLog) -> None:
        self._log = log
        self._expected: dict[TopicPartition, int] = {}
        self._backoffs: dict[TopicPartition, Backoff] = {}
        self._rereading: dict[TopicPartition, asyncio.Task[None]] = {}

    @property
    def is_active(self) -> bool:
        """True between `start` and `stop`."""
        return bool(self._expected)

    async def start(self, positions: Mapping[TopicPartition, int]) -> None:
        """Reads these from their positions on. Raises what the log raises."""
        self._expected = dict(positions)
        await self._log.read_from(positions)

    def accept(self, batch: RecordBatch) -> RecordBatch | None:
        """What of the batch comes next; None if it is not wanted. Never raises."""
        topic_partition = batch.topic_partition
        expected = self._expected.get(topic_partition)
        if expected is None or batch.next_offset <= expected:
            logger.debug("stale batch left out: %s", batch)
            return None
        if batch.first_offset > expected:
            self.read_again(topic_partition, f"{batch} arrived where offset {expected} comes next")
            return None
        self._expected[topic_partition] = batch.next_offset
        self._backoffs.pop(topic_partition, None)
        return batch.starting_at(expected)

    def read_again(self, topic_partition: TopicPartition, why: str) -> None:
        """Goes back to the expected position, after a pause; once, however often it is asked meanwhile."""
        if topic_partition not in self._expected or topic_partition in self._rereading:
            return
        logger.error("%s is read again: %s", topic_partition, why)
        telemetry.REREADS.labels(*topic_partition).inc()
        task = asyncio.create_task(self._read_again(topic_partition), name=f"read {topic_partition} again")
        self._rereading[topic_partition] = task
        task.add_done_callback(lambda _: self._rereading.pop(topic_partition, None))

    async def stop(self) -> None:
        """Nothing is read or taken from here on. Idempotent."""
        started, self._expected = list(self._expected), {}
        rereading = list(self._rereading.values())
        for task in rereading:
            task.cancel()
        await all_ended([_end_of(task) for task in rereading])
        self._log.stop_reading(started)

    async def _read_again(self, topic_partition: TopicPartition) -> None:
        self._log.stop_reading([topic_partition])
        backoff = self._backoffs.setdefault(
            topic_partition, Backoff(first_seconds=REREAD_SECONDS_MIN, ceiling_seconds=REREAD_SECONDS_MAX)
        )
        await asyncio.sleep(backoff.next_delay_seconds())
        await persisting(
            lambda: self._log.read_from({topic_partition: self._expected[topic_partition]}),
            what=f"reading {topic_partition} again",
            backoff=backoff,
        )


async def _end_of(task: asyncio.Task[None]) -> None:
    await asyncio.wait([task])
