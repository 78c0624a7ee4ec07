"""Avro in Confluent's wire format: what fastavro writes is stored exactly or parked, and no bytes do harm."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.table import ArrayType, RecordFormat, StructField, StructType, TableDefinition
from streams.adapters.format_decoder import FormatDecoder
from streams.errors import SchemaRegistryUnavailableError
from streams.limits import JSON_DEPTH_MAX, RECORD_BYTES_MAX
from streams.ports import DecodedBatch, ParkReason
from tests.avro_samples import MemoryRegistry, binary, encoded, framed
from tests.store_samples import DECODER, SEATS, batch, scalar, table

WRONG, RANGE = ParkReason.WRONG_TYPE, ParkReason.OUT_OF_RANGE
VARIABLE_DECIMAL = "io.debezium.data.VariableScaleDecimal"
NOON = datetime(2024, 1, 31, 12, tzinfo=UTC)
LOCAL_NOON = NOON.replace(tzinfo=None)
ORDERS = replace(table("orders", ("id",), id="BIGINT", name="VARCHAR"), format=RecordFormat.AVRO)
ORDER = {
    "type": "record",
    "name": "shop.Order",
    "fields": [{"name": "id", "type": "long"}, {"name": "name", "type": ["null", "string"], "default": None}],
}


def decode(
    registry: MemoryRegistry, definition: TableDefinition, values: list[Any], keys: list[bytes | None] | None = None
) -> DecodedBatch:
    result = FormatDecoder(DECODER, registry).decode(definition, batch(definition, values, keys=keys))
    assert len(result.rows) + len(result.deletes) + len(result.parked) == len(values)
    return result


def record(kind: Any) -> dict[str, Any]:
    return {"type": "record", "name": "R", "fields": [{"name": "v", "type": kind}]}


def outcome(result: DecodedBatch) -> Any:
    return result.parked[0].reason if result.parked else result.rows["v"][0].as_py()


def one(kind: Any, schema: Any, raw: Any) -> Any:
    """What a column of that type holds of a raw value of that schema, written without its logical types."""
    registry, plain = MemoryRegistry(), record(without_logical_types(schema))
    definition = replace(table("t", v=kind), format=RecordFormat.AVRO)
    value = framed(registry.register(record(schema)), binary(plain, {"v": raw}))
    return outcome(decode(registry, definition, [value]))


def without_logical_types(schema: Any) -> Any:
    if isinstance(schema, list):
        return [without_logical_types(branch) for branch in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: without_logical_types(item) for key, item in schema.items() if key != "logicalType"}


def logical(kind: str, name: str, /, **more: Any) -> dict[str, Any]:
    return {"type": kind, "logicalType": name, **more}


def connect(kind: str, name: str, /, **more: Any) -> dict[str, Any]:
    return {"type": kind, "connect.version": 1, "connect.name": name, **more}


MONEY = logical("bytes", "decimal", precision=10, scale=2)
FIXED_MONEY = logical("fixed", "decimal", precision=10, scale=2, name="Money", size=5)


@pytest.mark.parametrize(
    ("kind", "schema", "raw", "expected"),
    [
        ("INTEGER", "int", -5, -5),
        ("BIGINT", "long", 2**63 - 1, 2**63 - 1),
        ("SMALLINT", "long", 40_000, RANGE),
        ("UBIGINT", "long", -1, RANGE),
        ("INTEGER", "string", "5", WRONG),
        ("INTEGER", "double", 5.0, 5),
        ("INTEGER", "double", 5.5, WRONG),
        ("DOUBLE", "double", 0.1, 0.1),
        ("DOUBLE", "float", 0.1, 0.10000000149011612),
        ("DOUBLE", "double", math.inf, RANGE),
        ("DOUBLE", "double", math.nan, RANGE),
        ("DOUBLE", "long", 7, 7.0),
        ("REAL", "float", 0.1, 0.10000000149011612),
        ("REAL", "double", 0.1, RANGE),
        ("REAL", "double", 0.5, 0.5),
        ("REAL", "double", 1e300, RANGE),
        ("DECIMAL(10,2)", "double", 0.5, Decimal("0.50")),
        ("DECIMAL(10,2)", "double", 0.1, RANGE),
        ("DECIMAL(10,2)", "double", 5e-324, RANGE),
        ("DECIMAL(10,2)", "long", 7, Decimal("7.00")),
        ("DECIMAL(10,2)", "string", "7.5", Decimal("7.50")),
        ("DECIMAL(10,2)", MONEY, b"\x04\xd2", Decimal("12.34")),
        ("DECIMAL(10,2)", MONEY, b"\xff", Decimal("-0.01")),
        ("DECIMAL(3,1)", MONEY, b"\x04\xd2", RANGE),
        ("DECIMAL(10,2)", MONEY, b"", WRONG),
        ("DECIMAL(10,2)", FIXED_MONEY, b"\0\0\0\x04\xd2", Decimal("12.34")),
        ("DECIMAL(10,2)", "bytes", b"\xd7\x6d\xf8", WRONG),
        ("DECIMAL(10,2)", logical("bytes", "decimal", precision=2, scale=5), b"\x01", WRONG),
        ("BOOLEAN", "boolean", True, True),
        ("BOOLEAN", "int", 1, WRONG),
        ("VARCHAR", "string", "Zoë\n☃", "Zoë\n☃"),
        ("VARCHAR", "int", 5, WRONG),
        ("VARCHAR", {"type": "enum", "name": "E", "symbols": ["A", "B"]}, "B", "B"),
        ("VARCHAR", "bytes", b"\0\1\2", "AAEC"),
        ("VARCHAR", {"type": "fixed", "name": "F", "size": 3}, b"\0\1\2", "AAEC"),
        ("VARCHAR", logical("fixed", "duration", name="D", size=12), b"\1" * 12, "AQEBAQEBAQEBAQEB"),
        ("VARCHAR", logical("int", "date"), 19782, "2024-02-29"),
        ("UUID", logical("string", "uuid"), "0000000A-0000-0000-0000-00000000000B", str(UUID(int=(10 << 96) + 11))),
        ("UUID", logical("fixed", "uuid", name="U", size=16), UUID(int=5).bytes, str(UUID(int=5))),
        ("UUID", "string", "nope", WRONG),
        ("DATE", logical("int", "date"), 19782, date(2024, 2, 29)),
        ("DATE", logical("int", "date"), -719_163, RANGE),
        ("DATE", "int", 19782, WRONG),
        ("TIMESTAMP", logical("int", "date"), 19782, datetime(2024, 2, 29)),  # noqa: DTZ001
        ("TIMESTAMPTZ", logical("int", "date"), 19782, WRONG),
        ("TIMESTAMPTZ", logical("long", "timestamp-millis"), 1706702400000, NOON),
        ("TIMESTAMPTZ", logical("long", "timestamp-millis"), -1, datetime(1969, 12, 31, 23, 59, 59, 999000, UTC)),
        ("TIMESTAMPTZ", logical("long", "timestamp-micros"), 1706702400000001, NOON.replace(microsecond=1)),
        ("TIMESTAMPTZ", logical("long", "timestamp-nanos"), 1706702400000001000, NOON.replace(microsecond=1)),
        ("TIMESTAMPTZ", logical("long", "timestamp-nanos"), 1706702400000001001, RANGE),
        ("TIMESTAMPTZ", logical("long", "timestamp-micros"), 2**63 - 1, RANGE),
        ("TIMESTAMP", logical("long", "timestamp-micros"), 1706702400000000, LOCAL_NOON),
        ("TIMESTAMP", logical("long", "local-timestamp-millis"), 1706702400000, LOCAL_NOON),
        ("TIMESTAMP", logical("long", "local-timestamp-micros"), 1706702400000000, LOCAL_NOON),
        ("TIMESTAMPTZ", logical("long", "local-timestamp-micros"), 1706702400000000, WRONG),
        ("TIMESTAMPTZ", "long", 1706702400000, WRONG),
        ("BIGINT", logical("long", "timestamp-micros"), 5, WRONG),
        ("BIGINT", logical("long", "time-micros"), 5, 5),
        ("INTEGER", logical("int", "timestamp-millis"), 5, 5),
        ("TIMESTAMP", connect("long", "io.debezium.time.MicroTimestamp"), 1706702400000000, LOCAL_NOON),
        ("DATE", connect("int", "io.debezium.time.Date"), 19782, date(2024, 2, 29)),
        (
            "TIMESTAMPTZ",
            logical("long", "timestamp-millis", **{"connect.name": "org.apache.kafka.connect.data.Timestamp"}),
            1706702400000,
            NOON,
        ),
        ("JSON", connect("string", "io.debezium.data.Json"), '{"a": 1.50}', '{"a":1.50}'),
        ("JSON", "string", "text", '"text"'),
        ("JSON", record("float") | {"name": "Inner"}, {"v": 0.5}, '{"v":0.5}'),
        (
            "JSON",
            {"type": "map", "values": logical("long", "timestamp-micros")},
            {"at": 1},
            '{"at":"1970-01-01T00:00:00.000001Z"}',
        ),
        ("JSON", "double", math.nan, RANGE),
        ("JSON", "null", None, None),
        (ArrayType(scalar("SMALLINT")), {"type": "array", "items": ["null", "int"]}, [1, None], [1, None]),
        (ArrayType(scalar("SMALLINT")), {"type": "array", "items": "int"}, [40_000], RANGE),
        (
            StructType((StructField("a", scalar("DATE")),)),
            {"type": "map", "values": logical("int", "date")},
            {"a": 0, "b": 1},
            {"a": date(1970, 1, 1)},
        ),
        ("DATE", ["null", logical("int", "date"), "string"], 19782, date(2024, 2, 29)),
        (
            "TIMESTAMPTZ",
            [logical("int", "date"), logical("long", "timestamp-millis")],
            2**40,
            datetime.fromtimestamp(2**40 / 1000, UTC),
        ),
        ("DECIMAL(9,0)", ["null", FIXED_MONEY], None, None),
    ],
)
def test_a_value_is_what_its_schema_says_or_parked(kind: Any, schema: Any, raw: Any, expected: Any) -> None:
    assert one(kind, schema, raw) == expected


# -- the wire, schemas and the registry --------------------------------------------------------------------------------


def test_upserts_and_tombstones_with_keys_in_avro_json_and_plain_text() -> None:
    registry = MemoryRegistry()
    key = record("long") | {"fields": [{"name": "id", "type": "long"}], "name": "Key"}
    keys = [encoded(registry, key, {"id": 7}), encoded(registry, "long", 7), b'{"id": 7}', b"7"]
    assert decode(registry, ORDERS, [None] * 4, list(keys)).deletes["id"].to_pylist() == [7] * 4
    value = encoded(registry, ORDER, {"id": 7, "name": "x"})
    result = decode(registry, ORDERS, [value, value], [keys[0], None])
    assert result.rows.select(["id", "name"]).to_pylist() == [{"id": 7, "name": "x"}]
    assert result.parked[0].reason is ParkReason.MISSING_KEY


def test_a_key_of_several_columns() -> None:
    registry, seats = MemoryRegistry(), replace(SEATS, format=RecordFormat.AVRO)
    fields = [{"name": "flight", "type": "int"}, {"name": "seat", "type": "string"}]
    key = encoded(registry, {"type": "record", "name": "K", "fields": fields}, {"flight": 1, "seat": "2A"})
    result = decode(registry, seats, [None, None, None], [key, encoded(registry, "int", 1), framed(99, b"\2")])
    assert result.deletes.select(["flight", "seat"]).to_pylist() == [{"flight": 1, "seat": "2A"}]
    assert [parked.reason for parked in result.parked] == [ParkReason.BAD_KEY] * 2


@pytest.mark.parametrize(
    ("value", "reason", "says"),
    [
        (b"", ParkReason.NOT_AVRO, "zero byte"),
        (b'{"id": 1}', ParkReason.NOT_AVRO, "7b 22"),
        (b"\0\0\0\0", ParkReason.NOT_AVRO, "zero byte"),
        (framed(1, b""), ParkReason.NOT_AVRO, "end before"),
        (framed(1, b"\2\0\0"), ParkReason.NOT_AVRO, "1 bytes are left over"),
        (framed(1, b"\2\4"), ParkReason.NOT_AVRO, "branch 2 of a union of 2"),
        (framed(1, b"\2\1"), ParkReason.NOT_AVRO, "branch -1"),
        (framed(1, b"\2\2\6ab"), ParkReason.NOT_AVRO, "end before"),
        (framed(1, b"\2\2\1"), ParkReason.NOT_AVRO, "end before"),
        (framed(1, b"\xff" * 11 + b"\0"), ParkReason.NOT_AVRO, "ten bytes"),
        (framed(1, b"\xff" * 9 + b"\x7f\0"), ParkReason.NOT_AVRO, "64 bits"),
        (framed(1, b"\2\2\4\xff\xff"), ParkReason.INVALID_UTF8, "UTF-8"),
        (framed(1, b"\2\2" + b"\x80" * 4 + b"\x01" + b"x" * RECORD_BYTES_MAX), ParkReason.TOO_LARGE, "limit"),
        (framed(77, b"\2\0"), ParkReason.UNKNOWN_SCHEMA, "schema 77"),
        (framed(2, b"\2"), ParkReason.NOT_AN_OBJECT, "Avro record"),
        (framed(3, b""), ParkReason.UNUSABLE_SCHEMA, "kind JSON"),
        (framed(4, b""), ParkReason.UNUSABLE_SCHEMA, "'Nowhere'"),
        (framed(5, b""), ParkReason.UNUSABLE_SCHEMA, "64 levels"),
        (framed(6, b""), ParkReason.UNUSABLE_SCHEMA, "schema 6"),
        (framed(7, b""), ParkReason.UNUSABLE_SCHEMA, "two fields"),
    ],
)
@pytest.mark.invariant(6, place="input")
def test_a_poison_record_costs_only_itself(value: bytes, reason: ParkReason, says: str) -> None:
    registry = MemoryRegistry()
    good = encoded(registry, ORDER, {"id": 5, "name": None})
    registry.register("int")
    registry.register({}, kind="JSON")
    registry.register(record("Nowhere"))
    registry.register('{"type":"array","items":' * 100 + '"int"' + "}" * 100)
    registry.register({"type": "record", "fields": 5})
    registry.register(record("int") | {"fields": [{"name": "v", "type": "int"}] * 2})
    result = decode(registry, ORDERS, [good, value, good])
    ((parked,), ids) = (result.parked, result.rows["id"].to_pylist())
    assert (parked.index, parked.reason, ids) == (1, reason, [5, 5])
    assert says in parked.detail
    assert len(parked.detail) < 350


def test_a_schema_that_holds_itself_is_read_to_the_limit_and_no_deeper() -> None:
    registry = MemoryRegistry()
    definition = replace(table("t", v="INTEGER"), format=RecordFormat.AVRO)
    fields = [{"name": "next", "type": ["null", "Node"]}, {"name": "v", "type": ["null", "int"]}]
    number = registry.register({"type": "record", "name": "Node", "fields": fields})
    for depth in (1, JSON_DEPTH_MAX - 1, JSON_DEPTH_MAX, 4_000_000):
        value = framed(number, b"\2" * depth + b"\0\0" + b"\2\12" * depth if depth < 10**6 else b"\2" * depth)
        expected = 5 if depth < JSON_DEPTH_MAX else ParkReason.TOO_DEEP
        assert outcome(decode(registry, definition, [value])) == expected


@pytest.mark.parametrize("items", ["null", {"type": "record", "name": "Empty", "fields": []}])
def test_an_array_of_nothing_without_end_takes_no_time(items: Any) -> None:
    registry = MemoryRegistry()
    definition = replace(table("t", v="INTEGER"), format=RecordFormat.AVRO)
    schema = record("int") | {"fields": [{"name": "a", "type": {"type": "array", "items": items}}]}
    value = framed(registry.register(schema), b"\xfe\xff\xff\xff\xff\xff\xff\x7f\0")
    assert outcome(decode(registry, definition, [value])) == ParkReason.NOT_AVRO


def test_schemas_in_names_spaces_and_references_are_found() -> None:
    registry = MemoryRegistry()
    money = {"type": "record", "name": "Money", "namespace": "shop", "fields": [{"name": "cents", "type": "int"}]}
    order = {
        "type": "record",
        "name": "Order",
        "namespace": "shop",
        "fields": [{"name": "v", "type": "Money"}, {"name": "w", "type": ["null", "shop.Money"]}],
    }
    definition = replace(table("t", v="JSON", w="JSON"), format=RecordFormat.AVRO)
    number = registry.register(order, money)
    union = registry.register(["shop.Order", "shop.Money"], money, order)
    result = decode(registry, definition, [framed(number, b"\2\2\4"), framed(union, b"\0\2\2\4")])
    assert result.rows.select(["v", "w"]).to_pylist() == [{"v": '{"cents":1}', "w": '{"cents":2}'}] * 2


def test_a_schema_is_asked_for_once_and_an_unknown_one_once_per_batch() -> None:
    registry = MemoryRegistry()
    decoder = FormatDecoder(DECODER, registry)
    values = [encoded(registry, ORDER, {"id": 1}), framed(9, b""), framed(9, b"")]
    for _ in range(2):
        decoder.decode(ORDERS, batch(ORDERS, values))
    assert registry.asked == [1, 9, 9]


@pytest.mark.invariant(6, place="outage")
def test_while_the_registry_is_away_known_schemas_go_on_and_nothing_is_parked_for_want_of_others() -> None:
    registry = MemoryRegistry()
    decoder = FormatDecoder(DECODER, registry)
    known, new = encoded(registry, ORDER, {"id": 1}), encoded(registry, ORDER, {"id": 2})
    decoder.decode(ORDERS, batch(ORDERS, [known]))
    registry.is_away = True
    assert len(decoder.decode(ORDERS, batch(ORDERS, [known])).rows) == 1
    for values, keys in (([known, b"poison", new], None), ([None], [new])):
        with pytest.raises(SchemaRegistryUnavailableError):
            decoder.decode(ORDERS, batch(ORDERS, values, keys=keys))
    registry.is_away = False
    assert decoder.decode(ORDERS, batch(ORDERS, [known, b"poison", new])).rows["id"].to_pylist() == [1, 2]


# -- Debezium in Avro --------------------------------------------------------------------------------------------------

ROW = {
    "type": "record",
    "name": "Value",
    "fields": [
        {"name": "id", "type": "long"},
        {"name": "at", "type": ["null", connect("long", "io.debezium.time.MicroTimestamp")]},
        {
            "name": "seen",
            "type": [
                "null",
                logical("long", "timestamp-millis", **{"connect.name": "org.apache.kafka.connect.data.Timestamp"}),
            ],
        },
        {"name": "price", "type": ["null", MONEY | {"connect.name": "org.apache.kafka.connect.data.Decimal"}]},
        {
            "name": "big",
            "type": [
                "null",
                {
                    "type": "record",
                    "name": "Variable",
                    "connect.name": VARIABLE_DECIMAL,
                    "fields": [{"name": "scale", "type": "int"}, {"name": "value", "type": "bytes"}],
                },
            ],
        },
        {"name": "note", "type": ["null", "string"]},
    ],
}
CHANGE = {
    "type": "record",
    "name": "Envelope",
    "namespace": "server.public.orders",
    "fields": [
        {"name": "before", "type": ["null", ROW]},
        {"name": "after", "type": ["null", "Value"]},
        {"name": "op", "type": "string"},
    ],
}


def test_a_debezium_topic_in_avro() -> None:
    registry = MemoryRegistry()
    definition = table(
        "c",
        ("id",),
        id="BIGINT",
        at="TIMESTAMP",
        seen="TIMESTAMP",
        price="DECIMAL(10,2)",
        big="DECIMAL(10,2)",
        note="VARCHAR",
    )
    definition = replace(definition, format=RecordFormat.DEBEZIUM_AVRO)
    number = registry.register(CHANGE)
    plain = without_logical_types(CHANGE)
    full = {
        "id": 1,
        "at": 1706702400000001,
        "seen": 1706702400000,
        "price": b"\x04\xd2",
        "big": {"scale": 1, "value": b"\x04\xd2"},
        "note": "x",
    }
    key = encoded(registry, {"type": "record", "name": "Key", "fields": [{"name": "id", "type": "long"}]}, {"id": 3})
    changes = [
        {"op": "c", "before": None, "after": full},
        {"op": "d", "before": {"id": 2}, "after": None},
        {"op": "d", "before": None, "after": None},
        {"op": "t", "before": None, "after": None},
        {"op": "u", "before": None, "after": {"id": 4, "note": "__debezium_unavailable_value"}},
    ]
    values: list[Any] = [framed(number, binary(plain, change)) for change in changes]
    result = decode(registry, definition, [*values, None, encoded(registry, ORDER, {"id": 1})], [key] * 7)
    (row,) = result.rows.to_pylist()
    assert [row[name] for name in definition.column_names] == [
        1,
        LOCAL_NOON.replace(microsecond=1),
        LOCAL_NOON,
        Decimal("12.34"),
        Decimal("123.40"),
        "x",
    ]
    assert result.deletes["id"].to_pylist() == [2, 3, 3]
    assert [parked.reason for parked in result.parked] == [
        ParkReason.UNSUPPORTED_OPERATION,
        ParkReason.MISSING_VALUE,
        ParkReason.NOT_A_CHANGE,
    ]
    zoned = replace(table("c", ("id",), id="BIGINT", seen="TIMESTAMPTZ"), format=RecordFormat.DEBEZIUM_AVRO)
    assert decode(registry, zoned, values[:1], [key]).parked[0].reason is WRONG


# -- properties --------------------------------------------------------------------------------------------------------

_FIELDS: dict[str, tuple[Any, Any, st.SearchStrategy[Any]]] = {
    "integer": ("INTEGER", "int", st.integers(-(2**31), 2**31 - 1)),
    "bigint": ("BIGINT", "long", st.integers(-(2**63), 2**63 - 1)),
    "real": ("REAL", "float", st.floats(width=32, allow_nan=False, allow_infinity=False)),
    "double": ("DOUBLE", "double", st.floats(allow_nan=False, allow_infinity=False)),
    "boolean": ("BOOLEAN", "boolean", st.booleans()),
    "varchar": ("VARCHAR", "string", st.text(max_size=8)),
    "money": ("DECIMAL(10,2)", MONEY, st.decimals(-99_999_999, 99_999_999, places=2)),
    "fixed": ("DECIMAL(10,2)", FIXED_MONEY, st.decimals(-99_999_999, 99_999_999, places=2)),
    "day": ("DATE", logical("int", "date"), st.dates()),
    "at": ("TIMESTAMPTZ", logical("long", "timestamp-micros"), st.datetimes(timezones=st.just(UTC))),
    "local": ("TIMESTAMP", logical("long", "local-timestamp-micros"), st.datetimes()),
    "uuid": ("UUID", logical("string", "uuid"), st.uuids()),
    "numbers": (
        ArrayType(scalar("BIGINT")),
        {"type": "array", "items": "long"},
        st.lists(st.integers(-5, 5), max_size=3),
    ),
}
EVERYTHING = replace(
    table("everything", **{name: kind for name, (kind, _, _) in _FIELDS.items()}), format=RecordFormat.AVRO
)
EVERYTHING_AVRO = {
    "type": "record",
    "name": "Everything",
    "fields": [{"name": name, "type": ["null", schema]} for name, (_, schema, _) in _FIELDS.items()],
}
_rows = st.fixed_dictionaries({name: st.none() | values for name, (_, _, values) in _FIELDS.items()})


@settings(max_examples=100, deadline=None)
@given(st.lists(_rows, max_size=4))
def test_what_fastavro_writes_with_its_own_logical_types_is_what_is_stored(rows: list[dict[str, Any]]) -> None:
    registry = MemoryRegistry()
    number = registry.register(EVERYTHING_AVRO)
    result = decode(registry, EVERYTHING, [framed(number, binary(EVERYTHING_AVRO, row)) for row in rows])
    assert not result.parked
    for stored, row in zip(result.rows.to_pylist(), rows, strict=True):
        for name, value in row.items():
            assert stored[name] == (str(value) if isinstance(value, UUID) else value)
            # -0.0 equals 0.0.
            assert not isinstance(value, float) or math.copysign(1, stored[name]) == math.copysign(1, value)


@settings(max_examples=200, deadline=timedelta(seconds=5))
@given(_rows, st.data())
@pytest.mark.invariant(10, place="input")
def test_invariant_10_no_bytes_make_decoding_fail(row: dict[str, Any], data: st.DataObject) -> None:
    registry = MemoryRegistry()
    fields = [
        {"name": "next", "type": ["null", "Node", {"type": "map", "values": "Node"}]},
        {"name": "e", "type": EVERYTHING_AVRO},
    ]
    schema = data.draw(st.sampled_from([EVERYTHING_AVRO, {"type": "record", "name": "Node", "fields": fields}, CHANGE]))
    content = bytearray(binary(EVERYTHING_AVRO, row))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content)))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    definition = replace(EVERYTHING, format=data.draw(st.sampled_from([RecordFormat.AVRO, RecordFormat.DEBEZIUM_AVRO])))
    decode(registry, definition, [framed(registry.register(schema), bytes(content))])
