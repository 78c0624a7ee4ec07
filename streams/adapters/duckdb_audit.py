"""AuditWorkspace: what a partition of a table must hold, worked out from the log alone, in a file of its own.

Of each record it keeps its offset, its key's digest and the digests of its row as the store and as the sink spell it:
some 80 bytes on disk, whatever the record's size; memory is bounded by DuckDB, which spills. Which record of a key is
the newest comes from a window over all of them, not from the DELETE and INSERT by which stores are written. One
partition at a time; called by the audit, from one thread at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Self

import duckdb
import pyarrow as pa

from schemas.duckdb_ddl import METADATA_TYPES, duckdb_type, quote
from schemas.row_text import key_text, sink_text_in_duckdb, store_text
from schemas.table import TableDefinition
from streams.ports import AuditedRange, DecodedBatch, Digest, HeldRow, ParkReason
from streams.positions import OffsetRange

_ROW, _DELETE, _PARKED = range(3)


class Copy(StrEnum):
    """What is compared with the log."""

    STORE = "store"
    SINK = "sink"


class AuditWorkspace:
    """A context manager over one folder, which must be empty and is the caller's to remove."""

    def __init__(self, folder: Path, *, memory_limit: str = "512MB") -> None:
        self._connection = duckdb.connect(
            folder / "audit.duckdb",
            config={"memory_limit": memory_limit, "threads": 2, "temp_directory": str(folder / "spill")},
        )
        self._connection.execute("SET TimeZone = 'UTC'")
        self._connection.execute("CREATE TABLE letters (partition INTEGER, _offset BIGINT, reason VARCHAR)")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def begin_table(self, table: TableDefinition) -> None:
        """Forgets the table before, its dead letters too."""
        self._table = table
        types = {column.name: duckdb_type(column.type) for column in table.columns} | METADATA_TYPES
        columns = ", ".join(f"{quote(name)} {kind}" for name, kind in types.items())
        key = f"md5_number({key_text(table)})" if table.is_keyed else "NULL::UHUGEINT"
        digests = ", ".join(
            f"{'md5_number_' + half}({text}) AS {copy}_{half}"
            for copy, text in ((Copy.STORE, store_text(table)), (Copy.SINK, sink_text_in_duckdb(table)))
            for half in ("upper", "lower")
        )
        self._row_sql = f"SELECT _offset, epoch_ms(_timestamp), {_ROW}, {key}, {digests} FROM staged"
        self._delete_sql = f"SELECT _offset, epoch_ms(_timestamp), {_DELETE}, {key}, NULL, NULL, NULL, NULL FROM staged"
        self._execute(f"CREATE OR REPLACE TABLE staged ({columns})", "DELETE FROM letters")

    def begin_partition(self, partition: int) -> None:
        """Forgets the partition before."""
        self._partition = partition
        self._execute(
            "CREATE OR REPLACE TABLE records (_offset BIGINT, at_ms BIGINT, kind TINYINT, key UHUGEINT, "
            "store_upper UBIGINT, store_lower UBIGINT, sink_upper UBIGINT, sink_lower UBIGINT)"
        )

    def add(self, decoded: DecodedBatch) -> None:
        """The next records of the log."""
        source = decoded.source
        self._stage(decoded.rows, self._row_sql)
        self._stage(decoded.deletes, self._delete_sql)
        if decoded.parked:
            parked = [(source.offsets[each.index], source.timestamps_ms[each.index]) for each in decoded.parked]
            offsets, times = zip(*parked, strict=True)
            given = pa.table({"_offset": pa.array(offsets, pa.int64()), "at_ms": pa.array(times, pa.int64())})
            self._insert(given, f"INSERT INTO records SELECT _offset, at_ms, {_PARKED}, NULL, NULL, NULL, NULL, NULL")

    def add_letters(self, letters: Iterable[tuple[int, int, str]]) -> None:
        """Partition, offset and reason of dead letters of this table; repeated ones count once."""
        found = list(letters)
        if found:
            columns = list(zip(*found, strict=True))
            given = pa.table(
                {
                    "partition": pa.array(columns[0], pa.int32()),
                    "_offset": pa.array(columns[1], pa.int64()),
                    "reason": pa.array(columns[2], pa.string()),
                }
            )
            self._insert(given, "INSERT INTO letters SELECT partition, _offset, reason")

    def settle(self) -> None:
        """Works out until which offset each record is the newest of its key, on each side: what the sink refused was
        never there."""
        untils = "NULL::BIGINT AS store_until, NULL::BIGINT AS sink_until"
        if self._table.is_keyed:
            untils = (
                f"lead(_offset) OVER (PARTITION BY key, kind = {_PARKED} ORDER BY _offset) AS store_until, "
                f"lead(_offset) OVER (PARTITION BY key, kind = {_PARKED}, refused ORDER BY _offset) AS sink_until"
            )
        refused = (
            f"(_offset IN (SELECT _offset FROM letters WHERE partition = {self._partition} "
            f"AND reason = '{ParkReason.REFUSED_BY_SINK}')) AS refused"
        )
        self._execute(f"CREATE OR REPLACE TABLE settled AS SELECT *, {untils} FROM (SELECT *, {refused} FROM records)")

    def buckets(self, copy: Copy, asked: AuditedRange, position: int) -> dict[int, Digest]:
        """What a copy that has everything below `position` and nothing else must hold."""
        found = self._rows(
            f"SELECT _offset // {asked.bucket}, count(*), sum(_offset), sum({copy}_upper), sum({copy}_lower) "
            f"FROM settled WHERE {_live(copy, asked, position)} GROUP BY ALL"
        )
        return {int(bucket): Digest(*map(int, sums)) for bucket, *sums in found}

    def rows(self, copy: Copy, asked: AuditedRange, position: int) -> list[HeldRow]:
        """The rows behind these digests."""
        found = self._rows(f"SELECT _offset, {copy}_upper FROM settled WHERE {_live(copy, asked, position)}")
        return [HeldRow(offset, digest, 1) for offset, digest in found]

    def counts(self, offsets: OffsetRange) -> tuple[int, int, int]:
        """Records of the range that are rows, deletes and dead letters."""
        counted = self._rows(f"SELECT kind, count(*) FROM records WHERE {_within(offsets)} GROUP BY ALL")
        found: dict[int, int] = dict(counted)  # type: ignore[arg-type]  # each row is a pair
        return found.get(_ROW, 0), found.get(_DELETE, 0), found.get(_PARKED, 0)

    def records_between(self, lower: int, upper: int) -> bool:
        """Whether the log has a record strictly between these offsets."""
        return bool(self._rows(f"SELECT 1 FROM records WHERE _offset > {lower} AND _offset < {upper} LIMIT 1"))

    def refused(self, offsets: OffsetRange) -> int:
        """Rows of the range that the sink refused and parked."""
        return int(
            self._rows(f"SELECT count(*) FROM settled WHERE kind = {_ROW} AND refused AND {_within(offsets)}")[0][0]
        )

    def letters_missing(self, offsets: OffsetRange) -> list[int]:
        """Offsets of records that must be parked and have no dead letter."""
        return self._offsets(
            f"SELECT _offset FROM records WHERE kind = {_PARKED} AND {_within(offsets)} "
            f"AND _offset NOT IN (SELECT _offset FROM letters WHERE partition = {self._partition})"
        )

    def letters_unexpected(self, offsets: OffsetRange) -> list[int]:
        """Offsets of dead letters of records that are rows or deletes, or are not in the log."""
        return self._offsets(
            f"SELECT _offset FROM letters l WHERE partition = {self._partition} AND reason <> "
            f"'{ParkReason.REFUSED_BY_SINK}' AND {_within(offsets)} "
            f"AND NOT EXISTS (FROM records r WHERE r._offset = l._offset AND kind = {_PARKED})"
        )

    def letters_of_sink(self, offsets: OffsetRange) -> list[int]:
        """Offsets of the dead letters of rows that the sink refused."""
        return self._offsets(
            f"SELECT _offset FROM letters WHERE partition = {self._partition} AND reason = "
            f"'{ParkReason.REFUSED_BY_SINK}' AND {_within(offsets)}"
        )

    def first_letter(self) -> int | None:
        """The lowest offset of the partition that any letter is of."""
        offset = self._rows(f"SELECT min(_offset) FROM letters WHERE partition = {self._partition}")[0][0]
        return None if offset is None else int(offset)

    def _stage(self, records: pa.Table, select: str) -> None:
        if len(records):
            self._execute("DELETE FROM staged")
            self._insert(records, "INSERT INTO staged BY NAME SELECT *")
            self._execute(f"INSERT INTO records {select}")

    def _insert(self, given: pa.Table, insert: str) -> None:
        self._connection.register("given", given)
        try:
            self._execute(f"{insert} FROM given")
        finally:
            self._connection.unregister("given")

    def _execute(self, *statements: str) -> None:
        for statement in statements:
            self._connection.execute(statement)

    def _rows(self, sql: str) -> list[tuple[int, ...]]:
        return self._connection.execute(sql).fetchall()

    def _offsets(self, sql: str) -> list[int]:
        return sorted({offset for (offset,) in self._rows(sql)})


def _within(offsets: OffsetRange) -> str:
    return f"_offset >= {offsets.lo} AND _offset < {offsets.hi}"


def _live(copy: Copy, asked: AuditedRange, position: int) -> str:
    conditions = [
        f"kind = {_ROW}",
        f"_offset >= {asked.offsets.lo}",
        f"_offset < {min(asked.offsets.hi, position)}",
        f"({copy}_until IS NULL OR {copy}_until >= {position})",
        f"at_ms >= {asked.since_ms}",
    ]
    if copy is Copy.SINK:
        conditions.append("NOT refused")
    return " AND ".join(conditions)
