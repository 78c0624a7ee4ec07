"""The end of one partition of a topic: what is written to it from now on, and nothing that was there before.

The store worker reads with it what the others contribute to its answers. What cannot be read is skipped: whoever waits
for it has a deadline.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

from agents.log_consumer import LogConsumer
from streams.batches import RecordBatch
from streams.positions import TopicPartition
from streams.retry import Backoff, persisting

logger = logging.getLogger(__name__)

_RETRY_SECONDS_MAX = 5.0


class LogTail:
    """Delivers what comes to one partition from its start on; what cannot be read is skipped."""

    def __init__(
        self, options: Mapping[str, Any], topic_partition: TopicPartition, *, deliver: Callable[[RecordBatch], None]
    ) -> None:
        self._topic_partition = topic_partition
        self._log = LogConsumer(
            options,
            deliver=deliver,
            on_out_of_range=lambda _: self._begin(),
            on_unreadable=lambda _, why: self._skip(why),
        )
        self._beginning: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Nothing that is written after this returns is missed. Raises KafkaError."""
        await self._log.start()
        await self._seek_to_end()

    async def stop(self) -> None:
        """Idempotent."""
        if self._beginning is not None:
            self._beginning.cancel()
            await asyncio.wait([self._beginning])
        await self._log.stop()

    def _skip(self, why: str) -> None:
        logger.warning("%s: %s; going on at its end", self._topic_partition, why)
        self._begin()

    def _begin(self) -> None:
        if self._beginning is None or self._beginning.done():
            what = f"reading {self._topic_partition} from its end"
            beginning = persisting(self._seek_to_end, what=what, backoff=Backoff(ceiling_seconds=_RETRY_SECONDS_MAX))
            self._beginning = asyncio.create_task(beginning)

    async def _seek_to_end(self) -> None:
        marks = await self._log.watermarks([self._topic_partition])
        await self._log.read_from({self._topic_partition: marks[self._topic_partition].high})
