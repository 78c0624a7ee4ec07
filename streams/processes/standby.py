"""Standbys: warm copies of partitions that other workers own, ready to be promoted.

A standby restores like any owner (local file, newest snapshot, whole log), then applies the log as it grows. It answers
nothing, publishes nothing and parks nothing: before a record that is to be parked it waits until the owner has
accounted for it, so that a promoted standby has never passed a dead letter that its dead owner did not write (invariant
6). Promotion: the standby is stopped, its file stays open, and the new owner goes on from there (recovery's rung
`warm`).

Whatever breaks starts the standby anew, after a pause that grows; a copy that the log no longer reaches is replaced by
a snapshot that it does reach, as an owner's is. Called by agents/store_app.py, on the worker's event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack

from streams import telemetry
from streams.adapters.duckdb_store import PartitionStore
from streams.batches import RecordBatch
from streams.errors import LogGapKind, StaleEpochError
from streams.finishing import all_ended, in_thread
from streams.limits import WARM_LAG_RECORDS_MAX
from streams.ports import DeadLetter, PartitionLog
from streams.positions import TopicPartition
from streams.processes.hosting import CommittedRecord, HostingParts, continued_by_log
from streams.processes.ingestion import PartitionIngestion
from streams.processes.log_gaps import check_uncut, log_gap
from streams.processes.log_reading import LogReading
from streams.retry import Backoff, in_words

logger = logging.getLogger(__name__)

#: Between two looks at how far the owner is.
OWNER_CHECK_SECONDS = 0.5
#: Between two times that the group is asked to assign anew: each costs every partition a moment.
ASK_SECONDS_MIN = 30.0


class OwnersLetters:
    """streams.ports.DeadLetters of a standby: the owner parks, and this waits until it has."""

    def __init__(self, owners_position: CommittedRecord) -> None:
        self._owners_position = owners_position

    async def park(self, letters: Sequence[DeadLetter]) -> None:
        """Returns once the owner has accounted for all of these. Raises what asking for its position raises."""
        for source in dict.fromkeys(letter.source for letter in letters):
            last = max(letter.offset for letter in letters if letter.source == source)
            while (await self._owners_position(source) or (0, ""))[0] <= last:  # noqa: ASYNC110  # another process moves it
                await asyncio.sleep(OWNER_CHECK_SECONDS)


class Standby:
    """The copy of one partition, until it is stopped. Every transition happens in `_supervise`, its one task."""

    def __init__(self, partition: int, parts: HostingParts, log: PartitionLog, on_warm: Callable[[], None]) -> None:
        self.partition = partition
        #: Why it starts anew; None while all is well.
        self.failure: str | None = None
        #: topic -> next_offset, as of the newest transaction.
        self.positions: dict[str, int] = {}
        self._parts = parts
        self._log = log
        self._on_warm = on_warm
        self._reading = LogReading(log)
        self._ingestion: PartitionIngestion | None = None
        self._high_watermarks: dict[str, int] = {}
        self._was_warm = False
        self._task = asyncio.create_task(self._supervise(), name=f"standby-{partition}")

    @property
    def lag_records(self) -> int | None:
        """Offsets to the high watermarks; None while the copy is being restored."""
        if self._ingestion is None:
            return None
        return sum(max(0, high - self.positions.get(topic, 0)) for topic, high in self._high_watermarks.items())

    @property
    def is_warm(self) -> bool:
        """True if a promotion would take a moment only."""
        lag = self.lag_records
        return lag is not None and lag <= WARM_LAG_RECORDS_MAX

    @property
    def topic_partitions(self) -> list[TopicPartition]:
        """This partition of every table topic that has it."""
        return self._parts.topic_partitions(self.partition)

    def submit(self, batch: RecordBatch) -> None:
        """Queues what of the batch continues the log."""
        fresh = self._reading.accept(batch)
        if fresh is None or self._ingestion is None:
            return
        self._high_watermarks[fresh.topic] = fresh.high_watermark or fresh.next_offset
        self._ingestion.submit(fresh)

    def on_out_of_range(self, topic_partition: TopicPartition) -> None:
        """The log no longer holds what comes next."""
        if self._ingestion is not None:
            position = self.positions.get(topic_partition.topic, 0)
            why = "Kafka answered that it is out of range"
            self._ingestion.break_off(log_gap(LogGapKind.OUT_OF_RANGE, topic_partition, position, why))

    def read_again(self, topic_partition: TopicPartition, why: str) -> None:
        """What Kafka delivered for this topic cannot be read: asks for it again."""
        self._reading.read_again(topic_partition, why)

    async def delete_expired(self, now_ms: int) -> None:
        """Applies the tables' retention; a failure costs disk only."""
        store = self._parts.store.partitions().get(self.partition)
        if store is not None and self._ingestion is not None:
            try:
                await in_thread(store.delete_expired, now_ms)
            except StaleEpochError:
                logger.debug("standby %d ended before its rows expired", self.partition)
            except Exception:  # the boundary of one standby: the next one's rows and the timer go on (invariant 10)
                logger.exception("expired rows of standby %d stay until the next sweep", self.partition)

    async def stop(self, *, is_kept: bool) -> None:
        """Nothing is applied when it returns. The file is closed, unless it `is_kept` open for whoever comes next."""
        self._task.cancel()
        await asyncio.wait({self._task})
        await self._release(self._parts.store.release_partition if is_kept else self._parts.store.close_partition)
        telemetry.STANDBY_LAG_RECORDS.remove(self.partition)

    async def _supervise(self) -> None:
        backoff = Backoff(first_seconds=1.0)
        while True:
            reached = dict(self.positions)
            try:
                try:
                    await self._restore_and_follow()
                except Exception:
                    await self._release(self._parts.store.close_partition)
                    raise
            except Exception as error:  # the boundary of supervision: no copy's fault ends the worker (invariant 10)
                logger.exception("standby %d starts anew", self.partition)
                self.failure = in_words(error)
            self._was_warm = False
            telemetry.STANDBY_FAULTS.labels(self.partition).inc()
            if self.positions != reached:
                backoff.reset()
            await asyncio.sleep(backoff.next_delay_seconds())

    async def _restore_and_follow(self) -> None:
        before = await self._log.watermarks(self.topic_partitions)
        recovered = await self._parts.recovery.recover(self.partition, before)
        # Anew: what was recovered may be newer than these, and a store ahead of the log counts as a gap.
        marks = await self._log.watermarks(self.topic_partitions)
        check_uncut(recovered.store.next_offsets(), before, marks)
        recovered, self.positions, _ = await continued_by_log(self._parts, recovered, marks)
        self._high_watermarks = {tp.topic: marks[tp].high for tp in self.topic_partitions}
        self._ingestion = self._new_ingestion(recovered.store)
        logger.info("standby %d follows the log from %s", self.partition, self.positions)
        await self._reading.start({tp: self.positions[tp.topic] for tp in self.topic_partitions})
        await self._announce({})
        await self._ingestion.run()

    def _new_ingestion(self, store: PartitionStore) -> PartitionIngestion:
        return PartitionIngestion(
            store,
            tables=self._parts.catalog.by_topic,
            decoder=self._parts.decoder,
            dead_letters=self._parts.dead_letters,
            announce=self._announce,
            threads=self._parts.threads,
            is_counted=False,
        )

    async def _announce(self, positions: Mapping[str, int]) -> None:
        self.positions.update(positions)
        telemetry.STANDBY_LAG_RECORDS.labels(self.partition).set(self.lag_records or 0)
        if self.is_warm and not self._was_warm:
            self._was_warm, self.failure = True, None
            logger.info("standby %d is warm at %s", self.partition, self.positions)
            self._on_warm()

    async def _release(self, let_go: Callable[[int], None]) -> None:
        if self._ingestion is not None:
            self._ingestion.discard_queued()
            self._ingestion = None
        async with AsyncExitStack() as steps:
            steps.push_async_callback(in_thread, let_go, self.partition)
            steps.push_async_callback(self._reading.stop)


class Standbys:
    """All standbys of this worker. `on_all_warm` is called when every copy that the group awaits here is warm."""

    def __init__(self, parts: HostingParts, log: PartitionLog, *, on_all_warm: Callable[[], None]) -> None:
        self._parts = parts
        self._log = log
        self._on_all_warm = on_all_warm
        self._asked_at = float("-inf")
        self._asking: asyncio.TimerHandle | None = None
        self._standbys: dict[int, Standby] = {}
        self._awaited: frozenset[int] = frozenset()

    def standbys(self) -> Mapping[int, Standby]:
        """By partition, for status."""
        return self._standbys

    async def promote(self, partitions: Collection[int], *, kept: Collection[int]) -> None:
        """Stops every standby that is not `kept`; the files of those in `partitions` stay open for their new owner."""
        leaving = [self._standbys.pop(number) for number in list(self._standbys) if number not in kept]
        await all_ended([standby.stop(is_kept=standby.partition in partitions) for standby in leaving])

    def follow(self, partitions: Collection[int], awaited: Collection[int]) -> None:
        """Starts those of these that do not run yet, in the background; the group waits for the `awaited` ones to be
        warm."""
        if self._asking is not None:
            self._asking.cancel()
        self._awaited = frozenset(awaited)
        for partition in sorted(set(partitions) - self._standbys.keys()):
            self._standbys[partition] = Standby(partition, self._parts, self._log, self._tell_when_all_are_warm)
        self._tell_when_all_are_warm()

    async def stop(self) -> None:
        """Ends all of them; their files are closed."""
        if self._asking is not None:
            self._asking.cancel()
        await self.promote((), kept=())

    def submit(self, batch: RecordBatch) -> None:
        """Hands a fetched batch to its standby."""
        if standby := self._standbys.get(batch.partition):
            standby.submit(batch)

    def on_out_of_range(self, topic_partition: TopicPartition) -> None:
        """The log no longer holds what a standby reads next."""
        if standby := self._standbys.get(topic_partition.partition):
            standby.on_out_of_range(topic_partition)

    def on_unreadable(self, topic_partition: TopicPartition, why: str) -> None:
        """What Kafka delivered is damaged: nothing of it is used, and it is read again."""
        if standby := self._standbys.get(topic_partition.partition):
            standby.read_again(topic_partition, why)

    async def delete_expired(self, now_ms: int) -> None:
        """Applies the tables' retention in every copy."""
        for standby in list(self._standbys.values()):
            await standby.delete_expired(now_ms)

    def _tell_when_all_are_warm(self) -> None:
        awaited = [self._standbys[number] for number in self._awaited if number in self._standbys]
        if awaited and all(standby.is_warm for standby in awaited):
            loop = asyncio.get_running_loop()
            self._awaited = frozenset()
            self._asking = loop.call_at(max(loop.time(), self._asked_at + ASK_SECONDS_MIN), self._ask)

    def _ask(self) -> None:
        self._asked_at = asyncio.get_running_loop().time()
        self._on_all_warm()
