"""A log that does not continue where the store ends is told from one that does; an order of an operator ends it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from schemas.catalog import Catalog
from schemas.table import TableDefinition
from streams import telemetry
from streams.adapters.duckdb_store import DuckDBStore, PartitionStore
from streams.adapters.memory_snapshots import MemorySnapshotRepository
from streams.adapters.snapshot_codec import SnapshotCodec
from streams.errors import ConfigurationError, LogGapError, LogGapKind
from streams.ports import Watermarks
from streams.positions import TopicPartition
from streams.processes.hosting import HostedPartition, HostingParts, PartitionHost, PartitionState
from streams.processes.log_gaps import check_position
from streams.processes.recovery import Recovered, Recovery, Rung
from streams.processes.recovery_orders import OrderOutcome, RecoveryOrder, RecoveryOrders, RecoverySource
from streams.processes.snapshotting import Snapshotter
from streams.retry import Backoff
from tests.store_samples import DECODER, batch, table
from tests.unit.test_hosting import NoLetters
from tests.watched_log import WatchedLog, until

EVENTS = table("events", number="INTEGER!")
LATER = table("later", number="INTEGER!")
TP, LATER_TP = TopicPartition(EVENTS.topic, 0), TopicPartition(LATER.topic, 0)
CODEC = SnapshotCodec(bytes(range(32)), application="test")


@pytest.mark.parametrize(
    ("position", "topic_id", "log", "kind", "words"),
    [
        (3, "a", Watermarks(5, 9, "a"), LogGapKind.DELETED, "the log starts at 5"),
        (3, None, Watermarks(5, 9, "a"), LogGapKind.DELETED, "the log starts at 5"),
        (10, "a", Watermarks(0, 9, "a"), LogGapKind.BACKWARDS, "it went backwards"),
        (10, "a", Watermarks(0, 9, None), LogGapKind.BACKWARDS, "the log ends at 9"),
        (10, "a", Watermarks(0, 9, "b"), LogGapKind.RECREATED, "deleted and created anew"),
        (3, "a", Watermarks(0, 9, "b"), LogGapKind.RECREATED, "the store's is a, the log's is b"),
    ],
)
def test_each_gap_has_words_of_its_own_and_names_the_way_out(
    position: int, topic_id: str | None, log: Watermarks, kind: LogGapKind, words: str
) -> None:
    with pytest.raises(LogGapError, match=words) as gap:
        check_position(TP, position, topic_id, log)
    assert gap.value.kind is kind
    assert f"the store continues at offset {position}" in gap.value.message
    assert "pintail recover --partition 0" in gap.value.hint


@pytest.mark.parametrize("position", [5, 7, 9])
@pytest.mark.parametrize("topic_id", ["a", None])
def test_a_position_within_its_own_log_is_no_gap(position: int, topic_id: str | None) -> None:
    assert check_position(TP, position, topic_id, Watermarks(5, 9, "a")) == position


def test_a_topic_that_was_never_read_starts_where_the_log_starts() -> None:
    assert check_position(TP, None, "a", Watermarks(5, 9, "b")) == 5


@pytest.mark.parametrize("text", ["", "snapshot", "snapshot:", "snapshot:0", "snapshot:-1", "snapshot:x", "redis"])
def test_what_is_no_source_is_refused_with_the_forms_that_are(text: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        RecoverySource.parse(text)
    assert "snapshot:VERSION" in refused.value.hint


def test_an_order_lasts_until_it_is_finished_and_a_newer_one_is_not_finished_with_it(tmp_path: Path) -> None:
    orders = RecoveryOrders(tmp_path)
    assert orders.all_pending() == []
    old, new = RecoveryOrder(3, RecoverySource("log")), RecoveryOrder(3, RecoverySource("snapshot", 7))
    orders.place(old)
    orders.begin(old)
    begun = orders.pending(3)
    assert begun is not None
    assert (begun.id, begun.is_begun) == (old.id, True)
    orders.place(new)
    orders.begin(old)
    orders.finish(old, OrderOutcome(old.id, "no"))
    assert orders.all_pending() == [new]
    assert orders.outcome(new) is None
    orders.finish(new, OrderOutcome(new.id, None, {"t": 5}, ("3.duckdb.replaced-1",)))
    assert orders.pending(3) is None
    assert orders.outcome(new) == OrderOutcome(new.id, None, {"t": 5}, ("3.duckdb.replaced-1",))
    (tmp_path / "3.recover.json").write_text("{")
    assert orders.all_pending() == []


class Worker:
    """A host over a real store and snapshots in memory. The test is Kafka, and the operator."""

    def __init__(self, folder: Path, tables: tuple[TableDefinition, ...] = (EVENTS,)) -> None:
        catalog, self.folder = Catalog(tables), folder
        self.store = DuckDBStore(folder, catalog, threads=1)
        self.repository = MemorySnapshotRepository()
        self.orders = RecoveryOrders(folder)
        self.log = WatchedLog()
        parts = HostingParts(
            catalog=catalog,
            store=self.store,
            recovery=Recovery(self.store, self.repository, CODEC),
            snapshotter=Snapshotter(self.repository, CODEC),
            decoder=DECODER,
            dead_letters=NoLetters(),
            orders=self.orders,
            committed_record=self.log.committed_record,
        )
        self.host = PartitionHost(parts, self.log)

    @property
    def hosted(self) -> HostedPartition:
        return self.host.hosted()[0]

    async def assign(self) -> None:
        await self.host.assign([0])
        await until(lambda: self.hosted.state in (PartitionState.SERVING, PartitionState.FAILED))

    async def publish(self, *numbers: int) -> None:
        """Records whose number is their offset, applied."""
        self.log.marks[TP] = self.log.marks.get(TP, Watermarks(0, 0, "a"))._replace(high=numbers[-1] + 1)
        self.host.submit(batch(EVENTS, [{"number": number} for number in numbers], first=numbers[0]))
        await self.host.wait_until_applied(0, EVENTS.topic, numbers[-1])

    async def publish_later(self, *numbers: int) -> None:
        """The same, to the table that was added later; its owner commits."""
        self.log.marks[LATER_TP] = Watermarks(0, numbers[-1] + 1, "later")
        self.host.submit(batch(LATER, [{"number": number} for number in numbers], first=numbers[0]))
        await self.host.wait_until_applied(0, LATER.topic, numbers[-1])
        self.log.committed[LATER_TP] = (numbers[-1] + 1, "")

    async def obey(self, source: str) -> OrderOutcome:
        """Orders a recovery; its outcome."""
        order = RecoveryOrder(0, RecoverySource.parse(source))
        self.orders.place(order)
        await self.host.carry_out_orders()
        await until(lambda: self.orders.outcome(order) is not None)
        outcome = self.orders.outcome(order)
        assert outcome is not None
        return outcome

    def numbers(self) -> list[int]:
        cursor = self.store.query_cursor(0)
        rows = cursor.execute("SELECT number FROM events ORDER BY ALL").fetchall()
        cursor.close()
        return [number for (number,) in rows]

    def kept(self, why: str) -> list[str]:
        """The files put aside, without their logs and lists of blocks."""
        return [path.name for path in self.folder.glob(f"0.duckdb.{why}-*") if path.suffix not in (".wal", ".blocks")]


@pytest.fixture
async def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Worker]:
    monkeypatch.setattr(Backoff, "next_delay_seconds", lambda _: 0.01)
    worker = Worker(tmp_path)
    worker.log.marks[TP] = Watermarks(0, 0, "a")
    yield worker
    await worker.host.revoke([0])
    worker.store.close()


async def test_a_store_knows_the_topic_that_it_applied_after_a_restart(worker: Worker) -> None:
    await worker.assign()
    await worker.publish(0, 1)
    await worker.host.revoke([0])
    worker.log.marks[TP] = Watermarks(0, 50, "b")
    await worker.assign()
    assert worker.hosted.state is PartitionState.FAILED
    assert "deleted and created anew" in str(worker.hosted.failure)
    assert telemetry.LOG_GAPS.labels(0, LogGapKind.RECREATED)._value.get() >= 1


async def test_a_topic_of_which_nothing_was_applied_may_be_created_anew(worker: Worker) -> None:
    await worker.assign()
    await worker.host.revoke([0])
    worker.log.marks[TP] = Watermarks(0, 0, "b")
    await worker.assign()
    await worker.publish(0)
    await worker.host.check_logs()
    assert worker.hosted.state is PartitionState.SERVING


@pytest.mark.parametrize(
    ("marks", "words"),
    [
        (Watermarks(0, 50, "b"), "deleted and created anew"),
        (Watermarks(0, 1, "a"), "it went backwards"),
        (Watermarks(5, 9, "a"), "the log starts at 5"),
    ],
)
async def test_a_log_that_is_replaced_or_cut_under_a_serving_partition_is_noticed(
    worker: Worker, marks: Watermarks, words: str
) -> None:
    await worker.assign()
    await worker.publish(0, 1)
    await worker.host.check_logs()
    assert worker.hosted.state is PartitionState.SERVING
    worker.log.marks[TP] = marks
    await worker.host.check_logs()
    await until(lambda: worker.hosted.state is PartitionState.FAILED)
    assert words in str(worker.hosted.failure)


async def test_a_local_file_behind_the_log_gives_way_to_a_snapshot_that_the_log_reaches(worker: Worker) -> None:
    await worker.assign()
    await worker.publish(0, 1)
    worker.store.partitions()[0].checkpoint()
    await worker.host.revoke([0])
    behind = worker.store.path_of(0).read_bytes()
    await worker.assign()
    await worker.publish(2, 3, 4)
    await worker.host.take_snapshots()
    await worker.host.revoke([0])
    worker.store.path_of(0).write_bytes(behind)
    worker.store.path_of(0).with_name("0.duckdb.wal").unlink(missing_ok=True)
    worker.log.marks[TP] = Watermarks(5, 5, "a")
    await worker.assign()
    assert worker.hosted.state is PartitionState.SERVING
    assert worker.hosted.recovered is not None
    assert worker.hosted.recovered.rung is Rung.SNAPSHOT
    assert worker.numbers() == [0, 1, 2, 3, 4]
    assert len(worker.kept("behind")) == 1


@pytest.fixture
async def of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Worker]:
    """Its newest snapshot is of before anything of the second table was read, its file has both, and is closed."""
    monkeypatch.setattr(Backoff, "next_delay_seconds", lambda _: 0.01)
    worker = Worker(tmp_path, (EVENTS, LATER))
    await worker.assign()
    await worker.publish(0, 1)
    await worker.host.take_snapshots()
    await worker.publish_later(0, 1, 2, 3, 4)
    await worker.host.revoke([0])
    yield worker
    await worker.host.revoke([0])
    worker.store.close()


async def test_a_snapshot_of_before_a_topic_does_not_hide_what_the_log_has_lost_of_it(of_two: Worker) -> None:
    worker = of_two
    worker.store.remove_partition(0)
    worker.log.marks[LATER_TP] = Watermarks(3, 9, "later")
    await worker.assign()
    assert worker.hosted.state is PartitionState.FAILED
    assert f"log gap in {LATER_TP}: the store continues at offset 5, but it has nothing" in str(worker.hosted.failure)
    assert "the log starts at 3" in str(worker.hosted.failure)
    worker.orders.place(RecoveryOrder(0, RecoverySource("log")))
    await worker.host.carry_out_orders()
    await until(lambda: worker.log.reads[-2:] == [(TP, 0), (LATER_TP, 3)])


@pytest.mark.parametrize(
    ("low", "committed"),
    [
        (0, (5, "")),  # the log has all of it
        (3, None),  # nobody ever read it: the table is new, and the topic is not
        (5, (5, "")),  # read from there on, and nothing has come
    ],
)
async def test_a_topic_that_the_store_does_not_know_is_read_from_the_start_where_nothing_can_be_missing(
    of_two: Worker, low: int, committed: tuple[int, str] | None
) -> None:
    worker = of_two
    worker.store.remove_partition(0)
    worker.log.marks[LATER_TP] = Watermarks(low, low, "later")
    worker.log.committed = {} if committed is None else {LATER_TP: committed}
    await worker.assign()
    assert worker.hosted.state is PartitionState.SERVING
    assert worker.log.reads[-1] == (LATER_TP, low)


async def test_a_snapshot_of_before_a_topic_closes_no_gap_of_a_file_that_has_it(of_two: Worker) -> None:
    worker = of_two
    worker.log.marks[LATER_TP] = Watermarks(7, 9, "later")
    await worker.assign()
    assert worker.hosted.state is PartitionState.FAILED
    assert "the store continues at offset 5" in str(worker.hosted.failure)
    assert worker.kept("behind") == []


@pytest.mark.invariant(6, place="recovery")
async def test_a_log_that_is_cut_while_all_of_it_was_to_be_replayed_is_recovered_anew(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    recover, rungs = Recovery.recover, list[Rung]()

    async def cut_meanwhile(*arguments: Any) -> Recovered:
        recovered = await recover(*arguments)
        rungs.append(recovered.rung)
        worker.log.marks[TP] = Watermarks(5, 5, "a")
        return recovered

    monkeypatch.setattr(Recovery, "recover", cut_meanwhile)
    await worker.assign()
    assert rungs == [Rung.WHOLE_LOG, Rung.WHOLE_LOG], "the second one knows what the log has lost"
    assert worker.log.reads == [(TP, 5)]


async def test_a_gap_that_no_snapshot_closes_leaves_the_file_as_it_is(worker: Worker) -> None:
    await worker.assign()
    await worker.publish(0, 1)
    await worker.host.take_snapshots()
    await worker.host.revoke([0])
    worker.log.marks[TP] = Watermarks(5, 9, "a")
    await worker.assign()
    assert worker.hosted.state is PartitionState.FAILED
    assert worker.kept("behind") == []
    assert worker.store.path_of(0).exists()


async def test_a_failed_partition_is_recovered_from_the_log_as_ordered_and_what_it_held_is_kept(
    worker: Worker,
) -> None:
    await worker.assign()
    await worker.publish(0, 1)
    worker.log.marks[TP] = Watermarks(0, 0, "b")
    await worker.host.check_logs()
    await until(lambda: worker.hosted.state is PartitionState.FAILED)
    outcome = await worker.obey("log")
    assert outcome.failure is None
    assert set(outcome.kept) >= set(worker.kept("replaced"))
    assert len(worker.kept("replaced")) == 1
    assert worker.hosted.state is PartitionState.SERVING
    assert worker.numbers() == []
    await worker.publish(0)
    await worker.host.revoke([0])
    await worker.assign()
    assert (worker.hosted.state, worker.numbers()) == (PartitionState.SERVING, [0])


async def test_a_serving_partition_goes_back_to_a_snapshot_as_ordered(worker: Worker) -> None:
    await worker.assign()
    await worker.publish(0, 1)
    await worker.host.take_snapshots()
    worker.host.submit(batch(EVENTS, [{"number": 666}], first=2))
    await worker.host.wait_until_applied(0, EVENTS.topic, 2)
    worker.log.marks[TP] = Watermarks(0, 2, "a")
    outcome = await worker.obey("snapshot:1")
    assert (outcome.failure, worker.numbers()) == (None, [0, 1])
    assert outcome.next_offsets == {EVENTS.topic: 2}


@pytest.mark.parametrize("source", ["snapshot:9", "clickhouse"])
async def test_an_order_that_cannot_be_carried_out_changes_nothing_and_says_why(worker: Worker, source: str) -> None:
    await worker.assign()
    await worker.publish(0, 1)
    outcome = await worker.obey(source)
    assert outcome.failure
    await until(lambda: worker.orders.pending(0) is None)
    await until(lambda: worker.hosted.state is PartitionState.SERVING)
    assert worker.numbers() == [0, 1]
    assert worker.kept("replaced") == []


async def test_a_log_that_grew_while_the_store_was_recovered_is_no_gap(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await worker.assign()
    await worker.publish(0, 1)
    await worker.host.revoke([0])
    worker.log.marks[TP] = Watermarks(0, 1, "a")  # before the last record came
    open_partition = worker.store.open_partition

    def open_late(partition: int) -> PartitionStore:
        worker.log.marks[TP] = Watermarks(0, 2, "a")
        return open_partition(partition)

    monkeypatch.setattr(worker.store, "open_partition", open_late)
    await worker.assign()
    assert worker.hosted.state is PartitionState.SERVING
    assert worker.numbers() == [0, 1]


async def test_an_order_that_was_begun_before_a_crash_is_gone_on_with(worker: Worker) -> None:
    await worker.assign()
    await worker.publish(0, 1)
    await worker.host.take_snapshots()
    await worker.host.revoke([0])
    order = RecoveryOrder(0, RecoverySource("log"))
    worker.orders.place(order)
    await Recovery(worker.store, worker.repository, CODEC).recover(0, order=order)
    worker.orders.begin(order)
    worker.store.close_partition(0)
    worker.log.marks[TP] = Watermarks(2, 2, "a")
    await worker.assign()
    assert worker.hosted.recovered is not None
    assert worker.hosted.recovered.rung is Rung.WHOLE_LOG, "the snapshot is not what was ordered"
    assert len(worker.kept("replaced")) == 1
    await until(lambda: worker.orders.outcome(order) is not None)
