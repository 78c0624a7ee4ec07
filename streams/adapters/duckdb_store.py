"""DuckDBStore: a worker's DuckDB instance with one attached file per partition, and what queries may see of it.

One instance means one buffer pool and one memory limit; one file per partition means that a partition can be written,
copied, lost and restored alone. Queries see views in an in-memory catalog, never the attached files, and no view names
a file that is being closed. A partition that is opened or closed waits for what it has to in a turn of its own, so that
no other partition and no query waits with it. Called by the ingestion, recovery and query processes, from any thread.
"""

from __future__ import annotations

import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import duckdb

from schemas.catalog import Catalog
from schemas.duckdb_ddl import create_table_sql, duckdb_type, migration_sql, quote, quote_text
from schemas.table import METADATA_COLUMNS, TableDefinition
from streams.adapters.duckdb_commits import CommitGate
from streams.adapters.duckdb_dialect import LEDGER_VIEW
from streams.adapters.duckdb_file import (
    FileLock,
    companions,
    damaged,
    discard_unborn,
    misplaced_blocks,
    strip_zero_tail,
    unsound_blocks,
)
from streams.adapters.duckdb_partition import LEDGER_SQL, FrozenFile, PartitionStore, used_blocks
from streams.errors import StoreError, StoreLockedError

__all__ = ["DuckDBStore", "FrozenFile", "PartitionStore"]

ALL_PARTITIONS = "all_partitions"
LEDGER_NUMBERS = ("first_offset", "next_offset", "rows", "deletes", "parked")
#: Files that every supported DuckDB version can read.
_STORAGE_VERSION = "v1.5.0"
_METADATA_TYPES = dict(zip(METADATA_COLUMNS, ("INTEGER", "BIGINT", "TIMESTAMPTZ"), strict=True))


#: DuckDB's words for a file that a straggling query keeps open, in another process or in this one.
_STILL_OPEN = re.compile("Could not set lock|already attached|file handle conflict")


class DuckDBStore:
    """The partition stores of one worker."""

    def __init__(self, directory: Path, catalog: Catalog, *, memory_limit: str = "1GB", threads: int = 2) -> None:
        self._directory = directory.resolve()
        self._directory.mkdir(parents=True, exist_ok=True)
        self._catalog = catalog
        #: Of each partition, while it is opened, closed or removed. Taken before _lock.
        self._turns: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)
        self._lock = threading.RLock()  # guards the instance's catalog and the fields below; never held while waiting
        self._partitions: dict[int, PartitionStore] = {}
        self._commits = CommitGate()
        self._fenced: set[int] = set()  # attached, but nobody writes and no view shows them
        self._unclaimed: set[int] = set()  # those of them that nobody has had since they were opened ahead
        self._file_locks: dict[int, FileLock] = {}
        self._visible: frozenset[int] = frozenset()
        self._scopes: frozenset[str] = frozenset()
        self._idle_cursors: dict[str, list[duckdb.DuckDBPyConnection]] = {}
        self._instance = _open_instance(self._directory, memory_limit, threads)
        (self._rollback,) = self._instance.extract_statements("ROLLBACK")
        self.publish_scopes(())

    def path_of(self, partition: int) -> Path:
        """The partition's file, whether it exists or not."""
        return self._directory / f"{partition}.duckdb"

    def local_partitions(self) -> list[int]:
        """Those that have a file here, open or not."""
        return [int(file.stem) for file in self._directory.glob("*.duckdb") if file.stem.isdecimal()]

    def partitions(self) -> Mapping[int, PartitionStore]:
        """The partitions whose files are attached: the open ones, and those that were released."""
        with self._lock:
            return dict(self._partitions)

    def open_partition(self, partition: int, *, is_checked: bool = False) -> PartitionStore:
        """Locks, checks and attaches the partition's file, creating it and migrating its tables as needed; one that was
        only released has all that behind it, and a file whose every block was checked as it was written, a moment ago,
        is not read again. Idempotent. Raises StoreLockedError, StoreCorruptError.
        """
        with self._turn_of(partition):
            if opened := self.partitions().get(partition):
                return self._taken_back(opened)
            return self._open(partition, is_checked=is_checked)

    def open_ahead(self, partition: int, is_wanted: Callable[[], bool]) -> None:
        """Opens a file that is there, for whoever opens it next, and leaves it as a released one; nothing if it is no
        longer wanted when its turn comes. Raises as `open_partition` does."""
        with self._turn_of(partition):
            if is_wanted() and partition not in self.partitions() and self.path_of(partition).exists():
                self._open(partition)
                self._fence(partition)
                with self._lock:
                    self._unclaimed.add(partition)

    def is_in_use(self, partition: int) -> bool:
        """True of a file that is attached, and was opened by `open_partition` at least once."""
        with self._lock:
            return partition in self._partitions and partition not in self._unclaimed

    def release_partition(self, partition: int) -> None:
        """Takes the file from the views, fences the writer and waits for the transaction or the copy in flight. The
        file stays attached and locked until `close_partition`: to open it again costs nothing. Idempotent."""
        with self._turn_of(partition):
            self._fence(partition)

    def close_partition(self, partition: int) -> None:
        """The same, and detaches the file and unlocks it. Idempotent, also after a failure.

        A query that still runs on the partition keeps the file open until it ends, but cannot change it.
        """
        with self._turn_of(partition):
            self._close(partition)

    def close_unclaimed(self, partition: int) -> None:
        """The same for a file that was opened ahead, unless somebody has opened it since."""
        with self._turn_of(partition):
            if partition in self._unclaimed:
                self._close(partition)

    def interrupt(self, partition: int) -> None:
        """Rolls back what the partition's writer is about to commit, so that `close_partition` need not wait for it."""
        store = self.partitions().get(partition)
        if store is not None:
            store.interrupt()

    def remove_partition(self, partition: int) -> None:
        """Deletes the file and its logs (a stale log beside a restored file would be applied to it)."""
        with self._turn_of(partition):
            assert partition not in self.partitions(), "close the partition first"
            path = self.path_of(partition)
            file_lock = FileLock(self._directory / f"{partition}.lock")
            try:
                for file in (*companions(path), path):
                    file.unlink(missing_ok=True)
            finally:
                file_lock.release()

    def publish_scopes(self, serving: Collection[int]) -> None:
        """Rebuilds the views of queries over exactly these partitions: `all_partitions` and one scope for each. Leaves
        out what is not open, or was released."""
        with self._lock:
            readable = self._partitions.keys() - self._fenced
            stores = {partition: self._partitions[partition] for partition in sorted(readable.intersection(serving))}
            scopes = {ALL_PARTITIONS: list(stores.values())}
            scopes |= {_scope_of(partition): [store] for partition, store in stores.items()}
            statements = [f"DROP SCHEMA memory.{quote(name)} CASCADE" for name in self._scopes - scopes.keys()]
            for name, members in scopes.items():
                statements.append(f"CREATE SCHEMA IF NOT EXISTS memory.{quote(name)}")
                databases = [store.database for store in members]
                statements += [view_sql(name, table, databases) for table in self._catalog.tables]
                statements.append(_positions_view_sql(name, members))
                statements.append(ledger_view_sql(name, members))
                statements.append(_partitions_view_sql(name, members))
            _in_transaction(self._instance, statements)
            for name in self._scopes - scopes.keys():
                for cursor in self._idle_cursors.pop(name, ()):
                    cursor.close()
            self._scopes, self._visible = frozenset(scopes), frozenset(stores)

    def query_cursor(self, partition: int | None) -> duckdb.DuckDBPyConnection:
        """A cursor for one query over the scope: all served partitions, or one. Close it after use, or give it back.

        Raises StoreError when the partition is not served here.
        """
        scope = _scope_of(partition)
        with self._lock:
            if scope not in self._scopes:
                raise StoreError(f"partition {partition} is not served here", hint="ask the worker that owns it")
            if idle := self._idle_cursors.get(scope):
                return idle.pop()
            cursor = self._instance.cursor()
        cursor.execute(f"USE memory.{quote(scope)}")
        return cursor

    def give_back(self, cursor: duckdb.DuckDBPyConnection, partition: int | None) -> None:
        """Keeps a cursor of `query_cursor` for the next query over its scope: to make one costs a third of a lookup."""
        scope = _scope_of(partition)
        with suppress(duckdb.Error):
            cursor.execute(self._rollback)
            with self._lock:
                if scope in self._scopes:
                    self._idle_cursors.setdefault(scope, []).append(cursor)
                    return
        cursor.close()

    def applied(self, partition: int | None) -> dict[int, Mapping[str, int]] | None:
        """PartitionStore.applied of each partition that queries over the scope see; None while one of them commits."""
        with self._lock:
            visible = self._visible if partition is None else self._visible.intersection({partition})
            found = {number: self._partitions[number].applied for number in visible}
        applied = {number: offsets for number, offsets in found.items() if offsets is not None}
        return applied if len(applied) == len(found) else None

    def no_commits(self) -> AbstractContextManager[None]:
        """While it lasts nothing is committed: statements in it see all partitions at one point. Keep it short."""
        return self._commits.shut()

    def close(self) -> None:
        """Closes all partitions and the instance."""
        for partition in self.partitions():
            self.close_partition(partition)
        with self._lock:
            for cursors in self._idle_cursors.values():
                for cursor in cursors:
                    cursor.close()
            self._instance.close()

    def _turn_of(self, partition: int) -> threading.Lock:
        with self._lock:
            return self._turns[partition]

    # -- in the partition's turn -------------------------------------------------------------------------------------

    def _open(self, partition: int, *, is_checked: bool = False) -> PartitionStore:
        file_lock = FileLock(self._directory / f"{partition}.lock")
        try:
            store = self._attach(partition, is_checked=is_checked)
        except BaseException:
            file_lock.release()
            raise
        with self._lock:
            self._file_locks[partition] = file_lock
            self._partitions[partition] = store
        return store

    def _close(self, partition: int) -> None:
        store = self._fence(partition)
        if store is None:
            return
        with self._lock:
            self._instance.execute(f"DETACH {store.database}")
            store.close_descriptor()
            del self._partitions[partition]
            self._fenced.remove(partition)
            self._unclaimed.discard(partition)
            self._file_locks.pop(partition).release()

    def _fence(self, partition: int) -> PartitionStore | None:
        with self._lock:
            store = self._partitions.get(partition)
            if store is None:
                return None
            self._fenced.add(partition)
            if partition in self._visible:
                self.publish_scopes(self._visible)
        store.release()
        return store

    def _taken_back(self, store: PartitionStore) -> PartitionStore:
        """A new writer for a file that was released; the store itself if it was not."""
        with self._lock:
            if store.partition in self._fenced:
                store = self._partitions[store.partition] = store.successor(self._instance.cursor())
                self._fenced.remove(store.partition)
                self._unclaimed.discard(store.partition)
            return store

    def _attach(self, partition: int, *, is_checked: bool) -> PartitionStore:
        path, database = self.path_of(partition), f"partition_{partition}"
        discard_unborn(path)
        unsound = frozenset[int]() if is_checked else _unsound_blocks(path)
        strip_zero_tail(path)
        with self._lock:
            attaching = self._instance.cursor()
        try:
            # Replays the write-ahead log, which may take a while: on a cursor of its own, so that nobody waits for it.
            attaching.execute(f"ATTACH {quote_text(path)} AS {database} (STORAGE_VERSION '{_STORAGE_VERSION}')")
        except duckdb.Error as error:
            if _STILL_OPEN.search(str(error)):
                raise StoreLockedError(f"{path}: {error}", hint="a query may still be reading it: retry") from error
            raise damaged(path.name, f"DuckDB refuses it: {error}") from error
        finally:
            attaching.close()
        with self._lock:
            try:
                if unsound and (lost := unsound & used_blocks(self._instance, database)):
                    raise damaged(path.name, f"{len(lost)} blocks are damaged, the first is block {min(lost)}")
                _in_transaction(self._instance, self._bring_forward(database))
                return PartitionStore(
                    partition,
                    path,
                    database=database,
                    catalog=self._catalog,
                    connection=self._instance.cursor(),
                    commits=self._commits,
                )
            except duckdb.Error as error:
                self._instance.execute(f"DETACH {database}")
                raise damaged(path.name, str(error)) from error
            except BaseException:
                self._instance.execute(f"DETACH {database}")
                raise

    def _bring_forward(self, database: str) -> list[str]:
        """The statements that make the file hold the catalog's tables at their newest migration."""
        own = f"{database}.pintail"
        statements = [
            f"CREATE SCHEMA IF NOT EXISTS {own}",
            LEDGER_SQL.format(name=f"{own}.ledger"),
            f"CREATE TABLE IF NOT EXISTS {own}.migrations (table_name VARCHAR NOT NULL, number INTEGER NOT NULL)",
            f"CREATE TABLE IF NOT EXISTS {own}.meta (key VARCHAR NOT NULL, value VARCHAR NOT NULL)",
        ]
        applied = self._applied_migrations(database)
        for table in self._catalog.tables:
            target = f"{database}.main.{quote(table.name)}"
            numbers = [migration.number for migration in table.migrations] or [1]
            newest = applied.get(table.name)
            if newest is None:
                statements.append(create_table_sql(table, qualified_name=target))
            for number in numbers:
                if newest is None or number > newest:
                    if newest is not None:
                        statements += migration_sql(table, number, qualified_name=target)
                    statements.append(f"INSERT INTO {own}.migrations VALUES ({quote_text(table.name)}, {number})")
        return statements

    def _applied_migrations(self, database: str) -> dict[str, int]:
        known = self._instance.execute(
            "SELECT 1 FROM duckdb_tables() WHERE database_name = ? AND schema_name = 'pintail'"
            " AND table_name = 'migrations'",
            [database],
        ).fetchone()
        if known is None:
            return {}
        return dict(
            self._instance.execute(
                f"SELECT table_name, max(number) FROM {database}.pintail.migrations GROUP BY ALL"
            ).fetchall()
        )


def _scope_of(partition: int | None) -> str:
    """The schema with the views of one partition, or of all."""
    return ALL_PARTITIONS if partition is None else f"p{partition}"


def _in_transaction(instance: duckdb.DuckDBPyConnection, statements: list[str]) -> None:
    instance.execute("BEGIN TRANSACTION")
    try:
        for statement in statements:
            instance.execute(statement)
        instance.execute("COMMIT")
    except BaseException:
        instance.execute("ROLLBACK")
        raise


def _open_instance(directory: Path, memory_limit: str, threads: int) -> duckdb.DuckDBPyConnection:
    """An in-memory instance that reads and writes below `directory` only, and checkpoints only when told to."""
    instance = duckdb.connect(
        ":memory:",
        config={
            "memory_limit": memory_limit,
            "threads": threads,
            "checkpoint_threshold": "1TB",
            "temp_directory": str(directory / "spill"),
            "python_enable_replacements": False,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
        },
    )
    for statement in (
        "PRAGMA disable_checkpoint_on_shutdown",
        "SET GLOBAL TimeZone = 'UTC'",
        f"SET allowed_directories = [{quote_text(directory)}]",
        "SET enable_external_access = false",
        "SET lock_configuration = true",
    ):
        instance.execute(statement)
    return instance


def _unsound_blocks(path: Path) -> frozenset[int]:
    """Checks the file; nothing is wrong with one that does not exist yet. Raises StoreCorruptError."""
    if not path.exists():
        return frozenset()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        unsound = unsound_blocks(fd, path.name)
        if misplaced := misplaced_blocks(fd, path) - unsound:
            raise damaged(
                path.name,
                f"{len(misplaced)} blocks are not where they were written, the first is block {min(misplaced)}",
            )
        return unsound
    finally:
        os.close(fd)


def view_sql(scope: str, table: TableDefinition, databases: Collection[str]) -> str:
    """A view of the table over its rows in these databases; without any it is empty, and has its columns all the
    same."""
    types = {column.name: duckdb_type(column.type) for column in table.columns} | _METADATA_TYPES
    columns = ", ".join(map(quote, types))
    selects = [f"SELECT {columns} FROM {database}.main.{quote(table.name)}" for database in databases]
    if not selects:
        nothing = ", ".join(f"NULL::{kind} AS {quote(name)}" for name, kind in types.items())
        selects = [f"SELECT {nothing} WHERE false"]
    return f"CREATE OR REPLACE VIEW memory.{quote(scope)}.{quote(table.name)} AS {' UNION ALL '.join(selects)}"


def _positions_view_sql(scope: str, stores: list[PartitionStore]) -> str:
    selects = [
        f"SELECT {store.partition}::INTEGER AS partition, topic, max(next_offset) AS next_offset "
        f"FROM {store.database}.pintail.ledger GROUP BY topic"
        for store in stores
    ] or ["SELECT NULL::INTEGER AS partition, NULL::VARCHAR AS topic, NULL::BIGINT AS next_offset WHERE false"]
    return f"CREATE OR REPLACE VIEW memory.{quote(scope)}._positions AS {' UNION ALL '.join(selects)}"


def ledger_view_sql(scope: str, stores: Collection[PartitionStore]) -> str:
    """A view of what has been applied, over these stores; without any it is empty."""
    selects = [
        f"SELECT {store.partition}::INTEGER AS partition, topic, {', '.join(LEDGER_NUMBERS)} "
        f"FROM {store.database}.pintail.ledger"
        for store in stores
    ]
    kinds = {"partition": "INTEGER", "topic": "VARCHAR"} | dict.fromkeys(LEDGER_NUMBERS, "BIGINT")
    nothing = ", ".join(f"NULL::{kind} AS {name}" for name, kind in kinds.items())
    selects = selects or [f"SELECT {nothing} WHERE false"]
    return f"CREATE OR REPLACE VIEW memory.{quote(scope)}.{LEDGER_VIEW} AS {' UNION ALL '.join(selects)}"


def _partitions_view_sql(scope: str, stores: list[PartitionStore]) -> str:
    partitions = [store.partition for store in stores]
    return (
        f"CREATE OR REPLACE VIEW memory.{quote(scope)}._partitions"
        f" AS SELECT unnest({partitions}::INTEGER[]) AS partition"
    )
