"""Simulated workers: the real processes and the real store, in a SimulatedProcess, over the world's ports."""

from __future__ import annotations

import asyncio
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import duckdb

from agents.placement import Member, Place
from schemas.catalog import Catalog
from streams.adapters.duckdb_store import DuckDBStore, PartitionStore
from streams.adapters.memory_intents import IntentLog
from streams.adapters.snapshot_codec import SnapshotCodec
from streams.batches import RecordBatch
from streams.ports_snapshots import SnapshotRepository
from streams.positions import TopicPartition
from streams.processes.delivery import Delivery
from streams.processes.hosting import HostingParts, PartitionHost, PartitionState
from streams.processes.local_copies import LocalCopies
from streams.processes.microbatches import FlushLimits
from streams.processes.rebuilding import Rebuilding
from streams.processes.recovery import Recovered, Recovery, Rung
from streams.processes.recovery_orders import RecoveryOrders
from streams.processes.sink_hosting import SinkHost
from streams.processes.snapshotting import Snapshotter
from streams.processes.standby import OwnersLetters, Standbys
from tests.simulation.loop import SimulatedLock, SimulatedLoop, SimulatedProcess, this_thread
from tests.simulation.world import (
    TABLES,
    ClickHouse,
    Commits,
    DeliveredRecords,
    FaultySink,
    Intents,
    Kafka,
    Letters,
    LogReader,
    Redis,
    Snapshots,
)
from tests.store_samples import DECODER

CATALOG = Catalog(TABLES)
CODEC = SnapshotCodec(bytes(range(32)), application="simulation")
VERSIONS_KEPT = 2


@dataclass
class Disk:
    """What of a store worker outlives it."""

    folder: Path
    #: Where the log began for the stores here: records below were gone when they started empty.
    begins: dict[TopicPartition, int] = field(default_factory=dict)
    #: What a file that is about to be put here began with, until it is opened.
    coming: dict[int, Mapping[str, int]] = field(default_factory=dict)
    #: Partitions that came from ClickHouse and have not served since.
    rebuilt: set[int] = field(default_factory=set)


class StoreWorker:
    """One life of a store worker."""

    def __init__(
        self,
        loop: SimulatedLoop,
        name: str,
        disk: Disk,
        *,
        kafka: Kafka,
        redis: Redis,
        clickhouse: ClickHouse,
        intents: IntentLog,
        on_all_warm: Callable[[], None],
    ) -> None:
        self.name = name
        self.disk = disk
        #: What it was last given to own, as its membership remembers it.
        self.owned: frozenset[int] = frozenset()
        self._clickhouse = clickhouse
        self.assigned: set[int] = set()
        #: partition -> as what it is written here; a copy that stays one keeps its role.
        self.roles: dict[int, str] = {}
        self.process = process = SimulatedProcess(loop, name)
        process.at_death = self._keep_disk
        self.store = SimulatedStore(disk, process, self.roles)
        self._copies = LocalCopies(self.store, disk.folder)
        self.commits = Commits(kafka, process)
        repository = cast(SnapshotRepository, Snapshots(redis, process, self))
        self.orders = RecoveryOrders(disk.folder)
        delivered = DeliveredRecords(clickhouse, kafka, process, disk.rebuilt)
        read_intents = Intents(intents, kafka, process, lambda _: False)
        recovery = partial(
            ObservedRecovery,
            self.store,
            repository,
            CODEC,
            rebuilding=Rebuilding(CATALOG, delivered, read_intents),
            server_deadline_seconds=20.0,
        )
        self.recovery = recovery()
        parts = HostingParts(
            catalog=CATALOG,
            store=self.store,
            recovery=self.recovery,
            snapshotter=Snapshotter(
                repository, CODEC, versions_kept=VERSIONS_KEPT, clock_ms=lambda: int(loop.time() * 1000)
            ),
            decoder=DECODER,
            dead_letters=Letters(kafka, process, self.owns),
            orders=self.orders,
            committed_record=self.commits.record,
        )
        self.reader = StoreReader(kafka, process, self, lambda batch: self.host.submit(batch))
        self.host = PartitionHost(parts, self.reader)
        self.reader.on_out_of_range = self.host.on_out_of_range
        self.reader.on_unreadable = self.host.on_unreadable
        copies = replace(parts, recovery=recovery(claims_epochs=False), dead_letters=OwnersLetters(self.commits.record))
        self.copies_reader = StoreReader(kafka, process, self, lambda batch: self.standbys.submit(batch))
        self.standbys = Standbys(
            copies, self.copies_reader, on_all_warm=lambda: None if process.is_dead else on_all_warm()
        )
        self.copies_reader.on_out_of_range = self.standbys.on_out_of_range
        self.copies_reader.on_unreadable = self.standbys.on_unreadable
        self._reading_for_copies: asyncio.Task[None] | None = None
        process.start(self.reader.run())
        process.start(self._tend())

    def owns(self, partition: int) -> bool:
        """From its assignment until its revoke returns, as this worker sees it."""
        return partition in self.assigned

    def says(self) -> Member:
        """What it tells the group's leader."""
        return Member(self.name, self.owned, self._copies.positions())

    async def assign(self, place: Place, generation: int) -> None:
        """As the store app does."""
        self.owned = partitions = place.owned
        standbys = place.standbys
        if standbys and self._reading_for_copies is None:
            self._reading_for_copies = self.process.start(self.copies_reader.run())
        await self.standbys.promote(partitions, kept=standbys)
        self.commits.generation, self.assigned = generation, set(partitions)
        for partition in self.roles.keys() - standbys:
            del self.roles[partition]
        for partition in standbys:
            self.roles.setdefault(partition, f"a copy since generation {generation}")
        self.roles.update(dict.fromkeys(partitions, f"the owner in generation {generation}"))
        await self.host.assign(partitions, kept=standbys)
        self.standbys.follow(standbys, place.awaited)

    async def revoke(self) -> None:
        """As the store app does; copies go on."""
        await self.host.suspend(list(self.host.hosted()))
        for partition in self.assigned:
            del self.roles[partition]
        self.assigned = set()

    async def bury(self) -> None:
        """After its death."""
        await self.process.bury()
        self.store.abandon()
        shutil.rmtree(self.store.folder)

    def _keep_disk(self) -> None:
        """kill -9 leaves the files as they are at that moment."""
        kept = self.disk.folder.with_name(f"{self.disk.folder.name}+")
        shutil.copytree(self.disk.folder, kept, ignore=shutil.ignore_patterns("spill", "*.lock"))
        self.disk = Disk(kept, dict(self.disk.begins), dict(self.disk.coming), set(self.disk.rebuilt))

    def begins(self, partition: int) -> Mapping[str, int]:
        """Where the log began for the store here, by topic."""
        return {topic: begin for (topic, number), begin in self.disk.begins.items() if number == partition}

    def note_beginning(self, topic_partition: TopicPartition, position: int) -> None:
        """An empty store is read from there on: the log's start, and only if ClickHouse has no record below it."""
        delivered = self._clickhouse.offsets(topic_partition)
        if delivered and delivered[0] < position:
            raise self.process.loop.violation(
                6, f"{self.name} goes on without the records of {topic_partition} below {position}"
            )
        self.disk.begins[topic_partition] = position

    def will_restore(self, partition: int, begins: Mapping[str, int]) -> None:
        """Recovery has read a manifest: the file that is opened next is that version's."""
        if partition not in self.store.partitions():
            self.disk.coming[partition] = begins

    async def _tend(self) -> None:
        """What the store app's timers do."""
        loop = self.process.loop
        while True:
            await asyncio.sleep(loop.random.uniform(0.5, 5.0))
            await self.commits.commit(self.host.committable())
            await self.host.check_logs()
            await self.host.carry_out_orders()
            await self.host.take_snapshots()
            self._copies.remember()


class StoreReader(LogReader):
    """Notes what a store read last, and where an empty one began."""

    def __init__(
        self,
        kafka: Kafka,
        process: SimulatedProcess,
        worker: StoreWorker,
        deliver: Callable[[RecordBatch], None],
    ) -> None:
        super().__init__(kafka, process, deliver)
        self._worker = worker
        #: What a partition had to reach before it answers.
        self.targets: dict[TopicPartition, int] = {}

    async def watermarks(self, topic_partitions: Collection[TopicPartition]) -> Any:
        marks = await super().watermarks(topic_partitions)
        for topic_partition in topic_partitions:
            hosted = self._worker.host.hosted().get(topic_partition.partition)
            if hosted is not None and hosted.state is PartitionState.RECOVERING:
                self.targets[topic_partition] = marks[topic_partition].high
        return marks

    async def read_from(self, positions: Mapping[TopicPartition, int]) -> None:
        # A single one is read again: batches may be queued that the store does not know of yet.
        for topic_partition, position in positions.items() if len(positions) == len(TABLES) else ():
            store = self._worker.store.partitions().get(topic_partition.partition)
            if store is not None and topic_partition.topic not in store.next_offsets():
                self._worker.note_beginning(topic_partition, position)
        await super().read_from(positions)


class ObservedRecovery(Recovery):
    """Notes how every recovery went."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.rungs: list[Rung] = []
        self.found: dict[int, dict[str, int]] = {}

    async def recover(self, partition: int, *arguments: Any, **options: Any) -> Recovered:
        return self._noted(await super().recover(partition, *arguments, **options))

    async def recover_beyond(self, *arguments: Any, **options: Any) -> Recovered | None:
        recovered = await super().recover_beyond(*arguments, **options)
        return recovered and self._noted(recovered)

    def _noted(self, recovered: Recovered) -> Recovered:
        self.rungs.append(recovered.rung)
        self.found[recovered.store.partition] = recovered.store.next_offsets()
        return recovered


class SimulatedStore(DuckDBStore):
    """The real store: every statement of a writer is an effect, and its locks are those of SimulatedThreads."""

    def __init__(self, disk: Disk, process: SimulatedProcess, roles: Mapping[int, str]) -> None:
        super().__init__(disk.folder, CATALOG, memory_limit="256MB", threads=1)
        self.folder = disk.folder
        self._disk = disk
        self._process = process
        self._roles = roles
        self._turns = defaultdict(SimulatedLock)  # type: ignore[arg-type]

    def _attach(self, partition: int, *, is_checked: bool) -> PartitionStore:
        self._process.passes(f"attach {partition}")
        begins = self._disk.coming.pop(partition, None) or {}
        self._disk.begins.update({TopicPartition(topic, partition): begin for topic, begin in begins.items()})
        return self._observed(super()._attach(partition, is_checked=is_checked))

    def _taken_back(self, store: PartitionStore) -> PartitionStore:
        taken = super()._taken_back(store)
        return taken if taken is store else self._observed(taken)

    def _observed(self, store: PartitionStore) -> PartitionStore:
        store._writing = SimulatedLock()  # type: ignore[assignment]
        store._checkpointing = SimulatedLock()  # type: ignore[assignment]
        store._connection = cast(
            duckdb.DuckDBPyConnection, Statements(store._connection, store.partition, self._process, self._roles)
        )
        return store

    def open_for_writing(self) -> list[PartitionStore]:
        """All but those that were released."""
        return [store for store in self.partitions().values() if not store._released]

    def close_partition(self, partition: int) -> None:
        self._process.passes(f"close {partition}")
        super().close_partition(partition)

    def abandon(self) -> None:
        """Closes what a dead process had open, and changes nothing."""
        for store in self._partitions.values():
            store._connection.close()
            store.close_descriptor()
        for lock in self._file_locks.values():
            lock.release()
        self._instance.close()


class Statements:
    """The connection of a writer, who writes as what the worker was when it began."""

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        partition: int,
        process: SimulatedProcess,
        roles: Mapping[int, str],
    ) -> None:
        self._connection = connection
        self._partition = partition
        self._process = process
        self._roles = roles
        self._role = roles.get(partition)

    def execute(self, sql: str, *arguments: Any) -> Any:
        """One statement after the other; the process may die before and after each."""
        result = None
        for statement in sql.split("; "):
            result = self._execute(statement, *arguments)
        return result

    def _execute(self, sql: str, *arguments: Any) -> Any:
        process, word = self._process, sql.partition(" ")[0]
        process.passes(f"{word} {self._partition}")
        role = self._roles.get(self._partition)
        if role is None or role != self._role:
            raise process.loop.violation(
                5, f"{process.name}, which was {self._role} of partition {self._partition}, writes it as {role}"
            )
        if process.is_slow and word in ("COMMIT", "CHECKPOINT", "DELETE"):
            this_thread().sleep(process.loop.random.uniform(0.0, 2.0))
        result = self._connection.execute(sql, *arguments)
        if word in ("COMMIT", "CHECKPOINT"):
            process.passes(f"{word} {self._partition} done")
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


class SinkWorker:
    """One life of a sink worker."""

    def __init__(
        self, loop: SimulatedLoop, name: str, *, kafka: Kafka, clickhouse: ClickHouse, intents: IntentLog
    ) -> None:
        self.name = name
        self.assigned: set[TopicPartition] = set()
        self.process = process = SimulatedProcess(loop, name)
        self.intents = Intents(intents, kafka, process, self.owns)
        self.delivery = Delivery(
            sink=FaultySink(clickhouse, process),
            intents=self.intents,
            decoder=DECODER,
            dead_letters=Letters(kafka, process, lambda _: True),
            limits=FlushLimits(rows_max=loop.random.randint(5, 60), bytes_max=1 << 20, age_seconds_max=0.2),
        )
        self.reader = LogReader(kafka, process, lambda batch: self.host.submit(batch))
        self.host = SinkHost(self.delivery, CATALOG, self.reader)
        self.reader.on_out_of_range = self.host.on_out_of_range
        self.reader.on_unreadable = self.host.on_unreadable
        process.start(self.reader.run())

    def owns(self, topic_partition: TopicPartition) -> bool:
        """See StoreWorker."""
        return topic_partition in self.assigned

    async def assign(self, place: Place, generation: int) -> None:
        """As the sink app does."""
        assert not place.standbys
        self.assigned = {TopicPartition(table.topic, number) for table in TABLES for number in sorted(place.owned)}
        self.intents.generation = generation
        await self.host.on_assigned(self.assigned, generation)

    async def revoke(self) -> None:
        """As the sink app does."""
        await self.host.revoke(list(self.host.hosted()))
        self.assigned = set()

    async def bury(self) -> None:
        """After its death."""
        await self.process.bury()
        self.delivery.close()
