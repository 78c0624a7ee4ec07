"""PartitionStore: the tables of one partition and how far each topic has been applied, in one DuckDB file.

Invariants: rows and `next_offset` change in one transaction (1); a record below `next_offset` is never applied again
(2). One writer at a time, under the store's lock. Every error inside a transaction rolls it back, because DuckDB lets
an aborted transaction commit without a word. DuckDBStore opens and closes partitions; ingestion, recovery, snapshotting
and retention call the methods, each from any thread.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from schemas.catalog import Catalog
from schemas.duckdb_ddl import duckdb_type, quote, quote_text
from schemas.table import METADATA_COLUMNS, TableDefinition
from streams.adapters.duckdb_commits import CommitGate
from streams.adapters.duckdb_file import write_block_list
from streams.errors import LogGapError, StaleEpochError, StoreError
from streams.ports import DecodedBatch

_EPOCH_KEY = "epoch"
_TOPIC_ID_KEY = "topic_id/"

#: What was applied, a row per transaction and topic: the records of [first_offset, next_offset) by what became of them.
#: Written by INSERT only, because a DELETE would cost a small transaction a tenth more; now and then ranges that touch
#: are folded into one, so that a hole or an overlap stays to be seen.
LEDGER_SQL = """CREATE TABLE IF NOT EXISTS {name} (
    topic VARCHAR NOT NULL, first_offset BIGINT NOT NULL, next_offset BIGINT NOT NULL,
    rows BIGINT NOT NULL, deletes BIGINT NOT NULL, parked BIGINT NOT NULL)"""
#: Ledger rows after which they are folded.
_LEDGER_ROWS_MAX = 64
#: Up to so many keys, a set tells sooner than Arrow whether one repeats.
_COMPARED_IN_PYTHON = 500


@dataclass
class LedgerEntry:
    """A range of a topic's offsets that was applied in one go, and its records by what became of them. Offsets without
    a record (compacted away, transaction markers) are in the range and in none of the counts."""

    first_offset: int
    next_offset: int
    rows: int = 0
    deletes: int = 0
    parked: int = 0

    def extend(self, following: LedgerEntry) -> None:
        """Takes in the range that begins where this one ends."""
        assert following.first_offset == self.next_offset, "the ranges do not touch"
        self.next_offset = following.next_offset
        self.rows += following.rows
        self.deletes += following.deletes
        self.parked += following.parked


@dataclass(frozen=True)
class FrozenFile:
    """A partition file at rest. Blocks already in it do not change until the context that gave it ends.

    Read with os.pread on `fd` up to `size_bytes`: opening and closing the path would drop DuckDB's lock.
    """

    path: Path
    fd: int
    size_bytes: int
    next_offsets: Mapping[str, int]
    schema_versions: dict[str, int]
    #: See PartitionStore.content_hash; None unless it was asked for.
    content_hash: str | None = None


class PartitionStore:
    """One open partition. Made by DuckDBStore.open_partition."""

    def __init__(
        self,
        partition: int,
        path: Path,
        *,
        database: str,
        catalog: Catalog,
        connection: duckdb.DuckDBPyConnection,
        commits: CommitGate,
        fd: int | None = None,
    ) -> None:
        self.partition = partition
        self.path = path
        #: The name under which the file is attached.
        self.database = database
        self._catalog = catalog
        self._connection = connection  # of the writer; used only under _writing
        self._commits = commits
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if fd is None else fd
        self._writing = threading.Lock()
        self._checkpointing = threading.Lock()  # taken before _writing; until it is given up nobody checkpoints
        self._released = False
        self._is_fenced = False  # may be set at any moment
        self._sources: dict[str, _ArrowSource] = {}
        self._filled: set[str] = set()  # tables that have had rows
        self._ledger_rows = 0
        self._is_committing = False
        with self._writing:
            #: Never changed, only replaced, so that who holds it can tell whether it was.
            self._next_offsets: Mapping[str, int] = {
                topic: max(entry.next_offset for entry in entries) for topic, entries in self._read_ledger().items()
            }

    def next_offsets(self) -> dict[str, int]:
        """By topic, where to resume; topics never consumed are absent."""
        return dict(self._next_offsets)

    @property
    def applied(self) -> Mapping[str, int] | None:
        """The same, as one object until the next transaction commits, and None while it does. A reader who finds one
        object before its own transaction began to read and after that reads exactly this (a seqlock)."""
        return None if self._is_committing else self._next_offsets

    def ledger(self) -> dict[str, list[LedgerEntry]]:
        """By topic, everything that was applied since the partition began: one range, unless there is a hole or an
        overlap."""
        with self._writing:
            self._check_held()
            return self._read_ledger()

    def epoch(self) -> int:
        """The epoch last set; 0 for a new file."""
        with self._transaction() as connection:
            row = connection.execute(f"SELECT value FROM {self._own('meta')} WHERE key = ?", [_EPOCH_KEY]).fetchone()
        return int(row[0]) if row else 0

    def set_epoch(self, epoch: int) -> None:
        """Durable when it returns."""
        with self._transaction() as connection:
            connection.execute(f"DELETE FROM {self._own('meta')} WHERE key = ?", [_EPOCH_KEY])
            connection.execute(f"INSERT INTO {self._own('meta')} VALUES (?, ?)", [_EPOCH_KEY, str(epoch)])

    def topic_ids(self) -> dict[str, str]:
        """By topic, the id of the one whose records were applied; topics whose id was never known are absent."""
        with self._transaction() as connection:
            rows = connection.execute(
                f"SELECT key, value FROM {self._own('meta')} WHERE starts_with(key, ?)", [_TOPIC_ID_KEY]
            ).fetchall()
        return {key.removeprefix(_TOPIC_ID_KEY): value for key, value in rows}

    def set_topic_ids(self, topic_ids: Mapping[str, str]) -> None:
        """Durable when it returns."""
        with self._transaction() as connection:
            for topic, topic_id in topic_ids.items():
                key = _TOPIC_ID_KEY + topic
                connection.execute(f"DELETE FROM {self._own('meta')} WHERE key = ?", [key])
                connection.execute(f"INSERT INTO {self._own('meta')} VALUES (?, ?)", [key, topic_id])

    def apply(self, batches: Sequence[DecodedBatch]) -> None:
        """Applies batches in the order given, in one transaction; durable when it returns.

        1. leave out what is below the topic's next_offset    2. per table, keep the last record of each key
        3. delete the rows of those keys                      4. insert rows
        5. enter the range in the ledger, which sets next_offset
        Raises LogGapError, StaleEpochError after release, StoreError; then nothing is applied.
        """
        with self._writing:
            self._check_held()
            entries, pending = self._pending(batches)
            if not entries:
                return
            reached = {topic: entry.next_offset for topic, entry in entries.items()}
            with self._visible(pending) as statements, self._begun(reached) as connection:
                # In one call: each takes the interpreter's lock several times.
                connection.execute("; ".join([*statements, *self._enter(entries)]))

    def load(self, table: TableDefinition, rows: pa.Table) -> None:
        """Inserts rows into a store that is being filled from elsewhere, in the schema of decoded rows, no key twice.

        Until `begin_at` the store has no next_offset, by which recovery knows one that is not complete. Raises
        StoreError.
        """
        with self._writing:
            self._check_held()
            assert not self._next_offsets, "only a store that holds nothing can be filled"
            name = f"loaded rows of {table.name}"
            source = self._show(name, rows, _insert_sql(table, self._table(table), name))
            try:
                with self._begun() as connection:
                    connection.execute(f"EXECUTE {quote(name)}")
            finally:
                source.clear()

    def begin_at(self, next_offsets: Mapping[str, int]) -> None:
        """Ends `load`: the records below these offsets are in, and the ledger begins there. Durable when it returns."""
        with self._writing:
            self._check_held()
            assert not self._next_offsets, "only a store that holds nothing can be filled"
            entries = {topic: LedgerEntry(at, at) for topic, at in next_offsets.items()}
            with self._begun(next_offsets) as connection:
                connection.execute("; ".join(self._enter(entries)))

    def holds_rows(self) -> bool:
        """True if any table holds a row."""
        with self._transaction() as connection:
            return any(
                connection.execute(f"SELECT 1 FROM {self._table(table)} LIMIT 1").fetchone()
                for table in self._catalog.tables
            )

    def delete_expired(self, now_ms: int) -> int:
        """Deletes the rows that are older than their table's retention; returns how many."""
        deleted = 0
        with self._transaction() as connection:
            for table in self._catalog.tables:
                if table.retention_seconds is not None:
                    row = connection.execute(
                        f"DELETE FROM {self._table(table)} WHERE _timestamp < make_timestamptz(?)",
                        [(now_ms - table.retention_seconds * 1000) * 1000],
                    ).fetchone()
                    deleted += int(row[0]) if row else 0
        return deleted

    def wal_bytes(self) -> int:
        """Size of the write-ahead log."""
        try:
            return self.path.with_name(f"{self.path.name}.wal").stat().st_size
        except FileNotFoundError:
            return 0

    def checkpoint(self) -> None:
        """Folds the write-ahead log into the file. Waits while the file is frozen. Raises StoreError."""
        with self._checkpointing:
            self._fold()

    def checkpoint_unless_frozen(self) -> bool:
        """The same, but while the file is frozen it returns False at once: the log grows until a later call."""
        if not self._checkpointing.acquire(blocking=False):
            return False
        try:
            self._fold()
        finally:
            self._checkpointing.release()
        return True

    def _fold(self) -> None:
        """Under _checkpointing. The list is made when others may write again."""
        with self._writing:
            self._check_held()
            self._checkpoint()
        write_block_list(self._fd, self.path)

    @contextmanager
    def frozen(self, *, hashed: bool = False) -> Iterator[FrozenFile]:
        """Checkpoints, then keeps the file's blocks as they are until the context ends; writes go on meanwhile. Hashing
        them, if that is asked for, takes about a second per 10 million rows."""
        with self._checkpointing, ExitStack() as reading:
            with self._writing:
                self._check_held()
                self._checkpoint()
                content_hash = reading.enter_context(self._hashing()) if hashed else None
                file = FrozenFile(
                    path=self.path,
                    fd=self._fd,
                    size_bytes=os.fstat(self._fd).st_size,
                    next_offsets=self.next_offsets(),
                    schema_versions={table.name: table.schema_version for table in self._catalog.tables},
                )
            write_block_list(self._fd, self.path)
            if content_hash is not None:
                file = replace(file, content_hash=content_hash())
                reading.close()
            yield file

    def content_hash(self) -> str:
        """Of all rows of all tables, metadata included, and next_offsets; the order of rows does not count.

        Equal for stores of the same partition that applied the same records, however they came to them (invariant 8).
        """
        with self._hashing() as content_hash:
            return content_hash()

    @contextmanager
    def _hashing(self) -> Iterator[Callable[[], str]]:
        """The content_hash of what the store holds when the context begins, to be computed within it."""
        cursor = self._connection.cursor()
        try:
            cursor.execute("BEGIN TRANSACTION READ ONLY")
            # The first read fixes what the transaction sees.
            offsets = cursor.execute(
                f"SELECT topic, max(next_offset) FROM {self._own('ledger')} GROUP BY topic"
            ).fetchall()
            yield lambda: _hash_of(
                {
                    "offsets": sorted(offsets),
                    "tables": {table.name: self._table_hash(cursor, table) for table in self._catalog.tables},
                }
            )
        finally:
            cursor.close()

    def interrupt(self) -> None:
        """Fences the writer and rolls back the transaction in flight, whose call raises StoreError or StaleEpochError.
        Waits for nothing; `release` must follow."""
        self._is_fenced = True
        with suppress(duckdb.ConnectionException):  # closed meanwhile: nothing is in flight
            self._connection.interrupt()

    def release(self) -> None:
        """Fences the writer and waits for the transaction or the copy in flight. Idempotent.

        Until `close_descriptor`, which must follow DETACH, the descriptor stays open, and next_offsets can be read."""
        with self._checkpointing, self._writing:
            if not self._released:
                self._released = True
                self._connection.close()

    def successor(self, connection: duckdb.DuckDBPyConnection) -> PartitionStore:
        """A new writer of the same attached file, once this one is released."""
        assert self._released
        # The descriptor goes along: to close any of a file would drop DuckDB's lock on it.
        fd, self._fd = self._fd, -1
        return PartitionStore(
            self.partition,
            self.path,
            database=self.database,
            catalog=self._catalog,
            connection=connection,
            commits=self._commits,
            fd=fd,
        )

    def close_descriptor(self) -> None:
        """After DETACH. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # -- under _writing ------------------------------------------------------------------------------------------

    def _check_held(self) -> None:
        if self._released or self._is_fenced:
            raise StaleEpochError(
                f"partition {self.partition} has been released", hint="its new owner applies these records"
            )

    @contextmanager
    def _transaction(self) -> Iterator[duckdb.DuckDBPyConnection]:
        with self._writing:
            self._check_held()
            with self._begun() as connection:
                yield connection

    @contextmanager
    def _begun(self, reached: Mapping[str, int] | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
        """BEGIN, then COMMIT, which makes next_offsets those that are `reached`, or ROLLBACK."""
        connection = self._connection
        try:
            connection.execute("BEGIN TRANSACTION")
            yield connection
            self._check_held()
            with self._commits.committing():
                self._is_committing = reached is not None
                connection.execute("COMMIT")
                if reached is not None:
                    self._next_offsets = {**self._next_offsets, **reached}
        except BaseException as error:
            with suppress(duckdb.Error):  # there may be no transaction left to roll back
                connection.execute("ROLLBACK")
            if isinstance(error, duckdb.Error):
                raise StoreError(
                    f"partition {self.partition}: {error}",
                    hint="nothing was applied; if it repeats, close and reopen the partition",
                ) from error
            raise
        finally:
            self._is_committing = False

    def _checkpoint(self) -> None:
        try:
            self._connection.execute(f"CHECKPOINT {self.database}")
        except duckdb.Error as error:
            raise StoreError(f"partition {self.partition}: checkpoint failed: {error}", hint="retry later") from error

    def _pending(
        self, batches: Sequence[DecodedBatch]
    ) -> tuple[dict[str, LedgerEntry], list[tuple[TableDefinition, pa.Table, pa.Table]]]:
        """By topic what these batches add to the ledger, and per table the rows and deletes not applied yet, oldest
        first."""
        entries: dict[str, LedgerEntry] = {}
        by_table: dict[str, list[DecodedBatch]] = {}
        for batch in batches:
            source = batch.source
            assert source.partition == self.partition, "a batch of another partition"
            entry = entries.get(source.topic)
            position = entry.next_offset if entry else self._next_offsets.get(source.topic)
            if position is not None and source.first_offset > position:
                raise LogGapError(
                    f"{source.topic_partition}: the store needs offset {position}, the log continues at "
                    f"{source.first_offset}",
                    hint="records were deleted before they were applied: `pintail recover` says what to go on from",
                )
            if position is not None and source.next_offset <= position:
                continue
            fresh = _from_offset(batch, position)
            if entry is None:
                first = source.first_offset if position is None else position
                entry = entries[source.topic] = LedgerEntry(first, first)
            entry.next_offset = source.next_offset
            entry.rows += len(fresh.rows)
            entry.deletes += len(fresh.deletes)
            entry.parked += len(fresh.parked)
            by_table.setdefault(batch.table.name, []).append(fresh)
        pending = [
            (
                group[0].table,
                pa.concat_tables([batch.rows for batch in group]),
                pa.concat_tables([batch.deletes for batch in group]),
            )
            for group in by_table.values()
        ]
        return entries, [part for part in pending if len(part[1]) or len(part[2])]

    @contextmanager
    def _visible(self, pending: list[tuple[TableDefinition, pa.Table, pa.Table]]) -> Iterator[list[str]]:
        """Shows the writer's connection, and nobody else, these tables; gives the statements that apply them."""
        shown: dict[str, _ArrowSource] = {}
        try:
            for table, rows, deletes in pending:
                target = self._table(table)
                if table.is_keyed:
                    keys, rows = last_of_each_key(table, rows, deletes)
                    # Planned for an empty table, a DELETE would take it for the smaller side of the join for ever.
                    if self._is_filled(table):
                        name = f"incoming keys of {table.name}"
                        shown[name] = self._show(name, keys, _delete_keys_sql(table, target, name))
                name = f"incoming rows of {table.name}"
                shown[name] = self._show(name, rows, _insert_sql(table, target, name))
            yield [f"EXECUTE {quote(name)}" for name in shown]
        finally:
            for source in shown.values():
                source.clear()

    def _show(self, name: str, table: pa.Table, statement: str) -> _ArrowSource:
        """Lets `name` give these rows, once, to `statement`, which is executed by the same name. Registering and
        planning cost as much as inserting hundreds of rows, so they are done once."""
        source = self._sources.get(name)
        if source is None:
            source = _ArrowSource(table)
            self._connection.register(name, source.capsule)
            self._connection.execute(f"PREPARE {quote(name)} AS {statement}")
            self._sources[name] = source
        else:
            source.fill(table)
        return source

    def _is_filled(self, table: TableDefinition) -> bool:
        """Whether the table has had rows since the file was opened."""
        is_filled = table.name in self._filled or bool(
            self._connection.execute(f"SELECT 1 FROM {self._table(table)} LIMIT 1").fetchone()
        )
        if is_filled:
            self._filled.add(table.name)
        return is_filled

    def _enter(self, entries: Mapping[str, LedgerEntry]) -> list[str]:
        """The statements that add these to the ledger, folded once it is long."""
        ledger = self._own("ledger")
        self._ledger_rows += len(entries)
        statements = []
        if self._ledger_rows > _LEDGER_ROWS_MAX:
            folded = self._read_ledger()
            kept = [(topic, entry) for topic, ranges in folded.items() for entry in ranges]
            self._ledger_rows = len(kept) + len(entries)
            statements += [f"DELETE FROM {ledger}", _ledger_insert_sql(ledger, kept)]
        return [*statements, _ledger_insert_sql(ledger, entries.items())]

    def _read_ledger(self) -> dict[str, list[LedgerEntry]]:
        folded: dict[str, list[LedgerEntry]] = {}
        for topic, *numbers in self._connection.execute(
            "SELECT topic, first_offset, next_offset, rows, deletes, parked "
            f"FROM {self._own('ledger')} ORDER BY topic, first_offset, next_offset"
        ).fetchall():
            entry, ranges = LedgerEntry(*numbers), folded.setdefault(topic, [])
            if ranges and ranges[-1].next_offset == entry.first_offset:
                ranges[-1].extend(entry)
            else:
                ranges.append(entry)
        return folded

    # -- names ---------------------------------------------------------------------------------------------------

    def _own(self, name: str) -> str:
        return f"{self.database}.pintail.{name}"

    def _table(self, table: TableDefinition) -> str:
        return f"{self.database}.main.{quote(table.name)}"

    def _table_hash(self, cursor: duckdb.DuckDBPyConnection, table: TableDefinition) -> tuple[int, str]:
        columns = ", ".join(quote(name) for name in (*table.column_names, *METADATA_COLUMNS))
        row = cursor.execute(
            f"SELECT count(*), coalesce(sum(hash({columns})::HUGEINT), 0)::VARCHAR FROM {self._table(table)}"
        ).fetchone()
        assert row is not None
        return int(row[0]), str(row[1])


class _ArrowSource:
    """Rows for whoever scans the capsule, once, after which it can be filled again.

    DuckDB takes a bare stream as it is. Of an object that offers one it makes a scan of a pyarrow data set, which goes
    through Python and through Arrow's threads, and costs a small transaction a third more."""

    def __init__(self, table: pa.Table) -> None:
        self._schema = table.schema
        self.capsule = table.__arrow_c_stream__()
        self._address = _pointer_of(self.capsule, b"arrow_array_stream")

    def fill(self, table: pa.Table) -> None:
        """Only after the rows before were scanned or cleared."""
        assert table.schema == self._schema, "the statement that scans it was planned for other columns"
        table.to_reader()._export_to_c(self._address)

    def clear(self) -> None:
        """Lets go of rows that nobody has scanned."""
        with suppress(pa.ArrowInvalid):  # there are none
            pa.RecordBatchReader._import_from_c(self._address)


_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.argtypes, _pointer_of.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p


def used_blocks(connection: duckdb.DuckDBPyConnection, database: str) -> frozenset[int]:
    """The ids of the blocks that hold the tables of an attached file, and their description; also those that
    transactions have filled since the last checkpoint."""
    tables = connection.execute(
        "SELECT schema_name, table_name FROM duckdb_tables() WHERE database_name = ?", [database]
    ).fetchall()
    selects = [f"SELECT block_id FROM pragma_metadata_info('{database}')"]
    for schema, table in tables:
        segments = f"pragma_storage_info({quote_text(f'{database}.{quote(schema)}.{quote(table)}')})"
        selects += [
            f"SELECT block_id FROM {segments} WHERE persistent",
            f"SELECT unnest(additional_block_ids) FROM {segments}",
        ]
    found = connection.execute(f"SELECT DISTINCT block_id FROM ({' UNION ALL '.join(selects)}) WHERE block_id >= 0")
    return frozenset(block for (block,) in found.fetchall())


def _hash_of(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def last_of_each_key(table: TableDefinition, rows: pa.Table, deletes: pa.Table) -> tuple[pa.Table, pa.Table]:
    """(the distinct keys of rows and deletes, the rows that are the last record of their key).

    The records are of one partition of one topic, so the higher offset is the later record.
    """
    key = list(table.primary_key)
    if len(rows) <= _COMPARED_IN_PYTHON and not len(deletes) and _is_distinct(rows, key):
        return rows.select(key), rows
    records = pa.concat_tables([part.select([*key, "_offset"]) for part in (rows, deletes)])
    last = records.group_by(key, use_threads=False).aggregate([("_offset", "max")])
    if len(last) < len(records) or len(deletes):
        rows = rows.filter(pc.is_in(rows["_offset"], last["_offset_max"]))
    return last.select(key), rows


def _is_distinct(rows: pa.Table, key: Sequence[str]) -> bool:
    return len(set(zip(*(rows[name].to_pylist() for name in key), strict=True))) == len(rows)


def _from_offset(batch: DecodedBatch, position: int | None) -> DecodedBatch:
    """The batch without the rows and deletes below `position`."""
    if position is None or position <= batch.source.first_offset:
        return batch
    return DecodedBatch(
        table=batch.table,
        source=batch.source,
        rows=batch.rows.filter(pc.greater_equal(batch.rows["_offset"], position)),
        deletes=batch.deletes.filter(pc.greater_equal(batch.deletes["_offset"], position)),
        parked=tuple(each for each in batch.parked if batch.source.offsets[each.index] >= position),
    )


def _ledger_insert_sql(ledger: str, entries: Iterable[tuple[str, LedgerEntry]]) -> str:
    """Kafka allows no quotes in the names of topics."""
    values = [
        f"('{topic}', {entry.first_offset}, {entry.next_offset}, {entry.rows}, {entry.deletes}, {entry.parked})"
        for topic, entry in entries
    ]
    return f"INSERT INTO {ledger} VALUES {', '.join(values)}"


def _delete_keys_sql(table: TableDefinition, target: str, keys: str) -> str:
    if len(table.primary_key) == 1:
        (name,) = table.primary_key
        return f"DELETE FROM {target} WHERE {quote(name)} IN (SELECT {_cast_key(table, name)} FROM {quote(keys)})"
    matches = " AND ".join(f"t.{quote(name)} = k.{_cast_key(table, name)}" for name in table.primary_key)
    return f"DELETE FROM {target} AS t USING {quote(keys)} AS k WHERE {matches}"


def _cast_key(table: TableDefinition, name: str) -> str:
    """UUIDs travel as text; without the cast the comparison would be one of texts, and scan slowly."""
    return f"{quote(name)}::{duckdb_type(table.column(name).type)}"


def _insert_sql(table: TableDefinition, target: str, rows: str) -> str:
    columns = ", ".join(quote(name) for name in (*table.column_names, *METADATA_COLUMNS))
    return f"INSERT INTO {target} ({columns}) SELECT {columns} FROM {quote(rows)}"
