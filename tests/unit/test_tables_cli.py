"""`pintail tables` lists, shows and checks."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import pytest
from typer.testing import CliRunner, Result

from streams.cli.main import app
from streams.errors import ConfigurationError
from tests.unit.tables_helpers import write_table

CREATE = """CREATE TABLE orders (id BIGINT, total DECIMAL(12, 2) NOT NULL, PRIMARY KEY (id))
WITH (topic='shop.orders', retention='30 days')"""


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "tables"
    write_table(directory, "orders", CREATE, "ALTER TABLE orders ADD COLUMN note VARCHAR")
    write_table(directory, "clicks", "CREATE TABLE clicks (url VARCHAR)")
    monkeypatch.setenv("PINTAIL_TABLES_DIR", str(directory))
    monkeypatch.setenv("PINTAIL_DATA_DIR", str(tmp_path / "data"))
    return directory


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["tables", *arguments])


@pytest.mark.usefixtures("tables")
def test_the_list_says_what_each_table_is() -> None:
    result = run()

    assert result.exit_code == 0
    header, clicks, orders = (line.split() for line in result.stdout.splitlines())
    assert header == ["table", "topic", "key", "partitions", "columns", "retention", "version"]
    assert clicks == ["clicks", "clicks", "none,", "appends", "4", "1", "for", "ever", "1"]
    assert orders == ["orders", "shop.orders", "id", "4", "3", "30", "days", "2"]


@pytest.mark.usefixtures("tables")
def test_show_prints_sql_that_defines_the_table_again(tmp_path: Path) -> None:
    shown = run("show", "orders").stdout
    write_table(tmp_path / "again", "orders", shown)

    assert run("check", str(tmp_path / "again")).stdout == "orders: 3 columns, version 1\n"
    assert "retention='30 days'" in shown


@pytest.mark.usefixtures("tables")
def test_show_prints_each_generated_form() -> None:
    with duckdb.connect() as connection:
        connection.execute(run("show", "orders", "--as", "duckdb").stdout)
        assert connection.execute("SELECT count(*) FROM orders").fetchone() == (0,)
    assert "ENGINE = ReplacingMergeTree(_offset)" in run("show", "orders", "--as", "clickhouse").stdout
    assert "TTL _timestamp + toIntervalSecond(2592000)" in run("show", "orders", "--as", "clickhouse").stdout
    assert "total: decimal128(12, 2) not null" in run("show", "orders", "--as", "arrow").stdout
    assert json.loads(run("show", "orders", "--as", "jsonschema").stdout)["required"] == ["id", "total"]


@pytest.mark.usefixtures("tables")
def test_show_of_an_unknown_table_names_the_known_ones() -> None:
    result = run("show", "order")

    assert result.exit_code == 1
    assert isinstance(result.exception, ConfigurationError)
    assert result.exception.hint == "did you mean 'orders'? known tables: clicks, orders"


def test_check_reports_every_faulty_table_with_its_place_and_the_way_out(tables: Path) -> None:
    write_table(tables, "a", "CREATE TABLE a (x INTT)")
    write_table(tables, "b", "CREATE TABLE b (x INT)\nWITH (topic='clicks')")
    result = run("check")

    assert result.exit_code == 1
    assert f"{tables}/a/001_create.sql:1:19: there is no type INTT\n  what to do: did you mean" in result.stderr
    assert f"{tables}/clicks/001_create.sql:1:14: topic 'clicks' already feeds table 'b'" in result.stderr
    assert not result.stdout


def test_the_tables_that_ship_with_the_project_are_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PINTAIL_TABLES_DIR", raising=False)
    result = run("check")

    assert result.exit_code == 0
    assert "flights: 20 columns, version 1" in result.stdout
