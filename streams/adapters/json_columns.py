"""Many JSON objects to typed Arrow columns at once, by a parser that never coerces.

Arrow's JSON reader with an explicit schema takes a value only in the column's own JSON form and only if it fits
exactly: 1.9 or "5" into an integer, a fourth decimal digit into DECIMAL(10,3), a repeated field, all make it refuse the
whole piece. So what it returns is right, and what it refuses somebody else must look at. Timestamps, dates and UUIDs
are read as text or integers and cast here. Called by DuckDBDecoder, which takes refused pieces apart; the meaning of
every type is defined in exact_values.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from schemas.arrow_schema import arrow_type
from schemas.sql_types import DECIMAL_PRECISION_MAX
from schemas.table import ArrayType, Column, ColumnType, ScalarKind, ScalarType, StructType, TableDefinition
from streams.adapters.exact_json import FaultError, Number
from streams.adapters.exact_values import DAYS_MAX, DAYS_MIN, MICROS_MAX, MICROS_MIN, convert
from streams.limits import JSON_DEPTH_MAX, RECORD_BYTES_MAX

_TEMPORAL = frozenset({ScalarKind.DATE, ScalarKind.TIMESTAMP, ScalarKind.TIMESTAMPTZ})
#: Read as something else and cast afterwards, or not readable at all (JSON): not inside arrays and structs.
_INDIRECT = _TEMPORAL | {ScalarKind.UUID, ScalarKind.JSON, ScalarKind.REAL, ScalarKind.DECIMAL}
_UUID = "^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"
_ZONE = re.compile(r"(?:Z|T.*[+-][0-9:]+)$")
#: Legal between JSON tokens and illegal inside strings, just like the line ends that it stands in for.
_LINE_ENDS_TO_TAB = bytes.maketrans(b"\r\n", b"\t\t")
_DIGITS_TO_ZERO = bytes.maketrans(b"123456789", b"0" * 9)
_TOO_MANY_DIGITS = b"0" * (DECIMAL_PRECISION_MAX + 1)
_PARSE_OPTIONS_CACHED = 16
_DAY_MICROS = 86_400_000_000
#: Looked at to see whether a column's times are written as text or as numbers.
_PEEKED_RECORDS = 4
_NEWLINE, _OPEN, _OPEN_LIST = b"\n{["


@dataclass(frozen=True)
class ReadColumns:
    """Typed columns in table order, and the row numbers whose values must not be trusted."""

    columns: list[pa.Array]
    doubtful: list[int]


class ColumnReader:
    """Reads records of one table. Immutable."""

    def __init__(self, table: TableDefinition) -> None:
        self._columns = table.columns
        #: Columns whose JSON form is taken as text by somebody else.
        self.json_columns = tuple(c.name for c in table.columns if _kind(c.type) is ScalarKind.JSON)
        #: False for tables that only the exact path can read.
        self.can_read = all(_readable(column.type) for column in table.columns)
        self._has_decimals = any(_kind(column.type) is ScalarKind.DECIMAL for column in table.columns)
        self._temporal = tuple(c.name for c in table.columns if _kind(c.type) in _TEMPORAL)
        self._parse_options = lru_cache(_PARSE_OPTIONS_CACHED)(self._options_for)

    def read(self, text: bytes, values: Sequence[bytes]) -> ReadColumns:
        """Reads one JSON object from each line of `text`, which is `plain_text(values)`, or `lines(values)` of values
        that the caller knows to be one JSON object each, in UTF-8.

        Raises pa.ArrowInvalid when at least one is not in the exact form; its message may name the row.
        """
        if self._has_decimals and _TOO_MANY_DIGITS in text.translate(_DIGITS_TO_ZERO):
            raise pa.ArrowInvalid("a number has more digits than Arrow's decimals can be scaled by without wrapping")
        samples = self._samples(values)
        # As a stream of a single block: read_json would hand it from thread to thread.
        with pj.open_json(
            pa.BufferReader(text),
            read_options=pj.ReadOptions(use_threads=False, block_size=len(text) + 1),
            parse_options=self._parse_options(frozenset(n for n, value in samples.items() if isinstance(value, int))),
        ) as blocks:
            read = blocks.read_all()
        if len(read) != len(values):
            raise pa.ArrowInvalid(f"{len(values)} records hold {len(read)} objects")
        (whole,) = read.combine_chunks().to_batches()
        doubtful: set[int] = set()
        columns = [
            _finish(column, whole[column.name], samples.get(column.name), doubtful)
            if column.name not in self.json_columns
            else pa.nulls(len(values), pa.string())
            for column in self._columns
        ]
        return ReadColumns(columns, sorted(doubtful))

    def _samples(self, values: Sequence[bytes]) -> dict[str, object]:
        """A value of each temporal column, from the first records."""
        samples: dict[str, object] = {}
        if self._temporal:
            for value in values[:_PEEKED_RECORDS]:
                if len(samples) == len(self._temporal):
                    break
                try:
                    document = orjson.loads(value)
                except orjson.JSONDecodeError:
                    continue  # the reader will say what is wrong
                for name in self._temporal:
                    if name not in samples and document.get(name) is not None:
                        samples[name] = document[name]
        return samples

    def _options_for(self, as_numbers: frozenset[str]) -> pj.ParseOptions:
        """Given the columns whose times are written as numbers."""
        columns = (column for column in self._columns if column.name not in self.json_columns)
        schema = pa.schema([(column.name, self._read_type(column, as_numbers)) for column in columns])
        return pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")

    def _read_type(self, column: Column, as_numbers: Collection[str]) -> pa.DataType:
        kind = _kind(column.type)
        if kind in _TEMPORAL:
            return pa.int64() if column.name in as_numbers else pa.string()
        if kind is ScalarKind.DECIMAL:
            # Twice as wide as any column, so that a number is read as it was written, and refused if it cannot be.
            return pa.decimal256(2 * DECIMAL_PRECISION_MAX, arrow_type(column.type).scale)
        return pa.string() if kind is ScalarKind.UUID else arrow_type(column.type)


def lines(values: Sequence[bytes]) -> bytes:
    """The values, one a line."""
    text = b"\n".join(values)
    if count_byte(text, b"\n") >= len(values) or b"\r" in text:
        text = b"\n".join([value.translate(_LINE_ENDS_TO_TAB) for value in values])
    return text


def plain_text(values: Sequence[bytes | None]) -> bytes | None:
    """The values, one a line, if no value needs a closer look than the strict reader's; else None.

    Each then is in UTF-8, not too large, not too deep, without NaN and Infinity, and goes from `{` to `}` on its line.
    So none can run into the next: a value that ends in `}` within an object or array would need a comma or a bracket
    to go on, and finds `{`; within a string it would go on over the end of the line, which strings may not.
    """
    try:
        text = b"\n".join(values)  # type: ignore[arg-type]
    except TypeError:  # a tombstone
        return None
    seams = len(values) - 1
    if text.count(b"}\n{") != seams or count_byte(text, b"\n") != seams or b"\r" in text:
        return None
    if not (text.startswith(b"{") and text.endswith(b"}")):
        return None
    if len(text) > RECORD_BYTES_MAX and max(map(len, values)) > RECORD_BYTES_MAX:  # type: ignore[arg-type]
        return None
    if may_nest_too_deep(text, records=len(values)):
        byte = np.frombuffer(text, np.uint8)
        starts = np.append(0, np.flatnonzero(byte == _NEWLINE))
        if np.add.reduceat((byte == _OPEN) | (byte == _OPEN_LIST), starts, dtype=np.int32).max() > JSON_DEPTH_MAX:
            return None
    if b"NaN" in text or b"Inf" in text:
        return None
    return text if text.isascii() or is_utf8(text) else None


def is_utf8(text: bytes) -> bool:
    """Whether the bytes are text."""
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def may_nest_too_deep(text: bytes, *, records: int) -> bool:
    """False if no record in the text can. Each has one bracket of its own, so one that is needs this many more."""
    return count_byte(text, b"{") + count_byte(text, b"[") - records >= JSON_DEPTH_MAX


def count_byte(text: bytes, byte: bytes) -> int:
    """bytes.count for a single byte that occurs often, ten times as fast."""
    return int(np.count_nonzero(np.frombuffer(text, np.uint8) == byte[0]))


@lru_cache(maxsize=256)
def column_reader(table: TableDefinition) -> ColumnReader:
    """The reader of that table."""
    return ColumnReader(table)


def _kind(column_type: ColumnType) -> ScalarKind | None:
    return column_type.kind if isinstance(column_type, ScalarType) else None


def _readable(column_type: ColumnType, *, nested: bool = False) -> bool:
    if isinstance(column_type, ArrayType):
        return _readable(column_type.element, nested=True)
    if isinstance(column_type, StructType):
        return all(_readable(field.type, nested=True) for field in column_type.fields)
    return not (nested and column_type.kind in _INDIRECT)


def _finish(column: Column, read: pa.Array, sample: object, doubtful: set[int]) -> pa.Array:
    """The column in its own type; adds the rows to distrust."""
    kind = _kind(column.type)
    if not column.nullable and read.null_count:
        _distrust(pc.is_null(read), doubtful)
    if kind is ScalarKind.UUID:
        _distrust(pc.invert(pc.match_substring_regex(read, _UUID)), doubtful)
        return pc.ascii_lower(read)
    if kind in (ScalarKind.REAL, ScalarKind.DOUBLE):
        _distrust(pc.invert(pc.is_finite(read)), doubtful)
    if kind is ScalarKind.DECIMAL:
        return _narrowed(arrow_type(column.type), read, doubtful)
    if kind in _TEMPORAL:
        try:
            return _cast_temporal(arrow_type(column.type), read, sample)
        except pa.ArrowInvalid:
            return _convert_temporal(column, read, doubtful)
    return read


def _distrust(mask: pa.BooleanArray, doubtful: set[int]) -> None:
    if mask.true_count:
        doubtful.update(pc.indices_nonzero(mask).to_pylist())


def _narrowed(target: pa.Decimal128Type, read: pa.Array, doubtful: set[int]) -> pa.Array:
    """Decimals in the column's own precision; those that do not fit become null and doubtful."""
    with suppress(pa.ArrowInvalid):
        return read.cast(target)
    limit = pa.scalar(10 ** (target.precision - target.scale), read.type)
    wide = pc.greater_equal(pc.abs(read), limit)
    _distrust(wide, doubtful)
    return pc.if_else(wide, pa.scalar(None, read.type), read).cast(target)


def _cast_temporal(target: pa.DataType, read: pa.Array, sample: object) -> pa.Array:
    """By casts that refuse what they cannot represent. Raises pa.ArrowInvalid."""
    if pa.types.is_integer(read.type):
        if pa.types.is_date(target):
            raise pa.ArrowInvalid("a date is not a number")
        cast = read.cast(pa.timestamp("ms")).cast(pa.timestamp("us"))
    elif pa.types.is_date(target):
        return _within(read.cast(target), pa.int32(), DAYS_MIN, DAYS_MAX).view(target)
    else:
        zoned = target.tz is not None or (isinstance(sample, str) and _ZONE.search(sample) is not None)
        cast = read.cast(pa.timestamp("us", "UTC" if zoned else None))
    # The first day of year 1 may have been written as one of year 0, which is none: looked at value by value.
    return _within(cast, pa.int64(), MICROS_MIN + _DAY_MICROS, MICROS_MAX).view(target)


def _within(times: pa.Array, storage: pa.DataType, least: int, greatest: int) -> pa.Array:
    """The times in `storage`, their numeric form. Raises pa.ArrowInvalid for one out of bounds."""
    numbers = times.view(storage)
    present = numbers.drop_null().to_numpy()
    if present.size and not least <= present.min() <= present.max() <= greatest:
        raise pa.ArrowInvalid("a year outside 1 to 9999")
    return numbers


def _convert_temporal(column: Column, read: pa.Array, doubtful: set[int]) -> pa.Array:
    """Value by value: for mixed forms, and to find the ones that are wrong."""
    converted: list[Any] = []
    for row, value in enumerate(read.to_pylist()):
        try:
            written = Number(value) if isinstance(value, int) else value
            converted.append(convert(written, column.type, column.name))
        except FaultError:
            converted.append(None)
            doubtful.add(row)
    return pa.array(converted, arrow_type(column.type))
