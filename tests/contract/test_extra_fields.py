"""Fields that a table does not declare: ignored, parked or kept, by one rule in every format."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from schemas.table import ArrayType, ExtraFields, RecordFormat, StructField, StructType, TableDefinition
from streams.adapters.format_decoder import FormatDecoder
from streams.ports import DecodedBatch, ParkReason
from tests.avro_samples import MemoryRegistry, encoded
from tests.store_samples import DECODER, batch, scalar, table

ADDRESS = StructType(
    (StructField("street", scalar("VARCHAR")), StructField("geo", StructType((StructField("lat", scalar("INTEGER")),))))
)
PEOPLE = table("people", ("id",), id="BIGINT", address=ADDRESS, stops=ArrayType(ADDRESS), rest="JSON", any="JSON")
IGNORE = PEOPLE
PARK = replace(PEOPLE, extra_fields=ExtraFields.PARK)
KEEP = replace(PEOPLE, extra_fields=ExtraFields.KEEP, extra_column="rest")

GEO = {"type": "record", "name": "Geo", "fields": [{"name": "lat", "type": "int"}, {"name": "lon", "type": "int"}]}
STOP = {
    "type": "record",
    "name": "Stop",
    "fields": [
        {"name": "street", "type": "string"},
        {"name": "zip", "type": ["null", "int"]},
        {"name": "geo", "type": GEO},
    ],
}
PERSON = {
    "type": "record",
    "name": "Person",
    "fields": [
        {"name": "id", "type": "long"},
        {"name": "nick", "type": ["null", "string"]},
        {"name": "address", "type": STOP},
        {"name": "stops", "type": {"type": "array", "items": ["null", "Stop"]}},
        {"name": "rest", "type": "int"},
        {"name": "any", "type": "int"},
    ],
}
STREET = {"street": "a", "zip": None, "geo": {"lat": 1, "lon": 2}}
ROW: dict[str, Any] = {"id": 1, "nick": "x", "address": STREET, "stops": [None, STREET], "rest": 5, "any": 6}
KEPT = {
    "nick": "x",
    "address": {"zip": None, "geo": {"lon": 2}},
    "stops": [None, {"zip": None, "geo": {"lon": 2}}],
    "rest": 5,
}


def decode(definition: TableDefinition, record_format: RecordFormat, row: dict[str, Any]) -> DecodedBatch:
    registry = MemoryRegistry()
    envelope = {
        "type": "record",
        "name": "Envelope",
        "fields": [{"name": "op", "type": "string"}, {"name": "after", "type": PERSON}],
    }
    change = {"op": "c", "after": row}
    made: dict[RecordFormat, Callable[[], Any]] = {
        RecordFormat.JSON: lambda: row,
        RecordFormat.DEBEZIUM: lambda: change,
        RecordFormat.AVRO: lambda: encoded(registry, PERSON, row),
        RecordFormat.DEBEZIUM_AVRO: lambda: encoded(registry, envelope, change),
    }
    value = made[record_format]()
    definition = replace(definition, format=record_format)
    return FormatDecoder(DECODER, registry).decode(definition, batch(definition, [value]))


FORMATS = pytest.mark.parametrize("record_format", RecordFormat)


@FORMATS
def test_they_are_ignored_unless_the_table_says_otherwise(record_format: RecordFormat) -> None:
    (row,) = decode(IGNORE, record_format, ROW).rows.to_pylist()
    assert (row["id"], row["rest"], row["any"]) == (1, "5", "6")
    assert row["address"] == {"street": "a", "geo": {"lat": 1}}


@FORMATS
def test_they_park_the_record_that_has_any(record_format: RecordFormat) -> None:
    (parked,) = decode(PARK, record_format, ROW).parked
    assert (parked.reason, parked.detail) == (ParkReason.EXTRA_FIELD, "field 'nick' is not declared")


@FORMATS
def test_they_are_kept_in_their_own_shape_with_a_field_of_the_columns_name_among_them(
    record_format: RecordFormat,
) -> None:
    (row,) = decode(KEEP, record_format, ROW).rows.to_pylist()
    assert json.loads(row["rest"]) == KEPT
    assert row["any"] == "6"
    assert row["stops"] == [None, {"street": "a", "geo": {"lat": 1}}]


@pytest.mark.parametrize(
    ("row", "path"),
    [
        ({"id": 1, "address": {"street": "a", "zip": 1}}, "address.zip"),
        ({"id": 1, "address": {"geo": {"lat": 1, "lon": {"x": 1}}}}, "address.geo.lon"),
        ({"id": 1, "stops": [None, {}, {"zip": None}]}, "stops.zip"),
        ({"id": 1, "new": {"deep": 1}}, "new"),
    ],
)
def test_the_letter_says_where_the_first_one_is(row: dict[str, Any], path: str) -> None:
    (parked,) = decode(PARK, RecordFormat.JSON, row).parked
    assert parked.detail == f"field {path!r} is not declared"


@pytest.mark.parametrize("definition", [PARK, KEEP])
def test_a_record_without_any_is_a_row_like_any_other(definition: TableDefinition) -> None:
    (row,) = decode(definition, RecordFormat.JSON, {"id": 1, "any": {"x": 1}, "address": None}).rows.to_pylist()
    assert (row["rest"], row["any"]) == (None, '{"x":1}')


def test_what_is_kept_is_as_it_was_written() -> None:
    definition = replace(KEEP, format=RecordFormat.JSON)
    value = b'{"id": 1, "big": 12345678901234567890.10, "twice": 1, "twice": 2, "nothing": null, "deep": [{"a": 1e5}]}'
    result = FormatDecoder(DECODER).decode(definition, batch(definition, [value]))
    assert result.rows["rest"].to_pylist() == [
        '{"big":12345678901234567890.10,"twice":1,"twice":2,"nothing":null,"deep":[{"a":1e5}]}'
    ]


def test_what_cannot_be_kept_parks_its_record_and_is_harmless_where_it_is_ignored() -> None:
    schema = {
        "type": "record",
        "name": "R",
        "fields": [{"name": "id", "type": "long"}, {"name": "x", "type": "double"}],
    }
    registry = MemoryRegistry()
    value = encoded(registry, schema, {"id": 1, "x": float("nan")})
    for policy, definition in (("keep", KEEP), ("ignore", IGNORE)):
        definition = replace(definition, format=RecordFormat.AVRO)
        result = FormatDecoder(DECODER, registry).decode(definition, batch(definition, [value]))
        assert [parked.reason for parked in result.parked] == ([ParkReason.OUT_OF_RANGE] if policy == "keep" else [])
