"""`pintail snapshots` as an operator types it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import duckdb
import pytest

from streams.adapters.duckdb_store import DuckDBStore
from streams.adapters.redis_snapshots import RedisSnapshotRepository
from streams.adapters.snapshot_codec import SnapshotCodec
from streams.cli.main import main
from streams.processes.snapshotting import Snapshotter
from tests.redis_server import RedisServer
from tests.snapshot_stores import MOVES, append, move, open_store

KEY = bytes(range(32))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Two versions of partition 0, one of partition 3, of application `shown`."""
    with RedisServer() as running:
        stores = open_store(tmp_path_factory.mktemp("stores"))
        asyncio.run(_snapshot(running, stores))
        stores.close()
        yield running


async def _snapshot(server: RedisServer, stores: DuckDBStore) -> None:
    async with RedisSnapshotRepository(server.url, application="shown") as repository:
        snapshotter = Snapshotter(repository, SnapshotCodec(KEY, application="shown"))
        for partition in (0, 0, 3):
            store = stores.open_partition(partition)
            append(store, MOVES, [move(number) for number in range(250)])
            assert await snapshotter.take(store, epoch=partition + 5) is not None


@dataclass(frozen=True)
class Shown:
    """What one command left behind."""

    status: int
    out: str
    err: str


class Pintail(Protocol):
    """Runs `pintail snapshots` in this process."""

    def __call__(self, *arguments: str, **settings: str) -> Shown: ...


@pytest.fixture
def pintail(
    server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Pintail:
    def run(*arguments: str, **settings: str) -> Shown:
        defaults = {
            "redis": server.url,
            "application": "shown",
            "snapshot_key": KEY.hex(),
            "data_dir": str(tmp_path),
        }
        for name, value in {**defaults, **settings}.items():
            monkeypatch.setenv(f"PINTAIL_{name.upper()}", value)
        monkeypatch.setenv("COLUMNS", "40")  # a pipe has no width
        monkeypatch.setattr(sys, "argv", ["pintail", "snapshots", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return Shown(int(exit_.value.code or 0), captured.out, captured.err)

    return run


def test_list_shows_every_version(pintail: Pintail) -> None:
    shown = pintail("list")
    assert shown.status == 0, shown.err
    header, *lines = [line.split() for line in shown.out.splitlines()]
    assert header[:3] == ["partition", "version", "created"]
    assert [(line[0], line[1], line[5], line[-2], line[-1]) for line in lines] == [
        ("0", "2", "5", "moves", "500"),
        ("0", "1", "5", "moves", "250"),
        ("3", "1", "8", "moves", "250"),
    ]
    assert pintail().out == shown.out


def test_list_without_snapshots_says_so(pintail: Pintail) -> None:
    shown = pintail("list", application="another")
    assert shown.status == 0
    assert "no snapshots yet of application 'another'" in shown.out


def test_list_under_another_key_says_which_setting_to_change(pintail: Pintail) -> None:
    shown = pintail("list", snapshot_key="00" * 32)
    assert shown.status == 1
    assert shown.out.count("unreadable: another key") == 3
    assert shown.err.count("3 of 3 versions cannot be read: ") == 1
    assert shown.err.count("what to do: set PINTAIL_SNAPSHOT_KEY to the key") == 1
    assert SnapshotCodec(KEY, application="shown").key_id in shown.err
    assert "PINTAIL_SNAPSHOT_KEY" in shown.err
    assert "Traceback" not in shown.err


@pytest.mark.parametrize("command", ["list", "verify"])
def test_redis_away_is_one_clear_message(pintail: Pintail, command: str) -> None:
    shown = pintail(command, redis="redis://127.0.0.1:1")
    assert shown.status == 1
    assert "redis://127.0.0.1:1" in shown.err
    assert "is it running" in shown.err
    assert "Traceback" not in shown.err


def test_verify_checks_what_was_asked_for(pintail: Pintail) -> None:
    everything = pintail("verify")
    assert everything.status == 0, everything.err
    assert everything.out.count(": ok") == 3
    one = pintail("verify", "--partition", "0", "--version", "1")
    assert one.out.count("\n") == 1
    assert one.out.startswith("partition 0 version 1: ok")
    none = pintail("verify", "--partition", "9")
    assert none.status == 1
    assert "pintail snapshots list" in none.err


def test_verify_finds_a_damaged_block(pintail: Pintail, server: RedisServer) -> None:
    with server.client() as client:
        key = min(client.keys("{shown:3}:block:*"))
        intact = client.hget(key, "0")
        assert intact is not None
        client.hset(key, "0", intact[:-1] + bytes([intact[-1] ^ 1]))
        try:
            shown = pintail("verify")
        finally:
            client.hset(key, "0", intact)
    assert shown.status == 1
    assert "partition 3 version 1: NOT RESTORABLE" in shown.out
    assert shown.out.count(": ok") == 2


def test_restore_writes_any_version_as_a_file_that_duckdb_reads(pintail: Pintail, tmp_path: Path) -> None:
    file = tmp_path / "restored.duckdb"
    shown = pintail("restore", "--partition", "0", "--version", "1", "--to", str(file))
    assert shown.status == 0, shown.err
    assert "at moves 250" in shown.out
    with duckdb.connect(str(file), read_only=True) as connection:
        assert connection.execute("SELECT count(*) FROM moves").fetchall() == [(250,)]
    again = pintail("restore", "--partition", "0", "--to", str(file))
    assert again.status == 1
    assert "nothing is overwritten" in again.err
    none = pintail("restore", "--partition", "7", "--to", str(tmp_path / "none"))
    assert none.status == 1
    assert "pintail snapshots list" in none.err


def test_drill_restores_the_newest_version_of_each_partition(
    pintail: Pintail, server: RedisServer, tmp_path: Path
) -> None:
    create = "CREATE TABLE moves (player BIGINT, note VARCHAR) WITH (topic = 'moves')"
    (tmp_path / "tables" / "moves").mkdir(parents=True)
    (tmp_path / "tables" / "moves" / "001_create.sql").write_text(create)
    shown = pintail("drill", tables_dir=str(tmp_path / "tables"))
    assert shown.status == 0, shown.err
    assert shown.out.count("restores and opens; it has no hash") == 2
    with server.client() as client:
        key = min(client.keys("{shown:3}:block:*"))
        intact = client.hgetall(key)
        client.delete(key)
        try:
            shown = pintail("drill", tables_dir=str(tmp_path / "tables"))
        finally:
            client.hset(key, mapping=intact)
    assert shown.status == 1
    assert "partition 3: FAILED: snapshot version 1 of partition 3 lacks 1 of" in shown.out
    assert shown.out.startswith("partition 0 version 2: restores")


def test_list_says_which_key_each_version_is_under(pintail: Pintail) -> None:
    rotated = pintail("list", snapshot_key="00" * 32 + "," + KEY.hex())
    assert rotated.status == 0, rotated.err
    assert rotated.out.count(SnapshotCodec(KEY, application="shown").key_id[:8]) == 3
