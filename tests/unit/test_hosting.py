"""The life of a partition under one assignment: its way to SERVING, its faults, and how completely it is let go of."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
from aiokafka.errors import KafkaTimeoutError

from agents.fetched_batches import ByteBudget
from schemas.catalog import Catalog
from streams import telemetry
from streams.adapters.duckdb_file import FileLock
from streams.adapters.duckdb_store import DuckDBStore, PartitionStore
from streams.errors import SnapshotCorruptError, StaleEpochError, StoreError
from streams.ports import DeadLetter, DecodedBatch, Watermarks
from streams.positions import TopicPartition
from streams.processes import log_reading
from streams.processes.hosting import HostedPartition, HostingParts, PartitionHost, PartitionState
from streams.processes.recovery import Recovery, Rung
from streams.processes.recovery_orders import RecoveryOrders
from streams.processes.snapshotting import SnapshotInfo, SnapshotSchedule, Snapshotter
from streams.retry import Backoff
from tests.store_samples import DECODER, batch, table
from tests.watched_log import SECONDS_MAX, WatchedLog, until

EVENTS = table("events", number="INTEGER!")
TP = TopicPartition(EVENTS.topic, 0)


class NoLetters:
    async def park(self, letters: Sequence[DeadLetter]) -> None:
        raise AssertionError(f"nothing to park here: {letters}")


class FailingSnapshotter(Snapshotter):
    """Fails for partition 0."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    async def take(self, store: PartitionStore, epoch: int, *, hashed: bool = False) -> SnapshotInfo | None:
        del epoch, hashed
        self.taken.append(store.partition)
        if store.partition == 0:
            raise StoreError("checkpoint failed: no space left on device")
        return None


class Worker:
    """A host over a real store. The test is Kafka."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.store = DuckDBStore(folder, Catalog((EVENTS,)), threads=1)
        self.log = WatchedLog()
        self.snapshotter = FailingSnapshotter()
        parts = HostingParts(
            catalog=Catalog((EVENTS,)),
            store=self.store,
            recovery=Recovery(self.store, None, None),
            snapshotter=self.snapshotter,
            decoder=DECODER,
            dead_letters=NoLetters(),
            orders=RecoveryOrders(folder),
            **options,
        )
        self.host = PartitionHost(parts, self.log)

    def hosted(self, partition: int = 0) -> HostedPartition:
        return self.host.hosted()[partition]

    async def serve(self, *partitions: int) -> None:
        await self.host.assign(partitions)
        await until(lambda: len(self.host.serving()) == len(partitions))

    def submit(self, *numbers: int) -> None:
        self.host.submit(batch(EVENTS, [{"number": number} for number in numbers], first=numbers[0]))

    def is_unlocked(self, partition: int) -> bool:
        try:
            FileLock(self.store.path_of(partition).with_name(f"{partition}.lock")).release()
        except StoreError:
            return False
        return True


@pytest.fixture
async def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Worker]:
    monkeypatch.setattr(Backoff, "next_delay_seconds", lambda _: 0.01)
    worker = Worker(tmp_path)
    yield worker
    await worker.host.revoke(list(worker.host.hosted()))
    worker.store.close()


def gated(action: Callable[..., Any]) -> tuple[Callable[..., Any], threading.Event, threading.Event]:
    """(the action behind a gate, set when it is reached, the gate)."""
    reached, gate = threading.Event(), threading.Event()

    def wait_then_act(*arguments: Any) -> Any:
        reached.set()
        assert gate.wait(SECONDS_MAX), "the gate was never opened"
        return action(*arguments)

    return wait_then_act, reached, gate


@pytest.mark.invariant(5, place="rebalance")
async def test_invariant_5_after_revoke_the_files_are_closed_and_unlocked_also_those_that_were_being_opened(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening, reached, gate = gated(worker.store.open_partition)
    monkeypatch.setattr(worker.store, "open_partition", opening)
    await worker.host.assign([0, 1, 2])
    await asyncio.to_thread(reached.wait, SECONDS_MAX)
    revoking = asyncio.create_task(worker.host.revoke([0, 1, 2]))
    await asyncio.sleep(0)
    revoking.cancel()  # as a rebalance that takes too long would
    ended, _ = await asyncio.wait({revoking}, timeout=0.1)
    assert not ended, "the files would be opened afterwards"
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await revoking
    assert worker.store.partitions() == {}
    assert all(worker.is_unlocked(partition) for partition in (0, 1, 2))


@pytest.mark.invariant(5, place="rebalance")
async def test_invariant_5_a_new_assignment_waits_until_the_old_one_has_let_go(worker: Worker) -> None:
    await worker.serve(0)
    old, store = worker.hosted(), worker.hosted().store
    assert store is not None
    with store.frozen():
        assigning = asyncio.create_task(worker.host.assign([0]))
        await until(lambda: old.state is not PartitionState.SERVING)
        assert worker.host.hosted() == {}
        await asyncio.sleep(0)
        assert not assigning.done()
    await assigning
    await until(lambda: bool(worker.host.serving()))
    assert worker.hosted().store is not store


@pytest.mark.invariant(5, place="rebalance")
async def test_invariant_5_files_stay_open_through_a_rebalance_and_nobody_writes_to_them(worker: Worker) -> None:
    await worker.serve(0, 1)
    worker.submit(0, 1)
    async with asyncio.timeout(SECONDS_MAX):
        await worker.host.wait_until_applied(0, EVENTS.topic, 1)
    old, epoch = worker.hosted().store, worker.hosted().epoch
    assert old is not None
    await worker.host.suspend([0, 1])
    assert worker.host.serving() == {}
    with pytest.raises(StaleEpochError):
        old.checkpoint()
    with pytest.raises(StoreError):
        worker.store.query_cursor(0)
    assert not worker.is_unlocked(0)
    worker.log.marks[TopicPartition(EVENTS.topic, 0)] = Watermarks(0, 2)
    await worker.serve(0)
    recovered = worker.hosted().recovered
    assert recovered is not None
    assert (recovered.rung, worker.hosted().epoch) == (Rung.WARM, epoch + 1)
    assert worker.hosted().positions == {EVENTS.topic: 2}
    assert worker.store.partitions().keys() == {0}, "the other one's file is closed once it is known to have moved"
    assert worker.is_unlocked(1)
    with pytest.raises(StaleEpochError):
        old.checkpoint()
    await worker.serve(0)  # one assignment after the other, without a revoke in between
    recovered = worker.hosted().recovered
    assert recovered is not None
    assert recovered.rung is Rung.WARM


async def test_a_worker_that_is_given_nothing_closes_what_it_had(worker: Worker) -> None:
    await worker.serve(0)
    await worker.host.suspend([0])
    await worker.host.assign([])
    assert worker.store.partitions() == {}
    assert worker.is_unlocked(0)


async def test_what_comes_after_a_failed_step_of_letting_go_is_done_all_the_same(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await worker.serve(0)

    async def broken(partitions: Collection[int]) -> None:
        del partitions
        raise RuntimeError("no query can be ended")

    monkeypatch.setattr(worker.host, "before_closing", broken)
    with pytest.raises(RuntimeError):
        await worker.host.revoke([0])
    assert worker.store.partitions() == {}
    assert worker.is_unlocked(0)


async def test_a_second_fault_while_letting_go_does_not_end_supervision(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await worker.serve(0)
    faults = [StoreError("cannot be detached"), StoreError("cannot be written")]
    apply, close = PartitionStore.apply, worker.store.close_partition

    def apply_at_the_second_try(store: PartitionStore, batches: Sequence[DecodedBatch]) -> None:
        if len(faults) == 2:
            raise faults.pop()
        apply(store, batches)

    def close_at_the_second_try(partition: int) -> None:
        if len(faults) == 1:
            raise faults.pop()
        close(partition)

    monkeypatch.setattr(PartitionStore, "apply", apply_at_the_second_try)
    monkeypatch.setattr(worker.store, "close_partition", close_at_the_second_try)
    worker.submit(0)
    await until(lambda: worker.log.reads == [(TP, 0), (TP, 0)])
    assert faults == []
    worker.submit(0)
    async with asyncio.timeout(SECONDS_MAX):
        await worker.host.wait_until_applied(0, EVENTS.topic, 0)
    assert worker.hosted().failure is None


async def test_a_partition_that_recovers_anew_says_why(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    worker.log.faults = [KafkaTimeoutError("ListOffsets")]
    monkeypatch.setattr(Backoff, "next_delay_seconds", lambda _: 3600.0)
    await worker.host.assign([0])
    await until(lambda: worker.hosted().failure is not None)
    assert worker.hosted().state is PartitionState.RECOVERING
    assert "ListOffsets" in str(worker.hosted().failure)
    assert worker.is_unlocked(0)


@pytest.mark.invariant(6, place="input")
async def test_invariant_6_records_that_were_lost_on_the_way_are_read_again(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_reading, "REREAD_SECONDS_MIN", 0.01)
    await worker.serve(0)
    worker.submit(0, 1)
    worker.submit(4, 5)  # 2 and 3 never arrived
    await until(lambda: worker.log.reads == [(TP, 0), (TP, 2)])
    worker.submit(2, 3)
    worker.submit(4, 5)
    async with asyncio.timeout(SECONDS_MAX):
        await worker.host.wait_until_applied(0, EVENTS.topic, 5)
    cursor = worker.store.query_cursor(0)
    assert cursor.execute("SELECT list(number ORDER BY _offset) FROM events").fetchall() == [([0, 1, 2, 3, 4, 5],)]
    cursor.close()


async def test_those_who_wait_for_a_record_are_told_when_the_partition_fails(worker: Worker) -> None:
    await worker.serve(0)
    waiting = asyncio.create_task(worker.host.wait_until_applied(0, EVENTS.topic, 9))
    await asyncio.sleep(0)
    worker.host.on_out_of_range(TP)
    with pytest.raises(StoreError, match="has failed"):
        await asyncio.wait_for(waiting, SECONDS_MAX)
    assert worker.hosted().state is PartitionState.FAILED
    assert "out of range" in str(worker.hosted().failure)
    with pytest.raises(StoreError, match="has failed"):
        await worker.host.wait_until_applied(0, EVENTS.topic, 9)


async def test_those_who_wait_for_a_record_are_told_when_the_partition_leaves(worker: Worker) -> None:
    await worker.serve(0)
    waiting = asyncio.create_task(worker.host.wait_until_applied(0, EVENTS.topic, 9))
    await asyncio.sleep(0)
    await worker.host.revoke([0])
    with pytest.raises(StaleEpochError):
        await asyncio.wait_for(waiting, SECONDS_MAX)


async def test_a_failed_partition_gives_back_the_bytes_of_what_was_queued(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = ByteBudget(1000)
    await worker.serve(0)
    applying, reached, gate = gated(PartitionStore.apply)
    monkeypatch.setattr(PartitionStore, "apply", applying)

    def submit(first: int) -> None:
        fetched = batch(EVENTS, [{"number": first}], first=first)
        fetched.size_bytes = 400
        budget.take(TP, fetched)
        worker.host.submit(fetched)

    submit(0)
    await asyncio.to_thread(reached.wait, SECONDS_MAX)
    submit(1)
    submit(2)
    assert budget.bytes_used == 1200
    worker.host.on_out_of_range(TP)
    gate.set()
    await until(lambda: worker.hosted().state is PartitionState.FAILED)
    gc.collect()
    assert budget.bytes_used == 0


async def test_a_snapshot_that_fails_costs_neither_the_next_partition_its_own_nor_the_worker_its_timer(
    worker: Worker,
) -> None:
    await worker.serve(0, 1)
    before = telemetry.SNAPSHOT_FAILURES.labels(0)._value.get()
    await worker.host.take_snapshots()
    assert worker.snapshotter.taken == [0, 1]
    assert telemetry.SNAPSHOT_FAILURES.labels(0)._value.get() == before + 1


async def test_a_partition_whose_checkpoint_failed_is_opened_anew_because_duckdb_refuses_it_until_then(
    worker: Worker,
) -> None:
    await worker.serve(0)
    refused = worker.hosted().store
    await worker.host.take_snapshots()
    await until(lambda: 0 in worker.host.serving() and worker.hosted().store is not refused)


@pytest.mark.invariant(1, 5, place="rebalance")
@pytest.mark.invariant(1, 5, place="checkpoint")
async def test_a_revoke_over_budget_rolls_back_the_transaction_in_flight(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await worker.serve(0)
    store = worker.hosted().store
    assert store is not None
    monkeypatch.setattr(worker.host, "_revoke_seconds_max", 0.01)
    reached, given_up = threading.Event(), threading.Event()
    enter = store._enter
    interrupt = store.interrupt

    def enter_slowly(entries: Any) -> list[str]:
        reached.set()
        assert given_up.wait(SECONDS_MAX), "the revoke never hurried"
        return enter(entries)

    def interrupt_and_tell() -> None:
        interrupt()
        given_up.set()

    monkeypatch.setattr(store, "_enter", enter_slowly)
    monkeypatch.setattr(store, "interrupt", interrupt_and_tell)
    overruns = telemetry.REVOKE_OVERRUNS._value.get()
    worker.submit(0, 1)
    await asyncio.to_thread(reached.wait, SECONDS_MAX)
    await worker.host.revoke([0])
    assert telemetry.REVOKE_OVERRUNS._value.get() == overruns + 1
    assert worker.is_unlocked(0)
    await worker.serve(0)
    assert worker.log.reads == [(TP, 0), (TP, 0)], "what was rolled back is read again"


async def test_a_worker_that_ends_publishes_a_last_snapshot_within_its_budget(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await worker.serve(0, 1)
    await worker.host.leave()
    assert worker.snapshotter.taken == [0, 1]
    assert worker.host.hosted() == {}

    async def take(store: PartitionStore, epoch: int, *, hashed: bool = False) -> None:
        del store, epoch, hashed
        await asyncio.Event().wait()  # as while Redis hangs

    monkeypatch.setattr(worker.snapshotter, "take", take)
    monkeypatch.setattr(worker.host, "_revoke_seconds_max", 0.01)
    await worker.serve(0, 1)
    await worker.host.leave()
    assert all(worker.is_unlocked(partition) for partition in (0, 1))


async def test_a_retention_sweep_that_fails_costs_neither_the_next_partition_its_own_nor_the_worker_its_timer(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await worker.serve(0, 1)
    swept: list[int] = []

    def delete_expired(store: PartitionStore, now_ms: int) -> int:
        swept.append(store.partition)
        if store.partition == 0:
            raise StoreError(f"nothing older than {now_ms} could be deleted")
        raise StaleEpochError("released meanwhile")

    monkeypatch.setattr(PartitionStore, "delete_expired", delete_expired)
    before = telemetry.RETENTION_FAILURES.labels(0)._value.get()
    await worker.host.delete_expired(1)
    assert swept == [0, 1]
    assert telemetry.RETENTION_FAILURES.labels(0)._value.get() == before + 1
    assert sorted(worker.host.serving()) == [0, 1]


@pytest.mark.invariant(3, place="rebalance")
@pytest.mark.invariant(3, place="recovery")
async def test_invariant_3_a_partition_counts_as_serving_only_once_queries_see_it(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    publishing, reached, gate = gated(worker.store.publish_scopes)
    monkeypatch.setattr(worker.store, "publish_scopes", publishing)
    await worker.host.assign([0])
    await asyncio.to_thread(reached.wait, SECONDS_MAX)
    assert worker.host.serving() == {}
    gate.set()
    await until(lambda: bool(worker.host.serving()))
    worker.store.query_cursor(0).close()


@pytest.mark.invariant(5, place="rebalance")
async def test_invariant_5_views_that_are_published_late_name_no_file_that_was_let_go_of(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    publishing, reached, gate = gated(worker.store.publish_scopes)
    monkeypatch.setattr(worker.store, "publish_scopes", publishing)
    await worker.host.assign([0])
    await asyncio.to_thread(reached.wait, SECONDS_MAX)
    revoking = asyncio.create_task(worker.host.revoke([0]))
    await asyncio.sleep(0)
    gate.set()
    await revoking
    with pytest.raises(StoreError, match="not served"):
        worker.store.query_cursor(0)
    cursor = worker.store.query_cursor(None)
    assert cursor.execute("SELECT count(*) FROM events").fetchall() == [(0,)]
    cursor.close()


async def test_what_is_read_from_is_not_below_the_log(worker: Worker) -> None:
    worker.log.marks[TP] = Watermarks(7, 7)
    await worker.serve(0)
    assert worker.log.reads == [(TP, 7)]


async def test_a_snapshot_is_due_after_so_many_bytes_or_so_much_time_and_not_before(tmp_path: Path) -> None:
    worker = Worker(tmp_path, snapshot_schedule=SnapshotSchedule(interval_seconds=3600, after_bytes=150))
    await worker.serve(1)
    await worker.host.take_due_snapshots()
    assert worker.snapshotter.taken == []
    record = batch(EVENTS, [{"number": 0}], partition=1)
    record.size_bytes = 100
    worker.host.submit(record)
    await worker.host.take_due_snapshots()
    assert worker.snapshotter.taken == []
    record = batch(EVENTS, [{"number": 1}], first=1, partition=1)
    record.size_bytes = 100
    worker.host.submit(record)
    for _ in range(2):
        await worker.host.take_due_snapshots()
    assert worker.snapshotter.taken == [1], "once, then the bytes count anew"
    assert SnapshotSchedule(interval_seconds=30).is_due(seconds=30, record_bytes=0)
    await worker.host.revoke([1])
    worker.store.close()


async def test_a_failed_drill_is_counted_and_the_next_partition_has_its_own(tmp_path: Path) -> None:
    drilled = []

    async def drill(partition: int) -> None:
        drilled.append(partition)
        if partition == 1:
            raise SnapshotCorruptError("version 7 lacks 1 of 9 blocks")

    worker = Worker(tmp_path, drill=drill)
    await worker.serve(1, 2)
    failures = telemetry.DRILL_FAILURES.labels(1)._value.get()
    await worker.host.drill_next(1e-9)  # finds out when the first drills are due
    for _ in range(3):
        await worker.host.drill_next(3600)
    assert drilled[:2] == [1, 2]
    assert len(drilled) == 2, "not again before the interval has passed"
    assert worker.snapshotter.taken == [1, 2], "each drill starts with a snapshot"
    assert telemetry.DRILL_FAILURES.labels(1)._value.get() == failures + 1
    await worker.host.revoke([1, 2])
    worker.store.close()
