"""Two processes under one worker name: the newer one goes on, and the older one, a zombie perhaps, changes nothing."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import clickhouse_connect
import pytest
from confluent_kafka import Producer

from schemas.catalog import load_catalog
from schemas.dead_letters import OFFSET, PARTITION
from streams.adapters.duckdb_store import DuckDBStore
from tests.conftest import unique_name
from tests.oracle import records_of
from tests.waiting import wait_for
from tests.worker_process import Worker

PARTITIONS = 2


class Site:
    """A table of numbers, and the data directories of two machines."""

    def __init__(self, folder: Path, kafka: str, redis_url: str, ending: ExitStack) -> None:
        self.kafka = kafka
        self.topic = unique_name("same-name")
        self._folder = folder
        self._ending = ending
        self._producer = Producer({"bootstrap.servers": kafka})
        self._numbers = 0
        self.table = self.topic.replace("-", "_")
        table = folder / "tables" / self.table
        table.mkdir(parents=True)
        options = f"topic = '{self.topic}', partitions = {PARTITIONS}"
        (table / "001_create.sql").write_text(f"CREATE TABLE {self.table} (number BIGINT NOT NULL) WITH ({options})")
        self._environment = {
            "PINTAIL_KAFKA": kafka,
            "PINTAIL_REDIS": redis_url,
            "PINTAIL_SNAPSHOT_KEY": "00" * 32,
            "PINTAIL_APPLICATION": self.topic,
            "PINTAIL_TABLES_DIR": str(folder / "tables"),
            "PINTAIL_SNAPSHOT_INTERVAL_SECONDS": "0.5",
            "PINTAIL_SESSION_TIMEOUT_SECONDS": "6",
        }

    def start(self, machine: str, name: str = "store-0", **settings: str) -> Worker:
        """A process of the one name; it is killed in the end."""
        worker = Worker(self._folder / machine, name, self._environment | settings)
        self._ending.callback(worker.kill)
        return worker

    def write(self, numbers: int) -> None:
        """These many numbers to each partition, and poison behind them."""
        for partition in range(PARTITIONS):
            for number in range(self._numbers, self._numbers + numbers):
                self._producer.produce(self.topic, json.dumps({"number": number}), partition=partition)
            self._producer.produce(self.topic, b"poison", partition=partition)
        assert self._producer.flush(30) == 0
        self._numbers += numbers + 1

    def is_whole(self, worker: Worker) -> bool:
        """The worker serves both partitions and has applied all that was written."""
        states = worker.partitions()
        return {number: state["next_offsets"].get(self.topic, 0) for number, state in states.items()} == {
            str(number): self._numbers for number in range(PARTITIONS)
        } and worker.serving().keys() == set(range(PARTITIONS))

    def has_snapshots(self, worker: Worker) -> bool:
        """Snapshots hold all that was written."""
        snapshots = [state.get("snapshot", {}) for state in worker.partitions().values()]
        return [each.get("next_offsets", {}).get(self.topic) for each in snapshots] == [self._numbers] * PARTITIONS

    def stored(self, machine: str) -> list[dict[str, int]]:
        """The positions in the files of a machine whose worker has ended."""
        store = DuckDBStore(
            self._folder / machine / "stores" / "store-0", load_catalog(self._folder / "tables"), threads=1
        )
        try:
            return [store.open_partition(partition).next_offsets() for partition in range(PARTITIONS)]
        finally:
            store.close()

    def letters(self) -> list[tuple[str, str]]:
        """(partition, offset) of every dead letter."""
        headers: list[dict[str, Any]] = [
            dict(message.headers() or []) for message in records_of(self.kafka, [f"{self.topic}.dead-letters"])
        ]
        return sorted((each[PARTITION].decode(), each[OFFSET].decode()) for each in headers)


@pytest.fixture
def site(tmp_path: Path, kafka: str, redis_url: str) -> Iterator[Site]:
    with ExitStack() as ending:
        yield Site(tmp_path, kafka, redis_url, ending)


@pytest.mark.invariant(2, 5, 6, place="rebalance")
def test_a_zombie_whose_name_was_taken_ends_and_leaves_the_name_to_the_one_that_has_it(site: Site) -> None:
    old = site.start("a")
    wait_for(lambda: site.is_whole(old), "the first process serves")
    site.write(20)
    wait_for(lambda: site.is_whole(old) and site.has_snapshots(old), "the first process has everything")
    before, epochs = [{site.topic: 21}] * PARTITIONS, old.serving()
    old.process.send_signal(signal.SIGSTOP)
    new = site.start("b")
    site.write(20)
    wait_for(lambda: site.is_whole(new) and site.has_snapshots(new), "the second process has everything")
    taken = new.serving()
    assert all(taken[partition] > epochs[partition] for partition in epochs)
    site.write(20)
    old.process.send_signal(signal.SIGCONT)
    assert old.process.wait(30) == 1
    assert "has been replaced" in old.log.read_text()
    assert site.stored("a") == before
    wait_for(lambda: site.is_whole(new), "the second process goes on")
    letters = [(str(partition), str(offset)) for partition in range(PARTITIONS) for offset in (20, 41, 62)]
    assert site.letters() == sorted(letters)
    # Whatever restarts the old one does no harm.
    for _ in range(2):
        old.start()
        assert old.process.wait(30) == 1
    assert old.log.read_text().count("a process on /127.0.0.1") == 2
    # Nor does a second process beside the new one.
    beside = site.start("b")
    assert beside.process.wait(30) == 1
    assert f"already, as process {new.process.pid}" in beside.log.read_text()
    assert new.serving() == taken
    # Once the name is free, the old one may have it again.
    new.kill()

    def has_come_back() -> bool:
        if old.process.poll() is not None:
            old.start()
        return site.is_whole(old)

    wait_for(has_come_back, "the first process serves again")


@pytest.mark.invariant(5, 7, place="rebalance")
def test_a_sink_whose_name_was_taken_ends_and_every_record_is_delivered_once(site: Site, clickhouse_url: str) -> None:
    client = clickhouse_connect.get_client(dsn=clickhouse_url)

    def delivered() -> list[tuple[int, ...]]:
        """(partition, offset) of every row."""
        if not client.command(f"EXISTS {site.table}"):
            return []
        return sorted(client.query(f"SELECT _partition, _offset FROM {site.table}").result_rows)

    def start(machine: str) -> Worker:
        # Small inserts, so that the older process is stopped between two of them, or in the middle of one.
        return site.start(machine, "sink-0", PINTAIL_CLICKHOUSE=clickhouse_url, PINTAIL_SINK_FLUSH_ROWS_MAX="50")

    old = start("a")
    wait_for(lambda: old.delivering() == PARTITIONS, "the first process delivers")
    site.write(5_000)
    wait_for(delivered, "the first process has delivered something")
    old.process.send_signal(signal.SIGSTOP)
    new = start("b")
    wait_for(lambda: len(delivered()) >= 5_000 * PARTITIONS, "the second process has delivered the rest")
    site.write(20)
    old.process.send_signal(signal.SIGCONT)
    assert old.process.wait(30) == 1
    assert "has been replaced" in old.log.read_text()
    old.start()  # whatever restarts it
    assert old.process.wait(30) == 1
    assert "a process on /127.0.0.1" in old.log.read_text()
    site.write(20)
    offsets = [*range(5_000), *range(5_001, 5_021), *range(5_022, 5_042)]  # behind each write there is poison
    wait_for(lambda: len(delivered()) >= len(offsets) * PARTITIONS, "the second process goes on")
    assert delivered() == [(partition, offset) for partition in range(PARTITIONS) for offset in offsets]
    assert new.process.poll() is None
    client.close()
