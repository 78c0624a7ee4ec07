"""kill -9 at random moments while a producer writes: nothing is lost, nothing is doubled, nothing is only logged.

One run: twelve kills of the store worker (every fifth takes its disk as well) and twelve of the sink worker, in any
state they happen to be in; now and then, and in the end, `pintail audit` proves what came back. Afterwards the stores,
the dead letters and ClickHouse must equal an oracle that is built straight from the topics (invariants 1, 2, 6, 7). The
seed is in the test's name; PINTAIL_KILLS, PINTAIL_AUDIT_EVERY and PINTAIL_SEED widen the run.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import clickhouse_connect
import duckdb
import pytest
from confluent_kafka import Producer

from streams.localstack import processes
from streams.localstack.stack import LocalStack, StackOptions
from tests.oracle import Expected, expected_from_log, records_of, write_events, write_tables
from tests.system import pintail
from tests.waiting import wait_for, worker_report

KILLS = int(os.environ.get("PINTAIL_KILLS", "12"))
#: An audit waits until both workers are back, some 10 s; PINTAIL_AUDIT_EVERY=1 has one after each kill.
AUDIT_EVERY = int(os.environ.get("PINTAIL_AUDIT_EVERY", "6"))
SEED = int(os.environ.get("PINTAIL_SEED", "1"))
STORE, SINK = "store-0", "sink-0"
EVENTS_PER_SECOND_MAX = 1000

pytestmark = pytest.mark.timeout(600 + 30 * KILLS)


@dataclass(frozen=True)
class Aftermath:
    """What is left when the dust has settled."""

    expected: Expected
    accounts: dict[str, tuple[Any, ...]]
    clicks: list[tuple[Any, ...]]
    next_offsets: dict[tuple[str, int], int]
    dead_letters: list[tuple[str, int, int]]
    delivered_accounts: dict[str, tuple[Any, ...]]
    delivered_clicks: list[tuple[Any, ...]]


class Publisher(threading.Thread):
    """Writes events until told to stop; every one of them is acknowledged by all replicas."""

    def __init__(self, bootstrap: str, random: Random) -> None:
        super().__init__(name="publisher", daemon=True)
        self.published = 0
        self._producer = Producer({"bootstrap.servers": bootstrap, "acks": "all", "linger.ms": 5})
        self._events = write_events(random)
        self._enough = threading.Event()
        self._may_write = threading.Event()
        self._may_write.set()

    def run(self) -> None:
        while not self._enough.wait(0.05):
            self._may_write.wait()
            for _ in range(EVENTS_PER_SECOND_MAX // 20):
                topic, key, value = next(self._events)
                self._producer.produce(topic, key=key, value=value)
                self.published += 1
            self._producer.poll(0)
        assert self._producer.flush(60) == 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Writes nothing new meanwhile."""
        self._may_write.clear()
        try:
            yield
        finally:
            self._may_write.set()

    def finish(self) -> None:
        """Stops; returns when every event is in the log."""
        self._enough.set()
        self.join()


@pytest.fixture(scope="module", params=[SEED], ids=lambda seed: f"seed{seed}")
def aftermath(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aftermath]:
    random = Random(request.param)
    folder = tmp_path_factory.mktemp("kills")
    environment = {
        "PINTAIL_TABLES_DIR": str(write_tables(folder / "tables")),
        "PINTAIL_SNAPSHOT_INTERVAL_SECONDS": "1",
        "PINTAIL_SINK_FLUSH_ROWS_MAX": "700",
    }
    options = StackOptions(store_workers=1, sink_workers=1, worker_environment=environment)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "RESTART_CEILING_SECONDS", 0.5)
        with LocalStack(folder / "stack", options) as stack:
            publisher = Publisher(stack.addresses["kafka"], random)
            publisher.start()
            passed = {STORE: 0, SINK: 0}
            for number in range(KILLS):
                kill_somewhere(stack, random, passed, lose_disk=number % 5 == 4)
                if number % AUDIT_EVERY == AUDIT_EVERY - 1 and number + 1 < KILLS:
                    with publisher.paused():
                        prove(stack)
            publisher.finish()
            expected = expected_from_log(stack.addresses["kafka"])
            assert expected.records == publisher.published
            wait_for(lambda: has_applied(stack, expected), "the store catches up", seconds=180)
            wait_for(lambda: has_delivered(stack, expected), "the sink catches up", seconds=180)
            prove(stack)
            stack.stop_process(STORE)
            yield collect(stack, expected)


def kill_somewhere(stack: LocalStack, random: Random, passed: dict[str, int], *, lose_disk: bool) -> None:
    """Kills both workers, each at a moment of its own: just started, recovering, or after some progress.

    `passed` remembers how far each was seen to be, so that "progress" means records it had never applied before."""
    for name in random.sample([STORE, SINK], 2):
        moment = random.choice(["at once", "alive", "progress", "progress"])
        if moment == "alive":
            wait_for(partial(worker_report, port_of(stack, name)), f"{name} answers")
        elif moment == "progress":
            goal = passed[name] + random.randrange(1, 2000)
            passed[name] = wait_for(partial(has_passed, stack, name, goal), f"{name} goes on", seconds=120)
        stack.kill(name)
        if name == STORE and lose_disk:
            stack.stop_process(STORE)
            shutil.rmtree(stack.data_dir / "stores" / STORE, ignore_errors=True)
            stack.process(STORE).start()


def prove(stack: LocalStack) -> None:
    """`pintail audit` on the workers that came back: in = state = sink, to the last record."""
    audited = pintail(stack, "audit", "--sink", "--deadline-seconds", "60")
    assert audited.returncode == 0, audited.stdout + audited.stderr


def port_of(stack: LocalStack, name: str) -> int:
    port = stack.process(name).specification.port
    assert port is not None
    return port


def progress(stack: LocalStack, name: str) -> int:
    """Positions passed, over all partitions; 0 while the worker says nothing."""
    positions = store_positions(stack) if name == STORE else sink_positions(stack)
    return sum(positions.values())


def has_passed(stack: LocalStack, name: str, goal: int) -> int | None:
    passed = progress(stack, name)
    return passed if passed >= goal else None


def store_positions(stack: LocalStack) -> dict[tuple[str, int], int]:
    partitions = worker_report(port_of(stack, STORE)).get("partitions", {})
    return {
        (topic, int(number)): position
        for number, partition in partitions.items()
        for topic, position in partition["next_offsets"].items()
    }


def sink_positions(stack: LocalStack) -> dict[tuple[str, int], int]:
    partitions = worker_report(port_of(stack, SINK)).get("partitions", {})
    positions = {}
    for name, partition in partitions.items():
        topic, _, number = name.rstrip("]").partition("[")
        positions[topic, int(number)] = partition["next_offset"] or 0
    return positions


def has_applied(stack: LocalStack, expected: Expected) -> bool:
    positions = store_positions(stack)
    return all(positions.get(where, 0) >= end for where, end in expected.ends.items())


def has_delivered(stack: LocalStack, expected: Expected) -> bool:
    positions = sink_positions(stack)
    return all(positions.get(where, 0) >= end for where, end in expected.ends.items())


def collect(stack: LocalStack, expected: Expected) -> Aftermath:
    store = stack.data_dir / "stores" / STORE
    accounts, clicks, offsets = read_stores(sorted(store.glob("*.duckdb")))
    letters = [
        (headers["pintail.topic"], int(headers["pintail.partition"]), int(headers["pintail.offset"]))
        for message in records_of(stack.addresses["kafka"], ["accounts.dead-letters", "clicks.dead-letters"])
        for headers in [{name: value.decode() for name, value in message.headers() or []}]
    ]
    host, port = stack.addresses["clickhouse"].removeprefix("http://").split(":")
    with clickhouse_connect.get_client(host=host, port=int(port)) as client:
        delivered_accounts = client.query(
            "SELECT id, balance, note, _partition, _offset FROM accounts FINAL WHERE _deleted = 0"
        ).result_rows
        delivered_clicks = client.query("SELECT _partition, _offset, user_id, page, seconds FROM clicks").result_rows
    return Aftermath(
        expected=expected,
        accounts=accounts,
        clicks=clicks,
        next_offsets=offsets,
        dead_letters=letters,
        delivered_accounts={row[0]: tuple(row[1:]) for row in delivered_accounts},
        delivered_clicks=[tuple(row) for row in delivered_clicks],
    )


def read_stores(
    files: list[Path],
) -> tuple[dict[str, tuple[Any, ...]], list[tuple[Any, ...]], dict[tuple[str, int], int]]:
    """Accounts by id, clicks, and next_offsets by topic and partition, of all partition files."""
    assert len(files) == 4
    accounts: dict[str, tuple[Any, ...]] = {}
    clicks: list[tuple[Any, ...]] = []
    offsets: dict[tuple[str, int], int] = {}
    for file in files:
        with duckdb.connect(str(file)) as connection:
            rows = connection.execute("SELECT id, balance, note, _partition, _offset FROM accounts").fetchall()
            assert not accounts.keys() & {row[0] for row in rows}, "a key in two partitions"
            assert len({row[0] for row in rows}) == len(rows), "a key twice in one partition"
            accounts |= {row[0]: row[1:] for row in rows}
            clicks += connection.execute("SELECT _partition, _offset, user_id, page, seconds FROM clicks").fetchall()
            for topic, offset in connection.execute(
                "SELECT topic, max(next_offset) FROM pintail.ledger GROUP BY topic"
            ).fetchall():
                offsets[topic, int(file.stem)] = offset
    return accounts, clicks, offsets


@pytest.mark.invariant(1, 7, place="checkpoint")
@pytest.mark.invariant(1, 8, place="recovery")
def test_the_keyed_table_equals_the_oracle(aftermath: Aftermath) -> None:
    assert aftermath.accounts == aftermath.expected.accounts


@pytest.mark.invariant(1, 2, 7, place="checkpoint")
@pytest.mark.invariant(2, 7, 8, place="recovery")
def test_the_append_table_holds_every_record_exactly_once(aftermath: Aftermath) -> None:
    expected = sorted((*where, *row) for where, row in aftermath.expected.clicks.items())
    assert sorted(aftermath.clicks) == expected


@pytest.mark.invariant(6, 7, place="checkpoint")
@pytest.mark.invariant(6, place="recovery")
def test_the_stores_account_for_the_whole_log(aftermath: Aftermath) -> None:
    assert {where: aftermath.next_offsets.get(where) for where in aftermath.expected.ends} == aftermath.expected.ends


@pytest.mark.invariant(6, place="checkpoint")
@pytest.mark.invariant(6, place="recovery")
def test_every_poison_record_is_parked_and_nothing_else(aftermath: Aftermath) -> None:
    assert set(aftermath.dead_letters) == aftermath.expected.parked
    assert len(aftermath.expected.parked) > 0


@pytest.mark.invariant(7, place="checkpoint")
@pytest.mark.invariant(7, place="recovery")
def test_clickhouse_holds_the_append_table_exactly_once(aftermath: Aftermath) -> None:
    expected = sorted((*where, *row) for where, row in aftermath.expected.clicks.items())
    assert sorted(aftermath.delivered_clicks) == expected


@pytest.mark.invariant(7, place="checkpoint")
@pytest.mark.invariant(7, place="recovery")
def test_clickhouse_holds_the_keyed_table_as_the_store_does(aftermath: Aftermath) -> None:
    assert aftermath.delivered_accounts == aftermath.expected.accounts
