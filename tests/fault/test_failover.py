"""Two store workers with standbys, under load: what a restart and a death of one of them cost (invariants 2, 3, 6)."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from streams.adapters.kafka_partitioner import key_of
from tests.conftest import Servers
from tests.oracle import records_of
from tests.publishing import NumberPublisher
from tests.system import System, running_system
from tests.waiting import wait_for

PARTITIONS = 4
WORKERS = ("store-0", "store-1")
POISON = b'{"number": "many"}'
TABLES = {
    "visits": """
        CREATE TABLE visits (number BIGINT NOT NULL) WITH (topic = '{prefix}.visits', partitions = 4)
    """
}


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, servers: Servers) -> Iterator[System]:
    with running_system(
        tmp_path_factory.mktemp("failover"),
        TABLES,
        **servers,
        store_workers=2,
        environment={"PINTAIL_STANDBY": "1", "PINTAIL_SESSION_TIMEOUT_SECONDS": "20"},
    ) as system:
        yield system


@pytest.fixture(scope="module")
def publisher(system: System) -> Iterator[NumberPublisher]:
    publisher = NumberPublisher(
        system.settings.kafka, topic_of(system), partitions=PARTITIONS, pause_seconds=0.02, poison=POISON
    )
    publisher.start()
    yield publisher
    publisher.finish()


def topic_of(system: System) -> str:
    return f"{system.settings.application}.visits"


def partitions_of(system: System, worker: str) -> dict[int, dict[str, Any]]:
    """What it says of each partition that it owns."""
    return {int(number): state for number, state in system.partitions_of(worker).items()}


def standbys_of(system: System, worker: str) -> set[int]:
    """The partitions of which it keeps a copy that follows the log."""
    standbys = system.report_of(worker).get("standbys", {})
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


def copies_hold(system: System, worker: str) -> bool:
    """Its copies have passed the first poison, which they do once its owner has committed that it parked it."""
    standbys = system.report_of(worker)["standbys"].values()
    return all(min(state["next_offsets"].values(), default=0) > 0 for state in standbys)


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
    wait_for(lambda: all(copies_hold(system, name) for name in WORKERS), "the copies hold something")
    system.stack.kill("store-1", signal.SIGKILL)
    system.stack.stop_process("store-1")
    wait_for(lambda: serving(system, "store-0").keys() == set(range(PARTITIONS)), "store-0 serves all", seconds=60)
    assert rungs(system, "store-0") == {"warm"}


@pytest.mark.invariant(1, 2, 6, place="rebalance")
def test_a_worker_with_an_empty_disk_owns_nothing_until_its_copies_are_warm_and_nothing_was_lost(
    system: System, publisher: NumberPublisher
) -> None:
    shutil.rmtree(system.settings.data_dir / "stores" / "store-1")
    system.stack.start_process("store-1")
    wait_for(lambda: is_settled(system), "each serves two partitions and copies two")
    assert rungs(system, "store-1") == {"warm"}, "a cold one would have restored it"
    publisher.finish()
    for partition in range(PARTITIONS):
        answer = system.client.query(
            "SELECT count(*), count(DISTINCT number), max(number) + 1 FROM visits WHERE number >= 0",
            key=key_of(partition, PARTITIONS),
            at_least={topic_of(system): {partition: publisher.last_offsets[partition]}},
            deadline_ms=60_000,
        )
        assert answer.rows == [(publisher.next,) * 3]
    letters = system.dead_letters(topic_of(system))
    parked = {headers["pintail.partition"] + ":" + headers["pintail.offset"] for headers, _, _ in letters}
    poison = {
        f"{message.partition()}:{message.offset()}"
        for message in records_of(system.settings.kafka, [topic_of(system)])
        if message.value() == POISON
    }
    assert parked == poison
    assert poison
