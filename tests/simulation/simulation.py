"""A whole deployment in one loop: two or three store workers, sink workers, and everything that may happen to them.

Every public method is one step: it happens, virtual time passes, and what must always hold is checked against the
model, which is the log itself. `settle` heals the world, waits until all is caught up and compares everything.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random as global_random
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from agents.placement import Place, place
from schemas.table import TableDefinition
from streams.adapters.duckdb_store import DuckDBStore, PartitionStore
from streams.adapters.memory_intents import IntentLog
from streams.errors import SnapshotNotFoundError
from streams.positions import TopicPartition
from streams.processes.hosting import PartitionState
from streams.processes.recovery import SnapshotRestore
from streams.processes.recovery_orders import RecoveryOrder, RecoverySource
from tests.simulation.loop import InvariantError, SimulatedLoop, threads_in_turn, virtual_time
from tests.simulation.workers import CATALOG, CODEC, Disk, SinkWorker, StoreWorker
from tests.simulation.world import PARTITIONS, TABLES, ClickHouse, Kafka, Redis
from tests.store_samples import DECODER

SESSION_SECONDS = 6.0
REVOKE_SECONDS_MAX = 30.0
SETTLE_SECONDS_MAX = 900.0

Worker: TypeAlias = StoreWorker | SinkWorker
Row: TypeAlias = tuple[int, int, int | None]


class Group:
    """A consumer group: who is in it, and what each member is assigned."""

    def __init__(self) -> None:
        self.generation = 0
        self.members: dict[str, Worker] = {}
        self.places: dict[str, Place] = {}


class Simulation:
    """One run; the seed and the steps decide everything."""

    def __init__(self, seed: int, *, store_workers: int = 2, sink_workers: int = 2) -> None:
        print(f"simulation seed {seed}")
        global_random.seed(seed)  # the back-offs' jitter
        memory = Path("/dev/shm")  # noqa: S108
        self._folder = Path(tempfile.mkdtemp(prefix="simulation-", dir=memory if memory.is_dir() else None))
        self.loop = SimulatedLoop(seed)
        self.random = self.loop.random
        self.kafka, self.redis, self.clickhouse = Kafka(self.loop), Redis(self.loop), ClickHouse(self.loop)
        self.intents = IntentLog()
        self.groups = {"store": Group(), "sink": Group()}
        self.has_standbys = False
        #: Partitions are dealt as the assignor deals them; else at random, which must be right too.
        self.is_placed = False
        self._is_asked = False
        self.kills = 0
        self.promotions = 0
        self.answers = 0
        self._lives = 0
        for number in range(store_workers):
            self._start(f"store-{number}", None)
        for number in range(sink_workers):
            self._start(f"sink-{number}", None)
        for kind in self.groups:
            self._run(self._rebalance(kind))
        self._watching = self.loop.create_task(self._watch())

    # -- steps -----------------------------------------------------------------------------------------------------

    def write(self, records: int) -> None:
        """Producers write to every topic partition."""
        for (topic, _), log in self.kafka.logs.items():
            log.write(CATALOG.by_topic[topic], self.random, records)

    def pass_time(self, seconds: float) -> None:
        """Nothing special happens."""
        self._run(asyncio.sleep(seconds))
        self.check()

    def kill(self, name: str, *, after_effects: int, disk: str = "kept", moves: bool = False) -> None:
        """kill -9 after so many further effects, at once if they do not come; then it is started again.

        The disk is `kept`, `lost`, or `torn`: its newest write-ahead log lost its tail to zeros. If `moves`, the group
        notices before it is back, and its partitions move."""
        self._run(self._kill(name, after_effects=after_effects, disk=disk, moves=moves))
        self.check()

    def rebalance(self, kind: str) -> None:
        """Every member lets go of everything; the partitions are dealt anew."""
        self._run(self._rebalance(kind))
        self.check()

    def keep_standbys(self, kept: bool) -> None:
        """From this rebalance on every partition has a copy on another worker, or none any more."""
        self.has_standbys = kept
        self.rebalance("store")

    def place(self, placed: bool) -> None:
        """From this rebalance on the assignor deals, by what members say of their copies, or chance does."""
        self.is_placed = placed
        self.rebalance("store")

    def stop(self, name: str, *, seconds: float, is_cut: bool = False) -> None:
        """SIGSTOP, then SIGCONT; if it takes longer than the group waits, it wakes up as a zombie. If the log `is_cut`
        meanwhile, its copies may find that it begins after what they have."""
        self._run(self._stop(name, seconds, is_cut=is_cut))
        self.check()

    def slow_disks(self, slow: bool) -> None:
        """Transactions of the store workers, and inserts of the sink, take virtual seconds."""
        for group in self.groups.values():
            for worker in group.members.values():
                worker.process.is_slow = slow

    def redis_goes(self, away: bool) -> None:
        """Every call fails meanwhile."""
        self.redis.is_away = away

    def redis_restarts_empty(self) -> None:
        """It was configured to save nothing."""
        self.redis.restart_empty()

    def redis_evicts(self) -> None:
        """Blocks of published versions go, in spite of what is asked of Redis."""
        self.redis.evict(self.random)

    def kafka_goes(self, away: bool) -> None:
        """Nothing is fetched, parked or recorded meanwhile."""
        self.kafka.is_away = away

    def clickhouse_goes(self, away: bool) -> None:
        """Every insert fails meanwhile."""
        self.clickhouse.is_away = away

    def retention(self) -> None:
        """Kafka deletes records that the serving stores and ClickHouse have."""
        for topic_partition, log in self.kafka.logs.items():
            safe = min(self._applied(topic_partition), self._delivered(topic_partition))
            if safe > log.low:
                log.low = self.random.randint(log.low, safe)

    def settle(self, *, snapshots: bool = True) -> None:
        """The world heals; everything catches up; everything is compared, with `snapshots` every kept version too."""
        self.redis.is_away = self.kafka.is_away = self.clickhouse.is_away = False
        self.slow_disks(False)
        self._run(self._settle())
        self.check()
        self._check_records()
        if snapshots:
            for partition in range(PARTITIONS):
                self._run(self._check_snapshots(partition))

    def close(self) -> None:
        """Ends all workers and removes the files."""
        for group in self.groups.values():
            for worker in group.members.values():
                worker.process.at_death = lambda: None
                worker.process.kill()
                self._run(worker.bury())
        self._watching.cancel()
        self._run(asyncio.wait([self._watching]))
        self.loop.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def random_step(self) -> None:
        """One of the above, as the seed has it."""
        random = self.random
        self.write(random.randint(0, 30))
        name = random.choice(sorted(self.groups["store"].members) * 2 + sorted(self.groups["sink"].members))
        match random.randrange(14):
            case 0:
                self.rebalance(name.partition("-")[0])
            case 1 | 2:
                self.stop(name, seconds=random.uniform(0.5, 12.0), is_cut=random.random() < 0.3)
            case 3:
                self.redis_goes(not self.redis.is_away)
            case 4:
                random.choice((self.redis_restarts_empty, self.redis_evicts))()
            case 5:
                self.kafka_goes(not self.kafka.is_away)
            case 6:
                self.clickhouse_goes(not self.clickhouse.is_away)
            case 7:
                self.slow_disks(random.random() < 0.5)
            case 8:
                self.retention()
            case 9:
                self.keep_standbys(not self.has_standbys)
            case 10:
                self.place(not self.is_placed)
            case _:
                self.pass_time(random.uniform(0.1, 5.0))

    def random_cycle(self, *, snapshots: bool) -> None:
        """Some steps, a kill, and then everything must be exact again."""
        for _ in range(self.random.randint(0, 3)):
            self.random_step()
        self.random_kill()
        self.settle(snapshots=snapshots)

    def random_kill(self) -> None:
        """A kill somewhere, with what may come with it."""
        random = self.random
        self.write(random.randint(0, 40))
        name = random.choice(sorted(self.groups["store"].members) * 3 + sorted(self.groups["sink"].members))
        self.kill(
            name,
            after_effects=random.choice((random.randint(0, 12), random.randint(0, 60))),
            disk=random.choice(("kept", "kept", "kept", "torn", "lost")),
            moves=random.random() < 0.3,
        )

    # -- what happens ------------------------------------------------------------------------------------------------

    def _start(self, name: str, disk: Disk | None) -> None:
        if name.startswith("store"):
            self._lives += 1
            folder = self._folder / f"{name}.{self._lives}"
            if disk is None:
                folder.mkdir()
                disk = Disk(folder)
            else:
                disk.folder = disk.folder.rename(folder)
            worker: Worker = StoreWorker(
                self.loop,
                name,
                disk,
                kafka=self.kafka,
                redis=self.redis,
                clickhouse=self.clickhouse,
                intents=self.intents,
                on_all_warm=self._ask_for_an_assignment,
            )
        else:
            worker = SinkWorker(self.loop, name, kafka=self.kafka, clickhouse=self.clickhouse, intents=self.intents)
        self._group_of(name).members[name] = worker

    def _group_of(self, name: str) -> Group:
        return self.groups[name.partition("-")[0]]

    def _run(self, work: Awaitable[Any]) -> Any:
        with virtual_time(self.loop), threads_in_turn(), _silence():
            return self.loop.run_until_complete(work)

    async def _kill(self, name: str, *, after_effects: int, disk: str, moves: bool) -> None:
        group = self._group_of(name)
        worker = group.members[name]
        worker.process.effects_left = after_effects
        await self._until(lambda: worker.process.is_dead, seconds=3.0)
        worker.process.kill()
        self.kills += 1
        await worker.bury()
        kept = worker.disk if isinstance(worker, StoreWorker) else None
        if kept is not None and disk == "lost":
            shutil.rmtree(kept.folder)
            kept = None
        elif kept is not None and disk == "torn":
            for log in kept.folder.glob("*.wal"):
                with log.open("ab") as file:
                    file.write(bytes(self.random.randint(1, 5000)))
        del group.members[name]
        if moves and group.members:
            await asyncio.sleep(SESSION_SECONDS)
            await self._rebalance(name.partition("-")[0])
        await asyncio.sleep(self.random.uniform(0.1, 2.0))
        self._start(name, kept)
        if name in group.places:
            # A static member that is back in time gets what it had.
            back = group.members[name]
            await back.process.start(back.assign(group.places[name], group.generation))
        else:
            await self._rebalance(name.partition("-")[0])

    async def _stop(self, name: str, seconds: float, *, is_cut: bool) -> None:
        group = self._group_of(name)
        worker = group.members[name]
        worker.process.stop()
        if seconds < SESSION_SECONDS or len(group.members) == 1:
            await asyncio.sleep(seconds)
            if is_cut:
                self.retention()
            worker.process.go_on()
            return
        await asyncio.sleep(SESSION_SECONDS)
        await self._rebalance(name.partition("-")[0])
        await asyncio.sleep(seconds - SESSION_SECONDS)
        if is_cut:
            self.retention()
        worker.process.go_on()
        # The zombie works on until its next heartbeat is answered.
        await asyncio.sleep(self.random.uniform(0.0, 3.0))
        await self._rebalance(name.partition("-")[0])

    async def _rebalance(self, kind: str) -> None:
        group = self.groups[kind]
        while True:
            running = {
                name: worker
                for name, worker in group.members.items()
                if not worker.process.is_dead and not worker.process.is_stopped
            }
            revokes = {name: worker.process.start(worker.revoke()) for name, worker in running.items()}
            await asyncio.wait(revokes.values(), timeout=REVOKE_SECONDS_MAX)
            ready = [name for name, revoke in revokes.items() if revoke.done() and not running[name].process.is_dead]
            for name in ready:
                if error := revokes[name].exception():
                    self.loop.faults.append(f"the revoke of {name} raised {error!r}")
            group.generation += 1
            if kind == "sink":
                self.intents.generation = group.generation
            else:
                self.kafka.generation = group.generation
            before, group.places = group.places, self._places(kind, ready)
            for name in ready:
                self.promotions += len(before.get(name, Place()).standbys & group.places[name].owned)
            assigns = [
                running[name].process.start(running[name].assign(group.places[name], group.generation))
                for name in ready
            ]
            if assigns:
                await asyncio.wait(assigns)
            late = [revokes[name] for name in running if name not in ready]
            if not late:
                return
            # Those that let go too late join again once they have.
            await asyncio.wait(late)

    def _places(self, kind: str, ready: list[str]) -> dict[str, Place]:
        """As the assignor has it, or by chance: whoever has a copy may get the partition then, or somebody else."""
        standbys = 1 if self.has_standbys and kind == "store" else 0
        if self.is_placed and kind == "store" and ready:
            said = {worker.name: worker.says() for worker in self._stores() if worker.name in ready}
            return place(said, range(PARTITIONS), standbys=standbys)
        self.random.shuffle(ready)

        def every_nth(first: int) -> frozenset[int]:
            return frozenset(number for number in range(PARTITIONS) if (number + first) % len(ready) == 0)

        has_copies = standbys and len(ready) > 1
        return {
            name: Place(every_nth(-turn), every_nth(1 - turn) if has_copies else frozenset())
            for turn, name in enumerate(ready)
        }

    def _ask_for_an_assignment(self) -> None:
        self._is_asked = True

    async def _settle(self) -> None:
        for kind, group in self.groups.items():
            if len(group.places) < len(group.members):
                await self._rebalance(kind)
        if not await self._until(self._is_caught_up, seconds=SETTLE_SECONDS_MAX):
            raise InvariantError(6, f"not caught up after {SETTLE_SECONDS_MAX:.0f} s: {self._state()}")

    async def _until(self, condition: Callable[[], bool], *, seconds: float) -> bool:
        deadline = self.loop.time() + seconds
        while not condition():
            if self.loop.violations:
                raise self.loop.violations[0]
            if self.loop.time() > deadline:
                return False
            await self._reset_justified_gaps()
            if self._is_asked:
                self._is_asked = False
                await self._rebalance("store")
            await asyncio.sleep(0.05)
        return True

    async def _reset_justified_gaps(self) -> None:
        """A log gap is final; where it is true, the operator's way out is taken."""
        for worker in self._stores():
            for partition, hosted in worker.host.hosted().items():
                if hosted.state is not PartitionState.FAILED or worker.process.is_held:
                    continue
                found = worker.recovery.found.get(partition, {})
                logs = {table.topic: self.kafka.logs[TopicPartition(table.topic, partition)] for table in TABLES}
                committed = {topic: self.kafka.committed.get(log.topic_partition) for topic, log in logs.items()}
                if all(
                    found[topic] >= log.low if topic in found else not log.low or committed[topic] in (None, log.low)
                    for topic, log in logs.items()
                ):
                    raise self.loop.violation(6, f"partition {partition} failed without a gap: {hosted.failure}")
                if worker.orders.pending(partition) is None:
                    worker.orders.place(RecoveryOrder(partition, RecoverySource("clickhouse")))

    async def _watch(self) -> None:
        """What can be seen between the steps."""
        while True:
            await asyncio.sleep(0.02)
            for worker in self._stores():
                for partition in () if worker.process.is_held else worker.host.serving():
                    positions = worker.host.hosted()[partition].positions
                    for topic_partition, target in worker.reader.targets.items():
                        if topic_partition.partition == partition and positions[topic_partition.topic] < target:
                            self.loop.violation(3, f"{topic_partition} answers at {positions} before {target}")

    # -- what must hold ----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """After every step."""
        for worker in self._stores():
            for store in worker.store.open_for_writing():
                if store.partition in worker.host.serving():
                    worker.disk.rebuilt.discard(store.partition)
                # What is rebuilt from ClickHouse is exact once it serves, and not before.
                if store.partition not in worker.disk.rebuilt:
                    self._compare(f"{worker.name} holds", store, worker.disk.begins)
            self._ask(worker)
        for topic_partition, log in self.kafka.logs.items():
            delivered = self.clickhouse.offsets(topic_partition)
            if len(set(delivered)) < len(delivered) or not set(delivered) <= set(log.deliverable):
                self.loop.violation(7, f"ClickHouse holds {delivered} of {topic_partition}")
        if self.loop.violations:
            raise self.loop.violations[0]
        assert not self.loop.faults, self.loop.faults[0]

    def _ask(self, worker: StoreWorker) -> None:
        """As a query would: only what serves, and at a position that the answer states."""
        if worker.process.is_held:
            return
        for partition in worker.host.serving():
            self.answers += 1
            for table in TABLES:
                topic_partition = TopicPartition(table.topic, partition)
                cursor = worker.store.query_cursor(partition)
                try:
                    cursor.execute("BEGIN TRANSACTION READ ONLY")
                    positions = dict(cursor.execute("SELECT topic, next_offset FROM _positions").fetchall())
                    rows = cursor.execute(f"SELECT _offset, id, value FROM {table.name} ORDER BY 1").fetchall()
                finally:
                    cursor.close()
                expected = self._expected(
                    table, partition, worker.disk.begins.get(topic_partition, 0), positions.get(table.topic)
                )
                if rows != expected:
                    self.loop.violation(3, f"{worker.name} answers {rows} for {topic_partition} at {positions}")

    def _compare(self, what: str, store: PartitionStore, begins: dict[TopicPartition, int]) -> None:
        cursor = store._connection.cursor()
        try:
            cursor.execute("BEGIN TRANSACTION READ ONLY")
            positions = dict(
                cursor.execute(
                    f"SELECT topic, max(next_offset) FROM {store.database}.pintail.ledger GROUP BY topic"
                ).fetchall()
            )
            for table in TABLES:
                sql = f"SELECT _offset, id, value FROM {store.database}.main.{table.name} ORDER BY 1"
                rows = cursor.execute(sql).fetchall()
                begin = begins.get(TopicPartition(table.topic, store.partition), 0)
                expected = self._expected(table, store.partition, begin, positions.get(table.topic))
                if rows != expected:
                    wrong = sorted({*rows} ^ {*expected})[:5]
                    number = 2 if len({row[0] for row in rows}) < len(rows) else 1
                    self.loop.violation(
                        number,
                        f"{what} other rows of {table.name}[{store.partition}] than {positions} "
                        f"says of a log that began at {begin}: {wrong}",
                    )
                log = self.kafka.logs[TopicPartition(table.topic, store.partition)]
                if lost := log.poison_below(positions.get(table.topic, 0)) - self.kafka.parked[log.topic_partition]:
                    self.loop.violation(6, f"{what} {log.topic_partition} past {sorted(lost)}, which nobody parked")
        finally:
            cursor.close()

    def _expected(self, table: TableDefinition, partition: int, begin: int, position: int | None) -> list[Row]:
        """What the log says, from `begin` to `position`."""
        log = self.kafka.logs[TopicPartition(table.topic, partition)]
        return log.rows(begin, begin if position is None else position, is_keyed=table.is_keyed)

    def _check_records(self) -> None:
        """Invariants 6 and 7."""
        for topic_partition, log in self.kafka.logs.items():
            poison = log.poison_below(log.next_offset)
            parked = self.kafka.parked[topic_partition]
            if parked != poison:
                raise InvariantError(6, f"of {topic_partition}, {sorted(poison - parked)} are not parked")
            delivered = self.clickhouse.offsets(topic_partition)
            if delivered != log.deliverable:
                raise InvariantError(
                    7, f"ClickHouse lacks {sorted({*log.deliverable} - {*delivered})} of {topic_partition}"
                )

    async def _check_snapshots(self, partition: int) -> None:
        """Invariants 4 and 8."""
        (live, begins) = next(
            (worker.store.partitions()[partition], worker.disk.begins)
            for worker in self._stores()
            if partition in worker.host.serving()
        )
        for version in await self.redis.repository.versions(partition):
            restore = SnapshotRestore(self.redis.repository, CODEC, partition, version)
            try:
                manifest = await restore.manifest()
            except SnapshotNotFoundError:
                continue  # retired meanwhile
            lost = await self.redis.repository.missing_blocks(partition, manifest.block_names)
            if lost - self.redis.evicted:
                raise InvariantError(4, f"version {version} of partition {partition} lost blocks by itself")
            if lost:
                continue
            folder = self._folder / f"restored-{partition}-{version}"
            folder.mkdir()
            await restore.to(folder / f"{partition}.duckdb")
            scratch = DuckDBStore(folder, CATALOG, threads=1)
            try:
                store = scratch.open_partition(partition)
                began = {
                    TopicPartition(topic, partition): begin
                    for topic, begin in self.redis.published[partition, version].items()
                }
                if store.next_offsets() != manifest.next_offsets:
                    raise InvariantError(8, f"version {version} is at {store.next_offsets()}, not as its manifest says")
                self._compare(f"version {version} holds", store, began)
                if all(began.get(each, 0) == begins.get(each, 0) for each in began):
                    for topic, position in live.next_offsets().items():
                        log = self.kafka.logs[TopicPartition(topic, partition)]
                        batch = log.batch(store.next_offsets().get(topic, began.get(log.topic_partition, 0)), position)
                        store.apply([DECODER.decode(CATALOG.by_topic[topic], batch)])
                    if store.content_hash() != live.content_hash():
                        raise InvariantError(8, f"version {version} of partition {partition} and its replay differ")
            finally:
                scratch.close()
                shutil.rmtree(folder)

    # -- where things are --------------------------------------------------------------------------------------------

    def _stores(self) -> list[StoreWorker]:
        return [worker for worker in self.groups["store"].members.values() if isinstance(worker, StoreWorker)]

    def _applied(self, topic_partition: TopicPartition) -> int:
        """Of the serving owner; -1 if nobody serves."""
        return max(
            (
                worker.host.hosted()[topic_partition.partition].positions[topic_partition.topic]
                for worker in self._stores()
                if topic_partition.partition in worker.host.serving()
                and topic_partition.partition in self.owned_by(worker.name)
            ),
            default=-1,
        )

    def _delivered(self, topic_partition: TopicPartition) -> int:
        intent = self.intents.newest.get(topic_partition)
        return intent.lo if intent is not None else -1

    def owned_by(self, name: str) -> frozenset[int]:
        """The partitions that the group has given this worker."""
        return self._group_of(name).places.get(name, Place()).owned

    def _is_caught_up(self) -> bool:
        """A partition that is awaited elsewhere moves there once it is warm."""
        return not any(place.awaited for place in self.groups["store"].places.values()) and all(
            min(self._applied(topic_partition), self._passed(topic_partition), self._copied(topic_partition))
            >= log.next_offset
            for topic_partition, log in self.kafka.logs.items()
        )

    def _copied(self, topic_partition: TopicPartition) -> float:
        """How far the copy is that is furthest behind; infinity if there is none."""
        copies = [worker.standbys.standbys().get(topic_partition.partition) for worker in self._stores()]
        return min((copy.positions.get(topic_partition.topic, -1) for copy in copies if copy), default=math.inf)

    def _passed(self, topic_partition: TopicPartition) -> int:
        """How far the delivery of the sink's owner says it is; -1 if nobody delivers."""
        deliveries = [
            worker.host.hosted()[topic_partition].delivery
            for worker in self.groups["sink"].members.values()
            if isinstance(worker, SinkWorker)
            and topic_partition in worker.host.hosted()
            and topic_partition.partition in self.owned_by(worker.name)
        ]
        return max((delivery.next_offset or 0 for delivery in deliveries), default=-1)

    def _state(self) -> dict[str, Any]:
        """For whoever reads the failure."""
        state: dict[str, Any] = {f"{where}": log.watermarks for where, log in self.kafka.logs.items()}
        for worker in self._stores():
            for number, hosted in worker.host.hosted().items():
                state[f"{worker.name} {number}"] = (hosted.state, hosted.positions, hosted.failure)
            for number, copy in worker.standbys.standbys().items():
                state[f"{worker.name} {number} copy"] = (copy.lag_records, copy.positions, copy.failure)
        for member in self.groups["sink"].members.values():
            assert isinstance(member, SinkWorker)
            for where, delivery in member.host.hosted().items():
                state[f"{member.name} {where}"] = (delivery.state, delivery.delivery.next_offset, delivery.failure)
        return state


@contextmanager
def _silence() -> Iterator[None]:
    """Faults are the point here; what the workers say about them would fill the report."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
