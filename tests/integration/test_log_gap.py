"""When the log no longer holds what a worker needs next, it says so and stops; it never skips (D1)."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from streams.errors import QueryRefusedError
from tests.conftest import Servers, unique_name
from tests.system import System, running_system
from tests.waiting import wait_for

TABLES = {
    "seats": """
        CREATE TABLE seats (id INTEGER PRIMARY KEY, taken BOOLEAN, at TIMESTAMP)
        WITH (topic = '{prefix}.seats', partitions = 2)
    """,
    "events": """
        CREATE TABLE events (number INTEGER) WITH (topic = '{prefix}.events', partitions = 2)
    """,
}


@pytest.fixture
def system(tmp_path: Path, servers: Servers) -> Iterator[System]:
    with running_system(
        tmp_path,
        TABLES,
        kafka=servers["kafka"],
        redis_url=servers["redis_url"],
        clickhouse_url=f"{servers['clickhouse_url']}/{unique_name('db')}",
        sink_workers=1,
        environment={"PINTAIL_SNAPSHOT_INTERVAL_SECONDS": "1"},
    ) as system:
        yield system


def failed(system: System, kind: str, partition: int = 0) -> dict[str, Any]:
    """The report of the partition once it is FAILED."""

    def look() -> dict[str, Any] | None:
        state = system.partitions_of("store-0").get(str(partition), {})
        return state if state.get("state") == "failed" else None

    return wait_for(look, f"the store says so: {kind}")


def newest_snapshot(system: System) -> int | None:
    """The newest version of partition 0 that is listed."""
    lines = [line.split() for line in system.pintail("snapshots", "list").stdout.splitlines()]
    return max((int(line[1]) for line in lines if line[0] == "0"), default=None)


def test_records_deleted_before_they_were_applied_stop_their_partition_and_no_other(system: System) -> None:
    topic = f"{system.settings.application}.events"
    for number in range(10):
        position = system.publish(topic, json.dumps({"number": number}), partition=0)
    assert system.query_after(position, "SELECT count(*) FROM events").rows == [(10,)]
    wait_for(lambda: system.partitions_of("sink-0").get(f"{topic}[0]", {}).get("next_offset") == 10, "all delivered")

    for worker in ("store-0", "sink-0"):
        system.stack.stop_process(worker)
    for number in range(10, 20):
        system.publish(topic, json.dumps({"number": number}), partition=0)
    admin = AdminClient({"bootstrap.servers": system.settings.kafka})
    for result in admin.delete_records([TopicPartition(topic, 0, 15)]).values():
        result.result(timeout=30)
    for worker in ("store-0", "sink-0"):
        system.stack.process(worker).start()

    failure = failed(system, "deleted")["failure"]
    assert "offset 10" in failure
    assert "the log starts at 15" in failure
    assert "pintail recover --partition 0" in failure
    sink = wait_for(
        lambda: {n: s for n, s in system.partitions_of("sink-0").items() if s["state"] == "failed"}, "the sink says so"
    )
    assert list(sink) == [f"{topic}[0]"]

    with pytest.raises(QueryRefusedError) as refused:
        system.client.query("SELECT count(*) FROM events", deadline_ms=2000)
    assert refused.value.code == "not_serving"
    system.publish(topic, json.dumps({"number": 100}), partition=1)
    wait_for(lambda: system.partitions_of("store-0")["1"]["next_offsets"][topic] == 1, "the other partition goes on")

    status = system.pintail("status")
    assert status.returncode == 1
    assert "store-0 0: log gap" in status.stdout

    before = f"snapshot:{wait_for(lambda: newest_snapshot(system), 'a snapshot of before')}"
    hopeless = system.pintail("recover", "--partition", "0", "--from", before)
    assert hopeless.returncode == 1
    assert f"continues at offset 10 of {topic}[0], but the log holds [15, 20)" in hopeless.stderr

    # The way out, without a restart.
    process = system.stack.process("store-0").pid
    done = system.pintail("recover", "--partition", "0", "--from", "log")
    assert done.returncode == 0, done.stderr
    assert f"serves again, recovered from log, at {topic} 20" in done.stdout
    assert "0.duckdb.replaced-" in done.stdout
    kept = system.client.query("SELECT number FROM events WHERE _partition = 0 ORDER BY number")
    assert [number for (number,) in kept.rows] == [15, 16, 17, 18, 19]
    version = wait_for(lambda: system.partitions_of("store-0")["0"].get("snapshot", {}).get("version"), "a snapshot")
    refused_order = system.pintail("recover", "--partition", "0", "--from", f"snapshot:{version}")
    assert refused_order.returncode == 1
    assert "is open in a worker" in refused_order.stderr
    unknown = system.pintail("recover", "--partition", "0", "--from", "snapshot:999", "--yes")
    assert unknown.returncode == 1
    assert "no snapshot version 999" in unknown.stderr
    done = system.pintail("recover", "--partition", "0", "--from", f"snapshot:{version}", "--yes")
    assert done.returncode == 0, done.stderr
    assert system.partitions_of("store-0")["0"]["recovered"]["rung"] == "snapshot"
    assert system.client.query("SELECT count(*) FROM events").rows == [(6,)]
    assert system.stack.process("store-0").pid == process


def test_a_topic_that_is_created_anew_under_a_running_worker_is_noticed_although_its_offsets_fit(
    tmp_path: Path, servers: Servers
) -> None:
    with running_system(tmp_path, TABLES, **servers) as system:
        recreate_and_recover(system)


def recreate_and_recover(system: System) -> None:
    topic = f"{system.settings.application}.events"
    for number in range(3):
        position = system.publish(topic, json.dumps({"number": number}), partition=0)
    assert system.query_after(position, "SELECT count(*) FROM events").rows == [(3,)]
    admin = AdminClient({"bootstrap.servers": system.settings.kafka})
    process = system.stack.process("store-0").pid
    assert process is not None
    os.kill(process, signal.SIGSTOP)  # it must not see the topic while that is empty: then its offsets would not fit
    admin.delete_topics([topic])[topic].result(timeout=30)
    wait_for(lambda: topic not in admin.list_topics(timeout=30).topics, "the topic is gone")
    admin.create_topics([NewTopic(topic, 2, 1)])[topic].result(timeout=30)
    for number in range(100, 110):
        system.publish(topic, json.dumps({"number": number}), partition=0)
    os.kill(process, signal.SIGCONT)

    for partition in (0, 1):
        assert "was deleted and created anew" in failed(system, "recreated", partition)["failure"]
        done = system.pintail("recover", "--partition", str(partition), "--from", "log")
        assert done.returncode == 0, done.stderr
    answer = system.client.query("SELECT min(number), count(*) FROM events WHERE _partition = 0")
    assert answer.rows == [(100, 10)]


def test_a_lost_disk_without_snapshots_comes_back_from_clickhouse_where_the_log_has_lost_its_beginning(
    system: System,
) -> None:
    events, seats = (f"{system.settings.application}.{name}" for name in ("events", "seats"))
    for number in range(30):
        seat = {"id": number % 7, "taken": number % 2 == 0, "at": f"2026-01-01T00:00:{number:02d}"}
        seat_at = system.publish(
            seats, None if number % 5 == 4 else json.dumps(seat), key=json.dumps(seat["id"]), partition=0
        )
        position = system.publish(events, json.dumps({"number": number}), partition=0)
    everything = "SELECT (SELECT list(e ORDER BY number) FROM events e), (SELECT list(s ORDER BY id) FROM seats s)"
    delivered = {f"{events}[0]": 30, f"{seats}[0]": 30}

    def all_delivered() -> bool:
        next_offsets = {name: each["next_offset"] for name, each in system.partitions_of("sink-0").items()}
        return next_offsets.items() >= delivered.items()

    wait_for(all_delivered, "all delivered")
    before = system.query_after_all([position, seat_at], everything).rows
    system.stack.stop_process("store-0")
    admin = AdminClient({"bootstrap.servers": system.settings.kafka})
    cuts = [TopicPartition(events, 0, 25), TopicPartition(seats, 0, 28)]
    for result in admin.delete_records(cuts).values():
        result.result(timeout=30)
    shutil.rmtree(system.stack.data_dir / "stores" / "store-0")
    with redis.Redis.from_url(system.settings.redis) as client:
        client.delete(*client.keys(f"{{{system.settings.application}:0}}:*"))
    system.stack.process("store-0").start()

    recovered = wait_for(lambda: system.partitions_of("store-0").get("0", {}).get("recovered"), "recovered")
    assert recovered["rung"] == "clickhouse"
    assert system.query_after_all([position, seat_at], everything).rows == before
