"""Every fault in a table file is reported with its file, line and column, and with the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.parser import parse_table
from schemas.sql_tokens import TokenReader
from schemas.table import TableDefinition
from schemas.table_sql import table_sql
from streams.errors import TableFileError
from tests.unit.tables_helpers import table_definitions, write_table

# The fault is marked with ^ before it.
FAULTS_IN_CREATE = [
    ("CREATE TABLE things (a ^INTEGR)", "no type INTEGR", "did you mean INTEGER"),
    ("CREATE TABLE things (a ^POINT)", "no type POINT", "INT"),
    ("CREATE TABLE things (a ^QQQ)", "no type QQQ", "BOOLEAN"),
    ("CREATE TABLE things (\n  a INT,\n  b STRUCT(x INT,\n    y ^VARCHR[])\n)", "no type VARCHR", "VARCHAR"),
    ("CREATE TABLE things (a ^INT8)", "INT8 is not supported", "BIGINT or TINYINT"),
    ("CREATE TABLE things (a ^FLOAT)", "FLOAT is not supported", "REAL (4) or DOUBLE (8)"),
    ("CREATE TABLE things (a ^MAP(VARCHAR, INT))", "MAP is not supported", "STRUCT"),
    ("CREATE TABLE things (a ^BLOB)", "BLOB is not supported", "base64"),
    ("CREATE TABLE things (a ^DECIMAL)", "DECIMAL without digits", "DECIMAL(18, 3)"),
    ("CREATE TABLE things (a DECIMAL(^39, 0))", "from 1 to 38", "DECIMAL"),
    ("CREATE TABLE things (a DECIMAL(5, ^6))", "from 0 to 5", "DECIMAL"),
    ("CREATE TABLE things (a VARCHAR^(20))", "no length", "any length"),
    ("CREATE TABLE things (a TIMESTAMP(^9))", "from 0 to 6", "microseconds"),
    ("CREATE TABLE things (a TIMESTAMP WITH ^ZONE)", "expected TIME", "TIMESTAMPTZ"),
    ("CREATE TABLE things (a INT[^3])", "expected ]", "any length"),
    ("CREATE TABLE things (a ARRAY^(INT))", "expected <", "ARRAY<INTEGER>"),
    ("CREATE TABLE things (a ARRAY<INT^)", "expected >", "ARRAY<...>"),
    ("CREATE TABLE things (a STRUCT(^))", "expected a field name", "double quotes"),
    ("CREATE TABLE things (a STRUCT(x INT, ^X INT))", "there already, as 'x'", "DuckDB"),
    ("CREATE TABLE things (a STRUCT(^null INT))", "cannot be called", "ClickHouse"),
    ("CREATE TABLE things (a ^)", "expected a type, found ')'", "VARCHAR"),
    ("CREATE TABLE things (^)", "expected a column name", "double quotes"),
    ("CREATE TABLE things (a INT, b INT, ^a INT)", "'a' is there already", "rename"),
    ("CREATE TABLE things (a INT, ^A INT)", "there already, as 'a'", "DuckDB"),
    ("CREATE TABLE things (^_offset INT)", "begin with _ are Pintail's own", "rename"),
    ('CREATE TABLE things (^"a.b" INT)', "holds a quote", "rename"),
    ('CREATE TABLE things (^"" INT)', "or nothing", "rename"),
    ("CREATE TABLE things (a INT ^DEFAULT 3)", "unexpected 'DEFAULT'", "NOT NULL, PRIMARY KEY or CODEC"),
    ("CREATE TABLE things (a INT ^UNSIGND)", "unexpected 'UNSIGND'", "comma"),
    ("CREATE TABLE things (a INT, PRIMARY KEY (^b))", "'b' is not a column", "columns: a"),
    ("CREATE TABLE things (a INT, PRIMARY KEY (^A))", "'A' is not a column", "case matter"),
    ("CREATE TABLE things (a INT, PRIMARY KEY (a, ^a))", "in the key twice", "once"),
    ("CREATE TABLE things (a INT PRIMARY KEY, ^PRIMARY KEY (a))", "a second PRIMARY KEY", "PRIMARY KEY (a, b)"),
    ("CREATE TABLE things (^a JSON PRIMARY KEY)", "cannot be a key", "VARCHAR"),
    ("CREATE TABLE things (a DOUBLE, PRIMARY KEY (^a))", "cannot be a key", "compared exactly"),
    ("CREATE TABLE things (a INT[], PRIMARY KEY (^a))", "cannot be a key", "compared exactly"),
    ("CREATE TABLE things (a STRUCT(x INT), PRIMARY KEY (^a))", "cannot be a key", "compared exactly"),
    ("CREATE TABLE things (PRIMARY KEY ^a)", "expected (", "PRIMARY KEY (column)"),
    ("CREATE TABLE ^other (a INT)", "'other' in the folder of 'things'", "same name"),
    ("CREATE TABLE things^.x (a INT)", "one part", "things"),
    ("CREATE ^VIEW things AS SELECT 1", "expected TABLE, found 'VIEW'", "CREATE TABLE name"),
    ("^", "expected CREATE, found the end of the file", "CREATE TABLE name"),
    ("-- nothing yet^\n", "expected CREATE, found the end of the file", "CREATE TABLE name"),
    ("CREATE TABLE things (a INT^", "expected ), found the end of the file", "closing parenthesis"),
    ("CREATE TABLE things (a INT); ^DROP TABLE things", "expected the end of the file", "CREATE TABLE"),
    ("CREATE TABLE things (a INT) ^AS SELECT 1", "expected the end of the file", "CREATE TABLE"),
    ("CREATE TABLE things (a INT) WITH (^partition=4)", "no option 'partition'", "did you mean partitions?"),
    ("CREATE TABLE things (a INT) WITH (^connector='kafka')", "no option 'connector'", "topic, partitions, retention"),
    ("CREATE TABLE things (a INT) WITH (^)", "expected an option", "WITH (topic="),
    ("CREATE TABLE things (a INT) WITH (topic='a', ^topic='b')", "'topic' is there already", "remove"),
    ("CREATE TABLE things (a INT) WITH (topic=^b)", "in single quotes", "topic='flights'"),
    ("CREATE TABLE things (a INT) WITH (topic=^'no spaces')", "cannot be a topic", "letters, digits"),
    ("CREATE TABLE things (a INT) WITH (topic=^'x.dead-letters')", "dead-letter topic", "differently"),
    ("CREATE TABLE things (a INT) WITH (partitions=^0)", "from 1 to 1024", "partitions=4"),
    ("CREATE TABLE things (a INT) WITH (partitions=^'many')", "from 1 to 1024", "partitions=4"),
    ("CREATE TABLE things (a INT) WITH (partitions=^2.5)", "from 1 to 1024", "partitions=4"),
    ("CREATE TABLE things (a INT) WITH (retention=^'3 months')", "not a retention", "'30 days'"),
    ("CREATE TABLE things (a INT) WITH (retention=^30)", "not a retention", "'30 days'"),
    ("CREATE TABLE things (a INT) WITH (retention=^'0 days')", "not a retention", "above 0"),
    ("CREATE TABLE things (a INT) WITH (retention=^'999999999999 weeks')", "not a retention", "for ever"),
    ("CREATE TABLE things (a INT) WITH (format=^'csv')", "format 'csv' is not known", "format='json' or"),
    ("CREATE TABLE things (a INT CODEC(^Zip))", "no codec 'Zip'", "ZSTD"),
    ("CREATE TABLE things (a INT CODEC(ZSTD(^x)))", "expected a whole number", "ZSTD(3)"),
    ("CREATE TABLE things (a INT CODEC ^NOT NULL)", "expected (", "CODEC(Delta, ZSTD(3))"),
    ("CREATE TABLE things (abc INT NOT NULL) WITH (clickhouse_order_by=^'abd')", "not a column", "did you mean abc?"),
    ("CREATE TABLE things (a INT) WITH (clickhouse_order_by=^'a')", "cannot order", "NOT NULL in 001"),
    ("CREATE TABLE things (a INT[] NOT NULL) WITH (clickhouse_order_by=^'a')", "cannot order", "scalars"),
    ("CREATE TABLE things (a INT NOT NULL) WITH (clickhouse_order_by=^'a, a')", "twice", "remove"),
    (
        "CREATE TABLE things (a INT PRIMARY KEY) WITH (clickhouse_order_by=^'a')",
        "by that key",
        "PRIMARY KEY (a) decides",
    ),
    ("CREATE TABLE things (a INT) WITH (clickhouse_partition_by=^'a')", "'a' is not known", "one insert"),
    ("CREATE TABLE things (a INT PRIMARY KEY) WITH (clickhouse_partition_by=^'day')", "by time", "'partition'"),
    ("CREATE TABLE things (a INT) WITH (clickhouse_retention=^'1 day')", "shorter", "rebuilt from ClickHouse"),
    ("CREATE TABLE things (a INT) WITH (clickhouse_retention=^'long')", "not a retention", "'30 days'"),
    ("CREATE TABLE things (a INT) WITH (extra_fields=^'drop')", "extra_fields 'drop'", "extra_fields='ignore' or"),
    ("CREATE TABLE things (a INT) WITH (extra_fields=^'keep')", "not where", "extra_column='extra'"),
    ("CREATE TABLE things (a INT) WITH (extra_column=^'a')", "which are not kept", "extra_fields='keep'"),
    (
        "CREATE TABLE things (a INT) WITH (extra_fields='keep', extra_column=^'b')",
        "'b' is not a column",
        "declare it: b JSON",
    ),
    ("CREATE TABLE things (a INT) WITH (extra_fields='keep', extra_column=^'a')", "cannot hold", "as a JSON"),
    (
        "CREATE TABLE things (a JSON NOT NULL) WITH (extra_fields='keep', extra_column=^'a')",
        "cannot hold",
        "without NOT NULL",
    ),
    ("CREATE TABLE things (\n  a INT) WITH (topic=^'things)", "never closes", "close it"),
    ('CREATE TABLE things (\r\n  ^"a INT)', "never closes", "close it"),
    ("CREATE TABLE things (a INT)\n^/* about", "never closes", "close it"),
    ("CREATE TABLE things (é INT, ü ^INTT)", "no type INTT", "INT"),
]

FAULTS_IN_ALTER = [
    ("ALTER TABLE things ^DROP COLUMN a", "expected ADD, found 'DROP'", "make a new table"),
    ("ALTER TABLE things ^RENAME COLUMN a TO b", "expected ADD", "make a new table"),
    ("ALTER TABLE things ^ALTER COLUMN a TYPE BIGINT", "expected ADD", "make a new table"),
    ("ALTER TABLE things ADD COLUMN ^b INT NOT NULL", "cannot be NOT NULL", "nullable"),
    ("ALTER TABLE things ADD COLUMN ^b INT PRIMARY KEY", "cannot be part of the key", "nullable"),
    ("ALTER TABLE things ADD COLUMN ^a INT", "'a' is there already", "rename"),
    ("ALTER TABLE things ADD COLUMN b INT;\nALTER TABLE things ADD COLUMN ^B INT", "as 'b'", "rename"),
    ("ALTER TABLE ^other ADD COLUMN b INT", "'other' in the folder of 'things'", "same name"),
    ("^CREATE TABLE things (a INT)", "expected ALTER", "ADD COLUMN"),
    ("^DROP TABLE things", "expected ALTER", "make a new table"),
    ("ALTER TABLE things ADD COLUMN b INT ^ALTER TABLE things ADD COLUMN c INT", "unexpected 'ALTER'", "comma"),
    ("-- empty^\n", "adds no column", "ADD COLUMN"),
    ("ALTER TABLE things ADD COLUMN b ^INTT", "no type INTT", "INT"),
]


def _fault(folder: Path) -> TableFileError:
    with pytest.raises(TableFileError) as raised:
        parse_table(folder)
    return raised.value


def _place_of_mark(marked: str) -> tuple[str, int, int]:
    before, _, after = marked.partition("^")
    return before + after, before.count("\n") + 1, len(before) - before.rfind("\n")


@pytest.mark.parametrize(("marked", "message", "hint"), FAULTS_IN_CREATE)
def test_a_fault_in_create_is_pointed_at(tmp_path: Path, marked: str, message: str, hint: str) -> None:
    sql, line, column = _place_of_mark(marked)
    folder = write_table(tmp_path, "things")
    (folder / "001_create.sql").write_bytes(sql.encode())

    fault = _fault(folder)

    assert message in fault.message
    assert hint in fault.hint
    assert (fault.file, fault.line, fault.column) == (str(folder / "001_create.sql"), line, column)
    assert str(fault).startswith(f"{fault.file}:{line}:{column}: ")


@pytest.mark.parametrize(("marked", "message", "hint"), FAULTS_IN_ALTER)
def test_a_fault_in_a_migration_is_pointed_at(tmp_path: Path, marked: str, message: str, hint: str) -> None:
    sql, line, column = _place_of_mark(marked)
    folder = write_table(tmp_path, "things", "CREATE TABLE things (a INT)", sql)

    fault = _fault(folder)

    assert message in fault.message
    assert hint in fault.hint
    assert (fault.file, fault.line, fault.column) == (str(folder / "002_change.sql"), line, column)


@pytest.mark.parametrize(
    ("files", "at", "message"),
    [
        (["002_a.sql"], "002_a.sql", "no file with number 001"),
        (["001_a.sql", "003_b.sql"], "003_b.sql", "no file with number 002"),
        (["001_a.sql", "001_b.sql"], "001_b.sql", "001_a.sql has the same number"),
        (["001_a.sql", "2.sql"], "2.sql", "not a migration's file name"),
        (["000_a.sql", "001_b.sql"], "000_a.sql", "no file with number 001"),
        ([], "", "no table file"),
    ],
)
def test_the_numbers_of_the_files_have_no_gap(tmp_path: Path, files: list[str], at: str, message: str) -> None:
    folder = write_table(tmp_path, "things")
    for file in files:
        (folder / file).write_text("CREATE TABLE things (a INT)")

    fault = _fault(folder)

    assert message in fault.message
    assert Path(fault.file) == folder / at
    assert fault.hint


@pytest.mark.parametrize("name", ["Things", "1things", "_things", "a-b", "a b"])
def test_a_folder_that_cannot_name_a_table_is_refused(tmp_path: Path, name: str) -> None:
    fault = _fault(write_table(tmp_path, name, f'CREATE TABLE "{name}" (a INT)'))

    assert "cannot be a table name" in fault.message
    assert "lower case" in fault.hint


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    folder = write_table(tmp_path, "things")
    (folder / "001_create.sql").write_bytes("CREATE TABLE things (é INT)".encode("latin-1"))

    assert "not UTF-8" in _fault(folder).message


@given(st.text(max_size=80) | st.text("CREATE TABLE(),'\"[]<>;=-/* \n", max_size=80))
def test_no_text_is_read_with_anything_but_tokens_or_a_table_file_error(text: str) -> None:
    try:
        reader = TokenReader("x.sql", text)
    except TableFileError as fault:
        assert fault.hint  # noqa: PT017
        return
    while not reader.at_end:
        reader.take()


@given(table_definitions(), st.data())
def test_a_file_cut_short_or_garbled_is_a_table_file_error_or_a_table(
    tmp_path_factory: pytest.TempPathFactory, table: TableDefinition, data: st.DataObject
) -> None:
    sql = table_sql(table)
    cut = data.draw(st.integers(0, len(sql)))
    garbled = sql[:cut] + data.draw(st.text(max_size=3)) + sql[data.draw(st.integers(cut, len(sql))) :]
    folder = write_table(tmp_path_factory.mktemp("t"), "things")
    (folder / "001_create.sql").write_bytes(garbled.encode("utf-8", "surrogatepass"))
    try:
        parse_table(folder)
    except TableFileError as fault:
        assert fault.hint  # noqa: PT017
        assert fault.line <= garbled.count("\n") + 1  # noqa: PT017
