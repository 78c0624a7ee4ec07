"""Raw records to typed columns (D4): a fast path for whole batches, the exact path for the records it is not sure of.

A batch is read in pieces of a few thousand records.
1. A piece in which every record plainly has the shape of one JSON object goes straight to the strict reader of
   json_columns. Nearly all do, and one pass is all they cost.
2. Another piece, or one that the reader refused, is sieved: tombstones, and what is too large, not UTF-8, not JSON
   (DuckDB's json_valid) or not an object go to the exact path.
3. What is left is searched for culprits (one DuckDB query over the text of all columns) and read without them; if that
   is not enough, it is halved. So one poison record costs its own piece only.
4. The exact path decodes the rest one by one, or parks it.
The fast path holds no opinion of its own: it either yields what exact_decoder would, or nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import cast

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.arrow_schema import deletes_schema, rows_schema
from schemas.duckdb_ddl import duckdb_type, quote, quote_text
from schemas.table import Column, ScalarKind, ScalarType, StructType, TableDefinition
from streams.adapters.exact_decoder import (
    ExactDecoder,
    decode_records,
    has_odd_timestamp,
    metadata_arrays,
    to_table,
)
from streams.adapters.exact_json import nesting_depth
from streams.adapters.exact_values import INTEGER_RANGES
from streams.adapters.json_columns import (
    ColumnReader,
    ReadColumns,
    column_reader,
    is_utf8,
    lines,
    may_nest_too_deep,
    plain_text,
)
from streams.batches import RecordBatch
from streams.limits import JSON_DEPTH_MAX, RECORD_BYTES_MAX
from streams.ports import DecodedBatch, Decoder

_PIECE_RECORDS = 8192
#: Pieces this small are not searched or halved further.
_PIECE_RECORDS_MIN = 64
_CONSTANT = re.compile(rb"[:,\[\s-](?:NaN|Inf|Infinity)\s*[,\]}]")
_ROW_IN_MESSAGE = re.compile(r"in row (\d+)$")


@dataclass(frozen=True)
class _Piece:
    """Some records of a batch: their indices, ascending, and their values."""

    indices: Sequence[int]
    values: Sequence[bytes]

    def __len__(self) -> int:
        return len(self.indices)

    def cut(self, start: int, stop: int) -> _Piece:
        return _Piece(self.indices[start:stop], self.values[start:stop])

    def without(self, rows: Collection[int]) -> _Piece:
        if not rows:
            return self
        kept = [row for row in range(len(self)) if row not in rows]
        return _Piece([self.indices[row] for row in kept], [self.values[row] for row in kept])

    def text(self) -> pa.Array:
        """Raises pa.ArrowInvalid where a value is not UTF-8."""
        return pa.array(self.values, pa.binary()).cast(pa.string())


@dataclass
class _Reading:
    """A batch on its way: what has been read, and what is left to the exact path."""

    table: TableDefinition
    batch: RecordBatch
    reader: ColumnReader
    indices: list[Sequence[int]] = field(default_factory=list)
    columns: list[list[pa.Array]] = field(default_factory=list)
    unsure: set[int] = field(default_factory=set)
    #: A piece was refused: culprits seldom come alone, so the next pieces are searched first.
    search: bool = False

    def distrust(self, piece: _Piece, rows: Collection[int]) -> _Piece:
        """The piece without those rows, which become unsure."""
        self.unsure.update(piece.indices[row] for row in rows)
        return piece.without(rows)

    def accept(self, piece: _Piece, read: ReadColumns) -> None:
        """Takes what the reader made of the piece, without the rows it doubts."""
        columns = read.columns
        if read.doubtful:
            kept = np.delete(np.arange(len(piece)), read.doubtful)
            columns = [column.take(pa.array(kept)) for column in columns]
            piece = self.distrust(piece, set(read.doubtful))
        self.indices.append(piece.indices)
        self.columns.append(columns)


class DuckDBDecoder(Decoder):
    """The decoder of the workers. One per process is enough: decoding runs in the calling thread."""

    def __init__(self) -> None:
        self._instance = duckdb.connect(
            ":memory:", config={"threads": 1, "python_enable_replacements": False, "enable_external_access": False}
        )
        self._exact = ExactDecoder()

    def decode(self, table: TableDefinition, batch: RecordBatch) -> DecodedBatch:
        """See Decoder."""
        reader = column_reader(table)
        if not reader.can_read or reader.json_columns or not len(batch):
            return self._exact.decode(table, batch)
        reading = _Reading(table, batch, reader)
        # The cast holds for every piece that the reader sees: the sieve, or its text, makes sure of it.
        whole = _Piece(range(len(batch)), cast(list[bytes], batch.values))
        if table.is_keyed and not all(batch.keys):
            whole = reading.distrust(whole, _absent(batch.keys))
        if has_odd_timestamp(min(batch.timestamps_ms)) or has_odd_timestamp(max(batch.timestamps_ms)):
            odd = [row for row, index in enumerate(whole.indices) if has_odd_timestamp(batch.timestamps_ms[index])]
            whole = reading.distrust(whole, odd)
        for start in range(0, len(whole), _PIECE_RECORDS):
            self._take(reading, whole.cut(start, start + _PIECE_RECORDS))
        return _assemble(reading)

    def _take(self, reading: _Reading, piece: _Piece) -> None:
        """Reads one piece into `reading`, in one pass if it can be."""
        text = None if reading.search else plain_text(piece.values)
        if text is not None:
            try:
                reading.accept(piece, reading.reader.read(text, piece.values))
            except pa.ArrowInvalid:
                reading.search = True
            else:
                return
        self._take_apart(reading, self._sieve(reading, piece), searched=False)

    def _sieve(self, reading: _Reading, piece: _Piece) -> _Piece:
        """The records that are one JSON object each; the others become unsure."""
        piece = reading.distrust(piece, _absent(piece.values))
        if max(map(len, piece.values), default=0) > RECORD_BYTES_MAX:
            piece = reading.distrust(
                piece, {r for r, value in enumerate(piece.values) if len(value) > RECORD_BYTES_MAX}
            )
        try:
            text = piece.text()
        except pa.ArrowInvalid:
            piece = reading.distrust(piece, {row for row, value in enumerate(piece.values) if not is_utf8(value)})
            text = piece.text()
        others = pc.indices_nonzero(pc.invert(pc.starts_with(text, "{"))).to_pylist()
        piece = reading.distrust(piece, {*others, *self._rows(text, "NOT json_valid(value)")})
        return reading.distrust(piece, _odd_rows(piece.values))

    def _take_apart(self, reading: _Reading, piece: _Piece, *, searched: bool) -> None:
        """Reads one sieved piece into `reading`, searching and halving it as needed."""
        if reading.search and not searched:
            piece, searched = self._without_culprits(reading, piece), True
        if not piece:
            return
        try:
            reading.accept(piece, reading.reader.read(lines(piece.values), piece.values))
        except pa.ArrowInvalid as refusal:
            reading.search = True
            if len(piece) <= _PIECE_RECORDS_MIN:
                reading.distrust(piece, range(len(piece)))
            elif not searched:
                named = _ROW_IN_MESSAGE.search(str(refusal))
                self._take_apart(reading, reading.distrust(piece, {int(named[1])} if named else ()), searched=False)
            else:
                middle = len(piece) // 2
                self._take_apart(reading, piece.cut(0, middle), searched=True)
                self._take_apart(reading, piece.cut(middle, len(piece)), searched=True)

    def _without_culprits(self, reading: _Reading, piece: _Piece) -> _Piece:
        return reading.distrust(piece, set(self._rows(piece.text(), _culprit_condition(reading.table))))

    def _rows(self, text: pa.Array, condition: str) -> list[int]:
        """The rows whose `value` meets an SQL condition."""
        numbered = pa.table({"row": pa.array(np.arange(len(text))), "value": text})
        cursor = self._instance.cursor()
        try:
            cursor.register("records", numbered)
            return [row for (row,) in cursor.execute(f"SELECT row FROM records WHERE {condition}").fetchall()]
        finally:
            cursor.close()


def _assemble(reading: _Reading) -> DecodedBatch:
    """Fast pieces and exact records, in the order of their offsets."""
    table, batch = reading.table, reading.batch
    exact = decode_records(table, batch, sorted(reading.unsure))
    schema = rows_schema(table)
    metadata = metadata_arrays(batch, list(chain(*reading.indices)) if reading.unsure else None)
    columns = [
        pa.chunked_array(chunks, schema.field(n).type) for n, chunks in enumerate(zip(*reading.columns, strict=True))
    ]
    fast = pa.Table.from_arrays(columns + metadata, schema=schema) if columns else schema.empty_table()
    rows = fast
    if exact.rows:
        rows = pa.concat_tables([fast, to_table(schema, exact.rows, batch)])
        rows = rows.take(pc.sort_indices(rows, [("_offset", "ascending")]))
    return DecodedBatch(
        table=table,
        source=batch,
        rows=rows,
        deletes=to_table(deletes_schema(table), exact.deletes, batch),
        parked=tuple(exact.parked),
    )


def _absent(items: Sequence[bytes | None]) -> list[int]:
    return [index for index, item in enumerate(items) if item is None] if None in items else []


def _odd_rows(values: Sequence[bytes]) -> set[int]:
    """The rows with NaN or Infinity, which are not JSON, and those that nest too deep: both suit the fast reader."""
    text = b"".join(values)
    odd: set[int] = set()
    if b"NaN" in text or b"Inf" in text:
        odd.update(row for row, value in enumerate(values) if _CONSTANT.search(value))
    if may_nest_too_deep(text, records=len(values)):
        odd.update(
            row
            for row, value in enumerate(values)
            if value.count(b"{") + value.count(b"[") > JSON_DEPTH_MAX and nesting_depth(value) > JSON_DEPTH_MAX
        )
    return odd


def _culprit_condition(table: TableDefinition) -> str:
    """SQL that holds for records that the strict reader would refuse. It may err: then the piece is halved instead."""
    structure = json.dumps({column.name: "JSON" for column in table.columns})
    fine = " AND ".join(_fine(column, f"(document.{quote(column.name)}::VARCHAR)") for column in table.columns)
    return f"(SELECT NOT ({fine}) FROM (SELECT from_json(value, {quote_text(structure)}) AS document))"


def _fine(column: Column, text: str) -> str:
    """SQL: that JSON text is null, or in the column's own form."""
    first = f"{text}[1]"
    if not isinstance(column.type, ScalarType):
        bracket = "{" if isinstance(column.type, StructType) else "["
        return f"coalesce({first} = '{bracket}', true)"
    kind = column.type.kind
    if kind in INTEGER_RANGES:
        return f"coalesce(TRY_CAST({text} AS {kind})::VARCHAR = {text}, {text} IS NULL)"
    if kind in (ScalarKind.REAL, ScalarKind.DOUBLE):
        return f"coalesce({first} BETWEEN '-' AND '9', true)"
    if kind is ScalarKind.BOOLEAN:
        return f"coalesce({text} IN ('true', 'false'), true)"
    if kind is ScalarKind.DECIMAL:
        scale = column.type.scale or 0
        plain = f"regexp_full_match(trim({text}, '\"'), '[+-]?[0-9]+(\\.[0-9]{{0,{scale}}})?')"
        fits = f"TRY_CAST(trim({text}, '\"') AS {duckdb_type(column.type)}) IS NOT NULL"
        return f"coalesce({plain} AND {fits}, {text} IS NULL)"
    if kind in (ScalarKind.DATE, ScalarKind.TIMESTAMP, ScalarKind.TIMESTAMPTZ):
        return "true"
    return f"coalesce({first} = '\"', true)"
