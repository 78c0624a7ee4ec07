"""What lies around the simulated workers: Kafka, Redis, ClickHouse and the dead letters, in memory and with faults.

The ports that a worker gets go through its SimulatedProcess, so that it can die before and after each effect. What an
effect may never do is checked where it takes place: nothing is published, recorded or written by a worker that no
longer owns the partition (invariant 5).
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

import pyarrow as pa
from aiokafka.errors import KafkaConnectionError

from schemas.table import TableDefinition
from streams.adapters.memory_intents import IntentLog, MemoryIntents
from streams.adapters.memory_snapshots import MemorySnapshotRepository
from streams.errors import SinkUnavailableError, SnapshotStoreUnavailableError
from streams.ports import DeadLetter, DeliveredPage, Watermarks
from streams.positions import OffsetRange, TopicPartition
from tests.simulation.loop import SimulatedLoop, SimulatedProcess, this_thread
from tests.sink_log import PartitionLog, append_table, keyed_table
from tests.store_samples import DECODER

CLICKS = append_table("clicks")
ACCOUNTS = keyed_table("accounts")
TABLES = (CLICKS, ACCOUNTS)
PARTITIONS = 2
KEYS = 20


class LogPartition(PartitionLog):
    """One partition of a topic, whose start retention may move."""

    low = 0

    def rows(self, begin: int, position: int, *, is_keyed: bool) -> list[tuple[int, int, int | None]]:
        """(offset, id, value) of what a store holds that began at `begin` and is at `position`."""
        good = set(self.deliverable)
        rows: dict[int, tuple[int, int, int | None]] = {}
        for offset, key, value in zip(self.offsets, self.keys, self.values, strict=True):
            if offset not in good or not begin <= offset < position:
                continue
            if value is None:
                assert key is not None
                rows.pop(int(key), None)
                continue
            fields = json.loads(value)
            rows[fields["id"] if is_keyed else offset] = (offset, fields["id"], fields["value"])
        return sorted(rows.values())

    def poison_below(self, position: int) -> set[int]:
        """The offsets of what is to be parked."""
        return {offset for offset in self.offsets if offset < position} - set(self.deliverable)

    @property
    def watermarks(self) -> Watermarks:
        """What Kafka would say."""
        return Watermarks(self.low, self.next_offset)

    def write(self, table: TableDefinition, random: Random, records: int) -> None:
        """Good records, updates, deletes, poison, and offsets that hold none."""
        for _ in range(records):
            dice, number = random.random(), random.randrange(KEYS)
            if dice < 0.05:
                self.skip(random.randint(1, 3))
            elif dice < 0.15:
                self.append(random.choice((b"{not json", b'{"value": 1}', b"[1]", b"\xff")), key=b"1", is_poison=True)
            elif dice < 0.25 and table.is_keyed:
                self.append(None, key=str(number).encode())
            else:
                value = {"id": number, "value": random.randrange(10**6)}
                self.append(json.dumps(value).encode(), key=str(number).encode())


class Kafka:
    """The topics."""

    def __init__(self, loop: SimulatedLoop) -> None:
        self.loop = loop
        self.is_away = False
        self.logs = {
            TopicPartition(table.topic, partition): LogPartition(TopicPartition(table.topic, partition))
            for table in TABLES
            for partition in range(PARTITIONS)
        }
        #: (topic partition, offset) of everything parked; repeats are allowed.
        self.parked: defaultdict[TopicPartition, set[int]] = defaultdict(set)
        #: Of the store workers' group: its newest generation, and what its members committed.
        self.generation = 0
        self.committed: dict[TopicPartition, int] = {}

    async def answers(self) -> None:
        """A round trip. Raises KafkaError."""
        await asyncio.sleep(self.loop.random.choice((0.0, 0.001, 0.02)))
        if self.is_away:
            raise KafkaConnectionError("the broker is away")


class Commits:
    """The positions that the store workers' group committed, as one worker commits and asks for them."""

    def __init__(self, kafka: Kafka, process: SimulatedProcess) -> None:
        self._kafka = kafka
        self._process = process
        self.generation = 0

    async def commit(self, positions: Mapping[TopicPartition, int]) -> None:
        """Kafka refuses those of an older generation; what is not committed is with the next one."""
        await self._process.has_effect("commit")
        with suppress(KafkaConnectionError):
            await self._kafka.answers()
            if self.generation == self._kafka.generation:
                self._kafka.committed.update(positions)

    async def record(self, topic_partition: TopicPartition) -> tuple[int, str] | None:
        """See streams.processes.hosting.CommittedRecord."""
        await self._process.has_effect("read committed")
        await self._kafka.answers()
        position = self._kafka.committed.get(topic_partition)
        return None if position is None else (position, "")


class LogReader:
    """streams.ports.PartitionLog of one worker: fetches and hands over batches, now and then not as it should."""

    def __init__(self, kafka: Kafka, process: SimulatedProcess, deliver: Callable[[Any], Any]) -> None:
        self._kafka = kafka
        self._process = process
        self._deliver = deliver
        self._positions: dict[TopicPartition, int] = {}
        #: Told when the log does not hold what is read.
        self.on_out_of_range: Callable[[TopicPartition], None] = lambda _: None
        self.on_unreadable: Callable[[TopicPartition, str], None] = lambda *_: None

    async def watermarks(self, topic_partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, Watermarks]:
        """See streams.ports.PartitionLog."""
        await self._process.has_effect("watermarks")
        await self._kafka.answers()
        return {each: self._kafka.logs[each].watermarks for each in topic_partitions}

    async def read_from(self, positions: Mapping[TopicPartition, int]) -> None:
        """See streams.ports.PartitionLog."""
        await self._process.has_effect("read_from")
        await self._kafka.answers()
        self._positions.update(positions)

    def stop_reading(self, topic_partitions: Collection[TopicPartition]) -> None:
        """See streams.ports.PartitionLog."""
        for topic_partition in topic_partitions:
            self._positions.pop(topic_partition, None)

    async def run(self) -> None:
        """Fetches for ever."""
        random = self._kafka.loop.random
        while True:
            await asyncio.sleep(random.choice((0.01, 0.05, 0.1)))
            if self._kafka.is_away:
                continue
            for topic_partition in sorted(self._positions):
                position, log = self._positions[topic_partition], self._kafka.logs[topic_partition]
                if position < log.low:
                    self.stop_reading([topic_partition])
                    self.on_out_of_range(topic_partition)
                elif position < log.next_offset:
                    await self._fetch(topic_partition, position, log)

    async def _fetch(self, topic_partition: TopicPartition, position: int, log: LogPartition) -> None:
        random = self._kafka.loop.random
        end = min(log.next_offset, position + random.choice((1, 5, 40, 200)))
        batch = log.batch(position, end)
        batch.high_watermark = log.next_offset
        dice = random.random()
        if dice < 0.01:
            self.on_unreadable(topic_partition, "a damaged fetch")
            return
        self._positions[topic_partition] = end
        if dice < 0.03 and end < log.next_offset:
            return  # lost on the way to its owner, who sees it by the next batch
        if dice < 0.05:
            await self._hand_over(log.batch(max(log.low, position - 7), end))
        await self._hand_over(batch)

    async def _hand_over(self, batch: Any) -> None:
        await self._process.has_effect(f"batch {batch.topic}[{batch.partition}]")
        waiting = self._deliver(batch)
        if waiting is not None:
            await waiting


class Letters:
    """streams.ports.DeadLetters of one worker."""

    def __init__(self, kafka: Kafka, process: SimulatedProcess, owns: Callable[[int], bool]) -> None:
        self._kafka = kafka
        self._process = process
        self._owns = owns

    async def park(self, letters: Sequence[DeadLetter]) -> None:
        """See streams.ports.DeadLetters."""
        await self._process.has_effect("park")
        await self._kafka.answers()
        for letter in letters:
            if not self._owns(letter.source.partition):
                raise self._kafka.loop.violation(5, f"{self._process.name} parks {letter.source} after its revoke")
            self._kafka.parked[letter.source].add(letter.offset)
        await self._process.has_effect("parked")


class Redis:
    """The snapshots, and what the faults did to them."""

    def __init__(self, loop: SimulatedLoop) -> None:
        self.loop = loop
        self.is_away = False
        self.repository = MemorySnapshotRepository(clock=loop.time)
        self.evicted: set[str] = set()
        #: partition -> the newest epoch claimed in the life of this Redis.
        self.claimed: dict[int, int] = {}
        #: (partition, version) -> the offsets where the log began for the store that was captured.
        self.published: dict[tuple[int, int], Mapping[str, int]] = {}

    def restart_empty(self) -> None:
        """Nothing was saved, not even the epochs."""
        self.repository = MemorySnapshotRepository(clock=self.loop.time)
        self.evicted, self.claimed, self.published = set(), {}, {}

    def forget(self, partition: int) -> None:
        """An operator removed the snapshots of this partition."""
        self.repository._partitions.pop(partition, None)
        self.claimed.pop(partition, None)
        self.published = {where: begins for where, begins in self.published.items() if where[0] != partition}

    def evict(self, random: Random) -> None:
        """Takes a few blocks away."""
        for partition in range(PARTITIONS):
            blocks = self.repository._living(partition)
            for name in random.sample(sorted(blocks), min(len(blocks), random.randint(0, 2))):
                del blocks[name]
                self.evicted.add(name)


class RestoringStores(Protocol):
    """Keeps account of which records the stores of a worker can have."""

    def begins(self, partition: int) -> Mapping[str, int]:
        """By topic, the offset at which the log began for the store."""
        ...

    def will_restore(self, partition: int, begins: Mapping[str, int]) -> None:
        """A manifest was read."""
        ...


class Snapshots:
    """streams.ports_snapshots.SnapshotRepository of one worker."""

    def __init__(self, redis: Redis, process: SimulatedProcess, stores: RestoringStores) -> None:
        self._redis = redis
        self._process = process
        self._stores = stores

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Every call of the port, with the faults of a network on both ways."""

        async def call(partition: int, *arguments: Any, **options: Any) -> Any:
            redis, random = self._redis, self._redis.loop.random
            await self._process.has_effect(name)
            await asyncio.sleep(random.choice((0.0, 0.001, 0.03)))
            if redis.is_away:
                raise SnapshotStoreUnavailableError("Redis is away")
            result = await getattr(redis.repository, name)(partition, *arguments, **options)
            await self._took_effect(name, partition, result, arguments, options)
            await self._process.has_effect(f"{name} done")
            await asyncio.sleep(random.choice((0.0, 0.001)))
            if redis.is_away or random.random() < 0.01:
                raise SnapshotStoreUnavailableError("Redis did it, and its reply was lost")
            return result

        return call

    async def _took_effect(
        self, name: str, partition: int, result: Any, arguments: Sequence[Any], options: Mapping[str, Any]
    ) -> None:
        redis = self._redis
        if name == "load_manifest":
            self._stores.will_restore(partition, redis.published[partition, arguments[0]])
        elif name == "discard_blocks":
            redis.evicted |= set(arguments[0])
        elif name == "claim_epoch":
            if result <= redis.claimed.get(partition, 0):
                raise redis.loop.violation(5, f"epoch {result} of partition {partition} was claimed before")
            redis.claimed[partition] = result
        elif name == "publish":
            version, epoch = options["version"], options["epoch"]
            if epoch < redis.claimed.get(partition, 0):
                raise redis.loop.violation(
                    5, f"version {version} of partition {partition} is published under epoch {epoch}"
                )
            if await redis.repository.missing_blocks(partition, options["block_names"]):
                raise redis.loop.violation(4, f"version {version} of partition {partition} is visible, but not whole")
            redis.evicted -= set(options["block_names"])
            redis.published.setdefault((partition, version), self._stores.begins(partition))


@dataclass
class ClickHouse:
    """The table of one topic partition: inserts by their token, and what is still on its way."""

    loop: SimulatedLoop
    is_away: bool = False
    #: The part of the inserts that take effect later than anybody waits for.
    late_ratio: float = 0.05
    inserted: dict[tuple[TopicPartition, OffsetRange], list[int]] = field(default_factory=dict)

    def offsets(self, topic_partition: TopicPartition) -> list[int]:
        """Of every row, doubles included."""
        return sorted(n for (where, _), offsets in self.inserted.items() if where == topic_partition for n in offsets)

    def land(self, topic_partition: TopicPartition, offsets: OffsetRange, rows: list[int]) -> None:
        """An insert takes effect, unless its token is known."""
        self.inserted.setdefault((topic_partition, offsets), rows)


class FaultySink:
    """streams.ports.Sink of one worker: inserts get lost, land late, or land and seem to fail."""

    def __init__(self, clickhouse: ClickHouse, process: SimulatedProcess) -> None:
        self._clickhouse = clickhouse
        self._process = process

    def last_offset(self, table: TableDefinition, topic_partition: TopicPartition) -> int | None:
        """See streams.ports.Sink."""
        del table
        self._process.passes("last_offset")
        if self._clickhouse.is_away:
            raise SinkUnavailableError("ClickHouse is away")
        return max(self._clickhouse.offsets(topic_partition), default=None)

    def insert(
        self, table: TableDefinition, topic_partition: TopicPartition, offsets: OffsetRange, rows: pa.Table
    ) -> None:
        """See streams.ports.Sink."""
        del table
        clickhouse, random = self._clickhouse, self._clickhouse.loop.random
        self._process.passes(f"insert {topic_partition}{offsets}")
        dice = random.random()
        if clickhouse.is_away or dice < 0.05:
            raise SinkUnavailableError("the insert was lost")
        numbers = rows["_offset"].to_pylist()
        if dice < 0.05 + clickhouse.late_ratio:
            # It is on its way, whatever becomes of the worker.
            clickhouse.loop.call_in_world(
                random.uniform(0.1, 20.0), lambda: clickhouse.land(topic_partition, offsets, numbers)
            )
            raise SinkUnavailableError("no reply in time")
        this_thread().sleep(random.choice((0.001, 0.01, 2.0 if self._process.is_slow else 0.02)))
        clickhouse.land(topic_partition, offsets, numbers)
        self._process.passes(f"inserted {topic_partition}{offsets}")
        if dice < 0.1 + clickhouse.late_ratio:
            raise SinkUnavailableError("it landed, and the reply was lost")


class DeliveredRecords:
    """streams.ports.DeliveredRows of one worker, over the offsets that ClickHouse holds."""

    def __init__(self, clickhouse: ClickHouse, kafka: Kafka, process: SimulatedProcess, asked_for: set[int]) -> None:
        self._clickhouse = clickhouse
        self._kafka = kafka
        self._process = process
        self._asked_for = asked_for

    def verify(self, table: TableDefinition) -> bool:
        """See streams.ports.DeliveredRows."""
        del table
        self._answers("verify")
        return True

    def last_offset(self, table: TableDefinition, topic_partition: TopicPartition) -> int | None:
        """See streams.ports.DeliveredRows."""
        del table
        self._answers("last_offset")
        return max(self._clickhouse.offsets(topic_partition), default=None)

    def count(self, table: TableDefinition, topic_partition: TopicPartition, *, below: int) -> int:
        """See streams.ports.DeliveredRows."""
        self._answers("count")
        self._asked_for.add(topic_partition.partition)
        return len(self._rows(table, topic_partition, below))

    def page(
        self,
        table: TableDefinition,
        topic_partition: TopicPartition,
        *,
        below: int,
        after: tuple[str, ...] | None,
        rows_max: int,
    ) -> DeliveredPage:
        """See streams.ports.DeliveredRows."""
        self._answers("page")
        start, size = int(after[0]) if after else 0, min(rows_max, 10)
        rows = self._rows(table, topic_partition, below)
        return DeliveredPage(rows.slice(start, size), (str(start + size),) if start + size < len(rows) else None)

    def _rows(self, table: TableDefinition, topic_partition: TopicPartition, below: int) -> pa.Table:
        """Those that are the newest of their key, tombstones included, and then only those below."""
        log, held = self._kafka.logs[topic_partition], set(self._clickhouse.offsets(topic_partition))
        decoded = DECODER.decode(table, log.batch(0, log.next_offset))
        newest = held
        if table.is_keyed:
            keys = pa.concat_tables([part.select(["id", "_offset"]) for part in (decoded.rows, decoded.deletes)])
            by_key = {
                row["id"]: row["_offset"] for row in keys.sort_by("_offset").to_pylist() if row["_offset"] in held
            }
            newest = set(by_key.values())
        return decoded.rows.filter(pa.array([n in newest and n < below for n in decoded.rows["_offset"].to_pylist()]))

    def _answers(self, what: str) -> None:
        self._process.passes(what)
        if self._clickhouse.is_away:
            raise SinkUnavailableError("ClickHouse is away")


class Intents:
    """streams.ports.DeliveryIntents of one worker, under the generation of its newest assignment."""

    def __init__(
        self, log: IntentLog, kafka: Kafka, process: SimulatedProcess, owns: Callable[[TopicPartition], bool]
    ) -> None:
        self._log = log
        self._kafka = kafka
        self._process = process
        self._owns = owns
        self.generation = 0

    async def record(self, topic_partition: TopicPartition, offsets: OffsetRange) -> None:
        """See streams.ports.DeliveryIntents."""
        await self._process.has_effect(f"record {topic_partition}{offsets}")
        await self._answers()
        await MemoryIntents(self._log, self.generation).record(topic_partition, offsets)
        if self.generation != self._log.generation:
            raise self._kafka.loop.violation(
                5, f"{self._process.name} records {topic_partition}{offsets} under generation {self.generation}"
            )
        if not self._owns(topic_partition):
            raise self._kafka.loop.violation(
                5, f"{self._process.name} records {topic_partition}{offsets} after its revoke"
            )
        await self._process.has_effect(f"recorded {topic_partition}{offsets}")

    async def read(self, topic_partition: TopicPartition) -> OffsetRange | None:
        """See streams.ports.DeliveryIntents."""
        await self._process.has_effect("read intent")
        await self._answers()
        return await MemoryIntents(self._log, self.generation).read(topic_partition)

    async def _answers(self) -> None:
        try:
            await self._kafka.answers()
        except KafkaConnectionError as error:
            raise SinkUnavailableError(f"{error}") from error
