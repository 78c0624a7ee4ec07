"""Every table that can be defined renders to SQL, DuckDB and Arrow, and its types survive the way there and back."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import duckdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.arrow_schema import deletes_schema, rows_schema
from schemas.duckdb_ddl import create_table_sql, duckdb_type, migration_sql, quote
from schemas.json_schema import json_schema
from schemas.parser import parse_table
from schemas.table import METADATA_COLUMNS, TableDefinition
from schemas.table_sql import table_sql
from tests.unit.tables_helpers import rows_of, table_definitions, table_of, write_table

THINGS = quote("things")


def _described(connection: duckdb.DuckDBPyConnection, name: str = "things") -> dict[str, tuple[str, bool]]:
    """Column -> its type, and whether it may be null."""
    rows = connection.execute(f"DESCRIBE {quote(name)}").fetchall()
    return {column: (kind, null == "YES") for column, kind, null, *_ in rows}


def _canonical(connection: duckdb.DuckDBPyConnection, spelled: str) -> str:
    """A type as DESCRIBE spells it."""
    row = connection.execute(f"SELECT typeof(CAST(NULL AS {spelled}))").fetchone()
    assert row
    return str(row[0])


@given(table_definitions())
@settings(deadline=None)
def test_a_table_printed_as_sql_is_read_back_as_the_same_table(
    tmp_path_factory: pytest.TempPathFactory, table: TableDefinition
) -> None:
    folder = write_table(tmp_path_factory.mktemp("t"), "things", table_sql(table))

    assert parse_table(folder).table == table


@given(table_definitions(), st.data())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_duckdb_holds_what_the_arrow_schema_describes(table: TableDefinition, data: st.DataObject) -> None:
    rows = data.draw(rows_of(table))
    with duckdb.connect() as connection:
        connection.execute(create_table_sql(table, qualified_name=THINGS))
        described = _described(connection)
        expected = {c.name: (_canonical(connection, duckdb_type(c.type)), c.nullable) for c in table.columns}
        assert tuple(described) == (*table.column_names, *METADATA_COLUMNS)
        assert {name: described[name] for name in table.column_names} == expected

        connection.register("incoming", rows)
        connection.execute(f"INSERT INTO {THINGS} BY NAME SELECT * FROM incoming")
        stored = connection.execute(f"SELECT * FROM {THINGS} ORDER BY _offset").fetchall()

    assert [[_plain(value) for value in row] for row in stored] == [list(row.values()) for row in rows.to_pylist()]


def _plain(value: object) -> object:
    """UUIDs travel as strings in Arrow."""
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value


@given(table_definitions())
@settings(deadline=None)
def test_a_key_is_never_null_and_deletes_carry_nothing_else(table: TableDefinition) -> None:
    deletes, rows = deletes_schema(table), rows_schema(table)

    assert deletes.names == [*table.primary_key, *METADATA_COLUMNS]
    assert all(not field.nullable and field == rows.field(field.name) for field in deletes)
    assert set(table.primary_key) <= set(json_schema(table)["required"])


def test_a_store_that_was_migrated_has_the_columns_of_a_new_one(tmp_path: Path) -> None:
    files = [
        "CREATE TABLE things (id BIGINT PRIMARY KEY, a INT)",
        "ALTER TABLE things ADD COLUMN b VARCHAR[], ADD COLUMN c DECIMAL(9, 2)",
        'ALTER TABLE things ADD COLUMN "d e" STRUCT(x TIMESTAMPTZ)',
    ]
    first = table_of(tmp_path / "old", files[0])
    table = table_of(tmp_path / "new", *files)
    with duckdb.connect() as connection:
        connection.execute(create_table_sql(first, qualified_name="old"))
        connection.execute("INSERT INTO old BY NAME SELECT 1 id, 2 a, 0 _partition, 7 _offset, now() _timestamp")
        for number in (2, 3):
            for statement in migration_sql(table, number, qualified_name="old"):
                connection.execute(statement)
        connection.execute(create_table_sql(table, qualified_name="new"))

        assert _described(connection, "old") == _described(connection, "new")
        assert connection.execute('SELECT id, a, b, c, "d e", _offset FROM old').fetchall() == [
            (1, 2, None, None, None, 7)
        ]
    with pytest.raises(KeyError):
        migration_sql(table, 4, qualified_name="old")


def test_json_schema_says_what_a_publisher_may_send(tmp_path: Path) -> None:
    table = table_of(
        tmp_path,
        "CREATE TABLE things (id UUID PRIMARY KEY, n UTINYINT NOT NULL, t TIMESTAMPTZ, j JSON, k JSON NOT NULL,"
        " d DECIMAL(4, 1), tags VARCHAR[], s STRUCT(x INT))",
    )
    schema = json_schema(table)

    assert schema["required"] == ["id", "n", "k"]
    properties = schema["properties"]
    assert properties["id"] == {"type": "string", "format": "uuid"}
    assert properties["n"] == {"type": "integer", "minimum": 0, "maximum": 255}
    assert properties["t"]["type"] == ["string", "integer", "null"]
    assert properties["j"] == {}
    assert properties["k"] == {"not": {"type": "null"}}
    assert properties["d"]["type"] == ["number", "string", "null"]
    assert properties["tags"] == {"type": ["array", "null"], "items": {"type": ["string", "null"]}}
    assert properties["s"]["properties"]["x"]["type"] == ["integer", "null"]


def test_json_schema_of_a_table_that_parks_extra_fields_is_closed_at_every_depth(tmp_path: Path) -> None:
    table = table_of(tmp_path, "CREATE TABLE things (s STRUCT(x INT)[], j JSON) WITH (extra_fields='park')")
    schema = json_schema(table)

    assert schema["additionalProperties"] is False
    assert schema["properties"]["s"]["items"]["additionalProperties"] is False
    assert schema["properties"]["j"] == {}
