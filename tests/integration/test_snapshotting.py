"""Snapshots of real DuckDB stores: what they hold, what they cost, and what survives failures."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from streams.adapters.duckdb_store import DuckDBStore, PartitionStore
from streams.adapters.memory_snapshots import MemorySnapshotRepository
from streams.adapters.redis_snapshots import RedisSnapshotRepository
from streams.adapters.snapshot_codec import SnapshotCodec
from streams.errors import (
    SnapshotCorruptError,
    SnapshotFencedError,
    SnapshotKeyError,
    SnapshotStoreUnavailableError,
)
from streams.processes import snapshotting
from streams.processes.drill import drill, drill_newest
from streams.processes.recovery import Recovery, Rung, SnapshotRestore
from streams.processes.snapshotting import Snapshotter, block_ranges, versions_to_retire
from tests.redis_server import RedisServer
from tests.snapshot_stores import (
    CATALOG,
    CODEC,
    MOVES,
    PLAYERS,
    append,
    decoded,
    lose_blocks,
    move,
    open_store,
    player,
    players,
)

P = 1


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[DuckDBStore]:
    stores = open_store(tmp_path / "stores")
    yield stores
    stores.close()


@pytest.fixture
def store(stores: DuckDBStore) -> PartitionStore:
    store = stores.open_partition(P)
    append(store, PLAYERS, players(60_000))
    append(store, MOVES, [move(number) for number in range(5_000)])
    return store


async def restored_hash(
    repository: MemorySnapshotRepository | RedisSnapshotRepository, version: int, folder: Path
) -> str:
    """Content hash of a version, restored into a worker of its own."""
    elsewhere = open_store(folder / f"restored-{version}")
    try:
        await SnapshotRestore(repository, CODEC, P, version).to(elsewhere.path_of(P))
        return elsewhere.open_partition(P).content_hash()
    finally:
        elsewhere.close()


@pytest.mark.invariant(8, place="recovery")
async def test_invariant_8_every_kept_version_restores_to_the_content_of_its_time(
    store: PartitionStore, tmp_path: Path
) -> None:
    repository = MemorySnapshotRepository()
    snapshotter = Snapshotter(repository, CODEC, versions_kept=3)
    hashes: dict[int, str] = {}
    for round_ in range(5):
        append(store, PLAYERS, [player(number, seed=round_ + 1) for number in range(round_ * 100, round_ * 100 + 400)])
        append(store, MOVES, [move(number) for number in range(200)])
        info = await snapshotter.take(store, epoch=1)
        assert info is not None
        assert info.next_offsets == store.next_offsets()
        hashes[info.version] = store.content_hash()
    assert len(set(hashes.values())) == 5
    kept = await repository.versions(P)
    assert kept == (5, 4, 3)
    for version in kept:
        assert await restored_hash(repository, version, tmp_path) == hashes[version]


@pytest.mark.invariant(8, place="checkpoint")
async def test_invariant_8_holds_while_writes_go_on_during_the_capture(store: PartitionStore, tmp_path: Path) -> None:
    class WritingMeanwhile(MemorySnapshotRepository):
        async def put_blocks(self, partition: int, blocks: Mapping[str, bytes]) -> None:
            await asyncio.to_thread(append, store, PLAYERS, [player(n, seed=9) for n in range(70_000, 70_500)])
            await super().put_blocks(partition, blocks)

    before = store.content_hash()
    repository = WritingMeanwhile()
    info = await Snapshotter(repository, CODEC).take(store, epoch=1)
    assert info is not None
    assert store.next_offsets()["players"] > info.next_offsets["players"]
    assert await restored_hash(repository, info.version, tmp_path) == before


async def test_nothing_new_is_no_snapshot(store: PartitionStore, stores: DuckDBStore) -> None:
    repository = MemorySnapshotRepository()
    snapshotter = Snapshotter(repository, CODEC)
    assert await snapshotter.take(store, epoch=1) is not None
    assert await snapshotter.take(store, epoch=2) is None
    assert await Snapshotter(repository, CODEC).take(store, epoch=3) is None
    assert await snapshotter.take(stores.open_partition(P + 1), epoch=1) is None
    assert await repository.versions(P) == (1,)


async def test_one_percent_changed_rows_move_few_blocks(store: PartitionStore) -> None:
    snapshotter = Snapshotter(MemorySnapshotRepository(), CODEC)
    first = await snapshotter.take(store, epoch=1)
    append(store, PLAYERS, [player(number, seed=1) for number in range(30_000, 30_600)])
    second = await snapshotter.take(store, epoch=1)
    assert first is not None
    assert second is not None
    assert first.blocks_new == first.blocks_total
    assert second.blocks_new < second.blocks_total
    append(store, MOVES, [move(number) for number in range(600)])
    appended = await snapshotter.take(store, epoch=1)
    assert appended is not None
    assert 0 < appended.blocks_new <= 4
    assert appended.bytes_sent < first.bytes_sent / 2


async def test_a_restarted_worker_sends_only_what_changed(store: PartitionStore) -> None:
    repository = MemorySnapshotRepository()
    assert await Snapshotter(repository, CODEC).take(store, epoch=1) is not None
    append(store, MOVES, [move(number) for number in range(600)])
    info = await Snapshotter(repository, CODEC).take(store, epoch=2)
    assert info is not None
    assert info.version == 2
    assert 0 < info.blocks_new <= 4


async def test_exchanged_values_are_a_change_although_the_block_checksum_of_duckdb_stays(tmp_path: Path) -> None:
    """Two players exchange badges: for DuckDB's order-blind checksum the block with all badges is the same."""
    stores = open_store(tmp_path / "exchange")
    store = stores.open_partition(P)
    original = players(16_300)
    exchanged = [*original]
    exchanged[100] = {**original[100], "badge": original[101]["badge"]}
    exchanged[101] = {**original[101], "badge": original[100]["badge"]}
    repository = MemorySnapshotRepository()
    snapshotter = Snapshotter(repository, CODEC)
    checksum_blind = False
    seen: dict[bytes, bytes] = {}
    for rows in (original, original, exchanged, original, exchanged):
        append(store, PLAYERS, rows)
        info = await snapshotter.take(store, epoch=1)
        assert info is not None
        assert await restored_hash(repository, info.version, tmp_path) == store.content_hash()
        with store.frozen() as file:
            data = os.pread(file.fd, file.size_bytes, 0)
        for offset, length in list(block_ranges(file.size_bytes))[1:]:
            block = data[offset : offset + length]
            checksum_blind |= seen.setdefault(block[:8], block) != block
    stores.close()
    assert checksum_blind, "the case no longer exists in this DuckDB version; the fingerprints could be reconsidered"


@pytest.mark.invariant(4, 8, place="checkpoint")
async def test_invariant_4_a_crash_between_put_and_publish_leaves_the_old_version(
    store: PartitionStore, tmp_path: Path
) -> None:
    class DiesBeforePublish(MemorySnapshotRepository):
        dies = False

        async def publish(
            self, partition: int, *, version: int, epoch: int, manifest: bytes, block_names: Collection[str]
        ) -> None:
            if self.dies:
                raise SnapshotStoreUnavailableError("gone", hint="")
            await super().publish(partition, version=version, epoch=epoch, manifest=manifest, block_names=block_names)

    repository = DiesBeforePublish()
    snapshotter = Snapshotter(repository, CODEC)
    assert await snapshotter.take(store, epoch=1) is not None
    before = store.content_hash()
    append(store, MOVES, [move(number) for number in range(100)])
    repository.dies = True
    with pytest.raises(SnapshotStoreUnavailableError):
        await snapshotter.take(store, epoch=1)
    assert await repository.versions(P) == (1,)
    assert await restored_hash(repository, 1, tmp_path) == before
    repository.dies = False
    info = await snapshotter.take(store, epoch=1)
    assert info is not None
    assert info.version == 2
    assert await restored_hash(repository, 2, tmp_path) == store.content_hash()


@pytest.mark.invariant(5, place="rebalance")
async def test_invariant_5_a_zombie_under_an_older_epoch_is_fenced(store: PartitionStore) -> None:
    repository = MemorySnapshotRepository()
    old = await repository.claim_epoch(P, at_least=1)
    await repository.claim_epoch(P, at_least=1)
    with pytest.raises(SnapshotFencedError):
        await Snapshotter(repository, CODEC).take(store, epoch=old)
    assert await repository.versions(P) == ()


async def test_a_block_that_vanished_is_sent_again(store: PartitionStore, tmp_path: Path) -> None:
    repository = MemorySnapshotRepository()
    snapshotter = Snapshotter(repository, CODEC)
    first = await snapshotter.take(store, epoch=1)
    assert first is not None
    manifest = await SnapshotRestore(repository, CODEC, P, 1).manifest()
    await lose_blocks(repository, P, manifest.blocks)
    append(store, MOVES, [move(number) for number in range(100)])
    assert await snapshotter.take(store, epoch=1) is not None
    assert await restored_hash(repository, 2, tmp_path) == store.content_hash()


async def test_a_new_key_goes_on_with_new_snapshots(store: PartitionStore) -> None:
    repository = MemorySnapshotRepository()
    assert await Snapshotter(repository, CODEC).take(store, epoch=1) is not None
    other = SnapshotCodec(bytes(32), application="test")
    info = await Snapshotter(repository, other).take(store, epoch=1)
    assert info is not None
    assert info.blocks_new == info.blocks_total
    assert (await SnapshotRestore(repository, other, P, 2).check()).version == 2


async def test_a_partition_that_leaves_stops_the_capture_of_an_unchanged_file_at_the_next_block(
    store: PartitionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of such a file is sent, so nothing but the blocks themselves can notice."""
    snapshotter = Snapshotter(MemorySnapshotRepository(), CODEC)
    assert await snapshotter.take(store, epoch=1) is not None
    store.apply([decoded(MOVES, P, store.next_offsets()["moves"], [])])
    reading, gate, reads = threading.Event(), threading.Event(), list[int]()

    def read_behind_the_gate(fd: int, offset: int, length: int) -> bytes:
        reads.append(offset)
        reading.set()
        assert gate.wait(20)
        return os.pread(fd, length, offset)

    monkeypatch.setattr(snapshotting, "_read", read_behind_the_gate)
    taking = asyncio.create_task(snapshotter.take(store, epoch=1, hashed=True))
    await asyncio.to_thread(reading.wait, 20)
    taking.cancel()
    await asyncio.sleep(0)
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(taking, timeout=20)
    assert len(reads) == 1


HOUR_MS = 3_600_000


@pytest.mark.parametrize(
    ("newest_kept", "hours_kept", "kept"),
    [
        (1, 0, {9}),
        (3, 0, {7, 8, 9}),
        # Of each hour the last version: 9 of this one, 6 and 4 of those before, 1 of the one six hours ago.
        (1, 3, {9, 6, 4}),
        (2, 7, {9, 8, 6, 4, 1}),
        (20, 0, {1, 2, 3, 4, 5, 6, 7, 8, 9}),
    ],
)
def test_the_newest_versions_are_kept_and_the_newest_of_each_hour(
    newest_kept: int, hours_kept: int, kept: set[int]
) -> None:
    hours_ago = {9: 0.0, 8: 0.1, 7: 0.2, 6: 0.6, 5: 1.4, 4: 1.6, 3: 1.7, 2: 2.4, 1: 5.6}
    now_ms = 500_000 * HOUR_MS + HOUR_MS // 2
    created = {version: round(now_ms - hours * HOUR_MS) for version, hours in hours_ago.items()}
    retired = versions_to_retire(created, newest_kept=newest_kept, hours_kept=hours_kept, now_ms=now_ms)
    assert created.keys() - retired == kept


async def test_versions_of_past_hours_stay_restorable_also_after_a_restart(
    store: PartitionStore, tmp_path: Path
) -> None:
    repository, hashes = MemorySnapshotRepository(), dict[int, str]()
    for round_ in range(6):
        clock_ms = partial(int, 500_000 * HOUR_MS + (round_ + 1) * HOUR_MS // 2)
        snapshotter = Snapshotter(repository, CODEC, versions_kept=1, hours_kept=3, clock_ms=clock_ms)
        append(store, MOVES, [move(number) for number in range(100)])
        info = await snapshotter.take(store, epoch=round_ + 1)
        assert info is not None
        hashes[info.version] = store.content_hash()
    kept = await repository.versions(P)
    assert kept == (6, 5, 3)
    for version in kept:
        assert await restored_hash(repository, version, tmp_path) == hashes[version]


class TestDrill:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Iterator[Path]:
        yield tmp_path / "drills"
        assert list((tmp_path / "drills").iterdir()) == [], "a drill leaves nothing behind"

    async def test_invariant_8_a_drill_compares_the_rows_of_the_moment_of_capture(
        self, store: PartitionStore, folder: Path
    ) -> None:
        class WritingMeanwhile(MemorySnapshotRepository):
            async def put_blocks(self, partition: int, blocks: Mapping[str, bytes]) -> None:
                await asyncio.to_thread(append, store, MOVES, [move(1)])
                await super().put_blocks(partition, blocks)

        repository, expected = WritingMeanwhile(), store.content_hash()
        info = await Snapshotter(repository, CODEC).take(store, epoch=1, hashed=True)
        assert info is not None
        assert store.content_hash() != expected
        report = await drill(repository, CODEC, CATALOG, P, 1, folder)
        assert (report.content_hash, report.is_compared) == (expected, True)

    async def test_a_hash_is_taken_of_a_store_that_did_not_move_and_only_once(
        self, store: PartitionStore, folder: Path
    ) -> None:
        repository = MemorySnapshotRepository()
        snapshotter = Snapshotter(repository, CODEC)
        assert await snapshotter.take(store, epoch=1) is not None
        report = await drill_newest(repository, CODEC, CATALOG, folder, P)
        assert report is not None
        assert not report.is_compared
        info = await snapshotter.take(store, epoch=1, hashed=True)
        assert info is not None
        assert (info.version, info.blocks_new) == (2, 0)
        assert await snapshotter.take(store, epoch=1, hashed=True) is None
        report = await drill_newest(repository, CODEC, CATALOG, folder, P)
        assert report is not None
        assert report.is_compared

    async def test_rows_that_are_not_those_that_were_captured_fail_it(
        self, store: PartitionStore, folder: Path
    ) -> None:
        repository = MemorySnapshotRepository()
        assert await Snapshotter(repository, CODEC).take(store, epoch=1, hashed=True) is not None
        manifest = await SnapshotRestore(repository, CODEC, P, 1).manifest()
        lying = replace(manifest, version=2, content_hash="0" * 64)
        await repository.publish(
            P, version=2, epoch=1, manifest=CODEC.seal_manifest(lying), block_names=manifest.block_names
        )
        with pytest.raises(SnapshotCorruptError, match="other rows"):
            await drill(repository, CODEC, CATALOG, P, 2, folder)
        older = replace(lying, version=3, duckdb_version="1.0.0")
        await repository.publish(
            P, version=3, epoch=1, manifest=CODEC.seal_manifest(older), block_names=manifest.block_names
        )
        assert not (await drill(repository, CODEC, CATALOG, P, 3, folder)).is_compared

    async def test_a_lost_block_fails_it(self, store: PartitionStore, folder: Path) -> None:
        repository = MemorySnapshotRepository()
        assert await Snapshotter(repository, CODEC).take(store, epoch=1, hashed=True) is not None
        manifest = await SnapshotRestore(repository, CODEC, P, 1).manifest()
        await lose_blocks(repository, P, [manifest.blocks[3]])
        with pytest.raises(SnapshotCorruptError, match="lacks 1 of"):
            await drill(repository, CODEC, CATALOG, P, 1, folder)


async def test_after_a_rotation_of_keys_the_newest_snapshot_is_sealed_anew_and_the_old_key_can_go(
    store: PartitionStore, tmp_path: Path
) -> None:
    old, new = bytes(range(32)), bytes(reversed(range(32)))
    both, new_only = SnapshotCodec(new, old, application="test"), SnapshotCodec(new, application="test")
    repository = MemorySnapshotRepository()
    assert await Snapshotter(repository, CODEC).take(store, epoch=1) is not None
    # What was there before opens, and a store that did not move is sealed anew all the same, once.
    assert (await SnapshotRestore(repository, both, P, 1).check()).version == 1
    snapshotter = Snapshotter(repository, both)
    info = await snapshotter.take(store, epoch=1)
    assert info is not None
    assert (info.version, info.blocks_new) == (2, info.blocks_total)
    assert await snapshotter.take(store, epoch=1) is None
    assert await Snapshotter(repository, both).take(store, epoch=1) is None
    # Without the old key the older version is lost, and says which key it is under; the newest restores.
    with pytest.raises(SnapshotKeyError, match=CODEC.key_id):
        await SnapshotRestore(repository, new_only, P, 1).check()
    elsewhere = open_store(tmp_path / "new-key")
    recovered = await Recovery(elsewhere, repository, new_only).recover(P)
    assert (recovered.rung, recovered.version) == (Rung.SNAPSHOT, 2)
    assert recovered.store.content_hash() == store.content_hash()
    elsewhere.close()


@pytest.mark.invariant(4, place="rebalance")
async def test_cancelling_a_snapshot_thaws_the_store_although_the_repository_does_not_answer(
    store: PartitionStore,
) -> None:
    class Slow(MemorySnapshotRepository):
        def __init__(self) -> None:
            super().__init__()
            self.reached, self.proceed = asyncio.Event(), asyncio.Event()

        async def put_blocks(self, partition: int, blocks: Mapping[str, bytes]) -> None:
            self.reached.set()
            await self.proceed.wait()
            await super().put_blocks(partition, blocks)

    repository = Slow()
    taking = asyncio.create_task(Snapshotter(repository, CODEC).take(store, epoch=1))
    await repository.reached.wait()
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(taking, timeout=20)
    await asyncio.wait_for(asyncio.to_thread(store.checkpoint), timeout=5)
    assert await repository.versions(P) == ()


class TestWithRedis:
    @pytest.fixture
    def server(self) -> Iterator[RedisServer]:
        with RedisServer() as running:
            yield running

    @pytest.fixture
    async def repository(self, server: RedisServer) -> AsyncIterator[RedisSnapshotRepository]:
        async with RedisSnapshotRepository(server.url, application="test", timeout_seconds=2.0) as repository:
            yield repository

    @pytest.mark.invariant(8, place="outage")
    async def test_invariant_8_over_redis_also_after_its_restart(
        self, store: PartitionStore, server: RedisServer, repository: RedisSnapshotRepository, tmp_path: Path
    ) -> None:
        snapshotter = Snapshotter(repository, CODEC, versions_kept=2)
        hashes: dict[int, str] = {}
        for round_ in range(3):
            append(store, PLAYERS, [player(number, seed=round_ + 1) for number in range(300)])
            info = await snapshotter.take(store, epoch=1)
            assert info is not None
            hashes[info.version] = store.content_hash()
        server.kill()
        server.start()
        assert await repository.versions(P) == (3, 2)
        for version in (3, 2):
            assert await restored_hash(repository, version, tmp_path) == hashes[version]

    @pytest.mark.invariant(4, 8, place="outage")
    async def test_redis_down_during_a_snapshot_is_retriable_and_leaves_the_store_unharmed(
        self, store: PartitionStore, server: RedisServer, repository: RedisSnapshotRepository, tmp_path: Path
    ) -> None:
        put = threading.Event()

        class DownAfterFirstPut(RedisSnapshotRepository):
            async def put_blocks(self, partition: int, blocks: Mapping[str, bytes]) -> None:
                await super().put_blocks(partition, blocks)
                if not put.is_set():
                    put.set()
                    server.kill()

        async with DownAfterFirstPut(server.url, application="test", timeout_seconds=2.0) as failing:
            snapshotter = Snapshotter(failing, CODEC)
            with pytest.raises(SnapshotStoreUnavailableError) as outage:
                await snapshotter.take(store, epoch=1)
            assert put.is_set()
            assert outage.value.retriable
            append(store, MOVES, [move(number) for number in range(100)])
            store.checkpoint()
            server.start()
            info = await snapshotter.take(store, epoch=1)
        assert info is not None
        assert await restored_hash(repository, 1, tmp_path) == store.content_hash()
