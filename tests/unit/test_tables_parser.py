"""What table files mean: types, keys, options, migrations."""

from __future__ import annotations

from pathlib import Path

import pytest

from schemas.catalog import load_catalog
from schemas.duckdb_ddl import duckdb_type
from schemas.table import Column, ExtraFields, ScalarKind, ScalarType
from streams.errors import ConfigurationError, TableFileError
from tests.unit.tables_helpers import table_of, write_table


@pytest.mark.parametrize(
    ("spelled", "means"),
    [
        *((kind.value, kind.value) for kind in ScalarKind if kind is not ScalarKind.DECIMAL),
        ("int", "INTEGER"),
        ("INT2", "SMALLINT"),
        ("INT4", "INTEGER"),
        ("tinyint unsigned", "UTINYINT"),
        ("SMALLINT UNSIGNED", "USMALLINT"),
        ("INT UNSIGNED", "UINTEGER"),
        ("BIGINT UNSIGNED", "UBIGINT"),
        ("FLOAT4", "REAL"),
        ("FLOAT8", "DOUBLE"),
        ("DOUBLE PRECISION", "DOUBLE"),
        ("DECIMAL(10, 2)", "DECIMAL(10, 2)"),
        ("NUMERIC(38)", "DECIMAL(38, 0)"),
        ("dec(5,5)", "DECIMAL(5, 5)"),
        ("BOOL", "BOOLEAN"),
        ("TEXT", "VARCHAR"),
        ("STRING", "VARCHAR"),
        ("CHARACTER VARYING", "VARCHAR"),
        ("DATETIME", "TIMESTAMP"),
        ("TIMESTAMP(3)", "TIMESTAMP"),
        ("TIMESTAMP WITHOUT TIME ZONE", "TIMESTAMP"),
        ("TIMESTAMP WITH TIME ZONE", "TIMESTAMPTZ"),
        ("timestamp(6) with time zone", "TIMESTAMPTZ"),
        ("INT[]", "INTEGER[]"),
        ("ARRAY<INT>", "INTEGER[]"),
        ("ARRAY<ARRAY<DECIMAL(4,1)>>", "DECIMAL(4, 1)[][]"),
        ("STRUCT(a INT, b VARCHAR[])", 'STRUCT("a" INTEGER, "b" VARCHAR[])'),
        ("ROW(a INT)", 'STRUCT("a" INTEGER)'),
        ("STRUCT<a INT, b STRUCT<c DATE>>[]", 'STRUCT("a" INTEGER, "b" STRUCT("c" DATE))[]'),
        ('STRUCT("two words" INT, order INT)', 'STRUCT("two words" INTEGER, "order" INTEGER)'),
    ],
)
def test_every_usual_spelling_of_a_type_is_understood(tmp_path: Path, spelled: str, means: str) -> None:
    table = table_of(tmp_path, f"CREATE TABLE things (x {spelled} NOT NULL, y {spelled})")

    assert [duckdb_type(column.type) for column in table.columns] == [means, means]
    assert [column.nullable for column in table.columns] == [False, True]


def test_options_have_defaults(tmp_path: Path) -> None:
    table = table_of(tmp_path, "CREATE TABLE things (a INT)")

    assert (table.topic, table.partitions, table.retention_seconds, table.format) == ("things", 4, None, "json")
    assert not table.is_keyed
    assert table.schema_version == 1


def test_options_are_read_in_any_quoting_and_case(tmp_path: Path) -> None:
    table = table_of(
        tmp_path,
        "create table things (a int)\n"
        "with ('TOPIC' = 'shop.orders-v2', \"partitions\"='8', retention='2 Weeks', Format='json');",
    )

    assert (table.topic, table.partitions, table.retention_seconds) == ("shop.orders-v2", 8, 14 * 86_400)


@pytest.mark.parametrize("name", ["json", "debezium", "avro", "debezium-avro"])
def test_the_format_is_one_of_four(tmp_path: Path, name: str) -> None:
    assert table_of(tmp_path, f"CREATE TABLE things (a INT) WITH (format='{name}')").format == name


def test_extra_fields_are_ignored_parked_or_kept_in_a_column_that_any_file_may_add(tmp_path: Path) -> None:
    assert table_of(tmp_path / "0", "CREATE TABLE things (a INT)").extra_fields is ExtraFields.IGNORE
    parked = table_of(tmp_path / "1", "CREATE TABLE things (a INT) WITH (extra_fields='park')")
    assert (parked.extra_fields, parked.extra_column) == (ExtraFields.PARK, None)
    kept = table_of(
        tmp_path / "2",
        "CREATE TABLE things (a INT) WITH (extra_fields='keep', extra_column='rest')",
        "ALTER TABLE things ADD COLUMN rest JSON",
    )
    assert (kept.extra_fields, kept.extra_column) == (ExtraFields.KEEP, "rest")


@pytest.mark.parametrize(
    ("text", "seconds"), [("1 second", 1), ("90 minutes", 5_400), ("1 hour", 3_600), ("30 days", 2_592_000)]
)
def test_retention_is_words(tmp_path: Path, text: str, seconds: int) -> None:
    assert table_of(tmp_path, f"CREATE TABLE things (a INT) WITH (retention='{text}')").retention_seconds == seconds


@pytest.mark.parametrize(
    ("body", "key"),
    [
        ("id VARCHAR PRIMARY KEY, n INT", ("id",)),
        ("id VARCHAR PRIMARY KEY NOT ENFORCED, n INT", ("id",)),
        ("id VARCHAR NOT NULL PRIMARY KEY, n INT", ("id",)),
        ("id VARCHAR, n INT, PRIMARY KEY (n, id) NOT ENFORCED", ("n", "id")),
        ("PRIMARY KEY (id), id VARCHAR, n INT", ("id",)),
    ],
)
def test_key_columns_are_not_null_wherever_the_key_is_declared(tmp_path: Path, body: str, key: tuple[str, ...]) -> None:
    table = table_of(tmp_path, f"CREATE TABLE things ({body})")

    assert table.primary_key == key
    assert {column.name: column.nullable for column in table.columns} == {n: n not in key for n in ("id", "n")}


def test_names_keep_their_case_and_keywords_are_names_too(tmp_path: Path) -> None:
    table = table_of(tmp_path, 'CREATE TABLE things (userId INT, order INT, "group by" INT, key INT, straße INT)')

    assert table.column_names == ("userId", "order", "group by", "key", "straße")


def test_later_files_add_columns_and_raise_the_version(tmp_path: Path) -> None:
    table = table_of(
        tmp_path,
        "CREATE TABLE things (id BIGINT PRIMARY KEY)",
        "ALTER TABLE things ADD COLUMN a INT, ADD b VARCHAR[];\nALTER TABLE things ADD COLUMN c DATE NULL;",
        "-- one more\nALTER TABLE things ADD COLUMN d STRUCT(x INT)",
    )

    assert table.column_names == ("id", "a", "b", "c", "d")
    assert table.schema_version == 3
    assert [[column.name for column in m.added_columns] for m in table.migrations] == [["id"], ["a", "b", "c"], ["d"]]
    assert table.column("a") == Column("a", ScalarType(ScalarKind.INTEGER), nullable=True)


def test_files_that_are_not_sql_are_left_alone(tmp_path: Path) -> None:
    folder = write_table(tmp_path, "things", "CREATE TABLE things (a INT)")
    (folder / "README.md").write_text("about things")
    (tmp_path / ".git").mkdir()

    assert load_catalog(tmp_path).topics == ("things",)


def test_the_catalog_finds_tables_by_name_and_topic(tmp_path: Path) -> None:
    write_table(tmp_path, "orders", "CREATE TABLE orders (a INT) WITH (topic='shop.orders')")
    write_table(tmp_path, "clicks", "CREATE TABLE clicks (a INT)")
    catalog = load_catalog(tmp_path)

    assert catalog.topics == ("clicks", "shop.orders")
    assert catalog.by_topic["shop.orders"] is catalog.by_name("orders")
    with pytest.raises(ConfigurationError, match="no table 'order'") as fault:
        catalog.by_name("order")
    assert fault.value.hint == "did you mean 'orders'? known tables: clicks, orders"


def test_two_tables_cannot_share_a_topic(tmp_path: Path) -> None:
    write_table(tmp_path, "a", "CREATE TABLE a (x INT) WITH (topic='same')")
    write_table(tmp_path, "b", "CREATE TABLE b (x INT)\n  WITH (partitions=4, topic='same')")

    with pytest.raises(TableFileError, match="topic 'same' already feeds table 'a'") as fault:
        load_catalog(tmp_path)
    assert (Path(fault.value.file).parent.name, fault.value.line, fault.value.column) == ("b", 2, 29)


def test_all_tables_have_the_same_number_of_partitions(tmp_path: Path) -> None:
    write_table(tmp_path, "a", "CREATE TABLE a (x INT)")
    write_table(tmp_path, "b", "CREATE TABLE b (x INT) WITH (partitions=8)")

    with pytest.raises(TableFileError, match="8 partitions, but table 'a' has 4") as fault:
        load_catalog(tmp_path)
    assert (fault.value.line, fault.value.column) == (1, 41)


@pytest.mark.parametrize("make", [True, False])
def test_a_folder_without_tables_says_how_to_make_one(tmp_path: Path, make: bool) -> None:
    directory = tmp_path / "tables"
    if make:
        directory.mkdir()

    with pytest.raises(TableFileError, match="no tables") as fault:
        load_catalog(directory)
    assert "PINTAIL_TABLES_DIR" in fault.value.hint
