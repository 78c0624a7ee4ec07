"""The recovery ladder on real stores and a real Redis: every rung, every reason to step down, and what must raise."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from streams.adapters.duckdb_file import BLOCK_BYTES, sync_folder
from streams.adapters.duckdb_partition import used_blocks
from streams.adapters.duckdb_store import DuckDBStore, FrozenFile, PartitionStore
from streams.adapters.memory_snapshots import MemorySnapshotRepository
from streams.adapters.redis_snapshots import RedisSnapshotRepository
from streams.adapters.snapshot_codec import SnapshotCodec
from streams.errors import SnapshotCorruptError, SnapshotKeyError, SnapshotStoreUnavailableError, StoreLockedError
from streams.ports import Watermarks
from streams.positions import TopicPartition
from streams.processes import recovery
from streams.processes.progress import RecoveryProgress
from streams.processes.recovery import Recovery, Rung, SnapshotRestore
from streams.processes.snapshotting import Snapshotter
from tests.redis_server import RedisServer
from tests.snapshot_stores import CODEC, MOVES, PLAYERS, append, lose_blocks, move, open_store, player

P = 2


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture
async def repository(server: RedisServer) -> AsyncIterator[RedisSnapshotRepository]:
    with server.client() as client:
        client.flushall()
    async with RedisSnapshotRepository(server.url, application="test", timeout_seconds=2.0) as repository:
        yield repository


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[DuckDBStore]:
    stores = open_store(tmp_path / "stores")
    yield stores
    stores.close()


def fill(store: PartitionStore, seed: int = 0) -> str:
    """Changes some rows; the content hash afterwards."""
    append(store, PLAYERS, [player(number, seed=seed) for number in range(3_000)])
    append(store, MOVES, [move(number) for number in range(500)])
    return store.content_hash()


async def snapshot_versions(store: PartitionStore, repository: RedisSnapshotRepository, count: int) -> list[str]:
    """Takes versions 1 to `count`; their content hashes."""
    epoch = await repository.claim_epoch(store.partition, at_least=1)
    snapshotter = Snapshotter(repository, CODEC)
    hashes = []
    for seed in range(count):
        hashes.append(fill(store, seed))
        assert await snapshotter.take(store, epoch) is not None
    return hashes


def lose_disk(stores: DuckDBStore) -> None:
    stores.close_partition(P)
    stores.remove_partition(P)


def damage_file(stores: DuckDBStore) -> None:
    """Overwrites every block, as a bad disk would."""
    stores.open_partition(P).checkpoint()
    stores.close_partition(P)
    path = stores.path_of(P)
    with path.open("r+b") as file:
        file.seek(12 * 1024)
        file.write(os.urandom(path.stat().st_size - 12 * 1024))


async def blocks_only_in(repository: RedisSnapshotRepository, version: int) -> frozenset[str]:
    """The blocks that no older version shares."""
    newer = await SnapshotRestore(repository, CODEC, P, version).manifest()
    older = await SnapshotRestore(repository, CODEC, P, version - 1).manifest()
    return newer.block_names - older.block_names


async def test_the_local_file_is_the_first_rung(stores: DuckDBStore, repository: RedisSnapshotRepository) -> None:
    store = stores.open_partition(P)
    await snapshot_versions(store, repository, 1)
    newer = fill(store, seed=7)
    stores.close_partition(P)
    recovered = await Recovery(stores, repository, CODEC).recover(P)
    assert (recovered.rung, recovered.version, recovered.bytes_loaded) == (Rung.LOCAL_FILE, None, 0)
    assert recovered.store.content_hash() == newer


@pytest.mark.invariant(8, place="recovery")
async def test_invariant_8_a_lost_disk_comes_back_from_the_newest_snapshot(
    stores: DuckDBStore, repository: RedisSnapshotRepository
) -> None:
    hashes = await snapshot_versions(stores.open_partition(P), repository, 3)
    lose_disk(stores)
    recovered = await Recovery(stores, repository, CODEC).recover(P)
    assert (recovered.rung, recovered.version) == (Rung.SNAPSHOT, 3)
    assert recovered.bytes_loaded > 0
    assert recovered.store.content_hash() == hashes[2]
    assert [path.name for path in stores.path_of(P).parent.glob("*.restoring")] == []


async def test_an_empty_local_file_does_not_hide_a_snapshot(
    stores: DuckDBStore, repository: RedisSnapshotRepository
) -> None:
    """A worker that had the partition for a moment leaves one behind."""
    hashes = await snapshot_versions(stores.open_partition(P), repository, 1)
    lose_disk(stores)
    stores.open_partition(P)
    stores.close_partition(P)
    recovered = await Recovery(stores, repository, CODEC).recover(P)
    assert recovered.rung is Rung.SNAPSHOT
    assert recovered.store.content_hash() == hashes[0]


@pytest.mark.invariant(8, place="recovery")
async def test_invariant_8_replay_after_a_restore_reaches_the_content_of_the_live_store(
    stores: DuckDBStore, repository: RedisSnapshotRepository
) -> None:
    store = stores.open_partition(P)
    await snapshot_versions(store, repository, 2)
    live = fill(store, seed=9)
    lose_disk(stores)
    recovered = await Recovery(stores, repository, CODEC).recover(P)
    assert recovered.store.content_hash() != live
    assert fill(recovered.store, seed=9) == live


async def test_without_anything_the_whole_log_is_replayed(
    stores: DuckDBStore, repository: RedisSnapshotRepository
) -> None:
    recovered = await Recovery(stores, repository, CODEC).recover(P)
    assert (recovered.rung, recovered.version) == (Rung.WHOLE_LOG, None)
    assert recovered.store.next_offsets() == {}
    stores.close_partition(P)
    stores.remove_partition(P)
    assert (await Recovery(stores, None, None).recover(P)).rung is Rung.WHOLE_LOG


async def test_a_damaged_local_file_is_put_aside_and_the_snapshot_is_used(
    stores: DuckDBStore, repository: RedisSnapshotRepository
) -> None:
    hashes = await snapshot_versions(stores.open_partition(P), repository, 1)
    recovery = Recovery(stores, repository, CODEC)
    for _ in range(2):
        damage_file(stores)
        recovered = await recovery.recover(P)
        assert recovered.rung is Rung.SNAPSHOT
        assert recovered.store.content_hash() == hashes[0]
    aside = [path.name for path in stores.path_of(P).parent.glob(f"{P}.duckdb.corrupt-*") if path.suffix != ".blocks"]
    assert len(aside) == 1, "only the newest damaged file is kept"


async def test_a_stale_log_beside_a_restored_file_is_not_applied(
    stores: DuckDBStore, repository: RedisSnapshotRepository
) -> None:
    """The log of the lost file holds rows that the snapshot has too: applied to it, they would be there twice."""
    store = stores.open_partition(P)
    append(store, MOVES, [move(number) for number in range(500)])
    log = store.path.with_name(f"{P}.duckdb.wal")
    stale = log.read_bytes()
    assert stale
    hashes = await snapshot_versions(store, repository, 1)
    lose_disk(stores)
    log.write_bytes(stale)
    recovered = await Recovery(stores, repository, CODEC).recover(P)
    assert recovered.rung is Rung.SNAPSHOT
    assert recovered.store.content_hash() == hashes[0]


async def test_a_restore_that_fails_leaves_what_is_there(
    stores: DuckDBStore, repository: RedisSnapshotRepository
) -> None:
    await snapshot_versions(stores.open_partition(P), repository, 1)
    await lose_blocks(repository, P, (await SnapshotRestore(repository, CODEC, P, 1).manifest()).block_names)
    stores.close_partition(P)
    before = stores.path_of(P).read_bytes()
    with pytest.raises(SnapshotCorruptError):
        await SnapshotRestore(repository, CODEC, P, 1).to(stores.path_of(P))
    assert stores.path_of(P).read_bytes() == before


async def test_a_cancelled_restore_writes_nothing_after_its_file_is_closed(
    stores: DuckDBStore, repository: RedisSnapshotRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The descriptor may belong to another partition's file by then."""
    await snapshot_versions(stores.open_partition(P), repository, 1)
    lose_disk(stores)
    writing, gate, descriptors = threading.Event(), threading.Event(), list[int]()
    write = os.write

    def write_behind_the_gate(fd: int, data: memoryview) -> int:
        descriptors.append(fd)
        writing.set()
        assert gate.wait(20)
        os.fstat(fd)
        return write(fd, data)

    monkeypatch.setattr(os, "write", write_behind_the_gate)
    restoring = asyncio.create_task(SnapshotRestore(repository, CODEC, P, 1).to(stores.path_of(P)))
    await asyncio.to_thread(writing.wait, 20)
    restoring.cancel()
    await asyncio.sleep(0)
    os.fstat(descriptors[0])  # still the restore's own
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await restoring
    written = len(descriptors)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptors[0])
    assert written == len(descriptors)
    assert [path.name for path in stores.path_of(P).parent.glob(f"{P}.duckdb*")] == []


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 4]))


def swap(path: Path, *positions: int) -> None:
    with path.open("r+b") as file:
        blocks = [os.pread(file.fileno(), BLOCK_BYTES, position) for position in positions]
        for position, block in zip(positions, reversed(blocks), strict=True):
            os.pwrite(file.fileno(), block, position)


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("bit in the main header", "header at byte 0 is damaged"),
        ("bit in a database header", "header at byte"),
        ("bit in a block", "block"),
        ("end cut off", "block"),
        ("block of zeros", "computed checksum"),
        ("zeros at the end", "block"),
        ("swapped blocks", "2 blocks are not where they were written"),
        ("blocks of an older time", "blocks are not where they were written"),
        ("stale log", "the WAL was created for an older version of this database"),
        ("bit in the log", "DuckDB refuses it"),
        ("garbage", "header at byte 0 is damaged"),
    ],
)
async def test_a_fault_of_the_local_file_is_detected_named_and_recovered_from(
    stores: DuckDBStore,
    repository: RedisSnapshotRepository,
    caplog: pytest.LogCaptureFixture,
    fault: str,
    named: str,
) -> None:
    store = stores.open_partition(P)
    (expected,) = await snapshot_versions(store, repository, 1)
    path, log = store.path, store.path.with_name(f"{P}.duckdb.wal")
    older_blocks, headers = path.read_bytes(), 12_288
    if fault in ("bit in the log", "stale log", "blocks of an older time"):
        fill(store, seed=3)
    older_log = log.read_bytes() if log.exists() else b""
    if fault in ("stale log", "blocks of an older time"):
        store.checkpoint()
    used = sorted(used_blocks(store._connection, store.database))
    stores.close_partition(P)
    match fault:
        case "bit in the main header":
            flip(path, 100)
        case "bit in a database header":
            flip(path, 4096 + 16)
            flip(path, 8192 + 16)
        case "bit in a block":
            flip(path, 12_288 + 1_000)
        case "end cut off":
            os.truncate(path, path.stat().st_size - 2 * BLOCK_BYTES)
        case "block of zeros":
            with path.open("r+b") as file:
                file.seek(12_288)
                file.write(bytes(BLOCK_BYTES))
        case "bit in the log":
            flip(log, 20_000)
        case "zeros at the end":
            with path.open("r+b") as file:
                file.seek(headers + used[-1] * BLOCK_BYTES)
                file.write(bytes(path.stat().st_size - file.tell()))
        case "swapped blocks":
            swap(path, *(headers + block * BLOCK_BYTES for block in (used[0], used[-1])))
        case "blocks of an older time":
            path.write_bytes(path.read_bytes()[:headers] + older_blocks[headers:])
        case "stale log":
            log.write_bytes(older_log)
        case _:
            path.write_bytes(os.urandom(path.stat().st_size))
    progress = RecoveryProgress(P)
    recovered = await Recovery(stores, repository, CODEC).recover(P, progress=progress)
    assert (recovered.rung, recovered.version) == (Rung.SNAPSHOT, 1)
    assert recovered.store.content_hash() == expected
    (damage,) = progress.damage
    assert named in damage
    assert damage in caplog.text


@pytest.mark.invariant(1, place="recovery")
@pytest.mark.parametrize("fault", ["zeros behind the log", "log cut off", "file of no bytes", "only a log"])
async def test_what_a_crash_leaves_behind_is_no_damage(
    stores: DuckDBStore, repository: RedisSnapshotRepository, fault: str
) -> None:
    """A power loss extends a log by zeros or tears its last entry; a kill leaves a file without a header."""
    store = stores.open_partition(P)
    (snapshot,) = await snapshot_versions(store, repository, 1)
    newer = fill(store, seed=3)
    stores.close_partition(P)
    path, log = stores.path_of(P), stores.path_of(P).with_name(f"{P}.duckdb.wal")
    match fault:
        case "zeros behind the log":
            with log.open("ab") as file:
                file.write(bytes(300_000))
        case "log cut off":
            os.truncate(log, log.stat().st_size - 100)
        case "file of no bytes":
            path.write_bytes(b"")
        case _:
            path.unlink()
    recovered = await Recovery(stores, repository, CODEC).recover(P)
    if fault == "zeros behind the log":
        assert (recovered.rung, recovered.store.content_hash()) == (Rung.LOCAL_FILE, newer)
    elif fault == "log cut off":
        assert recovered.rung is Rung.LOCAL_FILE
        replayed = recovered.store.next_offsets()
        assert replayed["players"] == 6_000
        assert replayed["moves"] == 500, "the torn transaction is not there, in part or whole"
    else:
        assert (recovered.rung, recovered.store.content_hash()) == (Rung.SNAPSHOT, snapshot)


@pytest.mark.invariant(4, place="recovery")
async def test_a_half_published_version_does_not_count(
    stores: DuckDBStore, repository: RedisSnapshotRepository, server: RedisServer
) -> None:
    """The publishing script switches the version last; whatever stops it before leaves keys that nobody reads."""
    (expected,) = await snapshot_versions(stores.open_partition(P), repository, 1)
    with server.client() as client:
        client.copy(f"{{test:{P}}}:manifest:1", f"{{test:{P}}}:manifest:2")
        client.sadd(f"{{test:{P}}}:members:2", "0" * 40)
    lose_disk(stores)
    recovered = await Recovery(stores, repository, CODEC).recover(P)
    assert (recovered.rung, recovered.version) == (Rung.SNAPSHOT, 1)
    assert recovered.store.content_hash() == expected


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("missing block", "is not stored"),
        ("expired block", "is not stored"),
        ("cut block", "does not authenticate"),
        ("lost piece", "does not start like a sealed piece"),
        ("flipped bit", "does not authenticate"),
        ("swapped blocks", "does not authenticate"),
        ("damaged manifest", "does not authenticate"),
        ("no manifest", "has lost its manifest"),
    ],
)
@pytest.mark.invariant(8, place="recovery")
async def test_an_unusable_version_is_named_and_falls_back_to_the_older_one(
    stores: DuckDBStore, repository: RedisSnapshotRepository, server: RedisServer, fault: str, named: str
) -> None:
    hashes = await snapshot_versions(stores.open_partition(P), repository, 2)
    names = sorted(await blocks_only_in(repository, 2))
    keys = [f"{{test:{P}}}:block:{name}" for name in names]
    with server.client() as client:
        match fault:
            case "missing block":
                client.delete(keys[0])
            case "expired block":
                client.pexpire(keys[0], 1)
                while client.exists(keys[0]):
                    pass
            case "cut block":
                client.hset(keys[0], "0", (client.hget(keys[0], "0") or b"")[:-1])
            case "lost piece":
                client.hset(keys[0], "1", b"of no use alone")
                client.hdel(keys[0], "0")
            case "no manifest":
                client.delete(f"{{test:{P}}}:manifest:2")
            case "flipped bit":
                sealed = bytearray(client.hget(keys[0], "0") or b"")
                sealed[len(sealed) // 2] ^= 1
                client.hset(keys[0], "0", bytes(sealed))
            case "swapped blocks":
                client.rename(keys[0], "aside")
                client.rename(keys[1], keys[0])
                client.rename("aside", keys[1])
            case _:
                client.setrange(f"{{test:{P}}}:manifest:2", 40, b"damage")
    lose_disk(stores)
    progress = RecoveryProgress(P)
    recovered = await Recovery(stores, repository, CODEC).recover(P, progress=progress)
    assert (recovered.rung, recovered.version) == (Rung.SNAPSHOT, 1)
    assert recovered.store.content_hash() == hashes[0]
    (damage,) = progress.damage
    assert damage.startswith("snapshot version 2 ")
    assert named in damage
    newer = fill(recovered.store, seed=9)
    assert await Snapshotter(repository, CODEC).take(recovered.store, recovered.epoch) is not None
    lose_disk(stores)
    recovered = await Recovery(stores, repository, CODEC).recover(P)
    assert (recovered.version, recovered.store.content_hash()) == (3, newer), "the next snapshot is whole again"


async def test_damaged_blocks_are_stored_anew_by_the_next_snapshot(
    stores: DuckDBStore, repository: RedisSnapshotRepository, server: RedisServer
) -> None:
    await snapshot_versions(stores.open_partition(P), repository, 2)
    with server.client() as client:
        for name in await blocks_only_in(repository, 2):
            client.hset(f"{{test:{P}}}:block:{name}", "0", b"damage")
    lose_disk(stores)
    recovered = await Recovery(stores, repository, CODEC).recover(P)
    content = fill(recovered.store, seed=1)
    assert await Snapshotter(repository, CODEC).take(recovered.store, recovered.epoch) is not None
    lose_disk(stores)
    recovered = await Recovery(stores, repository, CODEC).recover(P)
    assert recovered.version == 3
    assert recovered.store.content_hash() == content


async def test_when_no_version_is_usable_the_whole_log_is_replayed_loudly(
    stores: DuckDBStore, repository: RedisSnapshotRepository, caplog: pytest.LogCaptureFixture
) -> None:
    await snapshot_versions(stores.open_partition(P), repository, 1)
    await lose_blocks(repository, P, (await SnapshotRestore(repository, CODEC, P, 1).manifest()).block_names)
    lose_disk(stores)
    recovered = await Recovery(stores, repository, CODEC).recover(P)
    assert recovered.rung is Rung.WHOLE_LOG
    assert "none of the snapshot versions [1] is usable" in caplog.text
    assert any(record.levelno >= logging.ERROR for record in caplog.records)


async def behind(stores: DuckDBStore) -> None:
    """The partition is closed and its file the one of before any snapshot."""
    stores.close_partition(P)
    stores.remove_partition(P)
    append(stores.open_partition(P), MOVES, [move(1)])
    stores.close_partition(P)


def files(stores: DuckDBStore) -> list[str]:
    """The names of what there is of the partition, without the moments at which it was put aside."""
    return sorted(re.sub(r"-\d+", "", path.name) for path in stores.path_of(P).parent.glob(f"{P}.duckdb*"))


async def test_a_file_behind_the_log_gives_way_to_the_newest_version_that_is_whole_and_damage_is_named_and_removed(
    stores: DuckDBStore, repository: RedisSnapshotRepository, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = await snapshot_versions(stores.open_partition(P), repository, 2)
    damaged = await blocks_only_in(repository, 2)
    with server.client() as client:
        for name in damaged:
            client.hset(f"{{test:{P}}}:block:{name}", "0", b"damage")
    await behind(stores)
    synced = list[list[str]]()

    def sync(folder: Path) -> None:
        sync_folder(folder)
        synced.append([name for name in files(stores) if "restoring" not in name])

    monkeypatch.setattr(recovery, "sync_folder", sync)
    progress = RecoveryProgress(P)
    recovered = await Recovery(stores, repository, CODEC).recover_beyond(P, lambda _: True, progress)
    assert recovered is not None
    assert (recovered.rung, recovered.version) == (Rung.SNAPSHOT, 1)
    assert recovered.store.content_hash() == hashes[0]
    (named,) = progress.damage
    assert named.startswith("snapshot version 2 ")
    assert await repository.missing_blocks(P, damaged) == damaged
    aside = [f"{P}.duckdb.behind", f"{P}.duckdb.behind.wal"]
    assert synced == [aside, [f"{P}.duckdb", *aside]]


async def test_a_file_behind_the_log_stays_where_no_version_opens(
    stores: DuckDBStore, repository: RedisSnapshotRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a version was captured from a file that was damaged already; every block of it is what was captured."""
    junk = tmp_path / "junk"
    junk.write_bytes(os.urandom(BLOCK_BYTES))

    @contextmanager
    def frozen(_: PartitionStore, *, hashed: bool = False) -> Iterator[FrozenFile]:
        del hashed
        with junk.open("rb") as file:
            yield FrozenFile(junk, file.fileno(), BLOCK_BYTES, {MOVES.topic: 9}, {})

    with monkeypatch.context() as patched:
        patched.setattr(PartitionStore, "frozen", frozen)
        await snapshot_versions(stores.open_partition(P), repository, 1)
    await behind(stores)
    before = files(stores)
    progress = RecoveryProgress(P)
    assert await Recovery(stores, repository, CODEC).recover_beyond(P, lambda _: True, progress) is None
    assert "does not open" in progress.damage[0]
    assert [name for name in files(stores) if ".corrupt" not in name] == before
    assert stores.open_partition(P).next_offsets() == {MOVES.topic: 1}


async def test_a_wrong_key_is_an_error_that_names_both_keys_and_harms_nothing(
    stores: DuckDBStore, repository: RedisSnapshotRepository
) -> None:
    hashes = await snapshot_versions(stores.open_partition(P), repository, 1)
    lose_disk(stores)
    wrong = SnapshotCodec(bytes(32), application="test")
    with pytest.raises(SnapshotKeyError) as refusal:
        await Recovery(stores, repository, wrong).recover(P)
    assert CODEC.key_id in str(refusal.value)
    assert wrong.key_id in str(refusal.value)
    assert "PINTAIL_SNAPSHOT_KEY" in refusal.value.hint
    assert not stores.path_of(P).exists()
    assert (await Recovery(stores, repository, CODEC).recover(P)).store.content_hash() == hashes[0]


async def test_each_recovery_has_a_newer_epoch_which_the_file_keeps(
    stores: DuckDBStore, repository: RedisSnapshotRepository
) -> None:
    recovery = Recovery(stores, repository, CODEC)
    first = await recovery.recover(P)
    stores.close_partition(P)
    second = await recovery.recover(P)
    assert second.epoch > first.epoch
    assert second.store.epoch() == second.epoch
    stores.close_partition(P)
    # A Redis that was replaced by an empty one must not give out epochs that are in use.
    replaced = await Recovery(stores, MemorySnapshotRepository(), CODEC).recover(P)
    assert replaced.epoch > second.epoch


@pytest.mark.invariant(5, place="recovery")
async def test_a_partition_that_another_worker_holds_is_not_touched(
    stores: DuckDBStore, repository: RedisSnapshotRepository
) -> None:
    stores.open_partition(P)
    other = open_store(stores.path_of(P).parent)
    try:
        with pytest.raises(StoreLockedError):
            await Recovery(other, repository, CODEC).recover(P)
    finally:
        other.close()


class TestWithoutRedis:
    @pytest.fixture
    async def away(self, tmp_path: Path) -> AsyncIterator[RedisSnapshotRepository]:
        url = f"unix://{tmp_path}/nobody"
        async with RedisSnapshotRepository(url, application="test", timeout_seconds=0.5) as repository:
            yield repository

    async def test_a_good_local_file_goes_on_under_the_next_local_epoch(
        self, stores: DuckDBStore, away: RedisSnapshotRepository, caplog: pytest.LogCaptureFixture
    ) -> None:
        store = stores.open_partition(P)
        content = fill(store)
        store.set_epoch(41)
        stores.close_partition(P)
        recovered = await Recovery(stores, away, CODEC).recover(P)
        assert (recovered.rung, recovered.epoch) == (Rung.LOCAL_FILE, 42)
        assert recovered.store.content_hash() == content
        assert "WITHOUT Redis" in caplog.text

    @pytest.mark.parametrize("file", ["missing", "damaged"])
    async def test_without_a_local_file_recovery_raises_at_the_deadline_instead_of_replaying_everything(
        self, stores: DuckDBStore, away: RedisSnapshotRepository, file: str
    ) -> None:
        fill(stores.open_partition(P))
        if file == "missing":
            lose_disk(stores)
        else:
            damage_file(stores)
        with pytest.raises(SnapshotStoreUnavailableError) as outage:
            await Recovery(stores, away, CODEC, server_deadline_seconds=0.3).recover(P)
        assert outage.value.retriable
        assert not stores.path_of(P).exists()

    @pytest.mark.invariant(8, place="outage")
    async def test_recovery_goes_on_when_redis_comes_back_before_the_deadline(
        self, stores: DuckDBStore, server: RedisServer, repository: RedisSnapshotRepository
    ) -> None:
        class WatchedRepository(RedisSnapshotRepository):
            tried = asyncio.Event()

            async def load_blocks(self, partition: int, names: Collection[str]) -> dict[str, bytes]:
                if not self.tried.is_set():
                    server.kill()
                    self.tried.set()
                return await super().load_blocks(partition, names)

        hashes = await snapshot_versions(stores.open_partition(P), repository, 1)
        lose_disk(stores)
        async with WatchedRepository(server.url, application="test", timeout_seconds=0.5) as watched:
            recovering = asyncio.create_task(Recovery(stores, watched, CODEC, server_deadline_seconds=30).recover(P))
            await watched.tried.wait()
            await asyncio.to_thread(server.start)
            recovered = await recovering
        assert (recovered.rung, recovered.version) == (Rung.SNAPSHOT, 1)
        assert recovered.store.content_hash() == hashes[0]

    async def test_a_partition_that_never_had_a_record_needs_no_redis(
        self, stores: DuckDBStore, away: RedisSnapshotRepository
    ) -> None:
        topics = [TopicPartition(table.topic, P) for table in (PLAYERS, MOVES)]
        stores.open_partition(P)
        stores.close_partition(P)
        recovery = Recovery(stores, away, CODEC)
        recovered = await recovery.recover(P, dict.fromkeys(topics, Watermarks(0, 0)))
        assert recovered.rung is Rung.WHOLE_LOG
        stores.close_partition(P)
        marks = {topics[0]: Watermarks(0, 0), topics[1]: Watermarks(7, 7)}
        with pytest.raises(SnapshotStoreUnavailableError):
            await Recovery(stores, away, CODEC, server_deadline_seconds=0.3).recover(P, marks)
