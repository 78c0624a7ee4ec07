"""ClickHouse takes the generated DDL, reports exactly the expected shape, and holds what the Arrow schema describes."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings

from schemas.arrow_schema import rows_schema
from schemas.catalog import load_catalog
from schemas.clickhouse_ddl import create_table_sql, create_table_statements, expected_columns, migration_sql
from schemas.table import TableDefinition
from streams.config import PACKAGED_TABLES
from tests.unit.tables_helpers import table_definitions, table_of

Client = Any


@pytest.fixture(scope="module")
def database(clickhouse: Client, unique_name: Callable[[str], str]) -> Iterator[str]:
    name = unique_name("tables")
    clickhouse.command(f"CREATE DATABASE {name}")
    yield name
    clickhouse.command(f"DROP DATABASE {name}")


@pytest.fixture
def things(clickhouse: Client, database: str) -> Iterator[str]:
    """Where the table of a test goes; gone afterwards."""
    yield f"{database}.things"
    clickhouse.command(f"DROP TABLE IF EXISTS {database}.things")


def shape(clickhouse: Client, database: str, name: str) -> list[tuple[str, str]]:
    rows = clickhouse.query(
        "SELECT name, type FROM system.columns WHERE database = {d:String} AND table = {t:String} ORDER BY position",
        parameters={"d": database, "t": name},
    ).result_rows
    return [(str(column), str(kind)) for column, kind in rows]


def insert(
    clickhouse: Client, table: TableDefinition, name: str, rows: Sequence[Mapping[str, object]], token: str = ""
) -> None:
    """The rows in the Arrow types of `rows_schema`, as one batch with nothing filled in by the server.

    Metadata that a row does not give: partition 0, its index as offset, and the present as timestamp.
    """
    now = datetime.now(UTC)
    metadata = [{"_partition": 0, "_offset": offset, "_timestamp": now} for offset in range(len(rows))]
    arrow = pa.Table.from_pylist(
        [{**extra, **row} for row, extra in zip(rows, metadata, strict=True)], rows_schema(table)
    )
    stream = io.BytesIO()
    with pa.ipc.new_stream(stream, arrow.schema) as writer:
        writer.write_table(arrow)
    clickhouse.raw_insert(
        name,
        column_names=arrow.column_names,
        insert_block=stream.getvalue(),
        fmt="ArrowStream",
        settings={"input_format_null_as_default": 0, "async_insert": 0, "insert_deduplication_token": token},
    )


@given(table=table_definitions())
@settings(deadline=None, max_examples=40)
def test_every_table_has_exactly_the_expected_shape(clickhouse: Client, database: str, table: TableDefinition) -> None:
    clickhouse.command(create_table_sql(table, database=database))
    try:
        assert shape(clickhouse, database, "things") == expected_columns(table)
    finally:
        clickhouse.command(f"DROP TABLE {database}.things")


def test_the_tables_that_ship_with_the_project_can_be_created_twice(clickhouse: Client, database: str) -> None:
    for table in load_catalog(PACKAGED_TABLES).tables:
        for _ in range(2):
            clickhouse.command(create_table_sql(table, database=database))
        assert shape(clickhouse, database, table.name) == expected_columns(table)


def test_a_migrated_table_has_the_shape_of_a_new_one_however_often_it_is_migrated(
    clickhouse: Client, database: str, things: str, tmp_path: Path
) -> None:
    files = [
        "CREATE TABLE things (id BIGINT PRIMARY KEY, a INT)",
        "ALTER TABLE things ADD COLUMN b VARCHAR[], ADD COLUMN c DECIMAL(9, 2)",
        'ALTER TABLE things ADD COLUMN "d e" STRUCT(x TIMESTAMPTZ, "from" INT)',
    ]
    table = table_of(tmp_path / "new", *files)
    first = table_of(tmp_path / "old", files[0])
    clickhouse.command(create_table_sql(first, database=database))
    insert(clickhouse, first, things, [{"id": 1}])
    for number in (2, 3, 2, 3):
        for statement in migration_sql(table, number, database=database):
            clickhouse.command(statement)

    assert shape(clickhouse, database, "things") == expected_columns(table)
    assert clickhouse.query(f"SELECT id, a, b, c FROM {things}").result_rows == [(1, None, [], None)]


def test_values_of_every_type_arrive_exactly(clickhouse: Client, database: str, things: str, tmp_path: Path) -> None:
    columns = {
        "i8 TINYINT": (-128, "-128"),
        "i64 BIGINT": (-(2**63), str(-(2**63))),
        "u8 UTINYINT": (255, "255"),
        "u64 UBIGINT": (2**64 - 1, str(2**64 - 1)),
        "r REAL": (0.5, "0.5"),
        "d DOUBLE": (0.1, "0.1"),
        "dec DECIMAL(38, 10)": ("1234567890123456789012345678.0123456789", "1234567890123456789012345678.0123456789"),
        "b BOOLEAN": (True, "true"),
        "v VARCHAR": ("héllo\t", "héllo\t"),
        "day DATE": (datetime(1901, 2, 3, tzinfo=UTC).date(), "1901-02-03"),
        "ts TIMESTAMP": (datetime(2013, 1, 1, 5, 0, 0, 123_456), "2013-01-01 05:00:00.123456"),  # noqa: DTZ001
        "tz TIMESTAMPTZ": (datetime(2262, 1, 1, 5, tzinfo=UTC), "2262-01-01 05:00:00.000000"),
        "u UUID": ("6ccd780c-baba-4026-9564-5b8c656024db",) * 2,
        "j JSON": ('{"b": 1.50, "a": []}',) * 2,
        "a INT[]": ([1, None], "[1,NULL]"),
        "us UUID[]": (["6ccd780c-baba-4026-9564-5b8c656024db"], "['6ccd780c-baba-4026-9564-5b8c656024db']"),
        's STRUCT("from" INT, t TIMESTAMP[])': ({"from": 7, "t": []}, "(7,[])"),
        "ss STRUCT(x VARCHAR)[]": ([{"x": "a"}, {"x": None}], "[('a'),(NULL)]"),
    }
    table = table_of(tmp_path, f"CREATE TABLE things (id INT PRIMARY KEY, {', '.join(columns)})")
    clickhouse.command(create_table_sql(table, database=database))
    row = dict(zip(table.column_names[1:], (value for value, _ in columns.values()), strict=True))
    row["dec"] = pa.scalar(row["dec"]).cast(pa.decimal128(38, 10)).as_py()
    insert(clickhouse, table, things, [{"id": 1, **row}, {"id": 2, "a": [], "us": [], "s": {}, "ss": []}])

    texts = ", ".join(f"toString({name})" for name in row)
    assert clickhouse.query(f"SELECT {texts} FROM {things} WHERE id = 1").result_rows == [
        tuple(text for _, text in columns.values())
    ]
    nulls = ", ".join(f"{name} IS NULL" for name in row if name not in ("a", "us", "s", "ss"))
    assert set(clickhouse.query(f"SELECT {nulls} FROM {things} WHERE id = 2").result_rows[0]) == {1}


@pytest.mark.parametrize("key", ["", ", PRIMARY KEY (id)"], ids=["append", "keyed"])
def test_the_last_offset_of_a_partition_is_right_whatever_has_been_replaced(
    clickhouse: Client, database: str, things: str, tmp_path: Path, key: str
) -> None:
    table = table_of(tmp_path, f"CREATE TABLE things (id BIGINT{key})")
    clickhouse.command(create_table_sql(table, database=database))
    for first, partition in itertools.product((0, 1_000, 2_000), (0, 1)):
        offsets = range(first, first + 500)
        rows = [{"id": o % 10 * 2 + partition, "_partition": partition, "_offset": o} for o in offsets]
        insert(clickhouse, table, things, rows)
    query = f"SELECT max(_offset) FROM {things} WHERE _partition = 1"

    for _ in ("before", "after"):
        assert clickhouse.command(query) == 2_499
        clickhouse.command(f"OPTIMIZE TABLE {things} FINAL")
    if table.is_keyed:
        assert "last_offset" in clickhouse.command(f"EXPLAIN {query} SETTINGS force_optimize_projection = 1")
        assert clickhouse.command(f"SELECT count() FROM {things} FINAL") == 20
    else:
        newest = f"SELECT _offset FROM {things} WHERE _partition = 1 ORDER BY _partition DESC, _offset DESC LIMIT 1"
        assert clickhouse.command(newest) == 2_499


def test_a_repeated_insert_under_one_token_is_stored_once(
    clickhouse: Client, database: str, things: str, tmp_path: Path
) -> None:
    for key in ("", ", PRIMARY KEY (id)"):
        clickhouse.command(f"DROP TABLE IF EXISTS {things}")
        table = table_of(tmp_path / f"keyed{bool(key)}", f"CREATE TABLE things (id BIGINT{key})")
        clickhouse.command(create_table_sql(table, database=database))
        for _ in range(2):
            insert(clickhouse, table, things, [{"id": 1}], token="things:0:7")
        assert clickhouse.command(f"SELECT count() FROM {things}") == 1


@pytest.mark.parametrize(
    "definition",
    [
        "CREATE TABLE things (id BIGINT PRIMARY KEY)",
        "CREATE TABLE things (id BIGINT NOT NULL CODEC(Delta, ZSTD)) WITH (clickhouse_order_by='id', "
        "clickhouse_partition_by='month', retention='1 day', clickhouse_retention='104 weeks')",
    ],
)
def test_what_creates_tables_on_a_cluster_is_sql_to_clickhouse(
    clickhouse: Client, tmp_path: Path, definition: str
) -> None:
    table = table_of(tmp_path, definition, "ALTER TABLE things ADD COLUMN a INT CODEC(T64)")
    for statement in create_table_statements(table, database="a b", cluster="it's"):
        assert "CreateQuery a b" in clickhouse.command(f"EXPLAIN AST {statement}")
    for statement in migration_sql(table, 2, database="a b", cluster="it's"):
        assert "AlterQuery a b" in clickhouse.command(f"EXPLAIN AST {statement}")


def test_rows_older_than_the_retention_go_and_a_far_future_one_stays(
    clickhouse: Client, database: str, things: str, tmp_path: Path
) -> None:
    table = table_of(tmp_path, "CREATE TABLE things (id BIGINT) WITH (retention='30 days')")
    clickhouse.command(create_table_sql(table, database=database))
    now = datetime.now(UTC)
    written = {1: now - timedelta(days=31), 2: now - timedelta(days=29), 3: datetime(2250, 1, 1, tzinfo=UTC)}
    insert(clickhouse, table, things, [{"id": number, "_timestamp": at} for number, at in written.items()])
    clickhouse.command(f"OPTIMIZE TABLE {things} FINAL")

    assert clickhouse.query(f"SELECT id FROM {things} ORDER BY id").result_rows == [(2,), (3,)]
