"""Debezium's JSON: what a connector writes is stored exactly, deletes included, or its record is parked."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.table import ArrayType, RecordFormat, StructField, StructType, TableDefinition
from streams.adapters.format_decoder import FormatDecoder
from streams.ports import DecodedBatch, ParkReason
from tests.store_samples import DECODER, SEATS, batch, scalar, table

FORMATS = FormatDecoder(DECODER)
WRONG, RANGE = ParkReason.WRONG_TYPE, ParkReason.OUT_OF_RANGE
ORDERS = replace(table("orders", ("id",), id="BIGINT", name="VARCHAR"), format=RecordFormat.DEBEZIUM)
SEATS_CDC = replace(SEATS, format=RecordFormat.DEBEZIUM)
LOG = replace(table("log", id="BIGINT"), format=RecordFormat.DEBEZIUM)


def decode(definition: TableDefinition, values: list[Any], keys: list[bytes | None] | None = None) -> DecodedBatch:
    result = FORMATS.decode(definition, batch(definition, values, keys=keys))
    assert len(result.rows) + len(result.deletes) + len(result.parked) == len(values)
    return result


def envelope(op: str, before: Any = None, after: Any = None) -> dict[str, Any]:
    return {
        "before": before,
        "after": after,
        "source": {"connector": "postgresql", "table": "orders", "lsn": 24023128},
        "op": op,
        "ts_ms": 1559033904863,
        "transaction": None,
    }


def struct(field: str, fields: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "struct", "optional": True, "name": "server.public.orders.Value", "field": field, "fields": fields}


def wrapped(payload: Any, row_fields: list[dict[str, Any]]) -> dict[str, Any]:
    sides = [struct("before", row_fields), struct("after", row_fields)]
    op = {"type": "string", "optional": False, "field": "op"}
    return {"schema": {"type": "struct", "fields": [*sides, op], "name": "Envelope"}, "payload": payload}


ID = {"type": "int64", "optional": False, "field": "id"}
NAME = {"type": "string", "optional": True, "field": "name"}


def field(kind: str, name: str | None = None, **more: Any) -> dict[str, Any]:
    return {"type": kind, "optional": True, "field": "v", **({"name": name, "version": 1} if name else {}), **more}


def one(kind: Any, value: Any, schema: dict[str, Any] | None) -> Any:
    """What a column of that type holds after decoding the value under that schema: the value, or the ParkReason."""
    definition = replace(table("t", v=kind), format=RecordFormat.DEBEZIUM)
    record: Any = envelope("c", after={"v": value})
    result = decode(definition, [wrapped(record, [schema]) if schema else record])
    return result.parked[0].reason if result.parked else result.rows["v"][0].as_py()


# -- changes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_schema", [True, False])
def test_creates_reads_and_updates_are_rows_deletes_and_tombstones_delete(with_schema: bool) -> None:
    changes: list[Any] = [
        envelope("r", after={"id": 1, "name": "snapshot"}),
        envelope("c", after={"id": 2, "name": "created"}),
        envelope("u", before={"id": 2, "name": "created"}, after={"id": 2, "name": None}),
        envelope("u", after={"id": 1, "name": "no before"}),
        envelope("d", before={"id": 2, "name": None}),
        None,
    ]
    keys: list[Any] = [{"id": number} for number in (1, 2, 2, 1, 2, 2)]
    if with_schema:
        changes = [wrapped(change, [ID, NAME]) if change else None for change in changes]
        keys = [{"schema": {"type": "struct", "fields": [ID]}, "payload": key} for key in keys]
    result = decode(ORDERS, changes, [json.dumps(key).encode() for key in keys])
    assert not result.parked
    assert result.rows.select(["id", "name", "_offset"]).to_pylist() == [
        {"id": 1, "name": "snapshot", "_offset": 0},
        {"id": 2, "name": "created", "_offset": 1},
        {"id": 2, "name": None, "_offset": 2},
        {"id": 1, "name": "no before", "_offset": 3},
    ]
    assert result.deletes.select(["id", "_offset"]).to_pylist() == [{"id": 2, "_offset": 4}, {"id": 2, "_offset": 5}]


@pytest.mark.parametrize("before", [None, {}, {"name": "x"}, {"id": None, "name": "x"}])
def test_a_delete_without_a_whole_before_goes_by_the_kafka_key(before: Any) -> None:
    result = decode(ORDERS, [envelope("d", before=before)], [b'{"id": 7}'])
    assert result.deletes["id"].to_pylist() == [7]


def test_a_delete_of_a_key_of_several_columns() -> None:
    seat = {"flight": 1, "seat": "2A"}
    values = [envelope("d", before={**seat, "passenger": "x"}), envelope("d", before={"flight": 1}), None]
    result = decode(SEATS_CDC, values, [json.dumps(seat).encode()] * 3)
    assert result.deletes.select(["flight", "seat"]).to_pylist() == [seat] * 3


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (b'{"id": 7}', 7),
        (b'{"schema": {"type": "struct", "fields": []}, "payload": {"id": 7}}', 7),
        (b'{"schema": null, "payload": {"id": 7}}', 7),
        (b'{"schema": {"type": "int64", "optional": false}, "payload": 7}', 7),
        (b"7", 7),
        (b'{"other": 7}', ParkReason.BAD_KEY),
        (b'{"schema": {"type": "struct"}, "payload": {"other": 7}}', ParkReason.BAD_KEY),
        (b'{"schema": {"type": "int64"}, "payload": null}', ParkReason.BAD_KEY),
        (b"seven", ParkReason.BAD_KEY),
        (None, ParkReason.MISSING_KEY),
    ],
)
def test_the_key_of_a_tombstone_comes_with_or_without_its_schema(key: bytes | None, expected: Any) -> None:
    for value in (None, {"schema": None, "payload": None}):
        result = decode(ORDERS, [value], [key])
        assert (result.parked[0].reason if result.parked else result.deletes["id"][0].as_py()) == expected


def test_a_key_object_that_does_not_name_the_column_is_never_taken_for_a_text() -> None:
    names = replace(table("names", ("name",), name="VARCHAR"), format=RecordFormat.DEBEZIUM)
    assert decode(names, [None], [b'{"id": 1}']).parked[0].reason is ParkReason.BAD_KEY
    assert decode(names, [None], [b"plain"]).deletes["name"].to_pylist() == ["plain"]


def test_a_key_has_the_types_of_its_schema() -> None:
    days = replace(table("days", ("day",), day="DATE"), format=RecordFormat.DEBEZIUM)
    schema = {"type": "struct", "fields": [{"type": "int32", "name": "io.debezium.time.Date", "field": "day"}]}
    keys: list[bytes | None] = [
        json.dumps({"schema": schema, "payload": {"day": 19782}}).encode(),
        b'{"day": 19782}',
        b"2024-02-29",
    ]
    assert decode(days, [None] * 3, keys).deletes["day"].to_pylist() == [date(2024, 2, 29)] * 3


@pytest.mark.parametrize(
    ("value", "reason", "says"),
    [
        (envelope("t"), ParkReason.UNSUPPORTED_OPERATION, "truncated"),
        (envelope("m"), ParkReason.UNSUPPORTED_OPERATION, "only c, r, u and d"),
        (envelope("c"), ParkReason.NOT_A_CHANGE, "'after'"),
        (envelope("u", after="text"), ParkReason.NOT_A_CHANGE, "'after'"),
        ({"id": 1, "name": "flattened"}, ParkReason.NOT_A_CHANGE, "'json'"),
        ({"op": 5, "after": {"id": 1}}, ParkReason.NOT_A_CHANGE, "'op'"),
        ({"schema": {"type": "struct"}, "payload": [1]}, ParkReason.NOT_AN_OBJECT, "an array"),
        ([], ParkReason.NOT_AN_OBJECT, "an array"),
        (b"{oops", ParkReason.NOT_JSON, "not JSON"),
        (b"", ParkReason.NOT_JSON, "not JSON"),
        (b'{"op":"c","op":"d","after":{"id":1}}', ParkReason.NOT_A_CHANGE, "'op'"),
        (b'{"op":"c","after":{"id":1,"id":2}}', ParkReason.NOT_JSON, "2 times"),
        (envelope("c", after={"name": "x"}), ParkReason.MISSING_KEY, "'id' is missing"),
        (envelope("c", after={"id": "x"}), ParkReason.WRONG_TYPE, "'id'"),
        (envelope("u", {"id": 1}, {"id": 2}), ParkReason.UNSUPPORTED_OPERATION, "changes the key"),
        (envelope("d", {"id": "x"}), ParkReason.BAD_KEY, "'id'"),
        (envelope("c", after={"id": 1, "name": "__debezium_unavailable_value"}), ParkReason.MISSING_VALUE, "REPLICA"),
        ({**envelope("c"), "deep": json.loads("[" * 70 + "]" * 70)}, ParkReason.TOO_DEEP, "64"),
    ],
)
@pytest.mark.invariant(6, place="input")
def test_what_is_no_change_of_one_row_is_parked_with_the_reason_and_costs_only_itself(
    value: Any, reason: ParkReason, says: str
) -> None:
    good = envelope("c", after={"id": 5, "name": "good"})
    result = decode(ORDERS, [good, value, good])
    ((parked,), ids) = (result.parked, result.rows["id"].to_pylist())
    assert (parked.index, parked.reason, ids) == (1, reason, [5, 5])
    assert says in parked.detail
    assert len(parked.detail) < 300


def test_an_append_table_takes_rows_and_parks_deletes() -> None:
    result = decode(LOG, [envelope("c", after={"id": 1}), envelope("u", {"id": 1}, {"id": 2}), envelope("d"), None])
    assert result.rows["id"].to_pylist() == [1, 2]
    assert [p.reason for p in result.parked] == [ParkReason.UNSUPPORTED_OPERATION, ParkReason.NULL_IN_APPEND_TABLE]


def test_a_change_without_a_kafka_key_is_parked() -> None:
    result = decode(ORDERS, [envelope("c", after={"id": 1}), envelope("d", before={"id": 1})], [None, None])
    assert [parked.reason for parked in result.parked] == [ParkReason.MISSING_KEY] * 2


_tails = st.sampled_from(["}", " }\n", ',"x":1}', "}}", "", ',"payload":1}', "} {}"])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(['{"schema":', '{ "schema": ', '{"payload":1,"schema":']),
            st.sampled_from(
                [json.dumps(wrapped(None, [ID, NAME])["schema"]), "null", "{}", '{"type":"é,\\"payload\\":"}']
            ),
            st.sampled_from([',"payload":', ', "payload": ', ',"payload":{},"payload":']),
            st.sampled_from(
                [
                    json.dumps(envelope("c", after={"id": 1, "name": "x"})),
                    json.dumps(envelope("c", after={"id": "1"})),
                    '{"op":"c","after":{"id":2,"deep":' + "[" * 61 + "]" * 61 + "}}",
                    '{"op":"c","after":{"id":2,"deep":' + "[" * 62 + "]" * 62 + "}}",
                    "null",
                    "[1",
                    '"\\ud800"',
                ]
            ),
            _tails,
        ).map(lambda parts: "".join(parts).encode()),
        max_size=6,
    )
)
def test_a_schema_that_was_seen_before_changes_nothing(values: list[bytes]) -> None:
    together = FormatDecoder(DECODER).decode(ORDERS, batch(ORDERS, list(values)))
    parked = {each.index: (each.reason, each.detail) for each in together.parked}
    rows = dict(zip(together.rows["_offset"].to_pylist(), together.rows["id"].to_pylist(), strict=True))
    for index, value in enumerate(values):
        alone = FormatDecoder(DECODER).decode(ORDERS, batch(ORDERS, [value]))
        assert parked.get(index) == next(((each.reason, each.detail) for each in alone.parked), None)
        assert rows.get(index) == next(iter(alone.rows["id"].to_pylist()), None)


# -- values ------------------------------------------------------------------------------------------------------------

NOON = datetime(2024, 1, 31, 12, tzinfo=UTC)
LOCAL_NOON = NOON.replace(tzinfo=None)
DECIMAL = "org.apache.kafka.connect.data.Decimal"
MONEY = field("bytes", DECIMAL, parameters={"scale": "2", "connect.decimal.precision": "10"})
VARIABLE = field("struct", "io.debezium.data.VariableScaleDecimal")


@pytest.mark.parametrize(
    ("kind", "schema", "value", "expected"),
    [
        ("DATE", field("int32", "io.debezium.time.Date"), 19782, date(2024, 2, 29)),
        ("DATE", field("int32", "org.apache.kafka.connect.data.Date"), -1, date(1969, 12, 31)),
        ("DATE", field("int32", "io.debezium.time.Date"), 2932897, RANGE),
        ("DATE", field("int32", "io.debezium.time.Date"), "x", WRONG),
        ("DATE", field("int32"), 19782, WRONG),
        ("DATE", field("string", "io.debezium.time.IsoDate"), "2024-02-29Z", date(2024, 2, 29)),
        ("VARCHAR", field("int32", "io.debezium.time.Date"), 19782, "2024-02-29"),
        ("INTEGER", field("int32", "io.debezium.time.Date"), 19782, WRONG),
        ("TIMESTAMP", field("int64", "io.debezium.time.Timestamp"), 1706702400000, LOCAL_NOON),
        ("TIMESTAMP", field("int64", "org.apache.kafka.connect.data.Timestamp"), 1706702400000, LOCAL_NOON),
        ("TIMESTAMP", field("int64", "io.debezium.time.MicroTimestamp"), 1706702400000000, LOCAL_NOON),
        ("TIMESTAMP", field("int64", "io.debezium.time.NanoTimestamp"), 1706702400000000000, LOCAL_NOON),
        ("TIMESTAMP", field("int64", "io.debezium.time.NanoTimestamp"), 1706702400000000001, RANGE),
        ("TIMESTAMP", field("int64", "io.debezium.time.MicroTimestamp"), -(2**63), RANGE),
        ("TIMESTAMPTZ", field("int64", "io.debezium.time.MicroTimestamp"), 1706702400000000, WRONG),
        ("TIMESTAMP", field("int64"), 1706702400000, WRONG),
        ("BIGINT", field("int64"), 1706702400000, 1706702400000),
        ("BIGINT", field("int64", "io.debezium.time.MicroTime"), 43200000000, 43200000000),
        ("TIMESTAMPTZ", field("string", "io.debezium.time.ZonedTimestamp"), "2024-01-31T12:00:00Z", NOON),
        ("TIMESTAMPTZ", field("string", "io.debezium.time.ZonedTimestamp"), "2024-01-31T14:00:00.0+02:00", NOON),
        ("TIMESTAMPTZ", field("string", "io.debezium.time.ZonedTimestamp"), "2024-01-31T12:00:00.1234567Z", RANGE),
        ("TIMESTAMP", field("string", "io.debezium.time.ZonedTimestamp"), "2024-01-31T12:00:00Z", LOCAL_NOON),
        ("DECIMAL(10,2)", MONEY, "BNI=", Decimal("12.34")),
        ("DECIMAL(10,2)", MONEY, "//8=", Decimal("-0.01")),
        ("DECIMAL(10,2)", MONEY, "1234", Decimal("-26588.24")),
        ("DECIMAL(10,2)", MONEY, 12.34, Decimal("12.34")),
        ("DECIMAL(4,1)", MONEY, "BNI=", RANGE),
        ("DECIMAL(10,2)", MONEY, "12.34", WRONG),
        ("DECIMAL(10,2)", MONEY, "", WRONG),
        ("DECIMAL(10,2)", MONEY, base64.b64encode(b"\x7f" * 100).decode(), RANGE),
        ("DECIMAL(10,2)", field("bytes"), "1234", WRONG),
        ("DECIMAL(10,2)", field("string"), "1234", Decimal("1234.00")),
        ("DECIMAL(10,2)", field("double"), 12.5, Decimal("12.50")),
        ("DECIMAL(10,2)", VARIABLE, {"scale": 1, "value": "BNI="}, Decimal("123.40")),
        ("DECIMAL(10,2)", VARIABLE, {"scale": -2, "value": "AQ=="}, Decimal("100.00")),
        ("DECIMAL(10,2)", VARIABLE, {"scale": 10**9, "value": "AQ=="}, RANGE),
        ("JSON", field("string", "io.debezium.data.Json"), '{"a": [1.50]}', '{"a":[1.50]}'),
        ("JSON", field("string", "io.debezium.data.Json"), "null", None),
        ("JSON", field("string", "io.debezium.data.Json"), "{oops", ParkReason.NOT_JSON),
        ("JSON", field("string"), '{"a": 1}', '"{\\"a\\": 1}"'),
        ("JSON", MONEY, "BNI=", "12.34"),
        ("JSON", field("int64", "io.debezium.time.MicroTimestamp"), 1706702400000001, '"2024-01-31T12:00:00.000001"'),
        ("VARCHAR", field("string", "io.debezium.data.Json"), '{"a": [1.50]}', '{"a": [1.50]}'),
        (ArrayType(scalar("INTEGER")), field("string", "io.debezium.data.Json"), "[1, 2]", [1, 2]),
        ("UUID", field("string", "io.debezium.data.Uuid"), "123E4567-e89b-12d3-a456-426614174000",
         "123e4567-e89b-12d3-a456-426614174000"),
        ("VARCHAR", field("bytes"), "AAEC", "AAEC"),
        ("VARCHAR", field("bytes"), "X19kZWJleml1bV91bmF2YWlsYWJsZV92YWx1ZQ==", ParkReason.MISSING_VALUE),
        ("BOOLEAN", field("boolean"), True, True),
        ("BOOLEAN", field("int16"), 1, WRONG),
        (ArrayType(scalar("DATE")), field("array", items={"type": "int32", "name": "io.debezium.time.Date"}),
         [19782, None], [date(2024, 2, 29), None]),
        (StructType((StructField("d", scalar("DATE")),)),
         field("struct", fields=[{"type": "int32", "name": "io.debezium.time.Date", "field": "d"}]),
         {"d": 19782}, {"d": date(2024, 2, 29)}),
        ("JSON", field("map", keys={"type": "string"}, values={"type": "int32", "name": "io.debezium.time.Date"}),
         {"a": 19782}, '{"a":"2024-02-29"}'),
        (ArrayType(scalar("VARCHAR")), field("array", items={"type": "string"}), ["__debezium_unavailable_value"],
         ParkReason.MISSING_VALUE),
        ("INTEGER", field("nonsense", "no.such.Type"), 5, 5),
        # Without a schema: the column's type decides, where that is certain.
        ("DATE", None, 19782, date(2024, 2, 29)),
        ("DATE", None, "2024-02-29", date(2024, 2, 29)),
        ("DATE", None, 1706702400000, RANGE),
        ("TIMESTAMP", None, 1706702400000, WRONG),
        ("TIMESTAMPTZ", None, 1706702400000, WRONG),
        ("TIMESTAMPTZ", None, "2024-01-31T12:00:00Z", NOON),
        ("TIMESTAMP", None, "2024-01-31T12:00:00Z", LOCAL_NOON),
        ("DECIMAL(10,2)", None, 12.34, Decimal("12.34")),
        ("DECIMAL(10,2)", None, "12.34", Decimal("12.34")),
        ("DECIMAL(10,2)", None, "-7", Decimal("-7.00")),
        ("DECIMAL(10,2)", None, "12345", Decimal("12345.00")),
        ("DECIMAL(10,2)", None, "1234", WRONG),
        ("DECIMAL(10,2)", None, "BNI=", WRONG),
        ("JSON", None, '{"a": 1}', '"{\\"a\\": 1}"'),
        ("JSON", None, {"a": 1.50}, '{"a":1.5}'),
        ("VARCHAR", None, "text", "text"),
        ("BIGINT", None, 5, 5),
        (ArrayType(scalar("DATE")), None, [19782], [date(2024, 2, 29)]),
    ],
)  # fmt: skip
def test_a_value_is_what_its_schema_says_or_parked(kind: Any, schema: Any, value: Any, expected: Any) -> None:
    assert one(kind, value, schema) == expected


@pytest.mark.parametrize("value", [-(2**63), 10**25, 1.5, "x", [1], {"a": 1}, True, "__debezium_unavailable_value"])
@pytest.mark.parametrize(
    "schema",
    [
        field("int64", "io.debezium.time.MicroTimestamp"),
        field("int32", "io.debezium.time.Date"),
        MONEY,
        VARIABLE,
        field("struct", fields="x"),
        field("array", items=5),
        {"type": 5, "name": [], "field": "v"},
    ],
)
def test_what_no_column_takes_parks_nothing(value: Any, schema: Any) -> None:
    definition = replace(table("t", id="BIGINT"), format=RecordFormat.DEBEZIUM)
    result = decode(definition, [wrapped(envelope("c", after={"id": 1, "v": value}), [ID, schema])])
    assert result.rows["id"].to_pylist() == [1]


_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001


@settings(max_examples=150, deadline=None)
@given(
    st.datetimes(),
    st.sampled_from([("io.debezium.time.Timestamp", 10**3), ("io.debezium.time.MicroTimestamp", 10**6)]),
    st.decimals(-(10**15), 10**15, places=4, allow_nan=False, allow_infinity=False),
)
def test_times_and_decimals_survive_the_way_through_their_encodings(
    moment: datetime, encoding: tuple[str, int], number: Decimal
) -> None:
    name, per_second = encoding
    moment = moment.replace(microsecond=moment.microsecond // 1000 * 1000) if per_second == 10**3 else moment
    count = (moment - _EPOCH) // timedelta(microseconds=10**6 // per_second)
    assert one("TIMESTAMP", count, field("int64", name)) == moment
    unscaled = int(number.scaleb(4))
    content = unscaled.to_bytes((unscaled.bit_length() + 8) // 8, signed=True)
    schema = field("bytes", DECIMAL, parameters={"scale": "4"})
    assert one("DECIMAL(38,4)", base64.b64encode(content).decode(), schema) == number


_anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["schema", "payload", "op", "before", "after", "id", "name", "type", "fields", "field"])
            | st.text(max_size=3),
            inner | st.sampled_from(["c", "u", "d", "struct", DECIMAL, "io.debezium.data.Json"]),
            max_size=6,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(_anything | st.builds(envelope, st.sampled_from("crudtm"), _anything, _anything), max_size=5), _anything
)
@pytest.mark.invariant(10, place="input")
def test_invariant_10_no_document_makes_decoding_fail(values: list[Any], key: Any) -> None:
    decode(ORDERS, [json.dumps(v).encode() for v in values], [json.dumps(key).encode()] * len(values))
