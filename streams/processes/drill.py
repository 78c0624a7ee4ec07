"""Proves that a snapshot can be restored: beside the live store, into a file of its own, row by row (invariant 8).

A version that records the hash of its content is restored, opened and hashed; the two hashes must agree. Any other one
must at least restore and open. Nothing of the live store or of the repository is changed. Callers: processes/hosting.py
on a schedule, and `pintail snapshots drill`.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import version as version_of_package
from pathlib import Path

from schemas.catalog import Catalog
from schemas.manifest import Manifest
from streams.adapters.duckdb_store import DuckDBStore
from streams.adapters.snapshot_codec import SnapshotCodec
from streams.errors import SnapshotCorruptError
from streams.finishing import in_thread
from streams.ports_snapshots import SnapshotRepository
from streams.processes.recovery import SnapshotRestore

_MEMORY_LIMIT = "256MB"


@dataclass(frozen=True)
class DrillReport:
    """A version that was restored and opened."""

    manifest: Manifest
    content_hash: str
    #: False where there was nothing to compare with: no hash recorded, or one of other tables or of another DuckDB.
    is_compared: bool


async def drill(
    repository: SnapshotRepository, codec: SnapshotCodec, catalog: Catalog, partition: int, version: int, folder: Path
) -> DrillReport:
    """Restores one version below `folder`, which must be on a disk with room for it, and removes it again.

    Raises SnapshotCorruptError when it does not restore or holds something else, StoreCorruptError when it does not
    open, SnapshotNotFoundError, SnapshotKeyError, SnapshotStoreUnavailableError."""
    beside = await in_thread(_new_folder, folder, f"drill-{partition}-")
    try:
        manifest = await SnapshotRestore(repository, codec, partition, version).to(beside / f"{partition}.duckdb")
        content_hash = await in_thread(_content_hash, beside, catalog, partition)
    finally:
        await in_thread(shutil.rmtree, beside)
    is_comparable = (
        manifest.content_hash is not None
        and manifest.duckdb_version == version_of_package("duckdb")
        and manifest.schema_versions == {table.name: table.schema_version for table in catalog.tables}
    )
    if is_comparable and content_hash != manifest.content_hash:
        raise SnapshotCorruptError(
            f"snapshot version {version} of partition {partition} restores to other rows than were captured",
            hint="do not rely on it: take the partition's file as a backup, and report this with the worker's log",
        )
    return DrillReport(manifest, content_hash, is_comparable)


async def drill_newest(
    repository: SnapshotRepository, codec: SnapshotCodec, catalog: Catalog, folder: Path, partition: int
) -> DrillReport | None:
    """The same of the newest version; None if there is none."""
    version = await repository.newest_version(partition)
    return None if version is None else await drill(repository, codec, catalog, partition, version, folder)


def _new_folder(below: Path, prefix: str) -> Path:
    below.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=prefix, dir=below))


def _content_hash(folder: Path, catalog: Catalog, partition: int) -> str:
    store = DuckDBStore(folder, catalog, memory_limit=_MEMORY_LIMIT, threads=1)
    try:
        return store.open_partition(partition).content_hash()
    finally:
        store.close()
