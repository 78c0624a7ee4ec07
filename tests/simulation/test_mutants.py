"""The simulation can fail: each of these mistakes, put into the real code, is found, and by the invariant it breaks.

Each is looked for among runs of the kind that shows it soon. The same runs find nothing without the mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from streams.adapters import duckdb_partition
from streams.adapters.duckdb_partition import FrozenFile, PartitionStore
from streams.adapters.memory_intents import MemoryIntents
from streams.adapters.memory_snapshots import MemorySnapshotRepository
from streams.batches import RecordBatch
from streams.ports import DeadLetter, DecodedBatch, Watermarks
from streams.positions import OffsetRange, TopicPartition
from streams.processes import hosting, standby
from streams.processes.delivery import PartitionDelivery
from streams.processes.hosting import HostedPartition, PartitionState
from streams.processes.ingestion import PartitionIngestion
from streams.processes.recovery import Recovery
from streams.processes.snapshotting import _Capture
from streams.processes.standby import OwnersLetters, Standby, Standbys
from tests.simulation.loop import InvariantError
from tests.simulation.simulation import Simulation

CYCLES_PER_SEED = 5
SEEDS_MAX = 16
Mutant = Callable[[pytest.MonkeyPatch], None]
LogMarks = Mapping[TopicPartition, Watermarks]


# -- the store ---------------------------------------------------------------------------------------------------------


def next_offset_in_a_transaction_of_its_own(patch: pytest.MonkeyPatch) -> None:
    enter = PartitionStore._enter

    def mutant(store: PartitionStore, entries: Mapping[str, Any]) -> list[str]:
        return ["COMMIT", "BEGIN TRANSACTION", *enter(store, entries)]

    patch.setattr(PartitionStore, "_enter", mutant)


def what_is_read_again_is_applied_again(patch: pytest.MonkeyPatch) -> None:
    def decode(ingestion: PartitionIngestion, batches: Sequence[RecordBatch]) -> list[DecodedBatch]:
        return [ingestion._decoder.decode(ingestion._tables[batch.topic], batch) for batch in batches]

    start = hosting._start_positions

    async def from_before(store: PartitionStore, marks: LogMarks) -> tuple[dict[str, int], dict[str, str]]:
        positions, topic_ids = await start(store, marks)
        return {tp.topic: max(log.low, positions[tp.topic] - 5) for tp, log in marks.items()}, topic_ids

    patch.setattr(hosting, "_start_positions", from_before)
    patch.setattr(PartitionIngestion, "_decode", decode)
    patch.setattr(duckdb_partition, "_from_offset", lambda batch, _: batch)


def replay_that_starts_a_record_too_late(patch: pytest.MonkeyPatch) -> None:
    start = hosting._start_positions

    async def mutant(store: PartitionStore, marks: LogMarks) -> tuple[dict[str, int], dict[str, str]]:
        positions, topic_ids = await start(store, marks)
        return {topic: position + (position > 0) for topic, position in positions.items()}, topic_ids

    patch.setattr(hosting, "_start_positions", mutant)


def answers_before_it_caught_up(patch: pytest.MonkeyPatch) -> None:
    enter = HostedPartition._enter

    async def mutant(hosted: HostedPartition, state: PartitionState) -> None:
        if state is PartitionState.REPLAYING:
            hosted._targets = {}
        await enter(hosted, state)

    patch.setattr(HostedPartition, "_enter", mutant)


def a_revoke_that_waits_for_nothing(patch: pytest.MonkeyPatch) -> None:
    async def mutant(hosted: HostedPartition, **_: Any) -> None:
        hosted._is_leaving = True

    patch.setattr(HostedPartition, "stop", mutant)


def poison_parked_after_its_offset_is_passed(patch: pytest.MonkeyPatch) -> None:
    commit, park = PartitionIngestion._commit, PartitionIngestion._park
    late: dict[PartitionIngestion, list[DeadLetter]] = {}

    async def park_later(ingestion: PartitionIngestion, letters: Sequence[DeadLetter]) -> None:
        late.setdefault(ingestion, []).extend(letters)

    async def mutant(ingestion: PartitionIngestion, batches: Sequence[RecordBatch]) -> None:
        await commit(ingestion, batches)
        await park(ingestion, late.pop(ingestion, []))

    patch.setattr(PartitionIngestion, "_park", park_later)
    patch.setattr(PartitionIngestion, "_commit", mutant)


def recovery_that_forgets_clickhouse(patch: pytest.MonkeyPatch) -> None:
    async def mutant(*_: Any) -> None:
        return None

    patch.setattr(Recovery, "_from_clickhouse", mutant)


# -- standbys ----------------------------------------------------------------------------------------------------------


def a_copy_that_passes_poison_before_its_owner(patch: pytest.MonkeyPatch) -> None:
    async def mutant(*_: Any) -> None:
        return None

    patch.setattr(OwnersLetters, "park", mutant)


def a_promotion_that_waits_for_nothing(patch: pytest.MonkeyPatch) -> None:
    async def mutant(*_: Any, **__: Any) -> None:
        return None

    patch.setattr(Standby, "stop", mutant)


def a_copy_that_counts_on_what_the_log_has_lost_meanwhile(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(standby, "check_uncut", lambda *_: None)


def a_copy_that_is_warm_and_does_not_say_so(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Standbys, "_tell_when_all_are_warm", lambda _: None)


# -- snapshots ---------------------------------------------------------------------------------------------------------


def a_snapshot_of_an_older_epoch_is_accepted(patch: pytest.MonkeyPatch) -> None:
    publish = MemorySnapshotRepository.publish

    async def mutant(repository: MemorySnapshotRepository, partition: int, *, epoch: int, **options: Any) -> None:
        newest = repository._partitions[partition].epoch
        await publish(repository, partition, epoch=max(epoch, newest), **options)

    patch.setattr(MemorySnapshotRepository, "publish", mutant)


def a_snapshot_is_published_before_its_last_block_is_stored(patch: pytest.MonkeyPatch) -> None:
    store_blocks, publish = _Capture._store_blocks, MemorySnapshotRepository.publish

    def all_but_one(capture: _Capture, new: Mapping[str, tuple[bytes, bytes]]) -> None:
        store_blocks(capture, dict(list(new.items())[:-1]))

    async def unchecked(
        repository: MemorySnapshotRepository, partition: int, *, block_names: Collection[str], **options: Any
    ) -> None:
        there = frozenset(block_names) - await repository.missing_blocks(partition, block_names)
        await publish(repository, partition, block_names=there, **options)

    patch.setattr(_Capture, "_store_blocks", all_but_one)
    patch.setattr(MemorySnapshotRepository, "publish", unchecked)


def blocks_of_a_retired_snapshot_are_removed_whoever_needs_them(patch: pytest.MonkeyPatch) -> None:
    retire = MemorySnapshotRepository.retire

    async def mutant(repository: MemorySnapshotRepository, partition: int, versions: Collection[int]) -> int:
        members = repository._partitions[partition].members
        retired = frozenset[str]().union(*(members[version] for version in versions))
        removed = await retire(repository, partition, versions)
        for name in retired:
            repository._living(partition).pop(name, None)
        return removed

    patch.setattr(MemorySnapshotRepository, "retire", mutant)


def a_snapshot_without_what_is_in_the_write_ahead_log(patch: pytest.MonkeyPatch) -> None:
    frozen = PartitionStore.frozen

    @contextmanager
    def mutant(store: PartitionStore, *, hashed: bool = False) -> Iterator[FrozenFile]:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(store, "_checkpoint", lambda: None)
            context = frozen(store, hashed=hashed)
            file = context.__enter__()
        try:
            yield file
        finally:
            context.__exit__(None, None, None)

    patch.setattr(PartitionStore, "frozen", mutant)


def a_snapshot_that_claims_what_was_applied_while_it_was_taken(patch: pytest.MonkeyPatch) -> None:
    capture = _Capture._capture

    def mutant(work: _Capture, *arguments: Any) -> Any:
        manifest = capture(work, *arguments)
        return replace(manifest, next_offsets=work._store.next_offsets())

    patch.setattr(_Capture, "_capture", mutant)


# -- the sink ----------------------------------------------------------------------------------------------------------


def intent_recorded_after_the_insert(patch: pytest.MonkeyPatch) -> None:
    record, insert = PartitionDelivery._record, PartitionDelivery._insert

    async def not_yet(delivery: PartitionDelivery, offsets: OffsetRange) -> None:
        if offsets.lo == offsets.hi:
            await record(delivery, offsets)

    async def mutant(delivery: PartitionDelivery, offsets: OffsetRange, rows: pa.Table) -> None:
        await insert(delivery, offsets, rows)
        await record(delivery, offsets)

    patch.setattr(PartitionDelivery, "_record", not_yet)
    patch.setattr(PartitionDelivery, "_insert", mutant)


def an_intent_of_an_older_generation_is_accepted(patch: pytest.MonkeyPatch) -> None:
    async def mutant(intents: MemoryIntents, topic_partition: TopicPartition, offsets: OffsetRange) -> None:
        intents.log.newest[topic_partition] = offsets

    patch.setattr(MemoryIntents, "record", mutant)


def an_intent_taken_for_a_delivery(patch: pytest.MonkeyPatch) -> None:
    start = PartitionDelivery.start

    async def mutant(delivery: PartitionDelivery) -> int | None:
        resume = await start(delivery)
        if delivery._buffer.replay is not None:
            resume = delivery.next_offset = delivery._buffered_to = delivery._buffer.replay.hi
            delivery._buffer.replay = None
        return resume

    patch.setattr(PartitionDelivery, "start", mutant)


def a_replay_under_another_token(patch: pytest.MonkeyPatch) -> None:
    start = PartitionDelivery.start

    async def mutant(delivery: PartitionDelivery) -> int | None:
        resume = await start(delivery)
        delivery._buffer.replay = None
        return resume

    patch.setattr(PartitionDelivery, "start", mutant)


# -- what happens ------------------------------------------------------------------------------------------------------


def a_kill(simulation: Simulation) -> None:
    _kill_one_of(simulation, "store-0", "store-1")


def a_kill_of_a_sink(simulation: Simulation) -> None:
    simulation.clickhouse.late_ratio = 0.4
    _kill_one_of(simulation, "sink-0", "sink-1")


def _kill_one_of(simulation: Simulation, *names: str) -> None:
    simulation.write(simulation.random.randint(10, 40))
    simulation.kill(simulation.random.choice(names), after_effects=simulation.random.randint(0, 20))
    simulation.settle(snapshots=False)


def a_rebalance(simulation: Simulation) -> None:
    simulation.write(simulation.random.randint(10, 40))
    simulation.pass_time(simulation.random.uniform(0.0, 0.2))
    simulation.rebalance(simulation.random.choice(("store", "sink")))
    simulation.settle(snapshots=False)


def a_zombie(simulation: Simulation) -> None:
    _stop_one_of(simulation, "store-0", "store-1")


def a_zombie_of_a_sink(simulation: Simulation) -> None:
    _stop_one_of(simulation, "sink-0", "sink-1")


def _stop_one_of(simulation: Simulation, *names: str) -> None:
    simulation.write(simulation.random.randint(10, 40))
    simulation.pass_time(simulation.random.uniform(0.0, 2.0))
    simulation.stop(simulation.random.choice(names), seconds=simulation.random.uniform(7.0, 12.0))
    simulation.settle(snapshots=False)


def a_promotion(simulation: Simulation) -> None:
    simulation.keep_standbys(True)
    simulation.write(simulation.random.randint(10, 40))
    name = simulation.random.choice(("store-0", "store-1"))
    simulation.kill(name, after_effects=simulation.random.randint(0, 12), moves=True)
    assert simulation.promotions, "the survivor has copies of all that it gets"
    simulation.settle(snapshots=False)


def a_log_that_is_cut_under_a_copy(simulation: Simulation) -> None:
    if not simulation.has_standbys:
        simulation.keep_standbys(True)
    simulation.write(simulation.random.randint(10, 40))
    simulation.stop(simulation.random.choice(("store-0", "store-1")), seconds=5.0, is_cut=True)
    simulation.settle(snapshots=False)


def a_loss_of_disk_where_copies_decide(simulation: Simulation) -> None:
    if not simulation.is_placed:
        simulation.place(True)
    simulation.write(simulation.random.randint(10, 40))
    simulation.settle(snapshots=False)
    name = simulation.random.choice(("store-0", "store-1"))
    simulation.kill(name, after_effects=simulation.random.randint(0, 12), disk="lost", moves=True)
    assert not simulation.owned_by(name), "it is cold, and the other one is warm"
    simulation.settle(snapshots=False)
    assert simulation.owned_by(name), "it is warm, and has its share"


def snapshots(simulation: Simulation) -> None:
    simulation.slow_disks(True)
    for _ in range(5):
        simulation.write(simulation.random.randint(5, 20))
        simulation.pass_time(simulation.random.uniform(1.0, 3.0))
    simulation.settle()


def a_loss_of_disk_and_snapshots(simulation: Simulation) -> None:
    simulation.write(simulation.random.randint(10, 40))
    simulation.settle(snapshots=False)
    simulation.retention()
    simulation.redis_restarts_empty()
    simulation.kill("store-0", after_effects=0, disk="lost")
    simulation.settle(snapshots=False)


@pytest.mark.parametrize(
    ("mutant", "numbers", "happens"),
    [
        (next_offset_in_a_transaction_of_its_own, {1, 2}, a_kill),
        (what_is_read_again_is_applied_again, {1, 2}, a_kill),
        (replay_that_starts_a_record_too_late, {6}, a_kill),
        (answers_before_it_caught_up, {3}, a_kill),
        (a_revoke_that_waits_for_nothing, {5}, a_rebalance),
        (poison_parked_after_its_offset_is_passed, {6}, a_kill),
        (recovery_that_forgets_clickhouse, {6}, a_loss_of_disk_and_snapshots),
        (a_copy_that_passes_poison_before_its_owner, {6}, a_promotion),
        (a_promotion_that_waits_for_nothing, {5}, a_promotion),
        (a_copy_that_counts_on_what_the_log_has_lost_meanwhile, {6}, a_log_that_is_cut_under_a_copy),
        (a_copy_that_is_warm_and_does_not_say_so, {6}, a_loss_of_disk_where_copies_decide),
        (a_snapshot_of_an_older_epoch_is_accepted, {5}, a_zombie),
        (a_snapshot_is_published_before_its_last_block_is_stored, {4}, snapshots),
        (blocks_of_a_retired_snapshot_are_removed_whoever_needs_them, {4}, snapshots),
        (a_snapshot_without_what_is_in_the_write_ahead_log, {8}, snapshots),
        (a_snapshot_that_claims_what_was_applied_while_it_was_taken, {8}, snapshots),
        (intent_recorded_after_the_insert, {7}, a_kill_of_a_sink),
        (an_intent_of_an_older_generation_is_accepted, {5}, a_zombie_of_a_sink),
        (an_intent_taken_for_a_delivery, {7}, a_kill_of_a_sink),
        (a_replay_under_another_token, {7}, a_kill_of_a_sink),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_mistake_is_found(
    mutant: Mutant, numbers: set[int], happens: Callable[[Simulation], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch)
    broken = next(found for seed in range(1, SEEDS_MAX) if (found := found_in(seed, happens)) is not None)
    assert broken.number in numbers, broken


def found_in(seed: int, happens: Callable[[Simulation], None]) -> InvariantError | None:
    """What this run finds broken."""
    with closing(Simulation(seed)) as simulation:
        try:
            for _ in range(CYCLES_PER_SEED):
                happens(simulation)
        except InvariantError as error:
            return error
    return None


@pytest.mark.parametrize(
    "happens",
    [
        a_kill,
        a_kill_of_a_sink,
        a_rebalance,
        a_zombie,
        a_zombie_of_a_sink,
        a_promotion,
        a_log_that_is_cut_under_a_copy,
        a_loss_of_disk_where_copies_decide,
        snapshots,
        a_loss_of_disk_and_snapshots,
    ],
)
def test_without_a_mistake_nothing_is_found(happens: Callable[[Simulation], None]) -> None:
    assert found_in(1, happens) is None
