"""Real servers and workers, and what may happen to them while records are written: nothing is lost, nothing doubled.

Two store workers and two sink workers; the second of each reaches Kafka through a network that can be cut. Their group
notices within seconds that a member is gone. After every fault each partition holds every number exactly once, in its
store and in ClickHouse (invariants 2, 5, 6 and 7).
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import clickhouse_connect
import pytest
import redis

from streams.adapters.kafka_partitioner import key_of
from streams.client import Client
from streams.config import load_settings
from streams.localstack import kafka
from streams.localstack.ports import HOST, choose_port
from streams.localstack.stack import LocalStack, StackOptions
from tests.publishing import NumberPublisher
from tests.tcp_proxy import TcpProxy
from tests.waiting import wait_for
from tests.worker_process import Worker

PARTITIONS = set(range(4))
TOPIC = "visits"
TABLE = "CREATE TABLE visits (number BIGINT NOT NULL) WITH (topic = 'visits', partitions = 4)"
pytestmark = pytest.mark.timeout(600)


class Site:
    """The deployment, and how many numbers were written to each partition so far."""

    def __init__(
        self,
        stack: LocalStack,
        network: TcpProxy,
        workers: dict[str, Worker],
        client: Client,
        environment: dict[str, str],
    ) -> None:
        self.stack = stack
        self.network = network
        self.workers = workers
        self.environment = environment
        self._client = client
        self._numbers = 0

    def serving(self, *names: str) -> dict[int, int]:
        """Partition -> epoch, of these store workers together."""
        return {number: epoch for name in names for number, epoch in self.workers[name].serving().items()}

    def is_balanced(self) -> bool:
        """Each worker has its half."""
        return is_balanced(self.workers)

    @contextmanager
    def writing(self) -> Iterator[NumberPublisher]:
        """Numbers are written while it lasts; then all is exact again."""
        publisher = NumberPublisher(
            self.stack.addresses["kafka"],
            TOPIC,
            partitions=len(PARTITIONS),
            first=self._numbers,
            pause_seconds=0.01,
        )
        publisher.start()
        try:
            yield publisher
        finally:
            publisher.finish()
            self._numbers = publisher.next
        self._check(publisher)

    def _check(self, publisher: NumberPublisher) -> None:
        for partition in sorted(PARTITIONS):
            answer = self._client.query(
                "SELECT count(*), count(DISTINCT number), max(number) + 1 FROM visits WHERE number >= 0",
                key=key_of(partition, len(PARTITIONS)),
                at_least={TOPIC: {partition: publisher.last_offsets[partition]}},
                deadline_ms=60_000,
            )
            assert answer.rows == [(self._numbers,) * 3], f"partition {partition}"
        expected = [(partition, self._numbers, self._numbers) for partition in sorted(PARTITIONS)]
        wait_for(lambda: [row[:1] + row[2:] for row in self._delivered()] == [r[:2] for r in expected], "all delivered")
        assert self._delivered() == expected

    def _delivered(self) -> list[tuple[int, ...]]:
        with clickhouse_connect.get_client(dsn=self.stack.addresses["clickhouse"]) as clickhouse:
            rows = clickhouse.query(
                "SELECT _partition, count(), uniqExact(number) FROM visits WHERE number >= 0 GROUP BY 1 ORDER BY 1"
            ).result_rows
        return [tuple(map(int, row)) for row in rows]


def is_balanced(workers: dict[str, Worker]) -> bool:
    halves = [len(workers[f"store-{number}"].serving()) for number in range(2)]
    return [*halves, *(workers[f"sink-{number}"].delivering() for number in range(2))] == [2, 2, 2, 2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("outages")
    (folder / "tables" / "visits").mkdir(parents=True)
    (folder / "tables" / "visits" / "001_create.sql").write_text(TABLE)
    far, near = choose_port(server="Kafka's second listener"), choose_port(server="the network")
    with ExitStack() as ending:
        patch = ending.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(kafka, "server_properties", with_second_listener(kafka.server_properties, far, near))
        stack = ending.enter_context(LocalStack(folder / "stack", StackOptions()))
        network = ending.enter_context(TcpProxy(near, server_port=far))
        environment = {
            "PINTAIL_TABLES_DIR": str(folder / "tables"),
            "PINTAIL_SNAPSHOT_INTERVAL_SECONDS": "0.5",
            "PINTAIL_SESSION_TIMEOUT_SECONDS": "6",
        }
        workers = {}
        for kind in ("store", "sink"):
            for number, bootstrap in enumerate((stack.addresses["kafka"], f"{HOST}:{near}")):
                name = f"{kind}-{number}"
                given = stack.settings_environment() | environment | {"PINTAIL_KAFKA": bootstrap}
                workers[name] = Worker(stack.data_dir, name, given)
                ending.callback(workers[name].kill)
        wait_for(partial(is_balanced, workers), "every worker has its half", seconds=90)
        settings = load_settings(data_dir=stack.data_dir, tables_dir=folder / "tables", kafka=stack.addresses["kafka"])
        client = ending.enter_context(Client.connect(settings))
        yield Site(stack, network, workers, client, environment)


def with_second_listener(properties: Any, far: int, near: int) -> Any:
    """Kafka's configuration with one more listener, on port `far`, that clients are told to reach on port `near`."""

    def extended(log_dir: Path, *, port: int, controller_port: int) -> str:
        text: str = properties(log_dir, port=port, controller_port=controller_port)
        for old, new in {
            "listeners=": f"listeners=FAR://{HOST}:{far},",
            "listener.security.protocol.map=": "listener.security.protocol.map=FAR:PLAINTEXT,",
        }.items():
            text = "".join(
                line.replace(old, new, 1) if line.startswith(old) else line for line in text.splitlines(keepends=True)
            )
        return f"{text}advertised.listeners=BROKER://{HOST}:{port},FAR://{HOST}:{near}\n"

    return extended


@pytest.mark.invariant(2, 5, 6, 7, place="rebalance")
def test_owners_that_were_stopped_wake_up_and_change_nothing(site: Site) -> None:
    before = site.serving("store-1")
    with site.writing():
        for name in ("store-1", "sink-1"):
            site.workers[name].process.send_signal(signal.SIGSTOP)
        wait_for(lambda: site.serving("store-0").keys() == PARTITIONS, "store-0 has all partitions")
        wait_for(lambda: site.workers["sink-0"].delivering() == 4, "sink-0 has all partitions")
        meanwhile = site.serving("store-0")
        for name in ("store-1", "sink-1"):
            site.workers[name].process.send_signal(signal.SIGCONT)
        wait_for(site.is_balanced, "every worker has its half")
    assert all(before[partition] < meanwhile[partition] for partition in before)


@pytest.mark.invariant(2, 5, 6, 7, place="rebalance")
@pytest.mark.invariant(2, 6, 7, place="outage")
def test_two_workers_that_both_believe_they_own_a_partition_while_the_network_is_cut(site: Site) -> None:
    before = site.serving("store-1")
    with site.writing():
        site.network.cut()
        wait_for(lambda: site.serving("store-0").keys() == PARTITIONS, "store-0 has all partitions")
        wait_for(lambda: site.workers["sink-0"].delivering() == 4, "sink-0 has all partitions")
        assert site.serving("store-1") == before, "it cannot know better"
        site.network.heal()
        wait_for(site.is_balanced, "every worker has its half")


@pytest.mark.invariant(2, 6, 7, place="outage")
def test_a_broker_that_stops_and_comes_back(site: Site) -> None:
    with site.writing() as publisher:
        site.stack.kill("kafka")
        site.stack.wait_until_ready("kafka")
        last = publisher.next
        wait_for(lambda: publisher.next > last + 50, "records are written again")


@pytest.mark.invariant(2, 6, 7, place="outage")
def test_a_redis_that_restarts_empty_has_snapshots_again(site: Site) -> None:
    with site.writing():
        site.stack.stop_process("redis")
        shutil.rmtree(site.stack.data_dir / "redis" / "appendonlydir")
        site.stack.start_process("redis")
        wait_for(lambda: partitions_in_redis(site) == len(PARTITIONS), "snapshots of all partitions")
        worker = site.workers["store-0"]
        worker.kill()
        shutil.rmtree(worker.stores)
        worker.start()
        wait_for(site.is_balanced, "every worker has its half")
    # Its own by the time it has its half, or, once it was away for too long, promoted from copies that it made of them.
    assert {state["recovered"]["rung"] for state in worker.partitions().values()} <= {"snapshot", "warm"}


def partitions_in_redis(site: Site) -> int:
    """How many partitions have a snapshot there."""
    with redis.Redis.from_url(site.stack.addresses["redis"]) as client:
        return sum(1 for _ in client.scan_iter("*:versions"))


@pytest.mark.invariant(1, 2, 6, 7, place="checkpoint")
def test_a_full_disk_stops_partitions_until_there_is_room(site: Site) -> None:
    worker = site.workers["store-0"]
    process = worker.process
    with site.writing():
        # Stands for a full disk wherever the tests run: no write beyond this size of a file succeeds.
        limits = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
        wait_for(lambda: len(failures(worker)) == 2, "both partitions say why they stopped")
        assert all("too large" in failure for failure in failures(worker)), failures(worker)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)
        wait_for(site.is_balanced, "every worker has its half")
    assert worker.process is process
    assert process.poll() is None


def failures(worker: Worker) -> list[str]:
    return [state["failure"] for state in worker.partitions().values() if "failure" in state]


def test_the_whole_is_proven_by_an_audit(site: Site) -> None:
    settings = {**os.environ, **site.stack.settings_environment(), **site.environment}
    command = [sys.executable, "-m", "streams.cli.main", "audit", "--sink", "--deadline-seconds", "60"]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
