"""Two store workers under load: what a restart and a death of one of them cost (invariants 2, 3, 6)."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from confluent_kafka import KafkaError, Message, Producer

from tests.system import System, running_system
from tests.waiting import wait_for, worker_report

PARTITIONS = 4
WORKERS = ("store-0", "store-1")
TABLES = {
    "visits": """
        CREATE TABLE visits (number BIGINT NOT NULL) WITH (topic = '{prefix}.visits', partitions = 4)
    """
}


class Publisher(threading.Thread):
    """Writes numbers to each partition in turn until told to stop."""

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
    ) as system:
        wait_for(lambda: all(len(serving(system, name)) == 2 for name in WORKERS), "both serve two partitions")
        yield system


@pytest.fixture
def publisher(system: System) -> Iterator[Publisher]:
    publisher = Publisher(system)
    publisher.start()
    yield publisher
    publisher.finish()


def partitions_of(system: System, worker: str) -> dict[int, dict[str, Any]]:
    """What the worker's /ready says of each partition."""
    port = system.stack.process(worker).specification.port
    assert port is not None
    return {int(number): state for number, state in worker_report(port).get("partitions", {}).items()}


def serving(system: System, worker: str) -> dict[int, int]:
    """Partition -> epoch, of those that the worker serves."""
    states = partitions_of(system, worker)
    return {number: state["epoch"] for number, state in states.items() if state["state"] == "serving"}


def has_applied(system: System, worker: str) -> bool:
    return all(min(state["next_offsets"].values()) > 0 for state in partitions_of(system, worker).values())


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


def check_content(system: System, publisher: Publisher) -> None:
    """Every partition holds each number exactly once."""
    publisher.finish()
    for partition, key in keys_by_partition(system).items():
        answer = system.client.query(
            "SELECT count(*), count(DISTINCT number), max(number) + 1 FROM visits WHERE number >= 0",
            key=key,
            at_least={publisher.topic: {partition: publisher.last_offsets[partition]}},
            deadline_ms=60_000,
        )
        assert answer.rows == [(publisher.rounds,) * 3]


def test_a_restart_within_the_session_time_out_moves_nothing_and_loses_nothing(
    system: System, publisher: Publisher
) -> None:
    wait_for(lambda: all(has_applied(system, name) for name in WORKERS), "every partition has applied something")
    before = {name: serving(system, name) for name in WORKERS}
    for restart in (restart_in_order, kill):
        restart(system, "store-1")
        wait_for(lambda: serving(system, "store-1").keys() == before["store-1"].keys(), "store-1 serves the same")
        assert serving(system, "store-0") == before["store-0"], "a new epoch would be a new assignment"
        for state in partitions_of(system, "store-1").values():
            assert state["recovered"]["rung"] == "local_file"
    check_content(system, publisher)


def restart_in_order(system: System, worker: str) -> None:
    system.stack.stop_process(worker)
    system.stack.start_process(worker)


def kill(system: System, worker: str) -> None:
    system.stack.kill(worker, signal.SIGKILL)
