"""Runs one guarded query on a store: rows and the positions they reflect, read in ONE read-only transaction.

The transaction is what makes the offsets of an answer exact: DuckDB fixes a partition's snapshot when the transaction
first reads it, rows and `_positions` alike. These need not be read where nothing was committed around that moment,
which the store knows; for one point of all partitions they are read first, between commits. The transaction is
read-only as the second wall behind the guard. Results are fetched in chunks, so that an answer over the row or byte
limit costs no more than the limit. Called by `answering`; `run` blocks and belongs in a thread, `interrupt` may come
from any thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from threading import Lock
from typing import Protocol

import duckdb
import pyarrow as pa

from schemas.catalog import Catalog
from schemas.messages import (
    AnswerColumn,
    AnswerFormat,
    AnswerHead,
    Consistency,
    QueryRequest,
    serialise_answer,
    serialise_arrow_answer,
)
from streams.adapters.duckdb_dialect import LEDGER_VIEW
from streams.adapters.duckdb_guard import GuardedQuery, QueryGuard, statement_of
from streams.adapters.duckdb_refusals import not_serving, refusal_of, too_many_bytes, too_many_rows
from streams.adapters.duckdb_values import row_encoder
from streams.errors import StoreError

#: Rows fetched at a time; one DuckDB vector, so that a chunk over the byte limit stays small.
_CHUNK_ROWS = 2_048

#: Of one partition, whose ledger is short: reading it costs half of adding it up.
_POSITIONS_OF_ONE = f"SELECT partition, topic, next_offset FROM {LEDGER_VIEW}"
_POSITIONS_OF_ALL = (
    "SELECT partition, topic, next_offset FROM _positions UNION ALL SELECT partition, NULL, NULL FROM _partitions"
)

_ERRORS_THROUGH_ARROW: dict[str, type[duckdb.Error]] = {
    "INTERRUPT": duckdb.InterruptException,
    "Out of Memory": duckdb.OutOfMemoryException,
    "Conversion": duckdb.ConversionException,
    "Out of Range": duckdb.OutOfRangeException,
    "Invalid Input": duckdb.InvalidInputException,
}

ArrowRows = tuple[pa.Schema, Sequence[pa.RecordBatch]]


class QueryCursors(Protocol):
    """What a query needs of a store; DuckDBStore is the implementation."""

    def query_cursor(self, partition: int | None) -> duckdb.DuckDBPyConnection:
        """A cursor whose current schema has one view per table and `_positions`, over one partition or, for None, over
        all SERVING ones."""
        ...

    def give_back(self, cursor: duckdb.DuckDBPyConnection, partition: int | None) -> None:
        """Instead of closing it."""
        ...

    def applied(self, partition: int | None) -> dict[int, Mapping[str, int]] | None:
        """By partition that such a cursor reads its next_offsets, None while one of them commits: the same objects
        before and after a transaction's first read are what it reads."""
        ...

    def no_commits(self) -> AbstractContextManager[None]:
        """While it lasts nothing is committed."""
        ...


@dataclass(frozen=True)
class AnswerBody:
    """An answer without what the worker adds: one of `rows_json` and `arrow`."""

    columns: list[AnswerColumn]
    #: topic -> partition -> next_offset, of the tables that the query read.
    offsets: dict[str, dict[str, int]]
    executed_ms: float
    #: Each one row or several, with commas between them.
    rows_json: Sequence[bytes] = ()
    arrow: ArrowRows | None = None

    def serialise(self, head: AnswerHead, *, compressed: bool = False) -> bytes:
        """The value of the reply; `compressed` with LZ4, if it is in Arrow."""
        if self.arrow is None:
            return serialise_answer(head, b"[" + b",".join(self.rows_json) + b"]")
        schema, batches = self.arrow
        return serialise_arrow_answer(head, batches, schema, compressed=compressed)


class Interruptible:
    """Work of one cursor, on a thread; `interrupt` may come from any thread."""

    def __init__(self, scope: frozenset[int]) -> None:
        #: The partitions whose files it reads.
        self.scope = scope
        self.interrupted = False
        self._lock = Lock()
        self._cursor: duckdb.DuckDBPyConnection | None = None

    def interrupt(self) -> None:
        """Ends the work soon. May be called again: an interrupt between two statements has no effect on the next."""
        with self._lock:
            self.interrupted = True
            if self._cursor is not None:
                self._cursor.interrupt()

    def run(self) -> AnswerBody:
        """Raises QueryRefusedError."""
        raise NotImplementedError

    @contextmanager
    def _using(
        self,
        cursor: duckdb.DuckDBPyConnection,
        give_back: Callable[[duckdb.DuckDBPyConnection], None] = duckdb.DuckDBPyConnection.close,
    ) -> Iterator[None]:
        """Closes the cursor in the end, and with it its transaction, or gives it back if nothing went wrong."""
        with self._lock:
            self._cursor = cursor
        is_sound = False
        try:
            yield
            is_sound = True
        finally:
            with self._lock:
                self._cursor = None
                is_sound &= not self.interrupted
            if is_sound:
                give_back(cursor)
            else:
                cursor.close()


class DuckDBQueries:
    """Prepares queries for one store."""

    def __init__(self, store: QueryCursors, catalog: Catalog) -> None:
        self._store = store
        self._catalog = catalog
        self._guard = QueryGuard(catalog)

    def check(self, request: QueryRequest) -> GuardedQuery:
        """Raises QueryRefusedError for what may not run."""
        return self._guard.check(request.sql, request.params)

    def prepare(
        self, request: QueryRequest, *, partition: int | None, scope: frozenset[int], limits: FetchLimits
    ) -> RunningQuery:
        """Cheap: the work starts with `run`. `scope` names the partitions that it reads: `partition`, or all that are
        SERVING here."""
        return RunningQuery(
            self._store,
            self._catalog,
            self._guard,
            request,
            partition=partition,
            scope=scope,
            limits=limits,
        )


class RunningQuery(Interruptible):
    """One execution."""

    def __init__(
        self,
        store: QueryCursors,
        catalog: Catalog,
        guard: QueryGuard,
        request: QueryRequest,
        *,
        partition: int | None,
        scope: frozenset[int],
        limits: FetchLimits,
    ) -> None:
        super().__init__(scope)
        self._store = store
        self._catalog = catalog
        self._guard = guard
        self._request = request
        self._partition = partition
        self._limits = limits

    def run(self) -> AnswerBody:
        """Raises QueryRefusedError for everything that can be wrong with a query."""
        started = time.perf_counter()
        request = self._request
        query = self._guard.check(request.sql, request.params)
        cursor = self._open_cursor()
        with self._using(cursor, partial(self._store.give_back, partition=self._partition)):
            try:
                cursor.execute(_begin())
                applied = self._at_one_point(cursor)
                before = self._store.applied(self._partition)
                cursor.execute(query.statement, request.params or None)
                after = self._store.applied(self._partition)
                columns = columns_of(cursor)
                rows_json, arrow = self._limits.fetch(cursor, request.format)
                if applied is None:
                    applied = _unmoved(before, after)
                if applied is None:
                    applied = _read_positions(cursor, self._partition)
                offsets = self._offsets(query, applied)
            except duckdb.Error as error:
                raise refusal_of(error, query, interrupted=self.interrupted) from error
        executed_ms = (time.perf_counter() - started) * 1000
        return AnswerBody(columns, offsets, executed_ms, rows_json, arrow)

    def _open_cursor(self) -> duckdb.DuckDBPyConnection:
        try:
            return self._store.query_cursor(self._partition)
        except (StoreError, duckdb.Error) as error:
            raise not_serving(f"the store has no queryable state: {error}") from error

    def _at_one_point(self, cursor: duckdb.DuckDBPyConnection) -> Mapping[int, Mapping[str, int]] | None:
        """Fixes what the transaction sees of all partitions between commits, if that was asked for, and reads what was
        applied by then."""
        if self._partition is not None or self._request.consistency is not Consistency.SNAPSHOT:
            return None
        with self._store.no_commits():
            return _read_positions(cursor, None)

    def _offsets(self, query: GuardedQuery, applied: Mapping[int, Mapping[str, int]]) -> dict[str, dict[str, int]]:
        """What the answer reflects: 0 where the store has not consumed anything of a topic yet.

        A partition that came or went a moment ago must be counted neither twice nor not at all: refuses if what was
        visible is not the scope."""
        if applied.keys() != self.scope:
            raise not_serving("the partitions of this worker are changing")
        topics = [self._catalog.by_name(table).topic for table in query.tables]
        return {topic: {str(each): applied[each].get(topic, 0) for each in sorted(applied)} for topic in topics}


@cache
def _begin() -> duckdb.Statement:
    return statement_of("BEGIN TRANSACTION READ ONLY")


def _unmoved(
    before: dict[int, Mapping[str, int]] | None, after: dict[int, Mapping[str, int]] | None
) -> dict[int, Mapping[str, int]] | None:
    """What was applied, if nothing else was between these two looks."""
    if before is None or after is None or before.keys() != after.keys():
        return None
    return before if all(before[partition] is after[partition] for partition in before) else None


def _read_positions(cursor: duckdb.DuckDBPyConnection, partition: int | None) -> dict[int, Mapping[str, int]]:
    """What the cursor's transaction sees as applied."""
    applied: dict[int, dict[str, int]] = {} if partition is None else {partition: {}}
    for number, topic, next_offset in cursor.execute(
        _POSITIONS_OF_ALL if partition is None else _POSITIONS_OF_ONE
    ).fetchall():
        newest = applied.setdefault(number, {})
        if topic is not None:
            newest[topic] = max(newest.get(topic, 0), next_offset)
    return {**applied}


@dataclass(frozen=True)
class FetchLimits:
    """What of a result is fetched at most."""

    rows_max: int
    bytes_max: int
    #: Whether JSON comes row by row.
    row_by_row: bool = False

    def fetch(
        self, cursor: duckdb.DuckDBPyConnection, answer_format: AnswerFormat
    ) -> tuple[Sequence[bytes], ArrowRows | None]:
        """The rows of the cursor's statement, in JSON or in Arrow. Raises QueryRefusedError beyond a limit."""
        if answer_format is AnswerFormat.ARROW:
            return (), self._fetch_arrow(cursor)
        return self._fetch_json(cursor), None

    def _fetch_json(self, cursor: duckdb.DuckDBPyConnection) -> list[bytes]:
        encode = row_encoder([kind for _, kind, *_ in cursor.description])
        chunks: list[bytes] = []
        rows_count = bytes_count = 0
        while rows := cursor.fetchmany(min(_CHUNK_ROWS, self.rows_max + 1 - rows_count)):
            rows_count += len(rows)
            if rows_count > self.rows_max:
                raise too_many_rows(self.rows_max)
            encoded = [encode([row])[1:-1] for row in rows] if self.row_by_row else [encode(rows)[1:-1]]
            chunks += encoded
            bytes_count += sum(map(len, encoded)) + len(encoded)
            if bytes_count > self.bytes_max:
                raise too_many_bytes(self.bytes_max)
        return chunks

    def _fetch_arrow(self, cursor: duckdb.DuckDBPyConnection) -> ArrowRows:
        reader = cursor.to_arrow_reader(_CHUNK_ROWS)
        batches: list[pa.RecordBatch] = []
        rows_count = bytes_count = 0
        for batch in _batches(reader):
            rows_count += batch.num_rows
            bytes_count += batch.nbytes
            if rows_count > self.rows_max:
                raise too_many_rows(self.rows_max)
            if bytes_count > self.bytes_max:
                raise too_many_bytes(self.bytes_max)
            batches.append(batch)
        return reader.schema, batches


def _batches(reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    """Raises DuckDB's errors as DuckDB's: through Arrow they come as an OSError that begins with their kind."""
    try:
        yield from reader
    except OSError as error:
        kind = _ERRORS_THROUGH_ARROW.get(str(error).partition(" Error:")[0], duckdb.Error)
        raise kind(str(error)) from error


def columns_of(cursor: duckdb.DuckDBPyConnection) -> list[AnswerColumn]:
    """Of the statement that the cursor executed last."""
    return [AnswerColumn(name=name, type=str(kind)) for name, kind, *_ in cursor.description]
