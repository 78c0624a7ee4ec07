"""Takes incremental snapshots of partition stores while writes go on (D6). Order of effects:

    1. number    the version after the newest one; nothing to do if that one is whole and reflects the same offsets
    2. capture   CHECKPOINT, then read the frozen file block by block; blocks not stored yet are sealed and put
    3. publish   fenced by the epoch; refused while any block is missing (invariant 4)
    4. retire    versions beyond those kept: the newest ones, and the newest of each of some past hours
A crash anywhere before 3 leaves the newest version as it was, and blocks that expire. The store is only read.

Blocks are cut where DuckDB cuts them, so one changed page changes one block. Capturing reads the whole file at memory
speed: recognising unchanged blocks by DuckDB's checksums would be cheaper and wrong (see BlockFingerprints). After a
change of key the next snapshot of each partition is due at once, and seals every block anew.
Called by processes/hosting.py on a timer and before a partition is handed over.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from importlib.metadata import version as version_of_package
from threading import Event
from typing import Any, TypeVar

from schemas.manifest import Manifest
from streams.adapters.duckdb_file import BLOCK_BYTES, HEADERS_BYTES
from streams.adapters.duckdb_store import PartitionStore
from streams.adapters.snapshot_codec import BlockFingerprints, SnapshotCodec
from streams.errors import SnapshotCorruptError, SnapshotError, SnapshotNotFoundError
from streams.finishing import ended
from streams.limits import MIB
from streams.ports_snapshots import SnapshotRepository

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

#: New blocks that are sealed and sent together: 4 MiB in memory.
BATCH_BLOCKS = 16
_HOUR_MS = 3_600_000


@dataclass(frozen=True, kw_only=True)
class SnapshotInfo:
    """A published snapshot, and what it cost."""

    partition: int
    version: int
    epoch: int
    next_offsets: Mapping[str, int]
    blocks_total: int
    #: Blocks that had to be sent.
    blocks_new: int
    #: Sealed bytes that were sent.
    bytes_sent: int
    #: What the versions kept occupy in the repository, shared blocks counted once; None if it could not be asked.
    memory_bytes: int | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class SnapshotSchedule:
    """When a partition that moved is due: so long after the last one, or after so many bytes of records."""

    interval_seconds: float = 30.0
    after_bytes: int = 256 * MIB

    def is_due(self, *, seconds: float, record_bytes: int) -> bool:
        """By time and bytes since the last one."""
        return seconds >= self.interval_seconds or record_bytes >= self.after_bytes


@dataclass
class _Memory:
    """What this process knows about a partition's snapshots; losing it costs time only."""

    newest: Manifest | None = None
    #: Version -> when it was made, of those kept; 0 where that cannot be read.
    created_ms: dict[int, int] = field(default_factory=dict)
    #: Fingerprint -> name, of blocks that were stored when last seen.
    names: dict[bytes, str] = field(default_factory=dict)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class Snapshotter:
    """Snapshots any partition store of this worker into one repository."""

    def __init__(
        self,
        repository: SnapshotRepository,
        codec: SnapshotCodec,
        *,
        versions_kept: int = 3,
        hours_kept: int = 0,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        assert versions_kept >= 1
        self._repository = repository
        self._codec = codec
        self._versions_kept = versions_kept
        self._hours_kept = hours_kept
        self._clock_ms = clock_ms
        self._fingerprints = BlockFingerprints()
        self._memories: dict[int, _Memory] = {}

    async def take(self, store: PartitionStore, epoch: int, *, hashed: bool = False) -> SnapshotInfo | None:
        """Publishes a snapshot of what the store holds now; None when the newest one is whole and has the same offsets,
        and the content's hash if that is asked for.

        Raises SnapshotFencedError when another owner took over, SnapshotStoreUnavailableError (retriable) when the
        repository is away, and what the store raises. Cancelling waits for the block at hand only."""
        memory = self._memories.setdefault(store.partition, _Memory())
        async with memory.turn:
            try:
                return await self._take(store, epoch, memory, hashed)
            except SnapshotCorruptError as error:
                if not error.blocks:
                    raise
                # Blocks that were stored before have gone since: send them again, once.
                logger.warning("partition %d: %s", store.partition, error.message)
                memory.names = {print_: name for print_, name in memory.names.items() if name not in error.blocks}
                return await self._take(store, epoch, memory, hashed)

    async def _take(self, store: PartitionStore, epoch: int, memory: _Memory, hashed: bool) -> SnapshotInfo | None:
        started = time.perf_counter()
        # 1. number
        newest = await self._repository.newest_version(store.partition)
        if memory.newest is None or memory.newest.version != newest:
            memory.newest = await self._load_newest(store.partition, newest)
        if await self._is_current(memory.newest, await asyncio.to_thread(store.next_offsets), hashed):
            return None
        version = 1 if newest is None else newest + 1
        # 2. capture
        capture = _Capture(
            store, self._repository, self._codec, self._fingerprints, memory.names, asyncio.get_running_loop()
        )
        manifest = await capture.run(version=version, epoch=epoch, created_at_ms=self._clock_ms(), hashed=hashed)
        # 3. publish
        await self._repository.publish(
            store.partition,
            version=version,
            epoch=epoch,
            manifest=await asyncio.to_thread(self._codec.seal_manifest, manifest),
            block_names=manifest.block_names,
        )
        memory.newest = manifest
        memory.created_ms[version] = manifest.created_at_ms
        memory.names = capture.names_seen
        # 4. retire
        memory_bytes = None
        try:
            await self._retire(store.partition, memory)
            memory_bytes = await self._repository.memory_bytes(store.partition)
        except SnapshotError as error:
            logger.warning("old snapshots of partition %d stay until the next one: %s", store.partition, error)
        return SnapshotInfo(
            partition=store.partition,
            version=version,
            epoch=epoch,
            next_offsets=manifest.next_offsets,
            blocks_total=len(manifest.blocks),
            blocks_new=capture.blocks_sent,
            bytes_sent=capture.bytes_sent,
            memory_bytes=memory_bytes,
            seconds=time.perf_counter() - started,
        )

    async def _retire(self, partition: int, memory: _Memory) -> None:
        kept = await self._repository.versions(partition)
        for version in kept:
            if version not in memory.created_ms:
                manifest = await self._load(partition, version) if self._hours_kept else None
                memory.created_ms[version] = manifest.created_at_ms if manifest else 0
        memory.created_ms = {version: memory.created_ms[version] for version in kept}
        unwanted = versions_to_retire(
            memory.created_ms, newest_kept=self._versions_kept, hours_kept=self._hours_kept, now_ms=self._clock_ms()
        )
        if unwanted:
            await self._repository.retire(partition, unwanted)

    async def _is_current(self, newest: Manifest | None, offsets: Mapping[str, int], hashed: bool) -> bool:
        """True when a snapshot would add nothing: no records yet, or the newest one is whole and has them all."""
        if newest is None or newest.next_offsets != offsets or (hashed and newest.content_hash is None):
            return not offsets
        return not await self._repository.missing_blocks(newest.partition, newest.block_names)

    async def _load_newest(self, partition: int, version: int | None) -> Manifest | None:
        """The newest manifest; None if there is none that can be read and is under the key that seals, which a new
        snapshot mends."""
        return None if version is None else await self._load(partition, version, under_newest_key=True)

    async def _load(self, partition: int, version: int, *, under_newest_key: bool = False) -> Manifest | None:
        try:
            sealed = await self._repository.load_manifest(partition, version)
            manifest = await asyncio.to_thread(self._codec.open_manifest, partition, version, sealed)
        except (SnapshotNotFoundError, SnapshotCorruptError) as error:
            logger.warning("partition %d: a new snapshot will replace version %d: %s", partition, version, error)
            return None
        if under_newest_key and self._codec.key_id_of(sealed) != self._codec.key_id:
            logger.info("partition %d: version %d is under an older key and is sealed anew", partition, version)
            return None
        return manifest


class _StoppedError(Exception):
    """The capture was told to stop."""


class _Capture:
    """Reads one frozen file in one thread, which hands batches of new blocks to the event loop and waits for them.

    One thread from freezing to thawing, because the store's lock may belong to the thread; memory stays at one batch.
    """

    def __init__(
        self,
        store: PartitionStore,
        repository: SnapshotRepository,
        codec: SnapshotCodec,
        fingerprints: BlockFingerprints,
        names_known: dict[bytes, str],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.names_seen: dict[bytes, str] = {}
        self.blocks_sent = 0
        self.bytes_sent = 0
        self._store = store
        self._repository = repository
        self._codec = codec
        self._fingerprints = fingerprints
        #: Grows with every batch put, so that the next attempt after a failure goes on from there.
        self._names_known = names_known
        self._loop = loop
        self._stop = Event()
        #: What the thread waits for on the event loop.
        self._call: Future[Any] | None = None

    async def run(self, *, version: int, epoch: int, created_at_ms: int, hashed: bool) -> Manifest:
        """The manifest of the captured file, every block of which is stored. The file is thawed when this returns or
        raises, also when it is cancelled."""
        work = asyncio.create_task(asyncio.to_thread(self._capture, version, epoch, created_at_ms, hashed))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            self._stop.set()
            if self._call is not None:
                self._call.cancel()
            await ended([work])
            raise

    def _capture(self, version: int, epoch: int, created_at_ms: int, hashed: bool) -> Manifest:
        names: list[str] = []
        sizes: dict[str, int] = {}
        new: dict[str, tuple[bytes, bytes]] = {}
        with self._store.frozen(hashed=hashed) as file:
            for offset, length in block_ranges(file.size_bytes):
                if self._stop.is_set():
                    raise _StoppedError
                block = _read(file.fd, offset, length)
                fingerprint = self._fingerprints.of(block)
                name = self._names_known.get(fingerprint) or self._codec.name_of(block)
                if fingerprint not in self._names_known and name not in new:
                    new[name] = (fingerprint, block)
                self.names_seen[fingerprint] = name
                names.append(name)
                sizes[name] = length
                if len(new) == BATCH_BLOCKS:
                    self._store_blocks(new)
                    new.clear()
            self._store_blocks(new)
            return Manifest(
                partition=self._store.partition,
                version=version,
                epoch=epoch,
                created_at_ms=created_at_ms,
                next_offsets=dict(file.next_offsets),
                schema_versions=dict(file.schema_versions),
                duckdb_version=version_of_package("duckdb"),
                file_bytes=file.size_bytes,
                content_bytes=sum(sizes.values()),
                checksum=self._codec.file_checksum(file.size_bytes, names),
                blocks=tuple(names),
                content_hash=file.content_hash,
            )

    def _store_blocks(self, new: Mapping[str, tuple[bytes, bytes]]) -> None:
        """Asks first, then sends: after a restart most blocks of an unchanged file are there."""
        if not new:
            return
        partition = self._store.partition
        missing = self._await(self._repository.missing_blocks(partition, new.keys()))
        sealed = {name: self._codec.seal_block(partition, name, new[name][1]) for name in sorted(missing)}
        if sealed:
            self._await(self._repository.put_blocks(partition, sealed))
        self.blocks_sent += len(sealed)
        self.bytes_sent += sum(map(len, sealed.values()))
        self._names_known.update((fingerprint, name) for name, (fingerprint, _) in new.items())

    def _await(self, call: Coroutine[Any, Any, Result]) -> Result:
        self._call = future = asyncio.run_coroutine_threadsafe(call, self._loop)
        if self._stop.is_set():
            future.cancel()
        return future.result()


def versions_to_retire(
    created_ms: Mapping[int, int], *, newest_kept: int, hours_kept: int, now_ms: int
) -> frozenset[int]:
    """Of versions and the times they were made: all but the newest ones, and the newest of each of the last hours."""
    newest_first = sorted(created_ms, reverse=True)
    of_hour: dict[int, int] = {}
    for version in newest_first:
        of_hour.setdefault(created_ms[version] // _HOUR_MS, version)
    recent = (version for hour, version in of_hour.items() if now_ms // _HOUR_MS - hour < hours_kept)
    return frozenset(newest_first) - {*newest_first[:newest_kept], *recent}


def block_ranges(file_bytes: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of a database file's header area and of its blocks; the last may be short."""
    if file_bytes:
        yield 0, min(HEADERS_BYTES, file_bytes)
    for offset in range(HEADERS_BYTES, file_bytes, BLOCK_BYTES):
        yield offset, min(BLOCK_BYTES, file_bytes - offset)


def _read(fd: int, offset: int, length: int) -> bytes:
    block = os.pread(fd, length, offset)
    if len(block) != length:
        raise SnapshotError(
            f"the store's file ends at byte {offset + len(block)} while it is captured",
            hint="something outside Pintail changes the file; leave the stores alone while a worker runs",
        )
    return block
