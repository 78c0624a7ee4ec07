"""Several store workers: co-location, questions by key, hand-over of partitions by snapshot (D2, D11)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.audits import audited, problems
from tests.conftest import Servers
from tests.system import Position, System, running_system
from tests.waiting import wait_for

PARTITIONS = 4
TABLES = {
    "accounts": """
        CREATE TABLE accounts (id VARCHAR, balance BIGINT, PRIMARY KEY (id))
        WITH (topic = '{prefix}.accounts', partitions = 4)
    """,
    "audits": """
        CREATE TABLE audits (id VARCHAR, balance BIGINT) WITH (topic = '{prefix}.audits', partitions = 4)
    """,
}


@pytest.fixture
def system(tmp_path: Path, servers: Servers) -> Iterator[System]:
    with running_system(
        tmp_path,
        TABLES,
        **servers,
        store_workers=2,
        environment={"PINTAIL_SNAPSHOT_INTERVAL_SECONDS": "0.5"},
    ) as system:
        wait_for(
            lambda: all(len(owned(system, name)) == 2 for name in ("store-0", "store-1")), "both own two partitions"
        )
        yield system


def owned(system: System, worker: str) -> set[int]:
    """The partitions that the worker serves."""
    return {int(number) for number, state in system.partitions_of(worker).items() if state["state"] == "serving"}


def reflects(state: dict[str, Any], next_offsets: dict[str, int]) -> bool:
    """The newest snapshot holds all that was written to `accounts`."""
    snapshot = state.get("snapshot", {}).get("next_offsets", {})
    return all(snapshot.get(topic, 0) >= position for topic, position in next_offsets.items())


def put(system: System, key: str, balance: int) -> Position:
    value = json.dumps({"id": key, "balance": balance})
    return system.publish(f"{system.settings.application}.accounts", value, key=key)


def balance(system: System, key: str, position: Position) -> list[tuple[Any, ...]]:
    return list(system.query_after(position, "SELECT balance FROM accounts WHERE id = ?", [key], key=key).rows)


def append_with_poison(system: System) -> None:
    """A row and a record that is none in each partition of `audits`, wherever they are at the moment."""
    for partition in range(PARTITIONS):
        for value in (json.dumps({"id": "x", "balance": partition}), "poison"):
            system.send(f"{system.settings.application}.audits", value, partition=partition)
    system.flush()


@pytest.mark.invariant(2, 6, 7, 8, 10, place="rebalance")
def test_partitions_are_co_located_and_move_with_their_state(system: System) -> None:
    kept = system.stack.process("store-0").pid
    assert owned(system, "store-0") | owned(system, "store-1") == set(range(PARTITIONS))
    assert not owned(system, "store-0") & owned(system, "store-1")

    keys = [f"key-{number}" for number in range(40)]
    written = {key: put(system, key, number) for number, key in enumerate(keys)}
    assert {position.partition for position in written.values()} == set(range(PARTITIONS))
    for number, key in enumerate(keys):
        assert balance(system, key, written[key]) == [(number,)]

    # Whichever worker is asked, it gathers what the other one holds, in every way of splitting a query.
    at_least: dict[str, dict[int, int]] = {}
    for position in written.values():
        newest = at_least.setdefault(position.topic, {})
        newest[position.partition] = max(newest.get(position.partition, 0), position.offset)
    for sql, rows in {
        "SELECT count(*), sum(balance), avg(balance) FROM accounts": [(40, sum(range(40)), sum(range(40)) / 40)],
        "SELECT id FROM accounts ORDER BY balance DESC LIMIT 2": [("key-39",), ("key-38",)],
        "SELECT count(*) FROM accounts a JOIN accounts b ON a.balance = b.balance + 1": [(39,)],
    }.items():
        for _ in range(4):
            answer = system.client.query(sql, at_least=at_least, deadline_ms=60_000)
            assert answer.rows == rows
            assert set(answer.epoch) == set(range(PARTITIONS))
            assert all(
                answer.offsets[topic][partition] > offset
                for topic, newest in at_least.items()
                for partition, offset in newest.items()
            )

    def is_covered() -> bool:
        """The newest snapshots reflect everything written."""
        covered = {**system.partitions_of("store-0"), **system.partitions_of("store-1")}
        return len(covered) == PARTITIONS and all(reflects(state, state["next_offsets"]) for state in covered.values())

    append_with_poison(system)
    wait_for(is_covered, "snapshots of every partition")

    # store-1 goes for good: after its session ends, store-0 takes over. It has none of its files, or empty ones from a
    # moment in which it was alone in the group.
    moved = owned(system, "store-1")
    system.stack.stop_process("store-1")
    append_with_poison(system)
    wait_for(lambda: owned(system, "store-0") == set(range(PARTITIONS)), "store-0 owns all", seconds=90)
    for number in moved:
        assert system.partitions_of("store-0")[str(number)]["recovered"]["rung"] == "snapshot"
    last = put(system, "key-0", 1000)
    answer = system.query_after(last, "SELECT count(*), sum(balance) FROM accounts")
    assert answer.rows == [(40, sum(range(40)) + 1000)]

    # And it comes back: partitions move again, with what was written meanwhile.
    system.stack.start_process("store-1")
    append_with_poison(system)
    wait_for(lambda: len(owned(system, "store-1")) == 2, "store-1 owns two again", seconds=90)
    for number, key in enumerate(keys[1:], start=1):
        assert balance(system, key, written[key]) == [(number,)]
    assert balance(system, "key-0", last) == [(1000,)]

    status, found = audited(system, "--no-sink")
    assert status == 0, problems(found)
    for number in range(PARTITIONS):
        moved_along = found["audits", number]
        assert (moved_along["rows"], moved_along["rows_in_store"], moved_along["parked"]) == (3, 3, 3)
    assert system.stack.process("store-0").pid == kept, "poison ended a worker"
