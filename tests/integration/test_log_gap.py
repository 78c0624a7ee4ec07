"""When the log no longer holds what a worker needs next, it says so and stops; it never skips (D1)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from streams.errors import QueryRefusedError
from tests.system import System, running_system
from tests.waiting import wait_for, worker_report

TABLES = {
    "events": """
        CREATE TABLE events (number INTEGER) WITH (topic = '{prefix}.events', partitions = 2)
    """
}


@pytest.fixture
def system(tmp_path: Path, kafka: str, redis_url: str, clickhouse_url: str) -> Iterator[System]:
    with running_system(
        tmp_path, TABLES, kafka=kafka, redis_url=redis_url, clickhouse_url=clickhouse_url, sink_workers=1
    ) as system:
        yield system


def report(system: System, worker: str) -> dict[str, Any]:
    port = system.stack.process(worker).specification.port
    assert port is not None
    partitions: dict[str, Any] = worker_report(port).get("partitions", {})
    return partitions


def test_records_deleted_before_they_were_applied_stop_their_partition_and_no_other(system: System) -> None:
    topic = f"{system.settings.application}.events"
    for number in range(10):
        position = system.publish(topic, json.dumps({"number": number}), partition=0)
    assert system.query_after(position, "SELECT count(*) FROM events").rows == [(10,)]
    wait_for(lambda: report(system, "sink-0").get(f"{topic}[0]", {}).get("next_offset") == 10, "all delivered")

    for worker in ("store-0", "sink-0"):
        system.stack.stop_process(worker)
    for number in range(10, 20):
        system.publish(topic, json.dumps({"number": number}), partition=0)
    admin = AdminClient({"bootstrap.servers": system.settings.kafka})
    for result in admin.delete_records([TopicPartition(topic, 0, 15)]).values():
        result.result(timeout=30)
    for worker in ("store-0", "sink-0"):
        system.stack.process(worker).start()

    failed = wait_for(
        lambda: {n: state for n, state in report(system, "store-0").items() if state["state"] == "failed"},
        "the store says so",
    )
    assert list(failed) == ["0"]
    assert "offset 10" in failed["0"]["failure"]
    assert "15" in failed["0"]["failure"]
    sink = wait_for(
        lambda: {n: s for n, s in report(system, "sink-0").items() if s["state"] == "failed"}, "the sink says so"
    )
    assert list(sink) == [f"{topic}[0]"]

    with pytest.raises(QueryRefusedError) as refused:
        system.client.query("SELECT count(*) FROM events", deadline_ms=2000)
    assert refused.value.code in ("partial_state", "not_serving")
    system.publish(topic, json.dumps({"number": 100}), partition=1)
    wait_for(lambda: report(system, "store-0")["1"]["next_offsets"][topic] == 1, "the other partition goes on")
