"""The contract of a snapshot repository: sealed blocks and sealed manifests, per partition, published atomically.

A repository sees ciphertext only and never interprets it; `streams.adapters.snapshot_codec` seals and opens. Block
names are keyed hashes of content: equal names mean equal content. Versions ascend by one per partition.
Callers are snapshotting, recovery and the command line; `redis_snapshots` and `memory_snapshots` implement it, and
refuse in the words at the end of this file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Protocol

from streams.errors import SnapshotCorruptError, SnapshotFencedError, SnapshotNotFoundError

#: How long a block that no published version needs stays: longer than taking one snapshot takes.
BLOCK_GRACE_SECONDS = 3600.0


class SnapshotRepository(Protocol):
    """Every method raises SnapshotStoreUnavailableError (retriable) when the repository cannot be reached in time, and
    may then have taken effect or not; repeating it is safe."""

    async def verify_configuration(self) -> None:
        """Raises SnapshotStoreUnsafeError when the repository would evict or forget what it was given."""
        ...

    async def close(self) -> None:
        """Releases connections. Idempotent."""
        ...

    async def claim_epoch(self, partition: int, *, at_least: int) -> int:
        """A new epoch: above every epoch claimed or published before, and not below `at_least`. Durable; from now on a
        publish under an older one is refused."""
        ...

    async def missing_blocks(self, partition: int, names: Collection[str]) -> frozenset[str]:
        """Those of `names` that are not stored. A stored block outside any version may still expire; publish tells."""
        ...

    async def put_blocks(self, partition: int, blocks: Mapping[str, bytes]) -> None:
        """Stores sealed blocks for the grace time; publishing a version keeps them for good. A name that is stored
        already is left as it is (its time begins anew), so a live block never becomes mortal."""
        ...

    async def discard_blocks(self, partition: int, damaged: Mapping[str, str]) -> None:
        """Removes blocks that were found damaged, whoever needs them, so that the next snapshot stores them again: of
        each name the piece that has this `digest_of`, in one step. One that was stored anew meanwhile stays."""
        ...

    async def publish(
        self, partition: int, *, version: int, epoch: int, manifest: bytes, block_names: Collection[str]
    ) -> None:
        """Makes `version` the newest one, in ONE step that is all or nothing: checks the epoch, checks that the version
        is above the newest, checks that every block is stored, keeps those for good, switches (invariant 4). Repeating
        it with the same manifest succeeds.

        Raises SnapshotFencedError when `epoch` is older than the newest claimed, or `version` is taken;
        SnapshotCorruptError with `blocks` when blocks are missing: put them again and repeat."""
        ...

    async def newest_version(self, partition: int) -> int | None:
        """The version published last, or None."""
        ...

    async def versions(self, partition: int) -> tuple[int, ...]:
        """The versions kept, newest first."""
        ...

    async def load_manifest(self, partition: int, version: int) -> bytes:
        """The sealed manifest. Raises SnapshotNotFoundError when that version is not kept."""
        ...

    async def load_blocks(self, partition: int, names: Collection[str]) -> dict[str, bytes]:
        """The sealed blocks; those that are not stored are absent from the result."""
        ...

    async def retire(self, partition: int, versions: Collection[int]) -> int:
        """Forgets these versions, but never the newest one, in one step. Blocks that no kept version needs get the
        grace time; returns how many. Never touches a block that a kept version needs, so that an owner who was
        replaced can do no harm with it."""
        ...

    async def memory_bytes(self, partition: int) -> int:
        """Memory that the kept versions of the partition occupy, shared blocks counted once."""
        ...

    async def partitions(self) -> tuple[int, ...]:
        """The partitions that have been claimed or published, ascending. Slow: for operators."""
        ...


def digest_of(sealed: bytes) -> str:
    """Tells a stored piece from another one of the same name. SHA-1, because a script in Redis has no other."""
    return hashlib.sha1(sealed, usedforsecurity=False).hexdigest()


def fenced_by_epoch(partition: int, epoch: int, newest: int) -> SnapshotFencedError:
    """A publish under an older epoch."""
    return SnapshotFencedError(
        f"partition {partition} belongs to epoch {newest}; a snapshot under epoch {epoch} is refused",
        hint="another worker has taken the partition over; this one must let it go",
    )


def fenced_by_version(partition: int, version: int, newest: int) -> SnapshotFencedError:
    """A publish of a version that is taken."""
    return SnapshotFencedError(
        f"partition {partition} already has snapshot version {newest}; version {version} is refused",
        hint="something else publishes under this epoch; only the partition's owner may",
    )


def blocks_missing(partition: int, version: int, names: frozenset[str]) -> SnapshotCorruptError:
    """A publish without all its blocks."""
    return SnapshotCorruptError(
        f"{len(names)} blocks of snapshot version {version} of partition {partition} are not stored",
        hint="the snapshot is not published and must be taken again; if this repeats, does Redis evict?",
        blocks=names,
    )


def version_not_found(partition: int, version: int) -> SnapshotNotFoundError:
    """A version that is not kept."""
    return SnapshotNotFoundError(
        f"partition {partition} has no snapshot version {version}",
        hint="`pintail snapshots list` shows the versions that are kept",
    )
