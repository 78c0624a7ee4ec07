"""Decoding: what is stored is exactly what was written, or the record is parked with a reason (invariant 6).

Every case runs on both decoders, alone and hidden in a batch of good records.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.table import ArrayType, ScalarKind, StructField, StructType, TableDefinition
from streams.adapters.duckdb_decoder import DuckDBDecoder
from streams.adapters.exact_decoder import ExactDecoder, ExactOutcome, decode_records
from streams.batches import RecordBatch
from streams.limits import JSON_DEPTH_MAX, RECORD_BYTES_MAX
from streams.ports import DecodedBatch, Decoder, ParkReason
from tests.store_samples import EVERYTHING, FLIGHTS, SEATS, TIMESTAMP_MS, batch, scalar, table

EXACT, FAST = ExactDecoder(), DuckDBDecoder()
DECODERS = pytest.mark.parametrize("decoder", [EXACT, FAST], ids=["exact", "fast"])


def one(decoder: Decoder, kind: Any, json_text: str) -> Any:
    """What a column of that type holds after decoding: the value, or the ParkReason."""
    definition = table("t", v=kind)
    good = [b"{}"] * 5
    result = decoder.decode(definition, batch(definition, [*good, f'{{"v":{json_text}}}'.encode(), *good]))
    assert len(result.rows) + len(result.parked) == 11
    if result.parked:
        (parked,) = result.parked
        assert parked.index == 5
        assert result.rows["_offset"].to_pylist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
        return parked.reason
    assert result.rows["_offset"].to_pylist() == list(range(11))
    return result.rows["v"][5].as_py()


WRONG, RANGE = ParkReason.WRONG_TYPE, ParkReason.OUT_OF_RANGE
NOON = datetime(2024, 1, 31, 12, tzinfo=UTC)


@DECODERS
@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("INTEGER", "5", 5),
        ("INTEGER", "5.0", 5),
        ("INTEGER", "-0", 0),
        ("INTEGER", "null", None),
        ("INTEGER", "1.9", WRONG),
        ("INTEGER", '"5"', WRONG),
        ("INTEGER", "true", WRONG),
        ("INTEGER", "2147483647", 2147483647),
        ("INTEGER", "2147483648", RANGE),
        ("INTEGER", "1e99999999999", RANGE),
        ("INTEGER", "9" * 10_000, RANGE),
        ("TINYINT", "-129", RANGE),
        ("UBIGINT", "18446744073709551615", 2**64 - 1),
        ("UBIGINT", "18446744073709551616", RANGE),
        ("UBIGINT", "-1", RANGE),
        ("BIGINT", "-9223372036854775808", -(2**63)),
        ("DOUBLE", "0.1", 0.1),
        ("DOUBLE", "7", 7.0),
        ("DOUBLE", "1e400", RANGE),
        ("DOUBLE", '"0.1"', WRONG),
        ("DOUBLE", "NaN", ParkReason.NOT_JSON),
        ("DOUBLE", "-Infinity", ParkReason.NOT_JSON),
        ("REAL", "0.5", 0.5),
        ("REAL", "1e39", RANGE),
        ("DECIMAL(10,2)", "1.25", Decimal("1.25")),
        ("DECIMAL(10,2)", '"1.25"', Decimal("1.25")),
        ("DECIMAL(10,2)", "0.30000000000000001", RANGE),
        ("DECIMAL(10,2)", "1.255", RANGE),
        ("DECIMAL(10,2)", "1e-99999999999", RANGE),
        ("DECIMAL(10,2)", "123456789.00", RANGE),
        ("DECIMAL(10,2)", "123456789", RANGE),
        ("DECIMAL(38,0)", "9" * 38, Decimal("9" * 38)),
        ("DECIMAL(38,10)", "478848058313199916571985436613.67", RANGE),
        # Times 10^10 modulo 2^256, this is 1024.
        ("DECIMAL(28,10)", str(pow(5**10, -1, 2**246)), RANGE),
        ("DECIMAL(10,2)", "129e-86", RANGE),
        ("DECIMAL(10,2)", "-5e-324", RANGE),
        ("DECIMAL(10,2)", '"8936e-41"', RANGE),
        ("DECIMAL(10,2)", "125e-2", Decimal("1.25")),
        ("DECIMAL(10,2)", "1e70", RANGE),
        ("DECIMAL(10,2)", '"1,25"', WRONG),
        ("DECIMAL(10,2)", "true", WRONG),
        ("BOOLEAN", "true", True),
        ("BOOLEAN", "1", WRONG),
        ("BOOLEAN", '"true"', WRONG),
        ("VARCHAR", '"a\\u00e9\\n\\"\\ud83d\\ude00"', 'aé\n"😀'),
        ("VARCHAR", "5", WRONG),
        ("VARCHAR", "{}", WRONG),
        ("VARCHAR", '"\\ud800"', ParkReason.INVALID_UTF8),
        ("UUID", '"123E4567-e89b-12d3-a456-426614174000"', "123e4567-e89b-12d3-a456-426614174000"),
        ("UUID", '"123e4567e89b12d3a456426614174000"', WRONG),
        ("DATE", '"2024-02-29"', date(2024, 2, 29)),
        ("DATE", '"2023-02-29"', WRONG),
        ("DATE", '"2024-02-29T00:00:00Z"', WRONG),
        ("DATE", '"0000-01-01"', WRONG),
        ("DATE", '"9999-12-31"', date(9999, 12, 31)),
        ("DATE", "19782", WRONG),
        ("TIMESTAMPTZ", '"2024-01-31T12:00:00Z"', NOON),
        ("TIMESTAMPTZ", '"2024-01-31 14:30:00.000001+02:30"', NOON.replace(microsecond=1)),
        ("TIMESTAMPTZ", "1706702400000", NOON),
        ("TIMESTAMPTZ", "1706702400000.001", NOON.replace(microsecond=1)),
        ("TIMESTAMPTZ", "1706702400000.0000000000000000000000000000001", RANGE),
        ("TIMESTAMPTZ", '"2024-01-31T12:00:00"', WRONG),
        ("TIMESTAMPTZ", '"2024-01-31T12:00:00.1234567Z"', RANGE),
        ("TIMESTAMPTZ", '"2024-01-31T12:00:00.123000000Z"', NOON.replace(microsecond=123000)),
        ("TIMESTAMPTZ", '"2024-02-30T12:00:00Z"', WRONG),
        ("TIMESTAMPTZ", '"0001-01-01T00:00:00Z"', datetime(1, 1, 1, tzinfo=UTC)),
        ("TIMESTAMPTZ", '"0000-12-31T12:00:00-23:59"', WRONG),
        ("TIMESTAMPTZ", '"yesterday"', WRONG),
        ("TIMESTAMPTZ", "99999999999999999", RANGE),
        ("TIMESTAMP", '"2024-01-31T14:00:00+02:00"', NOON.replace(tzinfo=None)),
        ("TIMESTAMP", '"2024-01-31T12:00:00"', NOON.replace(tzinfo=None)),
        ("TIMESTAMP", '"2024-01-31T12"', NOON.replace(tzinfo=None)),
        ("TIMESTAMP", '"0001-01-01T00:00:00+01:00"', RANGE),
        ("JSON", '{"b": [1.50, 1e5, null], "a": "\\u00e9"}', '{"b":[1.50,1e5,null],"a":"é"}'),
        ("JSON", "0.1000000000000000055", "0.1000000000000000055"),
        ("JSON", "null", None),
        (ArrayType(scalar("SMALLINT")), "[1,null,3]", [1, None, 3]),
        (ArrayType(scalar("SMALLINT")), "[1,40000]", RANGE),
        (ArrayType(scalar("SMALLINT")), "{}", WRONG),
        (StructType((StructField("p", scalar("DATE")),)), '{"p":"2024-02-29","q":1}', {"p": date(2024, 2, 29)}),
        (StructType((StructField("p", scalar("INTEGER")),)), "{}", {"p": None}),
        (StructType((StructField("p", scalar("INTEGER")),)), '{"p":"1"}', WRONG),
        (StructType((StructField("p", scalar("INTEGER")),)), '{"p":1,"p":2}', ParkReason.NOT_JSON),
        ("INTEGER", '1,"v":2', ParkReason.NOT_JSON),
        ("INTEGER", '1,"other":NaN', ParkReason.NOT_JSON),
        ("INTEGER", '1,"other":1e400', 1),
        ("INTEGER", '1,"other":"NaN, Infinity"', 1),
        ("INTEGER", "1,", ParkReason.NOT_JSON),
    ],
)
def test_a_value_is_stored_exactly_or_parked(decoder: Decoder, kind: Any, text: str, expected: Any) -> None:
    assert one(decoder, kind, text) == expected


@DECODERS
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", ParkReason.NOT_JSON),
        (b"nope", ParkReason.NOT_JSON),
        (b'{"id":1', ParkReason.NOT_JSON),
        (b'{"id":1}{"id":2}', ParkReason.NOT_JSON),
        (b'{"id":1}\n{"id":2}', ParkReason.NOT_JSON),
        (b'\xef\xbb\xbf{"id":1}', ParkReason.NOT_JSON),
        (b'{"id":1,"carrier":"a\nb"}', ParkReason.NOT_JSON),
        (b"[]", ParkReason.NOT_AN_OBJECT),
        (b"null", ParkReason.NOT_AN_OBJECT),
        (b'{"id":1,"carrier":"\xff"}', ParkReason.INVALID_UTF8),
        (b"[" * 1_000_000, ParkReason.TOO_DEEP),
        (b'{"id":1,"x":' + b"[" * 200_000 + b"]" * 200_000 + b"}", ParkReason.TOO_DEEP),
        (b'{"id":1,"carrier":"' + b"x" * RECORD_BYTES_MAX + b'"}', ParkReason.TOO_LARGE),
        (b"{}", ParkReason.MISSING_KEY),
        (b'{"id":null}', ParkReason.MISSING_KEY),
    ],
    ids=range(15),
)
@pytest.mark.invariant(6, place="input")
def test_a_poison_record_costs_only_itself(decoder: Decoder, value: bytes, reason: ParkReason) -> None:
    good = [{"id": number, "delay": 1.5} for number in range(3)]
    result = decoder.decode(FLIGHTS, batch(FLIGHTS, [*good, value, *good]))
    assert [(parked.index, parked.reason) for parked in result.parked] == [(3, reason)]
    assert result.rows["_offset"].to_pylist() == [0, 1, 2, 4, 5, 6]
    assert result.rows["id"].to_pylist() == [0, 1, 2, 0, 1, 2]


@DECODERS
def test_an_empty_value_is_told_how_a_delete_is_sent(decoder: Decoder) -> None:
    (parked,) = decoder.decode(FLIGHTS, batch(FLIGHTS, [b""])).parked
    assert parked.detail == "empty, not null; to delete send a null value (kcat -Z)"


@DECODERS
def test_the_deepest_legal_nesting_and_pretty_printing_pass(decoder: Decoder) -> None:
    nested = b'{"id":1,"x":' + b"[" * (JSON_DEPTH_MAX - 1) + b"]" * (JSON_DEPTH_MAX - 1) + b"}"
    pretty = b'\r\n {\n  "id" : 2,\r\n  "carrier" : "[[[[" }\n'
    wide = b'{"id":3,"x":[' + b",".join([b"[{}]"] * 500) + b"]}"
    result = decoder.decode(FLIGHTS, batch(FLIGHTS, [nested, pretty, wide]))
    assert not result.parked
    assert result.rows["id"].to_pylist() == [1, 2, 3]


@DECODERS
def test_records_cannot_run_into_each_other(decoder: Decoder) -> None:
    split = [b'{"id":1,"x":[', b'{"id":7}', b']}{"id":8}{"id":9}', b"", b'{"id":2}']
    result = decoder.decode(FLIGHTS, batch(FLIGHTS, split))
    assert result.rows.select(["id", "_offset"]).to_pylist() == [{"id": 7, "_offset": 1}, {"id": 2, "_offset": 4}]
    assert [parked.index for parked in result.parked] == [0, 2, 3]


@DECODERS
def test_metadata_comes_from_the_record(decoder: Decoder) -> None:
    result = decoder.decode(FLIGHTS, batch(FLIGHTS, [{"id": 1}], first=40, partition=3))
    (row,) = result.rows.to_pylist()
    assert (row["_partition"], row["_offset"]) == (3, 40)
    assert row["_timestamp"] == datetime.fromtimestamp((TIMESTAMP_MS + 40) / 1000, UTC)


@DECODERS
@pytest.mark.parametrize("timestamp_ms", [2**62, -(2**62), 253_402_300_800_000])
def test_a_kafka_timestamp_that_no_calendar_has_costs_its_own_record(decoder: Decoder, timestamp_ms: int) -> None:
    records = batch(FLIGHTS, [{"id": 1}, {"id": 2}, None, {"id": 3}], keys=[b"1", b"2", b"4", b"3"])
    records.timestamps_ms[1:3] = [timestamp_ms, timestamp_ms]
    result = decoder.decode(FLIGHTS, records)
    assert [(parked.index, parked.reason) for parked in result.parked] == [(1, RANGE), (2, RANGE)]
    assert result.rows["id"].to_pylist() == [1, 3]


@DECODERS
@pytest.mark.parametrize(
    ("definition", "key", "expected"),
    [
        (FLIGHTS, b"42", {"id": 42}),
        (FLIGHTS, b'{"id": 42}', {"id": 42}),
        (FLIGHTS, b"forty", ParkReason.BAD_KEY),
        (FLIGHTS, b"\xff", ParkReason.BAD_KEY),
        (FLIGHTS, b'{"other": 1}', ParkReason.BAD_KEY),
        (FLIGHTS, b"null", ParkReason.BAD_KEY),
        (FLIGHTS, None, ParkReason.MISSING_KEY),
        (SEATS, b'{"flight": 1, "seat": "2A"}', {"flight": 1, "seat": "2A"}),
        (SEATS, b"1", ParkReason.BAD_KEY),
        (table("n", ("name",), name="VARCHAR"), b"5", {"name": "5"}),
        (table("n", ("name",), name="VARCHAR"), b"{x", {"name": "{x"}),
        (table("d", ("day",), day="DATE"), b"2024-02-29", {"day": date(2024, 2, 29)}),
        (table("m", ("at",), at="TIMESTAMPTZ"), b"1706702400000", {"at": NOON}),
        (table("m", ("at",), at="TIMESTAMPTZ"), b"2024-01-31T12:00Z", {"at": NOON}),
        (table("p", ("sum",), sum="DECIMAL(10,2)"), b"1.5", {"sum": Decimal("1.50")}),
        (table("log", what="VARCHAR"), b"k", ParkReason.NULL_IN_APPEND_TABLE),
    ],
)
def test_a_tombstone_deletes_the_row_its_kafka_key_names(
    decoder: Decoder, definition: TableDefinition, key: bytes | None, expected: Any
) -> None:
    result = decoder.decode(definition, batch(definition, [None], keys=[key], first=7))
    assert not len(result.rows)
    if isinstance(expected, ParkReason):
        assert [parked.reason for parked in result.parked] == [expected]
    else:
        (row,) = result.deletes.to_pylist()
        assert {name: row[name] for name in expected} == expected
        assert row["_offset"] == 7


@DECODERS
def test_an_upsert_without_a_kafka_key_is_parked(decoder: Decoder) -> None:
    result = decoder.decode(FLIGHTS, batch(FLIGHTS, [{"id": 1}, {"id": 2}], keys=[None, b"2"]))
    assert [(parked.index, parked.reason) for parked in result.parked] == [(0, ParkReason.MISSING_KEY)]
    assert result.rows["id"].to_pylist() == [2]


@DECODERS
def test_the_detail_names_column_value_and_expectation(decoder: Decoder) -> None:
    result = decoder.decode(FLIGHTS, batch(FLIGHTS, [{"id": 1, "carrier": ["U" * 500]}, {"id": "U" * 500}]))
    first, second = (parked.detail for parked in result.parked)
    assert first == "column 'carrier': expected a string (VARCHAR), got an array"
    assert second.startswith("column 'id': expected an integer (BIGINT), got the string 'UUU")
    assert len(second) < 200


def test_many_poison_records_leave_the_good_ones_to_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def counted(definition: TableDefinition, records: RecordBatch, indices: Iterable[int]) -> ExactOutcome:
        seen.extend(indices := list(indices))
        return decode_records(definition, records, indices)

    monkeypatch.setattr("streams.adapters.duckdb_decoder.decode_records", counted)
    bad = [b"nope", b'{"id":1.5}', b'{"id":"5"}', b'{"id":1,"carrier":5}', b'{"id":1,"delay":true}', b"\xff"]
    values: list[Any] = [{"id": number, "carrier": "UA"} for number in range(10_000)]
    for number in range(0, 10_000, 100):
        values[number] = bad[number // 100 % len(bad)]
    result = FAST.decode(FLIGHTS, batch(FLIGHTS, values))
    assert [parked.index for parked in result.parked] == list(range(0, 10_000, 100))
    assert len(result.rows) == 9_900
    assert len(seen) == 100


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("TINYINT", "-5"),
        ("BIGINT", "5"),
        ("UBIGINT", "18446744073709551615"),
        ("REAL", "0.5"),
        ("DOUBLE", "0.1"),
        ("DECIMAL(12,2)", "1.25"),
        ("DECIMAL(38,18)", "1.25"),
        ("DECIMAL(12,2)", '"1.25"'),
        ("BOOLEAN", "true"),
        ("VARCHAR", '"plain"'),
        ("DATE", '"2024-02-29"'),
        ("TIMESTAMP", '"2024-01-31T12:00:00"'),
        ("TIMESTAMPTZ", '"2024-01-31T12:00:00.123Z"'),
        ("TIMESTAMPTZ", "1706702400000"),
        ("UUID", '"123e4567-e89b-12d3-a456-426614174000"'),
        (ArrayType(scalar("SMALLINT")), "[1,null,3]"),
        (StructType((StructField("p", scalar("INTEGER")),)), '{"p":1}'),
    ],
)
def test_what_producers_usually_write_takes_the_fast_path(
    kind: Any, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one pass: neither sieved nor left to the exact path, which would be right as well, but twenty times slower."""
    definition = table("t", v=kind)
    records = batch(definition, [f'{{"v":{text}}}'.encode()] * 100)
    exact = EXACT.decode(definition, records)

    def never(*_: object, **__: object) -> Any:
        raise AssertionError("not in one pass")

    monkeypatch.setattr(DuckDBDecoder, "_take_apart", never)
    fast = FAST.decode(definition, records)
    assert len(fast.rows) == 100
    assert_equal(fast, exact)


# -- the fast path equals the exact path -----------------------------------------------------------------------------

_numbers = st.one_of(
    st.integers(-300, 300).map(str),
    st.integers(-(2**66), 2**66).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.decimals(-(10**9), 10**9, allow_nan=False, places=3).map(str),
    st.sampled_from(
        ["-0", "1.0", "1.50", "1e3", "1E-2", "1e400", "1e-400", "1e39", "NaN", "Infinity", "01", "+1", "1."]
    ),
)
_times = st.one_of(
    st.datetimes().map(lambda moment: moment.isoformat()),
    st.datetimes(timezones=st.timezones()).map(lambda moment: moment.isoformat()),
    st.dates().map(lambda day: day.isoformat()),
    st.from_regex(
        r"\A20[0-9]{2}-[0-1][0-9]-[0-3][0-9]([T ][0-2][0-9](:[0-6][0-9](:[0-6][0-9](\.[0-9]{1,9})?)?)?"
        r"(Z|[+-][0-2][0-9](:?[0-6][0-9])?)?)?\Z"
    ),
)
_strings = st.one_of(
    st.text(max_size=8), _times, st.uuids().map(str), st.decimals(-(10**9), 10**9, places=2).map(str), _numbers
).map(json.dumps)
_leaves = st.one_of(_numbers, _strings, st.sampled_from(["null", "true", "false", '"\\ud800"', '"\\/"']))
_json = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]"),
        st.lists(st.tuples(st.sampled_from(["name", "height", "z"]), inner), max_size=3).map(
            lambda fields: "{" + ", ".join(f'"{name}": {item}' for name, item in fields) + "}"
        ),
    ),
    max_leaves=4,
)
_GOOD: dict[str, st.SearchStrategy[str]] = {
    **dict.fromkeys(("tinyint", "smallint", "integer", "bigint"), st.integers(-128, 127).map(str)),
    **dict.fromkeys(("utinyint", "usmallint", "uinteger", "ubigint"), st.integers(0, 255).map(str)),
    **dict.fromkeys(("real", "double"), _numbers),
    "money": st.one_of(_numbers, st.decimals(-(10**8), 10**8, places=2).map(str).map(json.dumps)),
    "boolean": st.sampled_from(["true", "false"]),
    "varchar": st.text(max_size=8).map(json.dumps),
    "date": st.dates().map(lambda day: json.dumps(day.isoformat())),
    **dict.fromkeys(("timestamp", "timestamptz"), st.one_of(_times.map(json.dumps), st.integers(0, 2**42).map(str))),
    "uuid": st.uuids().map(str).map(json.dumps),
    "numbers": st.lists(st.integers(-5, 5).map(str), max_size=3).map(lambda items: f"[{','.join(items)}]"),
    "place": st.just('{"name":"x","height":1.5}'),
}
_column = st.sampled_from([*EVERYTHING.column_names]).flatmap(
    lambda name: st.tuples(st.just(name), st.one_of(_GOOD[name], _GOOD[name], _json))
)
_record = st.one_of(
    st.lists(st.one_of(_column, st.tuples(st.just("ignored"), _json)), max_size=6).map(
        lambda fields: ("{" + ",".join(f'"{name}":{item}' for name, item in fields) + "}").encode()
    ),
    _json.map(str.encode),
    st.binary(max_size=12),
    st.none(),
)


def _broken(parts: tuple[bytes | None, bytes | None, int, int]) -> bytes:
    """What two records leave when they are cut and glued: `{"a":1}{"a":2}`, `{"a":"}`, `}`."""
    left, right, end, start = parts
    assert left is not None
    assert right is not None
    return left[: len(left) - end] + right[start:]


_shaped = st.one_of(
    _record.filter(lambda record: record is not None), st.sampled_from([b"{}", b'{"x":[{}', b'{"x":"}'])
)
_glued = st.tuples(_shaped, _shaped, st.integers(0, 9), st.integers(0, 9)).map(_broken)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(_shaped, _shaped, _glued), min_size=1, max_size=8))
def test_records_that_are_broken_in_two_cost_nobody_else_anything(values: list[bytes | None]) -> None:
    records = batch(EVERYTHING, values)
    assert_equal(FAST.decode(EVERYTHING, records), EXACT.decode(EVERYTHING, records))


@settings(max_examples=150, deadline=None)
@given(st.lists(_record, max_size=12))
@pytest.mark.invariant(10, place="input")
def test_the_fast_path_equals_the_exact_path(values: list[bytes | None]) -> None:
    records = batch(EVERYTHING, values)
    assert_equal(FAST.decode(EVERYTHING, records), EXACT.decode(EVERYTHING, records))


def assert_equal(fast: DecodedBatch, exact: DecodedBatch) -> None:
    assert fast.parked == exact.parked
    assert fast.deletes.equals(exact.deletes)
    assert fast.rows.schema == exact.rows.schema
    # Not Table.equals: NaN would differ from itself and -0.0 equal 0.0.
    assert repr(fast.rows.to_pylist()) == repr(exact.rows.to_pylist())


def test_every_kind_is_in_the_property_test() -> None:
    kinds = {column.type.kind for column in EVERYTHING.columns if hasattr(column.type, "kind")}
    assert kinds == set(ScalarKind) - {ScalarKind.JSON}
