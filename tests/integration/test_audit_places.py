"""`pintail audit` where copies may differ: several workers, Avro, rows that ClickHouse refuses, a log cut short."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from tests.audits import audited, clickhouse, found_in, problems
from tests.avro_samples import binary, framed
from tests.conftest import Servers, unique_name
from tests.registry_server import RegistryServer
from tests.system import System, running_system
from tests.waiting import wait_for

_EVENTS, _READINGS = unique_name("events"), unique_name("readings")
TABLES = {
    _EVENTS: f"""
        CREATE TABLE {_EVENTS} (n BIGINT NOT NULL, at TIMESTAMPTZ, ok BOOLEAN, day DATE)
        WITH (topic = '{{prefix}}.events', partitions = 2)
    """,
    _READINGS: f"""
        CREATE TABLE {_READINGS} (sensor INTEGER, celsius DOUBLE, PRIMARY KEY (sensor))
        WITH (topic = '{{prefix}}.readings', partitions = 2, format = 'avro')
    """,
}
READING = {
    "type": "record",
    "name": "Reading",
    "fields": [{"name": "sensor", "type": "int"}, {"name": "celsius", "type": "double"}],
}
KEY = {"type": "record", "name": "Key", "fields": [{"name": "sensor", "type": "int"}]}


OTHER_VALUES = {"at": "2026-03-01T10:00:00.123456Z", "ok": True, "day": "1969-12-31"}


@pytest.fixture
def registry() -> Iterator[RegistryServer]:
    registry = RegistryServer()
    registry.start()
    yield registry
    registry.stop()


@pytest.fixture
def system(tmp_path: Path, servers: Servers, registry: RegistryServer) -> Iterator[System]:
    environment = {"PINTAIL_SCHEMA_REGISTRY": registry.url}
    with running_system(
        tmp_path, TABLES, **servers, store_workers=2, sink_workers=2, environment=environment
    ) as system:
        wait_for(
            lambda: all(len(system.partitions_of(f"store-{number}")) == 1 for number in (0, 1)), "each has a partition"
        )
        yield system


def write(system: System, registry: RegistryServer) -> None:
    """A hundred events in each partition, of which ClickHouse refuses five; readings, some of them deleted."""
    clickhouse(system, f"ALTER TABLE {_EVENTS} ADD CONSTRAINT rule CHECK n % 20 != 7")
    schema, key_schema = registry.register(READING), registry.register(KEY)
    for number in range(200):
        partition, n = number % 2, number // 2
        sensor = number % 60
        system.send(f"{system.settings.application}.events", json.dumps({"n": n, **OTHER_VALUES}), partition=partition)
        key = framed(key_schema, binary(KEY, {"sensor": sensor}))
        value = framed(schema, binary(READING, {"sensor": sensor, "celsius": n / 7}))
        deleted = n % 9 == 0
        system.send(
            f"{system.settings.application}.readings",
            None if deleted else b"no Avro" if n == 50 else value,
            key=key,
            partition=partition,
        )
    system.flush()


@pytest.mark.invariant(7, place="input")
def test_invariant_7_is_proven_wherever_the_copies_are_and_only_of_what_the_log_still_holds(
    system: System, registry: RegistryServer
) -> None:
    write(system, registry)
    status, found = audited(system, "--sink")
    assert status == 0, problems(found)
    assert {each["verdict"] for each in found.values()} == {"proven"}
    for partition in (0, 1):
        events, readings = found["events", partition], found["readings", partition]
        assert (events["rows"], events["rows_in_store"], events["refused_by_sink"]) == (100, 100, 5)
        assert events["rows_in_sink"] == 95
        assert (readings["rows"], readings["deletes"], readings["parked"]) == (87, 12, 1)
        assert readings["rows_in_store"] == readings["rows_in_sink"] < 30

    # Retention takes the beginning of a log. Two of the refused rows are in it, of which only the letters tell.
    topic = f"{system.settings.application}.events"
    admin = AdminClient({"bootstrap.servers": system.settings.kafka})
    admin.delete_records([TopicPartition(topic, 0, 40)])[TopicPartition(topic, 0)].result(timeout=30)
    status, found = audited(system, "--sink")
    assert status == 0, problems(found)
    assert found["events", 0]["verdict"] == "proven_from_start"
    assert (found["events", 0]["first_offset"], found["events", 0]["rows"]) == (40, 60)
    assert {found[place]["verdict"] for place in found.keys() - {("events", 0)}} == {"proven"}

    # There, the store and ClickHouse are still compared with each other.
    clickhouse(system, f"ALTER TABLE {_EVENTS} UPDATE n = n + 1 WHERE _partition = 0 AND _offset = 20")
    clickhouse(system, f"ALTER TABLE {_EVENTS} DELETE WHERE _partition = 0 AND _offset IN (5, 6, 41)")
    clickhouse(
        system,
        f"INSERT INTO {_EVENTS} SETTINGS insert_deduplicate = 0 SELECT * FROM {_EVENTS} WHERE "
        "_partition = 0 AND _offset = 12",
    )
    status, found = audited(system, "--sink", "--table", _EVENTS)
    assert status == 1
    assert found_in(found["events", 0]) == {
        ("sink", "missing", 5, 7),
        ("sink", "doubled", 12, 13),
        ("store and sink", "changed", 20, 21),
        ("sink", "missing", 41, 42),
    }
    assert found["events", 1]["verdict"] == "proven"
