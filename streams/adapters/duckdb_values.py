"""DuckDB values as JSON: one converter per result column, chosen once by its type; None where orjson needs no help.

The mapping is part of the wire protocol (docs/wire-protocol.md): decimals, UUIDs, dates and times as text, timestamps
as ISO 8601 (with +00:00 for TIMESTAMPTZ), 64-bit integers as JSON integers and wider ones as text, NaN and infinities
as text, blobs in base64, JSON columns as the JSON they hold, lists as arrays, structs and maps as objects.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, date, datetime, time, timedelta
from functools import partial
from typing import Any

import orjson
from duckdb.sqltypes import DuckDBPyType

Converter = Callable[[Any], Any]

_INT64_MIN, _UINT64_MAX = -(2**63), 2**64 - 1
#: Types whose Python values orjson writes as the protocol wants them.
_PLAIN = (
    *("boolean", "tinyint", "smallint", "integer", "bigint", "utinyint", "usmallint", "uinteger", "ubigint"),
    *("varchar", "enum", "bit", "sqlnull"),
)


def row_encoder(types: Sequence[DuckDBPyType]) -> Callable[[list[tuple[Any, ...]]], bytes]:
    """Rows to the text of a JSON array of arrays."""
    converters = [(index, converter) for index, kind in enumerate(types) if (converter := _converter(kind))]
    if not converters:
        return orjson.dumps

    def encode(rows: list[tuple[Any, ...]]) -> bytes:
        return orjson.dumps([_converted(row, converters) for row in rows])

    return encode


def _converted(row: tuple[Any, ...], converters: Iterable[tuple[int, Converter]]) -> list[Any]:
    values = list(row)
    for index, converter in converters:
        if values[index] is not None:
            values[index] = converter(values[index])
    return values


def _converter(kind: DuckDBPyType) -> Converter | None:
    """How values of this type become JSON. Converters never see None."""
    identifier = kind.id
    if str(kind) == "JSON":
        return _json
    if identifier in _PLAIN:
        return None
    if identifier in ("list", "array"):
        return partial(_list, _converter(_child(kind, "child")) or _same)
    if identifier == "struct":
        fields = [(name, field) for name, field in kind.children if isinstance(field, DuckDBPyType)]
        return partial(_struct, [(name, _converter(field) or _same) for name, field in fields])
    if identifier == "map":
        return partial(_map, _converter(_child(kind, "value")) or _same)
    converter: Converter = _BY_TYPE.get(str(identifier), _any)
    return converter


def _child(kind: DuckDBPyType, name: str) -> DuckDBPyType:
    child = dict(kind.children)[name]
    assert isinstance(child, DuckDBPyType)
    return child


def _same(value: Any) -> Any:
    return value


def _list(element: Converter, values: Iterable[Any]) -> list[Any]:
    return [None if value is None else element(value) for value in values]


def _struct(fields: Sequence[tuple[str, Converter]], value: dict[str, Any] | tuple[Any, ...]) -> Any:
    if isinstance(value, tuple):  # a row without names, (1, 2)
        return [None if item is None else convert(item) for (_, convert), item in zip(fields, value, strict=True)]
    return {name: None if value[name] is None else convert(value[name]) for name, convert in fields}


def _map(element: Converter, value: dict[Any, Any]) -> dict[str, Any]:
    return {str(_any(key)): None if item is None else element(item) for key, item in value.items()}


def _json(value: str) -> orjson.Fragment:
    return orjson.Fragment(value)


def _wide_integer(value: int) -> int | str:
    return value if _INT64_MIN <= value <= _UINT64_MAX else str(value)


def _float(value: float) -> float | str:
    if value - value == 0:  # neither NaN nor an infinity
        return value
    return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"


def _timestamp(value: datetime | str) -> str:
    return value if isinstance(value, str) else value.isoformat()  # years beyond 9999 arrive as text


def _timestamp_with_zone(value: datetime | str) -> str:
    if isinstance(value, str):
        return value
    # The infinities arrive without a zone.
    return (value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)).isoformat()


def _interval(value: timedelta) -> str:
    """ISO 8601; DuckDB counts a month of an interval as 30 days."""
    seconds = value.seconds + value.microseconds / 1_000_000
    return f"P{value.days}DT{seconds:g}S"


def _blob(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _any(value: Any) -> Any:
    """By the value, for types without a converter of their own (unions, keys of maps)."""
    match value:
        case bool() | str() | None:
            return value
        case int():
            return _wide_integer(value)
        case float():
            return _float(value)
        case bytes():
            return _blob(value)
        case datetime():
            return _timestamp_with_zone(value) if value.tzinfo else _timestamp(value)
        case date() | time():
            return value.isoformat()
        case timedelta():
            return _interval(value)
        case list() | tuple():
            return _list(_any, value)
        case dict():
            return _map(_any, value)
        case _:
            return str(value)


_BY_TYPE: dict[str, Converter] = {
    "decimal": str,
    "hugeint": _wide_integer,
    "uhugeint": _wide_integer,
    "float": _float,
    "double": _float,
    "uuid": str,
    "date": str,
    "time": str,
    "timestamp": _timestamp,
    "timestamp_s": _timestamp,
    "timestamp_ms": _timestamp,
    "timestamp_ns": _timestamp,
    "timestamp with time zone": _timestamp_with_zone,
    "interval": _interval,
    "blob": _blob,
}
