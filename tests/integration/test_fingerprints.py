"""Fingerprints: DuckDB and ClickHouse agree on the same rows, and any difference between rows shows."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from loadtest.fingerprints import Fingerprint, clickhouse_fingerprint_sql, duckdb_fingerprint_sql
from loadtest.observers import ClickHouse, get
from schemas.arrow_schema import rows_schema
from schemas.clickhouse_ddl import create_table_sql as create_clickhouse_table_sql
from schemas.duckdb_ddl import create_table_sql as create_duckdb_table_sql
from schemas.errors import ConfigurationError
from schemas.table import ArrayType, Column, ScalarKind, ScalarType, TableDefinition
from tests.conftest import unique_name

_MOMENT = datetime(2013, 1, 1, 5, 0, 0, 123456, tzinfo=UTC)
#: Values of each type, the awkward ones among them.
VALUES: dict[ScalarKind, list[Any]] = {
    ScalarKind.TINYINT: [-128, 0, 127],
    ScalarKind.SMALLINT: [-32768, 32767],
    ScalarKind.INTEGER: [-(2**31), 2**31 - 1],
    ScalarKind.BIGINT: [-(2**63), 2**63 - 1],
    ScalarKind.UTINYINT: [255],
    ScalarKind.USMALLINT: [65535],
    ScalarKind.UINTEGER: [2**32 - 1],
    ScalarKind.UBIGINT: [2**64 - 1],
    ScalarKind.REAL: [0.0, -1.5, 39.02, 16777216.0],
    ScalarKind.DOUBLE: [0.0, -0.0, 39.02, -73.87261, 0.1 + 0.2, 1e-4, 123456789.123456, 2.0**53, float("nan")],
    ScalarKind.DECIMAL: [Decimal("1.50"), Decimal("-0.01"), Decimal("12345678.90")],
    ScalarKind.BOOLEAN: [True, False],
    ScalarKind.VARCHAR: ["", "N", "1:a", "Zürich ✈", "a|b", "\\N", "'\"\t\n"],
    ScalarKind.DATE: [date(1970, 1, 1), date(2013, 12, 31)],
    ScalarKind.TIMESTAMP: [_MOMENT.replace(tzinfo=None)],
    ScalarKind.TIMESTAMPTZ: [_MOMENT, datetime(1969, 12, 31, tzinfo=UTC)],
    ScalarKind.UUID: ["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"],
    ScalarKind.JSON: ['{"a": 1.0}', "null"],
}


def table_of(*kinds: ScalarKind, key: tuple[str, ...] = ()) -> TableDefinition:
    """A table with one nullable column per type, named after it, and `id`."""
    decimal = ScalarType(ScalarKind.DECIMAL, precision=18, scale=2)
    columns = [Column(kind.lower(), decimal if kind is ScalarKind.DECIMAL else ScalarType(kind)) for kind in kinds]
    name = unique_name("prints")
    columns.insert(0, Column("id", ScalarType(ScalarKind.INTEGER), nullable=False))
    return TableDefinition(name=name, topic=name, columns=tuple(columns), primary_key=key)


def rows_of(table: TableDefinition, rows: list[Mapping[str, Any]]) -> pa.Table:
    """`rows` as the stores hold them; what is not given is null, positions count up."""
    whole = [
        {
            "id": number,
            "_partition": number % 4,
            "_offset": number,
            "_timestamp": _MOMENT.replace(microsecond=5000),
            **row,
        }
        for number, row in enumerate(rows)
    ]
    return pa.Table.from_pylist(whole, schema=rows_schema(table))


def duckdb_fingerprint(table: TableDefinition, rows: pa.Table) -> Fingerprint:
    """As DuckDB computes it."""
    with duckdb.connect() as connection:
        connection.execute(create_duckdb_table_sql(table, qualified_name=table.name))
        connection.register("given", rows)
        connection.execute(f"INSERT INTO {table.name} BY NAME FROM given")
        row = connection.execute(duckdb_fingerprint_sql(table)).fetchone()
    assert row is not None
    return Fingerprint.of(row)


def clickhouse_fingerprint(address: str, table: TableDefinition, rows: pa.Table) -> Fingerprint:
    """As ClickHouse computes it."""
    clickhouse = ClickHouse(address)
    post(address, create_clickhouse_table_sql(table).encode())
    insert(address, table, rows)
    return Fingerprint.of(clickhouse.rows(clickhouse_fingerprint_sql(table))[0])


def insert(address: str, table: TableDefinition, rows: pa.Table) -> None:
    """Adds rows to a table of ClickHouse."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    names = ", ".join(rows.column_names)
    post(address, f"INSERT INTO {table.name} ({names}) FORMAT ArrowStream\n".encode() + bytes(sink.getvalue()))


def post(address: str, statement: bytes) -> None:
    """Runs one statement."""
    status, reply = get(address, "/", body=statement)
    assert status == 200, reply


@pytest.mark.parametrize("kind", VALUES)
def test_both_engines_agree_on_every_scalar_type_and_on_null(clickhouse_url: str, kind: ScalarKind) -> None:
    table = table_of(kind)
    rows = rows_of(table, [{kind.lower(): value} for value in [*VALUES[kind], None]])
    assert clickhouse_fingerprint(clickhouse_url, table, rows) == duckdb_fingerprint(table, rows)


@pytest.mark.parametrize("kind", VALUES)
def test_no_two_values_of_a_type_look_alike(kind: ScalarKind) -> None:
    table = table_of(kind)
    values = [*VALUES[kind], None]
    prints = {duckdb_fingerprint(table, rows_of(table, [{kind.lower(): value}])) for value in values}
    assert len(prints) == len(values)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ({"varchar": None}, {"varchar": "N"}),
        ({"varchar": "1:a"}, {"varchar": "a"}),
        ({"varchar": "1", "json": "23"}, {"varchar": "12", "json": "3"}),
        ({"varchar": "a"}, {"varchar": "a", "_offset": 7}),
        ({"varchar": "a"}, {"varchar": "a", "_partition": 1}),
        ({"varchar": "a"}, {"varchar": "a", "_timestamp": _MOMENT.replace(microsecond=6000)}),
    ],
)
def test_different_rows_have_different_fingerprints(left: Mapping[str, Any], right: Mapping[str, Any]) -> None:
    table = table_of(ScalarKind.VARCHAR, ScalarKind.JSON)
    assert duckdb_fingerprint(table, rows_of(table, [left])) != duckdb_fingerprint(table, rows_of(table, [right]))


def test_a_row_that_is_there_twice_or_not_at_all_shows(clickhouse_url: str) -> None:
    table = table_of(ScalarKind.VARCHAR)
    rows = rows_of(table, [{"varchar": "a"}, {"varchar": "b"}])
    twice = pa.concat_tables([rows, rows.slice(1)])
    prints = [clickhouse_fingerprint(clickhouse_url, table_of(ScalarKind.VARCHAR), r) for r in (rows, twice, rows[:1])]
    assert len(set(prints)) == 3
    assert prints[0] == duckdb_fingerprint(table, rows)


def test_the_order_of_rows_does_not_matter() -> None:
    table = table_of(ScalarKind.VARCHAR)
    rows = rows_of(table, [{"varchar": str(number)} for number in range(100)])
    assert duckdb_fingerprint(table, rows) == duckdb_fingerprint(table, rows.take(list(reversed(range(100)))))


def test_an_empty_table_has_a_fingerprint_in_both_engines(clickhouse_url: str) -> None:
    table = table_of(ScalarKind.VARCHAR, key=("id",))
    rows = rows_of(table, [])
    assert clickhouse_fingerprint(clickhouse_url, table, rows) == duckdb_fingerprint(table, rows) == (0, 0, 0)


def test_of_a_keyed_table_clickhouse_counts_the_newest_rows_that_are_not_deleted(clickhouse_url: str) -> None:
    table = table_of(ScalarKind.VARCHAR, key=("id",))
    newest = rows_of(table, [{"varchar": "new", "_offset": 9}])
    clickhouse_fingerprint(clickhouse_url, table, newest)
    insert(clickhouse_url, table, rows_of(table, [{"varchar": "old", "_offset": 3}]))
    gone = rows_of(table, [{"id": 5, "_offset": 11}]).append_column("_deleted", pa.array([1], pa.uint8()))
    insert(clickhouse_url, table, gone)
    there = Fingerprint.of(ClickHouse(clickhouse_url).rows(clickhouse_fingerprint_sql(table))[0])
    assert there == duckdb_fingerprint(table, newest)


def test_a_nested_column_is_refused_because_the_engines_store_it_differently() -> None:
    nested = Column("stops", ArrayType(ScalarType(ScalarKind.VARCHAR)))
    table = TableDefinition(name="t", topic="t", columns=(nested,))
    with pytest.raises(ConfigurationError, match="stops"):
        duckdb_fingerprint_sql(table)
