"""Standbys: warm copies that answer, publish and park nothing, and become owners without being opened again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from schemas.catalog import Catalog
from streams.adapters.duckdb_store import DuckDBStore
from streams.adapters.memory_snapshots import MemorySnapshotRepository
from streams.adapters.snapshot_codec import SnapshotCodec
from streams.batches import RecordBatch
from streams.errors import StaleEpochError
from streams.ports import DeadLetter, Watermarks
from streams.positions import TopicPartition
from streams.processes import standby as standby_module
from streams.processes.hosting import HostingParts, PartitionHost
from streams.processes.local_copies import LocalCopies
from streams.processes.recovery import Recovered, Recovery, Rung
from streams.processes.recovery_orders import RecoveryOrders
from streams.processes.snapshotting import Snapshotter
from streams.processes.standby import OwnersLetters, Standby, Standbys
from streams.retry import Backoff
from tests.store_samples import DECODER, batch, table
from tests.watched_log import SECONDS_MAX, WatchedLog, until

EVENTS = table("events", number="INTEGER!")
TP = TopicPartition(EVENTS.topic, 0)
CODEC = SnapshotCodec(bytes(range(32)), application="test")


class Letters:
    """Where the owner parks."""

    async def park(self, letters: Sequence[DeadLetter]) -> None:
        raise AssertionError(f"the owner has nothing to park: {letters}")


class Worker:
    """A host and standbys over one store. The test is Kafka, and the group."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = DuckDBStore(folder, Catalog((EVENTS,)), threads=1)
        self.log, self.group_log = WatchedLog(), WatchedLog()
        self.owners_positions: dict[TopicPartition, int] = {}
        self.times_asked = 0
        self.repository = MemorySnapshotRepository()
        parts = HostingParts(
            catalog=Catalog((EVENTS,)),
            store=self.store,
            recovery=Recovery(self.store, self.repository, CODEC),
            snapshotter=None,
            decoder=DECODER,
            dead_letters=Letters(),
            orders=RecoveryOrders(folder),
        )
        self.host = PartitionHost(parts, self.group_log)
        self.copies = copies = replace(
            parts,
            recovery=Recovery(self.store, self.repository, CODEC, claims_epochs=False),
            dead_letters=OwnersLetters(self._owners_position),
        )
        self.standbys = Standbys(copies, self.log, on_all_warm=self._ask)

    async def assign(self, *owned: int, standbys: Sequence[int] = (), awaited: Sequence[int] = ()) -> None:
        """What agents.store_app.StoreOwner does."""
        await self.host.suspend(list(self.host.hosted()))
        await self.standbys.promote(owned, kept=standbys)
        await self.host.assign(owned, kept=standbys)
        self.standbys.follow(standbys, awaited)

    async def publish_owners_snapshot(self, *values: int) -> None:
        """Of a store that holds these from the log's beginning on."""
        owner = DuckDBStore(self.folder / "owner", Catalog((EVENTS,)), threads=1)
        recovered = await Recovery(owner, self.repository, CODEC).recover(0)
        recovered.store.apply([DECODER.decode(EVENTS, numbers(*values))])
        await Snapshotter(self.repository, CODEC).take(recovered.store, recovered.epoch)
        owner.close()

    def standby(self, partition: int = 0) -> Standby:
        return self.standbys.standbys()[partition]

    async def warm(self, partition: int = 0) -> Standby:
        await until(lambda: self.standby(partition).is_warm)
        return self.standby(partition)

    async def _owners_position(self, topic_partition: TopicPartition) -> tuple[int, str] | None:
        position = self.owners_positions.get(topic_partition)
        return None if position is None else (position, "")

    def _ask(self) -> None:
        self.times_asked += 1


@pytest.fixture
async def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Worker]:
    monkeypatch.setattr(Backoff, "next_delay_seconds", lambda _: 0.01)
    monkeypatch.setattr(standby_module, "OWNER_CHECK_SECONDS", 0.001)
    worker = Worker(tmp_path)
    yield worker
    await worker.standbys.stop()
    await worker.host.revoke(list(worker.host.hosted()))
    worker.store.close()


def numbers(*values: int | str, first: int | None = None) -> RecordBatch:
    start = first if first is not None else int(values[0])
    return batch(EVENTS, [{"number": value} for value in values], first=start)


@pytest.mark.invariant(3, place="rebalance")
async def test_a_standby_follows_the_log_and_says_how_far_it_is(worker: Worker) -> None:
    worker.log.marks[TP] = Watermarks(0, 3)
    await worker.assign(standbys=[0])
    await until(lambda: worker.log.reads == [(TP, 0)])
    assert worker.standby().lag_records == 3
    worker.standbys.submit(numbers(0, 1, 2))
    await until(lambda: worker.standby().lag_records == 0)
    assert worker.standby().positions == {EVENTS.topic: 3}
    assert worker.host.serving() == {}
    assert worker.group_log.reads == [], "the group's consumer knows nothing of standbys"


@pytest.mark.invariant(2, 5, place="rebalance")
async def test_a_promoted_standby_goes_on_from_its_open_file(worker: Worker) -> None:
    await worker.assign(standbys=[0])
    standby = await worker.warm()
    worker.standbys.submit(numbers(0, 1, 2))
    await until(lambda: standby.positions[EVENTS.topic] == 3)
    stale = worker.store.partitions()[0]
    worker.group_log.marks[TP] = Watermarks(0, 3)
    await worker.assign(0)
    await until(lambda: bool(worker.host.serving()))
    hosted = worker.host.hosted()[0]
    assert hosted.recovered is not None
    assert hosted.recovered.rung is Rung.WARM
    assert hosted.epoch == 1, "a standby has claimed none"
    assert worker.group_log.reads == [(TP, 3)]
    assert worker.log.active == set()
    with pytest.raises(StaleEpochError):
        stale.checkpoint()


async def test_an_owner_becomes_a_standby_and_what_it_is_not_given_is_closed(worker: Worker) -> None:
    await worker.assign(0, 1)
    await until(lambda: len(worker.host.serving()) == 2)
    worker.host.submit(numbers(0, 1))
    async with asyncio.timeout(SECONDS_MAX):
        await worker.host.wait_until_applied(0, EVENTS.topic, 1)
    worker.log.marks[TP] = Watermarks(0, 2)
    await worker.assign(standbys=[0])
    assert worker.store.partitions().keys() <= {0}
    await worker.warm()
    assert worker.log.reads == [(TP, 2)]
    assert worker.host.hosted() == {}


async def test_a_standby_that_stays_one_is_left_alone(worker: Worker) -> None:
    await worker.assign(standbys=[0, 1])
    standby = await worker.warm()
    await worker.assign(1, standbys=[0])
    assert worker.standby() is standby
    assert standby.is_warm
    await worker.assign(standbys=[])
    assert worker.store.partitions() == {}


@pytest.mark.invariant(6, place="rebalance")
async def test_invariant_6_a_standby_passes_a_dead_letter_only_after_the_owner_has_parked_it(worker: Worker) -> None:
    await worker.assign(standbys=[0])
    standby = await worker.warm()
    worker.owners_positions[TP] = 1
    worker.standbys.submit(numbers(0, "poison", 2, first=0))
    await until(lambda: standby.lag_records == 3)
    await asyncio.sleep(0.02)
    assert standby.positions == {EVENTS.topic: 0}
    worker.owners_positions[TP] = 2
    await until(lambda: standby.positions == {EVENTS.topic: 3})


async def test_a_copy_that_the_log_no_longer_reaches_gives_way_to_a_snapshot_that_it_does_reach(worker: Worker) -> None:
    await worker.assign(standbys=[0])
    standby = await worker.warm()
    worker.standbys.submit(numbers(0, 1))
    await until(lambda: standby.positions[EVENTS.topic] == 2)
    worker.log.marks[TP] = Watermarks(5, 5)
    worker.standbys.on_out_of_range(TP)
    await until(lambda: standby.failure is not None and "the log starts at 5" in standby.failure)
    assert worker.store.path_of(0).exists(), "a copy is not thrown away for nothing"
    await worker.publish_owners_snapshot(0, 1, 2, 3, 4)
    await until(lambda: worker.log.reads == [(TP, 0), (TP, 5)])
    assert worker.standby() is standby
    assert standby.failure is None
    assert len(list(worker.folder.glob("0.duckdb.behind-*[0-9]"))) == 1


@pytest.mark.invariant(6, place="recovery")
async def test_a_log_that_is_cut_while_its_beginning_is_awaited_gives_way_to_a_snapshot(worker: Worker) -> None:
    recover = worker.copies.recovery.recover

    async def cut_meanwhile(*arguments: Any) -> Recovered:
        recovered = await recover(*arguments)
        if recovered.rung is Rung.WHOLE_LOG:
            worker.log.marks[TP] = Watermarks(5, 5)
            await worker.publish_owners_snapshot(0, 1, 2, 3, 4)
        return recovered

    worker.copies.recovery.recover = cut_meanwhile  # type: ignore[assignment,method-assign]
    await worker.assign(standbys=[0])
    await worker.warm()
    assert worker.log.reads == [(TP, 5)]
    assert worker.store.partitions()[0].next_offsets() == {EVENTS.topic: 5}, "it holds what came before"


async def test_whatever_else_breaks_starts_the_standby_anew(worker: Worker) -> None:
    worker.log.faults = [OSError("no broker"), OSError("no broker")]
    await worker.assign(standbys=[0])
    await worker.warm()
    assert worker.standby().failure is None


async def test_the_group_is_asked_once_all_awaited_copies_are_warm(worker: Worker) -> None:
    worker.log.marks[TopicPartition(EVENTS.topic, 1)] = Watermarks(0, 10**6)
    await worker.assign(standbys=[0, 1, 2], awaited=[0, 1])
    await worker.warm(0)
    await worker.warm(2)
    assert worker.times_asked == 0
    worker.standbys.submit(numbers(0))
    await until(lambda: worker.standby(0).positions[EVENTS.topic] == 1)
    assert worker.times_asked == 0
    await worker.assign(standbys=[0, 2], awaited=[0])
    await until(lambda: worker.times_asked == 1)
    await worker.assign(standbys=[0, 2], awaited=[0])
    await asyncio.sleep(0.01)
    assert worker.times_asked == 1, "not again at once"


async def test_a_worker_remembers_how_far_its_copies_are(worker: Worker) -> None:
    copies = LocalCopies(worker.store, worker.folder)
    await worker.assign(standbys=[0, 1])
    await worker.warm(1)
    standby = await worker.warm()
    worker.standbys.submit(numbers(0, 1, 2))
    await until(lambda: standby.positions[EVENTS.topic] == 3)
    assert copies.positions() == {0: 3}, "one that holds nothing is no copy"
    copies.remember()
    await worker.standbys.stop()
    restarted = LocalCopies(worker.store, worker.folder)
    assert restarted.positions() == {0: 3}
    worker.store.path_of(0).unlink()
    assert restarted.positions() == {}


@pytest.mark.parametrize("text", ["", "[]", '{"0": "x"}', "{"])
def test_what_was_remembered_and_cannot_be_read_is_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "copies.json").write_text(text)
    store = DuckDBStore(tmp_path, Catalog((EVENTS,)), threads=1)
    assert LocalCopies(store, tmp_path).positions() == {}
    store.close()
