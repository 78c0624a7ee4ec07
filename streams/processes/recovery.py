"""Finds a partition a store to go on from: the recovery ladder (D7), one function per rung, tried in this order.

    warm         the file is open already: of the assignment before, or of a standby that is promoted
    local file   opened and checked by the store. A damaged one is put aside as `<N>.duckdb.corrupt-<ms>` (only the
                 newest of them is kept) and the ladder goes on; so it does where nothing was ever applied, because an
                 empty file would replay the log from its beginning, which may not be where the records began
    snapshot     newest version first; every block is checked against its name, the file against its checksum
    clickhouse   the rows that the sink delivered (processes/rebuilding.py) of records that the log has lost; only where
                 it has lost its beginning and the sink knows more
    whole log    an empty store, which replays everything that the log still holds

A good local file is used even if a snapshot is newer: replay from its offset is always right and needs no Redis. Where
the log no longer reaches back to it, `recover_beyond` takes a snapshot that the log does reach, by the same walk over
the versions; the file is put aside as `<N>.duckdb.behind-<ms>`. An operator's order (processes/recovery_orders.py) is a
rung of its own, before all others and instead of them; what it replaces is kept as `<N>.duckdb.replaced-<ms>`, for the
operator to remove. A file that is missing or damaged while Redis or ClickHouse is away is no reason to silently replay
what the log still holds: recovery waits for it until a deadline, then raises; but where the log shows that there never
was a record, nothing can be lost and nobody is waited for. Snapshots under another key, and rows that cannot come back
exactly, are raised for the same reason.

Then the assignment's epoch is claimed and written into the store; a standby claims none. No thread of a cancelled
recovery outlives it, so the caller can close what was opened. Called by processes/hosting.py for each assignment, and
by processes/standby.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

from schemas.manifest import Manifest
from streams.adapters.duckdb_file import FileLock, companions, sync_folder
from streams.adapters.duckdb_store import DuckDBStore, PartitionStore
from streams.adapters.snapshot_codec import SnapshotCodec
from streams.errors import (
    PintailError,
    RecoveryRefusedError,
    SnapshotCorruptError,
    SnapshotKeyError,
    SnapshotNotFoundError,
    SnapshotStoreUnavailableError,
    StoreCorruptError,
)
from streams.finishing import in_thread
from streams.ports import Watermarks
from streams.ports_snapshots import SnapshotRepository, digest_of
from streams.positions import TopicPartition
from streams.processes.progress import RecoveryProgress
from streams.processes.rebuilding import Rebuilding
from streams.processes.recovery_orders import RecoveryOrder
from streams.retry import Backoff

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

#: How long recovery waits for a Redis or a ClickHouse that is away when it cannot go on without.
SERVER_DEADLINE_SECONDS = 120.0
#: Blocks that are loaded and opened together: 4 MiB in memory.
BATCH_BLOCKS = 16


class Rung(StrEnum):
    """Where a recovered store came from."""

    WARM = "warm"
    LOCAL_FILE = "local_file"
    SNAPSHOT = "snapshot"
    CLICKHOUSE = "clickhouse"
    WHOLE_LOG = "whole_log"


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """An open store under a new epoch, ready for replay from its next_offsets."""

    store: PartitionStore
    epoch: int
    rung: Rung
    #: The snapshot version that was restored; None on the other rungs.
    version: int | None
    #: Sealed bytes that were loaded from the repository.
    bytes_loaded: int
    seconds: float


@dataclass(frozen=True)
class _Found:
    store: PartitionStore
    rung: Rung
    version: int | None = None
    bytes_loaded: int = 0


LogWatermarks = Mapping[TopicPartition, Watermarks]
_ORDERED_RUNGS = {"snapshot": Rung.SNAPSHOT, "clickhouse": Rung.CLICKHOUSE, "log": Rung.WHOLE_LOG}


class Recovery:
    """Recovers partitions of one worker. Without a repository the ladder has no snapshot rung, without `rebuilding` no
    ClickHouse rung. One that does not own what it recovers claims no epochs, so that nothing of it can be published."""

    def __init__(
        self,
        store: DuckDBStore,
        repository: SnapshotRepository | None,
        codec: SnapshotCodec | None,
        *,
        rebuilding: Rebuilding | None = None,
        claims_epochs: bool = True,
        server_deadline_seconds: float = SERVER_DEADLINE_SECONDS,
    ) -> None:
        assert (repository is None) == (codec is None), "a repository and a codec belong together"
        self._store = store
        self._repository = repository
        self._codec = codec
        self._rebuilding = rebuilding
        self._claims_epochs = claims_epochs
        self._server_deadline_seconds = server_deadline_seconds

    async def recover(
        self,
        partition: int,
        log: LogWatermarks | None = None,
        progress: RecoveryProgress | None = None,
        order: RecoveryOrder | None = None,
    ) -> Recovered:
        """An open store for the partition, from the best rung that holds, or from the one that is ordered. `log` is
        what the log holds of each of its topics; without it the log counts as whole.

        Raises StoreLockedError (retriable), SnapshotStoreUnavailableError or SinkUnavailableError (both retriable) when
        the deadline passed without Redis or ClickHouse, SnapshotKeyError when the snapshots are under another key, and
        InexactRowsError when ClickHouse knows more than the log but cannot give it back. Of an order that cannot be
        carried out it raises what prevents it; then the file is as it was, or was put aside whole."""
        started = time.perf_counter()
        log, progress = log or {}, progress or RecoveryProgress(partition)
        if order is not None:
            found = await self._as_ordered(partition, order, log, progress)
        else:
            found = (
                await self._from_local_file(partition, progress)
                or await self._from_snapshot(partition, log, progress)
                or await self._from_clickhouse(partition, log, progress)
                or await self._from_whole_log(partition, log, progress)
            )
        return await self._opened(found, started)

    async def recover_beyond(
        self, partition: int, is_in_log: Callable[[Mapping[str, int]], bool], progress: RecoveryProgress | None = None
    ) -> Recovered | None:
        """From the newest snapshot at next_offsets that the log reaches, where the local file's are behind it; None if
        there is none, and the file is as it was. The partition must be closed. Raises as `recover` does."""
        started = time.perf_counter()
        progress = progress or RecoveryProgress(partition)
        found = await self._from_snapshot(partition, {}, progress, is_in_log)
        return await self._opened(found, started) if found is not None else None

    async def _opened(self, found: _Found, started: float) -> Recovered:
        epoch = await (self._claim_epoch(found.store) if self._claims_epochs else in_thread(found.store.epoch))
        return Recovered(
            store=found.store,
            epoch=epoch,
            rung=found.rung,
            version=found.version,
            bytes_loaded=found.bytes_loaded,
            seconds=time.perf_counter() - started,
        )

    async def _as_ordered(
        self, partition: int, order: RecoveryOrder, log: LogWatermarks, progress: RecoveryProgress
    ) -> _Found:
        """What an operator ordered, and nothing else."""
        source, path = order.source, self._store.path_of(partition)
        logger.warning("partition %d: recovered from %s, as ordered", partition, source)
        rung = _ORDERED_RUNGS[source.name]
        await in_thread(self._store.close_partition, partition)
        if order.is_begun and path.exists():
            return _Found(await in_thread(self._store.open_partition, partition), rung, source.version)
        if source.version is not None:
            if self._repository is None or self._codec is None:
                raise RecoveryRefusedError("this worker has no snapshots", hint="set PINTAIL_REDIS and a key")
            restore = SnapshotRestore(self._repository, self._codec, partition, source.version)
            store = await self._restored(partition, restore, kept_as="replaced")
            return _Found(store, rung, source.version, restore.bytes_loaded)
        if source.name == "clickhouse":
            return await self._rebuilt_instead(partition, log, progress)
        await in_thread(put_aside_unlocked, path, "replaced")
        return await self._from_whole_log(partition, log, progress)

    async def _restored(self, partition: int, restore: SnapshotRestore, kept_as: str | None = None) -> PartitionStore:
        """The version, opened in place of the local file."""
        to_file = partial(restore.to, self._store.path_of(partition), is_synced=False, kept_as=kept_as)
        await self._patiently(partition, to_file)
        return await in_thread(partial(self._store.open_partition, partition, is_checked=True))

    async def _rebuilt_instead(self, partition: int, log: LogWatermarks, progress: RecoveryProgress) -> _Found:
        if self._rebuilding is None:
            raise RecoveryRefusedError("this worker has no ClickHouse", hint="set PINTAIL_CLICKHOUSE, or order another")
        positions = await self._rebuilding.positions(partition, partial(self._patiently, partition))
        if not positions:
            raise RecoveryRefusedError("ClickHouse holds nothing of this partition", hint="order another")
        await in_thread(put_aside_unlocked, self._store.path_of(partition), "replaced")
        return await self._rebuilt(partition, positions, log, progress)

    async def _from_local_file(self, partition: int, progress: RecoveryProgress) -> _Found | None:
        path = self._store.path_of(partition)
        if not path.exists():
            logger.info("partition %d: no local file", partition)
            return None
        rung = Rung.WARM if self._store.is_in_use(partition) else Rung.LOCAL_FILE
        progress.begin(rung, path.stat().st_size, "bytes")
        try:
            store = await in_thread(self._store.open_partition, partition)
        except StoreCorruptError as error:
            aside = await in_thread(put_aside, path)
            progress.found_damage(Rung.LOCAL_FILE, f"the local file is damaged and was kept as {aside.name}: {error}")
            return None
        if not store.next_offsets():
            logger.info("partition %d: the local file never held anything", partition)
            # One that holds rows all the same is left over from a rebuilding that did not end.
            is_half_built = await in_thread(store.holds_rows)
            await in_thread(self._discard if is_half_built else self._store.close_partition, partition)
            return None
        progress.end()
        logger.info("partition %d: %s opened, at %s", partition, rung, store.next_offsets())
        return _Found(store, rung)

    async def _from_snapshot(
        self,
        partition: int,
        log: LogWatermarks,
        progress: RecoveryProgress,
        is_in_log: Callable[[Mapping[str, int]], bool] | None = None,
    ) -> _Found | None:
        """From the newest version that verifies. With `is_in_log` the local file is behind the log, and gives way only
        to a version that is not."""
        if self._repository is None or self._codec is None:
            return None
        repository, codec, path = self._repository, self._codec, self._store.path_of(partition)
        try:
            versions = await self._patiently(partition, partial(repository.versions, partition), log)
        except SnapshotStoreUnavailableError:
            if _holds_records(log):
                raise
            return None
        for version in versions:
            restore = SnapshotRestore(repository, codec, partition, version, progress)
            try:
                if is_in_log is None:
                    store = await self._restored(partition, restore)
                elif is_in_log((await self._patiently(partition, restore.manifest)).next_offsets):
                    store = await self._restored(partition, restore, kept_as="behind")
                else:
                    return None  # and older ones are further behind
            except SnapshotKeyError:
                raise
            except SnapshotCorruptError as error:
                progress.found_damage(Rung.SNAPSHOT, f"snapshot version {version} is unusable: {error}")
                # Damaged blocks would be reused by every later snapshot; without them the next one sends them anew.
                await self._patiently(partition, partial(repository.discard_blocks, partition, restore.damaged))
            except SnapshotNotFoundError:
                if version in await self._patiently(partition, partial(repository.versions, partition)):
                    progress.found_damage(Rung.SNAPSHOT, f"snapshot version {version} has lost its manifest")
                else:
                    logger.info("partition %d: snapshot version %d was retired meanwhile", partition, version)
            except StoreCorruptError as error:
                aside = await in_thread(put_aside, path)
                if is_in_log is not None:
                    await in_thread(put_back, path, "behind")
                progress.found_damage(
                    Rung.SNAPSHOT, f"snapshot version {version} does not open and was kept as {aside.name}: {error}"
                )
            else:
                logger.info("partition %d: version %d restored, at %s", partition, version, store.next_offsets())
                return _Found(store, Rung.SNAPSHOT, version, restore.bytes_loaded)
        if versions:
            logger.error("partition %d: none of the snapshot versions %s is usable", partition, list(versions))
        else:
            logger.info("partition %d: no snapshot", partition)
        return None

    async def _from_clickhouse(self, partition: int, log: LogWatermarks, progress: RecoveryProgress) -> _Found | None:
        cut = {source.topic for source, marks in log.items() if marks.low > 0}
        if self._rebuilding is None or not cut:
            return None
        positions = await self._rebuilding.positions(partition, partial(self._patiently, partition))
        if not cut & positions.keys():
            logger.info("partition %d: ClickHouse knows no more than the log", partition)
            return None
        return await self._rebuilt(partition, positions, log, progress)

    async def _rebuilt(
        self, partition: int, positions: dict[str, int], log: LogWatermarks, progress: RecoveryProgress
    ) -> _Found:
        """A store filled from ClickHouse, or none at all. What the log still holds is left to replay: the sink may be
        ahead of the store that was lost, and it passed over poison that only a store parks (invariant 6)."""
        assert self._rebuilding is not None
        positions = positions | {
            source.topic: marks.low
            for source, marks in log.items()
            if marks.low < positions.get(source.topic, 0) <= marks.high
        }
        store = await in_thread(self._store.open_partition, partition)
        try:
            await self._rebuilding.fill(store, positions, progress, partial(self._patiently, partition))
        except BaseException:
            await in_thread(self._discard, partition)
            raise
        return _Found(store, Rung.CLICKHOUSE)

    async def _from_whole_log(self, partition: int, log: LogWatermarks, progress: RecoveryProgress) -> _Found:
        lost = {source.topic: marks.low for source, marks in log.items() if marks.low > 0}
        logger.warning(
            "partition %d: starts empty, everything the log holds is replayed%s",
            partition,
            f"; it no longer holds what was below {lost}" if lost else "",
        )
        progress.begin(Rung.WHOLE_LOG, 0, "")
        return _Found(await in_thread(self._store.open_partition, partition), Rung.WHOLE_LOG)

    def _discard(self, partition: int) -> None:
        self._store.close_partition(partition)
        self._store.remove_partition(partition)

    async def _claim_epoch(self, store: PartitionStore) -> int:
        """The new assignment's epoch, above the one in the file; from the repository, if it can be reached."""
        epoch = await in_thread(store.epoch) + 1
        if self._repository is not None:
            try:
                epoch = await self._repository.claim_epoch(store.partition, at_least=epoch)
            except SnapshotStoreUnavailableError as error:
                logger.warning(
                    "partition %d goes on WITHOUT Redis under epoch %d; no snapshots until it is back: %s",
                    store.partition,
                    epoch,
                    error,
                )
        await in_thread(store.set_epoch, epoch)
        return epoch

    async def _patiently(
        self, partition: int, action: Callable[[], Awaitable[Result]], log: LogWatermarks | None = None
    ) -> Result:
        """Repeats `action` while its server is away, until the deadline; then raises. With the watermarks of a log that
        never held a record it raises at once."""
        deadline = time.monotonic() + self._server_deadline_seconds
        backoff = Backoff(ceiling_seconds=5.0)
        while True:
            try:
                return await action()
            except PintailError as error:
                delay = backoff.next_delay_seconds()
                is_needed = log is None or _holds_records(log)
                if not error.retriable or not is_needed or time.monotonic() + delay > deadline:
                    raise
                logger.warning("partition %d has no local file and waits: %s; again in %.1f s", partition, error, delay)
                await asyncio.sleep(delay)


def _holds_records(log: LogWatermarks) -> bool:
    """False if the log shows that none of the topics ever had a record."""
    return not log or any(marks.high > 0 for marks in log.values())


class SnapshotRestore:
    """One version of one partition, turned back into a file, or only checked."""

    def __init__(
        self,
        repository: SnapshotRepository,
        codec: SnapshotCodec,
        partition: int,
        version: int,
        progress: RecoveryProgress | None = None,
    ) -> None:
        self.bytes_loaded = 0
        #: Name -> digest of the stored piece, of blocks that `check` found damaged.
        self.damaged: dict[str, str] = {}
        self._progress = progress or RecoveryProgress(partition)
        self._repository = repository
        self._codec = codec
        self._partition = partition
        self._version = version

    async def manifest(self) -> Manifest:
        """Raises SnapshotNotFoundError, SnapshotCorruptError, SnapshotKeyError."""
        sealed = await self._repository.load_manifest(self._partition, self._version)
        return await in_thread(self._codec.open_manifest, self._partition, self._version, sealed)

    async def to(self, path: Path, *, is_synced: bool = True, kept_as: str | None = None) -> Manifest:
        """Puts the version's file at `path` in one step, durably if it is synced; until then whatever is there stays
        as it is, and then it is put aside if it is to be `kept_as` something. Recovery does not wait for the disk: a
        file that a power loss tears is found damaged when it is opened next, and the log has what was applied to it
        since.

        Stale write-ahead logs beside it go first: DuckDB would apply them to the restored file."""
        temporary = path.with_name(f"{path.name}.restoring")
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                manifest = await self.check(write=lambda block: _write_all(fd, block))
                if is_synced:
                    await in_thread(os.fsync, fd)
            finally:
                os.close(fd)
            if kept_as is not None:
                await in_thread(put_aside_unlocked, path, kept_as)
            for log in companions(path):
                log.unlink()
            temporary.replace(path)
            await in_thread(sync_folder, path.parent)
        finally:
            temporary.unlink(missing_ok=True)
        return manifest

    async def check(self, write: Callable[[bytes], None] = lambda _: None) -> Manifest:
        """Loads every block, checks it against its name and passes it on in the order of the file. With the manifest's
        own checksum over names and size, that covers the file.

        Raises SnapshotCorruptError with ALL blocks that are missing or damaged, and SnapshotKeyError."""
        manifest = await self.manifest()
        self.bytes_loaded, written = 0, 0
        self.damaged.clear()
        faults: dict[str, str] = {}
        self._progress.begin("snapshot", manifest.file_bytes, "bytes")
        async with aclosing(self._batches(manifest.blocks)) as batches:
            async for names, sealed in batches:
                self.bytes_loaded += sum(map(len, sealed.values()))
                written += await in_thread(self._open_batch, names, sealed, write, faults)
                self._progress.reach(written)
        if faults:
            raise SnapshotCorruptError(
                f"snapshot version {self._version} of partition {self._partition} lacks {len(faults)} of "
                f"{len(manifest.block_names)} blocks: {next(iter(faults.values()))}",
                hint="an older version may be intact; the next snapshot sends the lost blocks again",
                blocks=frozenset(faults),
            )
        if written != manifest.file_bytes:
            raise SnapshotCorruptError(
                f"snapshot version {self._version} of partition {self._partition} has {written} bytes, "
                f"its manifest says {manifest.file_bytes}"
            )
        return manifest

    async def _batches(self, blocks: tuple[str, ...]) -> AsyncGenerator[tuple[tuple[str, ...], dict[str, bytes]]]:
        """Names and sealed blocks in the order of the file; the next batch is loaded while one is opened."""
        groups = [blocks[start : start + BATCH_BLOCKS] for start in range(0, len(blocks), BATCH_BLOCKS)]
        loading: asyncio.Task[dict[str, bytes]] | None = None
        try:
            for names, following in zip_longest(groups, groups[1:]):
                sealed = await (loading or self._load(names))
                loading = asyncio.create_task(self._load(following)) if following else None
                yield names, sealed
        finally:
            if loading is not None:
                loading.cancel()
                await asyncio.gather(loading, return_exceptions=True)

    async def _load(self, names: tuple[str, ...]) -> dict[str, bytes]:
        return await self._repository.load_blocks(self._partition, frozenset(names))

    def _open_batch(
        self, names: tuple[str, ...], sealed: dict[str, bytes], write: Callable[[bytes], None], faults: dict[str, str]
    ) -> int:
        written = 0
        for name in names:
            if name not in sealed:
                faults[name] = f"block {name} is not stored"
                continue
            try:
                block = self._codec.open_block(self._partition, name, sealed[name])
            except SnapshotKeyError:
                raise
            except SnapshotCorruptError as error:
                faults[name] = error.message
                self.damaged[name] = digest_of(sealed[name])
                continue
            written += len(block)
            if not faults:
                write(block)
        return written


def put_aside(path: Path, why: str = "corrupt") -> Path:
    """Renames a file and its logs, durably, so that they can be examined; removes those put aside earlier for the same
    reason, but never what an operator had replaced."""
    if why != "replaced":
        for old in path.parent.glob(f"{path.name}.{why}-*"):
            old.unlink()
    aside = path.with_name(f"{path.name}.{why}-{time.time_ns() // 1_000_000}")
    _rename(path, aside)
    return aside


def put_back(path: Path, why: str) -> None:
    """Undoes the newest `put_aside` for this reason."""
    aside = f".{why}-"
    _rename(max(each for each in path.parent.glob(f"{path.name}{aside}*") if each.suffix.startswith(aside)), path)


def _rename(path: Path, to: Path) -> None:
    for log in companions(path):
        log.rename(log.with_name(to.name + log.name.removeprefix(path.name)))
    path.rename(to)
    sync_folder(path.parent)


def put_aside_unlocked(path: Path, why: str) -> None:
    """The same for a file that may be missing, or be open in another process: then it raises StoreLockedError."""
    lock = FileLock(path.with_name(f"{path.stem}.lock"))
    try:
        if path.exists():
            put_aside(path, why)
    finally:
        lock.release()


def _write_all(fd: int, block: bytes) -> None:
    rest = memoryview(block)
    while rest:
        rest = rest[os.write(fd, rest) :]
