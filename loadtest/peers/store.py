"""One DuckDB file for one table, as one writes it by hand: rows and offsets in one transaction, no more than that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import duckdb
import orjson
import pyarrow as pa

from loadtest.fingerprints import Fingerprint, duckdb_fingerprint_sql
from schemas.arrow_schema import rows_schema
from schemas.duckdb_ddl import create_table_sql, quote
from schemas.table import TableDefinition


class HandWrittenStore:
    """Upserts are DELETE and INSERT; values are what orjson says they are."""

    def __init__(self, path: Path, table: TableDefinition) -> None:
        self._table = table
        self._connection = duckdb.connect(str(path), config={"threads": 2, "memory_limit": "1GB"})
        self._connection.execute(create_table_sql(table, qualified_name=quote(table.name)))
        self._connection.execute("CREATE TABLE offsets (partition INTEGER, next_offset BIGINT)")
        columns = [pa.field(each.name, _as_parsed(each.type)) for each in rows_schema(table)]
        self._schema = pa.schema([*columns[:-1], pa.field("_timestamp", pa.int64())])

    def row(self, value: bytes, *, partition: int, offset: int, timestamp_ms: int) -> dict[str, Any]:
        """A record as a row."""
        return self.row_of(orjson.loads(value), partition=partition, offset=offset, timestamp_ms=timestamp_ms)

    def row_of(self, fields: dict[str, Any], *, partition: int, offset: int, timestamp_ms: int) -> dict[str, Any]:
        """The same for a value that somebody else has parsed."""
        return fields | {"_partition": partition, "_offset": offset, "_timestamp": timestamp_ms}

    def apply(self, rows: Iterable[dict[str, Any]], next_offsets: Mapping[int, int]) -> None:
        """Rows, oldest first, and the positions after them, by partition: one transaction."""
        rows = list(rows)
        if self._table.is_keyed:  # the last record of a key wins
            rows = list({row[self._table.primary_key[0]]: row for row in rows}.values())
        batch = pa.Table.from_pylist(rows, schema=self._schema)
        name, execute = quote(self._table.name), self._connection.execute
        self._connection.register("batch", batch)
        execute("BEGIN")
        if self._table.is_keyed:
            key = quote(self._table.primary_key[0])
            execute(f"DELETE FROM {name} WHERE {key} IN (SELECT {key} FROM batch)")
        timestamp = "make_timestamptz(_timestamp * 1000) AS _timestamp"
        execute(f"INSERT INTO {name} BY NAME SELECT * REPLACE ({timestamp}) FROM batch")
        for partition, next_offset in next_offsets.items():
            execute("DELETE FROM offsets WHERE partition = $1", [partition])
            execute("INSERT INTO offsets VALUES ($1, $2)", [partition, next_offset])
        execute("COMMIT")
        self._connection.unregister("batch")

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()


def _as_parsed(kind: pa.DataType) -> pa.DataType:
    """JSON has neither times nor decimals: text and doubles until DuckDB casts them."""
    if pa.types.is_timestamp(kind):
        return pa.string()
    return pa.float64() if pa.types.is_decimal(kind) else kind


class StoredRows:
    """What a peer's file holds, read by somebody else once the peer has ended. A context manager."""

    def __init__(self, path: Path, table: TableDefinition) -> None:
        self._connection = duckdb.connect(str(path), read_only=True)
        self._table = table

    def __enter__(self) -> StoredRows:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def row(self, sql: str) -> tuple[Any, ...]:
        """The only row of a statement."""
        row = self._connection.execute(sql).fetchone()
        assert row is not None
        return row

    def next_offsets(self) -> dict[int, int]:
        """Partition -> next_offset, as committed with the rows."""
        return dict(self._connection.execute("SELECT partition, next_offset FROM offsets").fetchall())

    def fingerprint(self) -> Fingerprint:
        """Of all rows."""
        return Fingerprint.of(self.row(duckdb_fingerprint_sql(self._table)))
