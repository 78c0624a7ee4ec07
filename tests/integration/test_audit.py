"""`pintail audit` on a whole system: proven while it is written to; every hole, doubled and changed row is found."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pytest

from tests.audits import audited, clickhouse, found_in, problems
from tests.conftest import Servers, unique_name
from tests.system import System, running_system
from tests.waiting import wait_for

_EVENTS, _ACCOUNTS = unique_name("events"), unique_name("accounts")
TABLES = {
    _EVENTS: f"""
        CREATE TABLE {_EVENTS} (n BIGINT NOT NULL, ratio DOUBLE, tags VARCHAR[])
        WITH (topic = '{{prefix}}.events', partitions = 2)
    """,
    _ACCOUNTS: f"""
        CREATE TABLE {_ACCOUNTS} (id BIGINT, balance DECIMAL(18, 2), PRIMARY KEY (id))
        WITH (topic = '{{prefix}}.accounts', partitions = 2)
    """,
}


@pytest.fixture
def system(tmp_path: Path, servers: Servers) -> Iterator[System]:
    with running_system(tmp_path, TABLES, **servers, sink_workers=1) as system:
        yield system


def fill(system: System, first: int, count: int) -> None:
    """Rows, updates, deletes and poison, in both partitions of both tables."""
    events, accounts = (f"{system.settings.application}.{name}" for name in ("events", "accounts"))
    for number in range(first, first + count):
        value = json.dumps({"n": number, "ratio": number * 1e-7, "tags": ["a", None, str(number)]})
        system.send(events, "poison" if number % 10 == 3 else value, partition=number % 2)
        key = number if number < 600 else number % 97  # most rows stay as they are, some change all the time
        deleted = number % 7 == 0
        record = None if deleted else json.dumps({"id": key, "balance": f"{number}.25"})
        system.send(accounts, record, key=str(key), partition=key % 2)
    system.flush()


@pytest.mark.invariant(7, place="input")
def test_invariant_7_what_is_written_is_proven_meanwhile_and_every_tampering_is_found(system: System) -> None:
    fill(system, 0, 600)
    stop = threading.Event()

    def keep_writing() -> None:
        number = 600
        while not stop.wait(0.05):
            fill(system, number, 20)
            number += 20

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        status, found = audited(system, "--sink")
    finally:
        stop.set()
        writer.join()
    assert status == 0, problems(found)
    assert found["events", 1]["parked"] > 0
    assert found["events", 1]["rows"] == found["events", 1]["rows_in_store"] == found["events", 1]["rows_in_sink"]
    assert found["accounts", 0]["deletes"] > 0
    assert found["accounts", 0]["rows"] > found["accounts", 0]["rows_in_store"] > 0

    tamper_with_clickhouse(system)
    status, found = audited(system, "--sink")
    assert status == 1
    assert found_in(found["events", 0]) == {
        ("sink", "missing", 100, 103),
        ("sink", "doubled", 110, 111),
        ("sink", "changed", 120, 121),
    }
    assert found_in(found["events", 1]) == {("sink", "unexpected", 11, 12)}
    assert found["accounts", 0]["verdict"] == "proven"
    assert [(d["where"], d["kind"]) for d in found["accounts", 1]["differences"]] == [("sink", "missing")]

    tamper_with_store(system)
    status, found = audited(system, "--table", _EVENTS)
    assert status == 1
    assert found_in(found["events", 1]) == {
        ("store", "missing", 10, 11),
        ("store", "doubled", 20, 21),
        ("store", "changed", 30, 31),
        ("sink", "unexpected", 11, 12),
    }
    shown = system.pintail("audit", "--table", _EVENTS)
    assert shown.returncode == 1
    assert f"{system.settings.application}.events[1] store: missing [10, 11), 1 record" in shown.stdout
    assert "NOT proven: in = state = sink" in shown.stdout


def tamper_with_clickhouse(system: System) -> None:
    """Partition 0 of the events loses rows, has one twice and one changed; partition 1 has a row where the log has
    poison, and partition 1 of the accounts lacks a key."""
    columns = "n, ratio, tags, _topic, _partition, _offset, _timestamp"
    insert = f"INSERT INTO {_EVENTS} ({columns}) SETTINGS insert_deduplicate = 0 SELECT "
    for statement in (
        f"{insert} {columns} FROM {_EVENTS} WHERE _partition = 0 AND _offset = 110",
        f"{insert} n, ratio, tags, _topic, 1, 11, _timestamp FROM {_EVENTS} WHERE _partition = 0 AND _offset = 112",
        f"ALTER TABLE {_EVENTS} UPDATE ratio = ratio * 2 WHERE _partition = 0 AND _offset = 120",
        f"ALTER TABLE {_EVENTS} DELETE WHERE _partition = 0 AND _offset IN (100, 101, 102)",
        f"ALTER TABLE {_ACCOUNTS} DELETE WHERE id = (SELECT max(id) FROM {_ACCOUNTS} FINAL "
        "WHERE _partition = 1 AND _deleted = 0)",
    ):
        clickhouse(system, statement)


def tamper_with_store(system: System) -> None:
    """Behind the worker's back, in the file of partition 1."""
    system.stack.stop_process("store-0")
    path = system.stack.data_dir / "stores" / "store-0" / "1.duckdb"
    with duckdb.connect(path) as connection:
        for statement in (
            f"DELETE FROM {_EVENTS} WHERE _offset = 10",
            f"INSERT INTO {_EVENTS} SELECT * FROM {_EVENTS} WHERE _offset = 20",
            f"UPDATE {_EVENTS} SET n = -n WHERE _offset = 30",
            "CHECKPOINT",
        ):
            connection.execute(statement)
    system.stack.start_process("store-0")
    wait_for(lambda: system.partitions_of("store-0").get("1", {}).get("state") == "serving", "it serves again")
