"""Two store workers with standbys, under load: what a restart and a death of one of them cost (invariants 2, 3, 6)."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from confluent_kafka import KafkaError, Message, Producer

from tests.oracle import records_of
from tests.system import System, running_system
from tests.waiting import wait_for, worker_report

PARTITIONS = 4
WORKERS = ("store-0", "store-1")
POISON = b'{"number": "many"}'
TABLES = {
    "visits": """
        CREATE TABLE visits (number BIGINT NOT NULL) WITH (topic = '{prefix}.visits', partitions = 4)
    """
}


class Publisher(threading.Thread):
    """Writes numbers to each partition in turn until told to stop, and some poison."""

    def __init__(self, system: System) -> None:
        super().__init__(name="publisher", daemon=True)
        self.topic = f"{system.settings.application}.visits"
        self._producer = Producer({"bootstrap.servers": system.settings.kafka, "acks": "all", "linger.ms": 5})
        self._enough = threading.Event()
        self.rounds = 0
        #: Of each partition, once `finish` has returned.
        self.last_offsets: dict[int, int] = {}

    def run(self) -> None:
        while not self._enough.wait(0.02):
            for partition in range(PARTITIONS):
                value = json.dumps({"number": self.rounds})
                self._producer.produce(self.topic, value, partition=partition, on_delivery=self._on_delivery)
            if self.rounds % 10 == 0:
                self._producer.produce(self.topic, POISON, partition=self.rounds // 10 % PARTITIONS)
            self.rounds += 1
            self._producer.poll(0)
        assert self._producer.flush(30) == 0

    def _on_delivery(self, error: KafkaError | None, message: Message) -> None:
        assert error is None, error
        self.last_offsets[int(message.partition())] = int(message.offset())

    def finish(self) -> None:
        """Stops; returns when every record is in the log."""
        self._enough.set()
        self.join()


@pytest.fixture(scope="module")
def system(
    tmp_path_factory: pytest.TempPathFactory, kafka: str, redis_url: str, clickhouse_url: str
) -> Iterator[System]:
    with running_system(
        tmp_path_factory.mktemp("failover"),
        TABLES,
        kafka=kafka,
        redis_url=redis_url,
        clickhouse_url=clickhouse_url,
        store_workers=2,
        environment={"PINTAIL_STANDBY": "1", "PINTAIL_SESSION_TIMEOUT_SECONDS": "30"},
    ) as system:
        yield system


@pytest.fixture(scope="module")
def publisher(system: System) -> Iterator[Publisher]:
    publisher = Publisher(system)
    publisher.start()
    yield publisher
    publisher.finish()


def report(system: System, worker: str) -> dict[str, Any]:
    """What the worker's /ready says; empty while it says nothing."""
    port = system.stack.process(worker).specification.port
    assert port is not None
    return worker_report(port)


def partitions_of(system: System, worker: str) -> dict[int, dict[str, Any]]:
    """What it says of each partition that it owns."""
    return {int(number): state for number, state in report(system, worker).get("partitions", {}).items()}


def standbys_of(system: System, worker: str) -> set[int]:
    """The partitions of which it keeps a copy that follows the log."""
    standbys = report(system, worker).get("standbys", {})
    return {int(number) for number, state in standbys.items() if state["state"] == "standby"}


def serving(system: System, worker: str) -> dict[int, int]:
    """Partition -> epoch, of those that the worker serves."""
    states = partitions_of(system, worker)
    return {number: state["epoch"] for number, state in states.items() if state["state"] == "serving"}


def is_settled(system: System) -> bool:
    """Each serves two partitions, and keeps warm copies of the other's."""
    owned = {name: serving(system, name).keys() for name in WORKERS}
    copies = {name: standbys_of(system, name) for name in WORKERS}
    return (
        all(len(partitions) == 2 for partitions in owned.values())
        and all(min(state["next_offsets"].values()) > 0 for n in WORKERS for state in partitions_of(system, n).values())
        and copies == {"store-0": set(owned["store-1"]), "store-1": set(owned["store-0"])}
    )


def keys_by_partition(system: System) -> dict[int, str]:
    """A key for each partition, by which questions find it."""
    keys: dict[int, str] = {}
    for number in range(100):
        topic = f"{system.settings.application}.visits"
        position = system.publish(topic, json.dumps({"number": -1}), key=f"key-{number}")
        keys.setdefault(position.partition, f"key-{number}")
        if len(keys) == PARTITIONS:
            break
    return keys


def rungs(system: System, worker: str) -> set[str]:
    """How the partitions that the worker owns were recovered."""
    return {state["recovered"]["rung"] for state in partitions_of(system, worker).values()}


@pytest.mark.usefixtures("publisher")
@pytest.mark.parametrize(
    ("restarted", "kept", "is_killed"),
    [("store-0", "store-1", False), ("store-1", "store-0", False), ("store-1", "store-0", True)],
)
def test_a_restart_within_the_session_time_out_moves_nothing(
    system: System, restarted: str, kept: str, is_killed: bool
) -> None:
    wait_for(lambda: is_settled(system), "each serves two partitions and copies two")
    before = {name: serving(system, name) for name in WORKERS}
    if is_killed:
        system.stack.kill(restarted, signal.SIGKILL)  # whatever watches over it starts it again
    else:
        system.stack.stop_process(restarted)
        system.stack.start_process(restarted)
    wait_for(lambda: serving(system, restarted).keys() == before[restarted].keys(), "it serves the same")
    assert serving(system, kept) == before[kept], "a new epoch would be a new assignment"
    assert rungs(system, restarted) == {"local_file"}


@pytest.mark.usefixtures("publisher")
def test_when_a_worker_dies_the_other_answers_from_its_copies(system: System) -> None:
    wait_for(lambda: is_settled(system), "each serves two partitions and copies two")
    system.stack.kill("store-1", signal.SIGKILL)
    system.stack.stop_process("store-1")
    wait_for(lambda: serving(system, "store-0").keys() == set(range(PARTITIONS)), "store-0 serves all", seconds=60)
    assert rungs(system, "store-0") == {"warm"}


@pytest.mark.invariant(1, 2, 6, place="rebalance")
def test_a_worker_with_an_empty_disk_owns_nothing_until_its_copies_are_warm_and_nothing_was_lost(
    system: System, publisher: Publisher
) -> None:
    shutil.rmtree(system.settings.data_dir / "stores" / "store-1")
    system.stack.start_process("store-1")
    wait_for(lambda: is_settled(system), "each serves two partitions and copies two")
    assert rungs(system, "store-1") == {"warm"}, "a cold one would have restored it"
    publisher.finish()
    for partition, key in keys_by_partition(system).items():
        answer = system.client.query(
            "SELECT count(*), count(DISTINCT number), max(number) + 1 FROM visits WHERE number >= 0",
            key=key,
            at_least={publisher.topic: {partition: publisher.last_offsets[partition]}},
            deadline_ms=60_000,
        )
        assert answer.rows == [(publisher.rounds,) * 3]
    letters = system.dead_letters(publisher.topic)
    parked = {headers["pintail.partition"] + ":" + headers["pintail.offset"] for headers, _, _ in letters}
    poison = {
        f"{message.partition()}:{message.offset()}"
        for message in records_of(system.settings.kafka, [publisher.topic])
        if message.value() == POISON
    }
    assert parked == poison
    assert poison
