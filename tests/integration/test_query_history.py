"""`pintail query --history`: ClickHouse answers what the store would, or the query is refused; on the real engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
from typer.testing import CliRunner

from schemas.catalog import Catalog, load_catalog
from schemas.clickhouse_query import HistoryRefusedError, clickhouse_query
from schemas.duckdb_ddl import create_table_sql
from streams.adapters.clickhouse_queries import ClickHouseQueries
from streams.adapters.clickhouse_rows import delivery_table
from streams.adapters.clickhouse_sink import ClickHouseSink
from streams.adapters.duckdb_values import row_encoder
from streams.cli.main import app
from streams.positions import OffsetRange, TopicPartition
from tests.sink_log import PartitionLog
from tests.store_samples import DECODER

TABLES = {
    "trips": "CREATE TABLE trips (id BIGINT NOT NULL, line VARCHAR NOT NULL, delay INT, fare DECIMAL(9, 2), "
    "began TIMESTAMPTZ)",
    "lines": "CREATE TABLE lines (line VARCHAR, name VARCHAR, PRIMARY KEY (line))",
}
QUERIES = [
    "SELECT * FROM trips ORDER BY id",
    "SELECT count(*) AS n, count(delay), sum(delay), min(fare), max(began), count(DISTINCT line) FROM trips",
    "SELECT sum(delay), max(line), count(*) FROM trips WHERE id < 0",
    "SELECT line, avg(delay) AS a FROM trips GROUP BY ALL ORDER BY a DESC, line",
    "SELECT line, count(*) FILTER (WHERE delay > 3) AS late FROM trips GROUP BY line HAVING count(*) > 1 ORDER BY 1",
    "SELECT t.id, l.name FROM trips t LEFT JOIN lines l USING (line) ORDER BY t.id",
    "SELECT l.line FROM lines l WHERE NOT EXISTS (SELECT 1 FROM trips t WHERE t.line = l.line) ORDER BY 1",
    "WITH late AS (SELECT * FROM trips WHERE delay >= 5) SELECT line, count(*) FROM late GROUP BY line ORDER BY line",
    "SELECT date_trunc('day', began) AS day, count(*) FROM trips GROUP BY day ORDER BY day",
    "SELECT extract(year FROM began), extract(day FROM began) FROM trips ORDER BY id LIMIT 2",
    "SELECT id, CASE WHEN delay IS NULL THEN 'none' WHEN delay > 4 THEN 'late' ELSE 'early' END FROM trips ORDER BY 1",
    "SELECT id FROM trips ORDER BY id LIMIT 2 OFFSET 1",
    "SELECT coalesce(delay, -1), delay + 1, delay * 2, delay % 3, -delay, abs(delay - 5) FROM trips ORDER BY id",
    "SELECT line || '!' FROM trips WHERE line LIKE 'U%' AND delay BETWEEN 1 AND 9 AND line NOT IN ('U9') ORDER BY id",
    "SELECT id, row_number() OVER (PARTITION BY line ORDER BY id) FROM trips ORDER BY id",
    "SELECT line FROM trips UNION SELECT line FROM lines ORDER BY line",
    "SELECT id FROM trips WHERE began >= TIMESTAMPTZ '2026-01-02 00:00:00+00' ORDER BY id DESC",
    "SELECT sum(delay)::DOUBLE / count(*) FROM trips WHERE began < DATE '2026-01-05'",
    "SELECT delay FROM trips ORDER BY delay, id",
    "SELECT delay FROM trips ORDER BY delay DESC, id",
    "SELECT name FROM lines ORDER BY name",
]
REFUSED = {
    "SELECT round(fare) FROM trips": "may mean something else",
    "SELECT lower(line) FROM trips": "may mean something else",
    "SELECT id::VARCHAR FROM trips": "may mean something else",
    "SELECT * FROM range(3)": "may mean something else",
    "SELECT quantile_cont(delay, 0.5) FROM trips": "may mean something else",
    "SELECT * FROM trip": "did you mean",
    "SELECT * FROM system.tables": "names a database",
    "INSERT INTO trips VALUES (1)": "not one SELECT",
    "SELECT 1; SELECT 2": "not one SELECT",
    "SELECT FROM WHERE": "cannot be read",
    "SELECT id FROM trips WHERE id = $2": "no value for $2",
    "SELECT nothing FROM trips": "nothing",
}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    directory = tmp_path_factory.mktemp("tables")
    for name, sql in TABLES.items():
        (directory / name).mkdir()
        (directory / name / "001_create.sql").write_text(f"{sql} WITH (partitions=1)")
    return load_catalog(directory)


def records(table: str) -> list[tuple[str | None, dict[str, Any] | None]]:
    if table == "lines":
        kept: list[tuple[str | None, dict[str, Any] | None]] = [
            (line, {"line": line, "name": f"Line {line}"}) for line in ("U1", "U2", "U9", "S1")
        ]
        return [*kept, ("U1", {"line": "U1", "name": "Airport"}), ("S1", None), ("U9", {"line": "U9", "name": None})]
    return [
        (
            None,
            {
                "id": n,
                "line": f"U{n % 4}",
                "delay": None if n == 4 else n,
                "fare": n * 1.5,
                "began": f"2026-01-0{n}T07:00:00Z",
            },
        )
        for n in range(1, 8)
    ]


@pytest.fixture(scope="module")
def url(clickhouse_url: str, unique_name: Callable[[str], str], catalog: Catalog) -> str:
    """Of a database that holds the tables, and what was delivered of them."""
    url = f"{clickhouse_url}/{unique_name('history')}"
    sink = ClickHouseSink(url)
    sink.ensure_tables(catalog)
    for table in catalog.tables:
        log = PartitionLog(TopicPartition(table.topic, 0))
        for key, value in records(table.name):
            log.append(None if value is None else json.dumps(value).encode(), key=None if key is None else key.encode())
        decoded = DECODER.decode(table, log.batch(0, log.next_offset))
        assert not decoded.parked
        sink.insert(table, log.topic_partition, OffsetRange(0, log.next_offset), delivery_table([decoded]))
    sink.close()
    return url


@pytest.fixture(scope="module")
def store(catalog: Catalog) -> Iterator[duckdb.DuckDBPyConnection]:
    """The tables as a store has them."""
    connection = duckdb.connect()
    for table in catalog.tables:
        connection.execute(create_table_sql(table, qualified_name=table.name))
        newest = {key or offset: (offset, value) for offset, (key, value) in enumerate(records(table.name))}
        for offset, value in newest.values():
            if value is not None:
                values = [*(value[name] for name in table.column_names), 0, offset, "2023-11-14 22:13:20+00"]
                marks = ", ".join("?" * len(values))
                connection.execute(f"INSERT INTO {table.name} VALUES ({marks})", values)
    yield connection
    connection.close()


@pytest.fixture
def queries(url: str, catalog: Catalog) -> Iterator[ClickHouseQueries]:
    sink = ClickHouseSink(url)
    yield ClickHouseQueries(sink, catalog)
    sink.close()


def plain(value: Any) -> Any:
    """Numbers of any spelling, and times without theirs."""
    if isinstance(value, str):
        value = value.replace("+00:00", "Z").replace(".000000Z", "Z").replace(".000Z", "Z")
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


@pytest.mark.parametrize("sql", QUERIES)
def test_clickhouse_answers_as_the_store_does(
    sql: str, queries: ClickHouseQueries, store: duckdb.DuckDBPyConnection
) -> None:
    answer = queries.ask(sql, [], deadline_ms=10_000, rows_max=1_000)
    cursor = store.execute(sql)
    expected = json.loads(row_encoder([kind for _, kind, *_ in cursor.description])(cursor.fetchall()))
    assert [[plain(value) for value in row] for row in answer.rows] == [[plain(v) for v in row] for row in expected]


@pytest.mark.parametrize("sql", REFUSED)
def test_what_may_mean_something_else_is_refused(sql: str, queries: ClickHouseQueries) -> None:
    with pytest.raises(HistoryRefusedError) as refused:
        queries.ask(sql, [1], deadline_ms=10_000, rows_max=1_000)
    assert REFUSED[sql] in str(refused.value)
    assert refused.value.hint


def test_values_are_bound_as_literals_whatever_they_hold(catalog: Catalog, queries: ClickHouseQueries) -> None:
    text = "it's \\ \n -- {x:Int64}"
    answer = queries.ask("SELECT $1, $2, $3", [text, None, 2.5], deadline_ms=10_000, rows_max=10)
    assert answer.rows == [[text, None, 2.5]]
    named = queries.ask("SELECT id FROM trips WHERE line = $l ORDER BY id", {"l": "U1"}, deadline_ms=9_000, rows_max=10)
    assert named.rows == [[1], [5]]
    assert named.offsets == {"trips": {0: 7}}
    translated, _ = clickhouse_query("SELECT id FROM trips WHERE id = ?", [3], catalog, database="d")
    assert "= 3" in translated


def test_the_command_prints_the_answer_of_clickhouse(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, sql in TABLES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "001_create.sql").write_text(f"{sql} WITH (partitions=1)")
    monkeypatch.setenv("PINTAIL_CLICKHOUSE", url)
    monkeypatch.setenv("PINTAIL_TABLES_DIR", str(tmp_path))
    command = ["query", "--history", "SELECT line, name FROM lines ORDER BY 1", "-f", "csv"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.stdout == "line,name\nU1,Airport\nU2,Line U2\nU9,\n"
    assert "as of lines [0: 7]" in done.stderr
