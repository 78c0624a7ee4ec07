"""The texts that the audit digests: ClickHouse and DuckDB spell each type alike; queries take a store's."""

from __future__ import annotations

import datetime as dt
import math
from decimal import Decimal
from typing import Any

import duckdb
import pytest

from schemas.catalog import Catalog
from schemas.duckdb_ddl import create_table_sql
from schemas.row_text import key_text, sink_text_in_clickhouse, sink_text_in_duckdb, store_text
from schemas.table import ArrayType, StructField, StructType, TableDefinition
from streams.adapters.clickhouse_rows import delivery_table
from streams.adapters.clickhouse_sink import ClickHouseSink
from streams.adapters.duckdb_guard import QueryGuard
from streams.positions import OffsetRange, TopicPartition
from tests.conftest import unique_name
from tests.store_samples import DECODER, batch, scalar, table

_PLACE = StructType((StructField("it's", scalar("VARCHAR")), StructField("height", scalar("DOUBLE"))))
_MOMENT = dt.datetime(2013, 1, 1, 5, 0, 0, 123456, tzinfo=dt.UTC)


def everything() -> TableDefinition:
    return table(
        unique_name("texts"),
        (),
        tiny="TINYINT",
        big="UBIGINT",
        real="REAL",
        double="DOUBLE",
        money="DECIMAL(18,4)",
        flag="BOOLEAN",
        name="VARCHAR",
        day="DATE",
        at="TIMESTAMP",
        seen="TIMESTAMPTZ",
        id="UUID",
        extra="JSON",
        numbers=ArrayType(scalar("INTEGER")),
        grid=ArrayType(ArrayType(scalar("DOUBLE"))),
        place=_PLACE,
        places=ArrayType(_PLACE),
    )


ROWS: list[dict[str, Any]] = [
    {},
    {"tiny": -128, "big": 2**64 - 1, "real": 0.1, "double": 1e-7, "money": "-12345678901234.5678", "flag": True},
    {"double": 1e300, "name": "", "day": "1900-01-01", "at": "2013-01-01T05:00:00.123456", "seen": _MOMENT.isoformat()},
    {"double": -0.0, "name": "Zoë ☃'\\\t\n", "day": "2299-12-31", "id": "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"},
    {"double": 123456789012345680000.0, "extra": {"a": [1.0, None]}, "numbers": [], "places": []},
    {"numbers": [1, None, -3], "grid": [[1.5, None], [], [1e-9]], "place": {"it's": "N", "height": None}},
    {"place": {"it's": None, "height": math.pi}, "places": [{"it's": "a", "height": 1}, {"it's": "b"}]},
    {"money": str(Decimal("0.5000")), "name": "1:N", "flag": False},
]


def texts(sql: str, definition: TableDefinition, rows: Any) -> list[str]:
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute(create_table_sql(definition, qualified_name=definition.name))
        connection.register("given", rows)
        connection.execute(f"INSERT INTO {definition.name} BY NAME FROM given")
        found = connection.execute(f"SELECT {sql} FROM {definition.name} ORDER BY _offset").fetchall()
    return [text for (text,) in found]


def test_clickhouse_and_duckdb_spell_the_same_row_the_same_and_different_ones_differently(clickhouse_url: str) -> None:
    definition = everything()
    decoded = DECODER.decode(definition, batch(definition, ROWS))
    assert decoded.parked == ()
    sink = ClickHouseSink(clickhouse_url)
    try:
        sink.ensure_tables(Catalog((definition,)))
        source = TopicPartition(definition.topic, 0)
        sink.insert(definition, source, OffsetRange(0, len(ROWS)), delivery_table([decoded]))
        found = sink.arrow(
            f"SELECT {sink_text_in_clickhouse(definition)} AS t FROM {sink.qualified(definition)} ORDER BY _offset",
            {},
            {"output_format_arrow_string_as_string": 1},
        )
    finally:
        sink.close()
    expected = texts(sink_text_in_duckdb(definition), definition, decoded.rows)
    assert found["t"].to_pylist() == expected
    without_positions = [text.rpartition("|")[0].rpartition("|")[0] for text in expected]
    assert len(set(without_positions)) == len(ROWS)


def test_the_query_topic_takes_a_stores_text_and_no_two_rows_share_one() -> None:
    definition = everything()
    sql = store_text(definition)
    QueryGuard(Catalog((definition,))).check(f"SELECT sum(md5_number_upper({sql})) FROM {definition.name}", [])
    found = texts(sql, definition, DECODER.decode(definition, batch(definition, ROWS)).rows)
    assert len({text.rpartition("|")[0].rpartition("|")[0] for text in found}) == len(ROWS)


@pytest.mark.parametrize("key", [("a",), ("a", "b"), ("b", "a")])
def test_keys_are_told_apart(key: tuple[str, ...]) -> None:
    definition = table("keys", key, a="VARCHAR", b="VARCHAR")
    rows = [{"a": "1:", "b": "x"}, {"a": "1", "b": ":x"}, {"a": "11", "b": "x"}, {"a": "1", "b": "1x"}]
    decoded = DECODER.decode(definition, batch(definition, rows, keys=[b"%d" % number for number in range(len(rows))]))
    distinct = {tuple(row[name] for name in key) for row in rows}
    assert len(set(texts(key_text(definition), definition, decoded.rows))) == len(distinct)
