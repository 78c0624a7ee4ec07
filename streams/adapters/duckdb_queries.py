"""Runs one guarded query on a store: rows and the positions they reflect, read in ONE read-only transaction.

The transaction is what makes the offsets of an answer exact: DuckDB fixes a partition's snapshot when the transaction
first reads it, rows and `_positions` alike. It is read-only as the second wall behind the guard. Results are fetched
in chunks, so that an answer over the row or byte limit costs no more than the limit. Called by `answering`; `run`
blocks and belongs in a thread, `interrupt` may come from any thread.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

import duckdb
import pyarrow as pa

from schemas.catalog import Catalog
from schemas.messages import (
    AnswerColumn,
    AnswerFormat,
    AnswerHead,
    QueryRequest,
    RefusalCode,
    serialise_answer,
    serialise_arrow_answer,
)
from streams.adapters.duckdb_guard import GuardedQuery, QueryGuard
from streams.adapters.duckdb_refusals import refusal_of, too_many_bytes, too_many_rows
from streams.adapters.duckdb_values import row_encoder
from streams.errors import QueryRefusedError, StoreError

#: Rows fetched at a time; one DuckDB vector, so that a chunk over the byte limit stays small.
_CHUNK_ROWS = 2_048


class QueryCursors(Protocol):
    """What a query needs of a store; DuckDBStore is the implementation."""

    def query_cursor(self, partition: int | None) -> duckdb.DuckDBPyConnection:
        """A cursor whose current schema has one view per table and `_positions`, over one partition or, for None, over
        all SERVING ones."""
        ...


@dataclass(frozen=True)
class AnswerBody:
    """What the store contributes to an answer: exactly one of `rows_json` and `arrow`."""

    columns: list[AnswerColumn]
    #: topic -> partition -> next_offset, of the tables that the query read.
    offsets: dict[str, dict[str, int]]
    executed_ms: float
    rows_json: bytes = b""
    arrow: tuple[pa.Schema, Sequence[pa.RecordBatch]] | None = None

    def serialise(self, head: AnswerHead) -> bytes:
        """The value of the reply."""
        if self.arrow is None:
            return serialise_answer(head, self.rows_json)
        schema, batches = self.arrow
        return serialise_arrow_answer(head, batches, schema)


class DuckDBQueries:
    """Prepares queries for one store."""

    def __init__(self, store: QueryCursors, catalog: Catalog) -> None:
        self._store = store
        self._catalog = catalog
        self._guard = QueryGuard(catalog)

    def prepare(
        self, request: QueryRequest, *, partition: int | None, scope: frozenset[int], rows_max: int, bytes_max: int
    ) -> RunningQuery:
        """Cheap: the work starts with `run`. `scope` names the partitions whose positions the answer states."""
        return RunningQuery(
            store=self._store,
            catalog=self._catalog,
            guard=self._guard,
            request=request,
            partition=partition,
            scope=scope,
            rows_max=rows_max,
            bytes_max=bytes_max,
        )


@dataclass
class RunningQuery:
    """One execution."""

    store: QueryCursors
    catalog: Catalog
    guard: QueryGuard
    request: QueryRequest
    partition: int | None
    scope: frozenset[int]
    rows_max: int
    bytes_max: int

    def __post_init__(self) -> None:
        self._lock = Lock()
        self._cursor: duckdb.DuckDBPyConnection | None = None
        self._interrupted = False

    def interrupt(self) -> None:
        """Ends the query soon. May be called again: an interrupt between two statements has no effect on the next."""
        with self._lock:
            self._interrupted = True
            if self._cursor is not None:
                self._cursor.interrupt()

    def run(self) -> AnswerBody:
        """Raises QueryRefusedError for everything that can be wrong with a query."""
        started = time.perf_counter()
        query = self.guard.check(self.request.sql, self.request.params)
        cursor = self._open_cursor()
        try:
            cursor.execute("BEGIN TRANSACTION READ ONLY")
            cursor.execute(self.request.sql, self.request.params or None)
            columns = [AnswerColumn(name=name, type=str(kind)) for name, kind, *_ in cursor.description]
            if self.request.format is AnswerFormat.ARROW:
                rows_json, arrow = b"", self._fetch_arrow(cursor)
            else:
                rows_json, arrow = self._fetch_json(cursor), None
            offsets = self._offsets(cursor, query)
        except duckdb.Error as error:
            raise refusal_of(error, query, interrupted=self._interrupted) from error
        finally:
            with self._lock:
                self._cursor = None
                cursor.close()  # ends the transaction
        executed_ms = (time.perf_counter() - started) * 1000
        return AnswerBody(columns, offsets, executed_ms, rows_json, arrow)

    def _open_cursor(self) -> duckdb.DuckDBPyConnection:
        try:
            cursor = self.store.query_cursor(self.partition)
        except (StoreError, duckdb.Error) as error:
            raise QueryRefusedError(
                f"the store has no queryable state: {error}",
                code=RefusalCode.NOT_SERVING,
                hint="ask again: the partition is on its way to SERVING",
                retriable=True,
            ) from error
        with self._lock:
            self._cursor = cursor
        return cursor

    def _fetch_json(self, cursor: duckdb.DuckDBPyConnection) -> bytes:
        encode = row_encoder([kind for _, kind, *_ in cursor.description])
        chunks: list[bytes] = []
        rows_count = bytes_count = 0
        while rows := cursor.fetchmany(min(_CHUNK_ROWS, self.rows_max + 1 - rows_count)):
            rows_count += len(rows)
            if rows_count > self.rows_max:
                raise too_many_rows(self.rows_max)
            chunks.append(encode(rows)[1:-1])
            bytes_count += len(chunks[-1]) + 1
            if bytes_count > self.bytes_max:
                raise too_many_bytes(self.bytes_max)
        return b"[" + b",".join(chunks) + b"]"

    def _fetch_arrow(self, cursor: duckdb.DuckDBPyConnection) -> tuple[pa.Schema, list[pa.RecordBatch]]:
        reader = cursor.to_arrow_reader(_CHUNK_ROWS)
        batches: list[pa.RecordBatch] = []
        rows_count = bytes_count = 0
        for batch in reader:
            rows_count += batch.num_rows
            bytes_count += batch.nbytes
            if rows_count > self.rows_max:
                raise too_many_rows(self.rows_max)
            if bytes_count > self.bytes_max:
                raise too_many_bytes(self.bytes_max)
            batches.append(batch)
        return reader.schema, batches

    def _offsets(self, cursor: duckdb.DuckDBPyConnection, query: GuardedQuery) -> dict[str, dict[str, int]]:
        """0 where the store has not consumed anything of the topic yet."""
        topics = [self.catalog.by_name(table).topic for table in query.tables]
        offsets = {topic: dict.fromkeys(map(str, sorted(self.scope)), 0) for topic in topics}
        if not topics:
            return offsets
        positions: list[tuple[int, str, Any]] = cursor.execute(
            "SELECT partition, topic, next_offset FROM _positions"
        ).fetchall()
        for partition, topic, next_offset in positions:
            if topic in offsets and partition in self.scope:
                offsets[topic][str(partition)] = next_offset
        return offsets
