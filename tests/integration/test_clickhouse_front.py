"""The embedded ClickHouse answers unmodified clients as a server does."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlencode

import lz4.frame
import pyarrow as pa
import pytest
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import DatabaseError


def http(url: str, body: bytes | None = None, **parameters: str) -> bytes:
    with urllib.request.urlopen(f"{url}/?{urlencode(parameters)}", data=body, timeout=30) as reply:  # noqa: S310
        return bytes(reply.read())


@pytest.fixture
def table(clickhouse: Client, unique_name: Callable[[str], str]) -> str:
    name = unique_name("front")
    clickhouse.command(f"CREATE TABLE {name} (id UInt32, text String) ENGINE = MergeTree ORDER BY id")
    return name


def test_rows_inserted_in_compressed_native_blocks_come_back(clickhouse: Client, table: str) -> None:
    rows = [[number, f"line {number} FORMAT Native\n"] for number in range(100_000)]
    assert clickhouse.insert(table, rows, column_names=["id", "text"]).written_rows == len(rows)
    assert clickhouse.query(f"SELECT * FROM {table} ORDER BY id").result_rows == [tuple(row) for row in rows]


def test_an_arrow_stream_in_an_lz4_frame_is_inserted(clickhouse: Client, table: str) -> None:
    rows = pa.table({"id": pa.array([1, 2], pa.uint32()), "text": ["a", "b"]})
    body = pa.BufferOutputStream()
    with pa.ipc.new_stream(body, rows.schema) as stream:
        stream.write_table(rows)
    compressed = lz4.frame.compress(body.getvalue())
    clickhouse.raw_insert(table, ["id", "text"], compressed, fmt="ArrowStream", compression="lz4")
    assert clickhouse.query_arrow(f"SELECT * FROM {table} ORDER BY id").to_pylist() == rows.to_pylist()


def test_an_insert_with_a_long_column_list_and_values_is_answered_at_once(clickhouse: Client, table: str) -> None:
    columns = ["id", *(f"a_long_column_name_{number}" for number in range(12))]
    for name in columns[1:]:
        clickhouse.command(f"ALTER TABLE {table} ADD COLUMN {name} UInt8")
    clickhouse.command(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('1' * len(columns))})")
    assert clickhouse.query(f"SELECT count() FROM {table}").result_rows == [(1,)]


def test_parameters_and_streams(clickhouse: Client) -> None:
    assert clickhouse.query("SELECT {a:UInt8} + 1, {b:String}", parameters={"a": 41, "b": "x'y"}).result_rows == [
        (42, "x'y")
    ]
    with clickhouse.query_rows_stream("SELECT number FROM numbers(200000)") as rows:
        assert sum(number for (number,) in rows) == 199_999 * 100_000


def test_a_setting_holds_for_its_own_statement_only(clickhouse_url: str) -> None:
    question = b"SELECT getSetting('max_block_size')"
    default = http(clickhouse_url, question)
    for session in ({}, {"session_id": "settings-test"}):
        assert http(clickhouse_url, question, **session, max_block_size="77") == b"77\n"
        assert http(clickhouse_url, question, **session) == default


def test_a_database_holds_for_its_own_statement_only(clickhouse_url: str) -> None:
    question = b"SELECT currentDatabase()"
    for database in ("system", "default", "system"):
        assert http(clickhouse_url, question, database=database) == database.encode() + b"\n"
        assert http(clickhouse_url, question) == b"default\n"


def test_a_session_keeps_its_temporary_table_to_itself(clickhouse_url: str) -> None:
    mine = {"session_id": "mine"}
    http(clickhouse_url, b"CREATE TEMPORARY TABLE scratch (a Int32)", **mine)
    http(clickhouse_url, b"INSERT INTO scratch VALUES (5)", **mine)
    assert http(clickhouse_url, b"SELECT a FROM scratch", **mine) == b"5\n"
    for others in ({}, {"session_id": "theirs"}):
        with pytest.raises(urllib.error.HTTPError) as refused:
            http(clickhouse_url, b"SELECT a FROM scratch", **others)
        refused.value.close()
        assert refused.value.headers["X-ClickHouse-Exception-Code"] == "60"


@pytest.mark.parametrize(
    ("query", "code"),
    [("SELEC 1", 62), ("SELECT * FROM no_such_table", 60), ("SELECT no_such_column FROM system.one", 47)],
)
def test_errors_carry_clickhouse_codes(clickhouse: Client, query: str, code: int) -> None:
    with pytest.raises(DatabaseError) as error:
        clickhouse.command(query, data=None) if query.startswith("SELEC ") else clickhouse.query(query)
    assert error.value.code == code


def test_unknown_settings_and_paths_are_refused(clickhouse_url: str) -> None:
    for url, status in ((f"{clickhouse_url}/?query=SELECT+1&no_such=1", 404), (f"{clickhouse_url}/nowhere", 404)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(url, timeout=30)  # noqa: S310
        refused.value.close()
        assert refused.value.code == status


def test_plain_http_clients_need_no_driver(clickhouse_url: str, table: str) -> None:
    assert urllib.request.urlopen(f"{clickhouse_url}/ping", timeout=30).read() == b"Ok.\n"  # noqa: S310
    http(clickhouse_url, b"1\tone\n2\ttwo\n", query=f"INSERT INTO {table} FORMAT TSV")
    http(clickhouse_url, f"INSERT INTO {table} VALUES (3, 'a FORMAT b c')".encode())
    assert http(clickhouse_url, f"SELECT text FROM {table} ORDER BY id FORMAT JSONCompactEachRow".encode()) == (
        b'["one"]\n["two"]\n["a FORMAT b c"]\n'
    )
    request = urllib.request.Request(  # noqa: S310
        f"{clickhouse_url}/?{urlencode({'query': 'SELECT 1', 'enable_http_compression': '1'})}",
        headers={"Accept-Encoding": "gzip"},
    )
    with urllib.request.urlopen(request, timeout=30) as reply:  # noqa: S310
        assert gzip.decompress(reply.read()) == b"1\n"


def test_a_cut_body_is_refused_and_changes_nothing(clickhouse: Client, clickhouse_url: str, table: str) -> None:
    whole = lz4.frame.compress(b"1\tone\n" * 1000)
    for body in (whole[: len(whole) // 2], b"no lz4 at all"):
        request = urllib.request.Request(  # noqa: S310
            f"{clickhouse_url}/?{urlencode({'query': f'INSERT INTO {table} FORMAT TSV'})}",
            data=body,
            headers={"Content-Encoding": "lz4"},
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=30)  # noqa: S310
        refused.value.close()
        assert refused.value.headers["X-ClickHouse-Exception-Code"] == "271"
    assert clickhouse.command(f"SELECT count() FROM {table}") == 0


def test_a_directory_is_open_in_one_process_only_and_sigterm_releases_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "streams.localstack.clickhouse_front", "--path", str(tmp_path), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout is not None
            url = json.loads(first.stdout.readline())["url"]
            http(url, b"CREATE TABLE kept (a Int32) ENGINE = MergeTree ORDER BY a")
            http(url, b"INSERT INTO kept VALUES (1)")
            second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            assert second.returncode == 1
            assert f"{tmp_path} is open in another process" in second.stderr
            first.send_signal(signal.SIGTERM)
            assert first.wait(timeout=30) == 0
        finally:
            first.kill()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as again:
        try:
            assert again.stdout is not None
            assert http(json.loads(again.stdout.readline())["url"], b"SELECT a FROM kept") == b"1\n"
        finally:
            again.kill()
