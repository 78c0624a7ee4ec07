"""A Debezium topic and an Avro topic through real workers into queries and ClickHouse; the registry comes late."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import clickhouse_connect
import pytest
import urllib3

from tests.avro_samples import binary, framed
from tests.conftest import Servers
from tests.registry_server import RegistryServer
from tests.system import System, running_system
from tests.waiting import wait_for

TABLES = {
    "formats_orders": """
        CREATE TABLE formats_orders (id BIGINT, total DECIMAL(12, 2), placed_at TIMESTAMP, rest JSON, PRIMARY KEY (id))
        WITH (topic = '{prefix}.orders', partitions = 2, format = 'debezium',
              extra_fields = 'keep', extra_column = 'rest')
    """,
    "formats_readings": """
        CREATE TABLE formats_readings
            (sensor INTEGER, celsius DECIMAL(6, 3), measured TIMESTAMPTZ, PRIMARY KEY (sensor))
        WITH (topic = '{prefix}.readings', partitions = 2, format = 'avro')
    """,
}
READING = {
    "type": "record",
    "name": "Reading",
    "fields": [
        {"name": "sensor", "type": "int"},
        {"name": "celsius", "type": {"type": "bytes", "logicalType": "decimal", "precision": 6, "scale": 3}},
        {"name": "measured", "type": {"type": "long", "logicalType": "timestamp-micros"}},
    ],
}
KEY = {"type": "record", "name": "Key", "fields": [{"name": "sensor", "type": "int"}]}
AT = datetime(2024, 1, 31, 12, 0, 0, 1, UTC)


@pytest.fixture
def registry() -> Iterator[RegistryServer]:
    registry = RegistryServer()
    yield registry
    registry.stop()


@pytest.fixture
def system(tmp_path: Path, servers: Servers, registry: RegistryServer) -> Iterator[System]:
    with running_system(
        tmp_path,
        TABLES,
        **servers,
        sink_workers=1,
        environment={"PINTAIL_SCHEMA_REGISTRY": registry.url},
    ) as system:
        yield system


def port(system: System, worker: str) -> int:
    number = system.stack.process(worker).specification.port
    assert number is not None
    return number


def failure(system: System, worker: str, partition: str) -> str | None:
    """What /ready says is wrong with the partition; None also while the worker does not answer."""
    text: str | None = system.partitions_of(worker).get(partition, {}).get("failure")
    return text


def delivered(system: System, sql: str) -> list[Any]:
    client = clickhouse_connect.get_client(dsn=system.settings.clickhouse, autogenerate_session_id=False)
    try:
        return list(client.query(sql).result_rows)
    finally:
        client.close()


def change(op: str, before: Any, after: Any) -> str:
    field = [
        {"type": "int64", "field": "id"},
        {
            "type": "bytes",
            "name": "org.apache.kafka.connect.data.Decimal",
            "parameters": {"scale": "2"},
            "field": "total",
        },
        {"type": "int64", "name": "io.debezium.time.MicroTimestamp", "field": "placed_at"},
    ]
    sides = [{"type": "struct", "fields": field, "field": side} for side in ("before", "after")]
    payload = {"op": op, "before": before, "after": after}
    return json.dumps({"schema": {"type": "struct", "fields": sides}, "payload": payload})


def test_both_topics_arrive_exactly_and_wait_for_the_registry_without_losing_or_parking_anything(
    system: System, registry: RegistryServer
) -> None:
    readings, orders = (f"{system.settings.application}.{name}" for name in ("readings", "orders"))
    schema, key_schema = registry.register(READING), registry.register(KEY)
    for sensor in (1, 2, 3):
        value = framed(schema, binary(READING, {"sensor": sensor, "celsius": Decimal("20.500"), "measured": AT}))
        key = framed(key_schema, binary(KEY, {"sensor": sensor}))
        system.publish(readings, value, key=key, partition=0)
    system.publish(readings, b"no Avro", key=b"1", partition=0)
    last = system.publish(readings, None, key=key, partition=0)

    # The registry is away: partition 0 says so and waits, in the store and in the sink; partition 1 goes on.
    for worker, partition in (("store-0", "0"), ("sink-0", f"{readings}[0]")):
        told = wait_for(lambda w=worker, p=partition: failure(system, w, p), f"{worker} says what it waits for")  # type: ignore[misc]
        assert registry.url in told
    metrics = urllib3.request("GET", f"http://127.0.0.1:{port(system, 'store-0')}/metrics", retries=False).data.decode()
    assert 'pintail_decode_backoff_seconds{partition="0"} 0.0\n' not in metrics
    assert 'pintail_decode_backoff_seconds{partition="0"}' in metrics
    for op, before, after in [
        ("c", None, {"id": 7, "total": "BNI=", "placed_at": 1706702400000001, "note": "kept"}),
        ("c", None, {"id": 8, "total": "BNI=", "placed_at": 1706702400000001}),
        ("t", None, None),
        ("d", {"id": 8, "total": None, "placed_at": None}, None),
    ]:
        changed = system.publish(orders, change(op, before, after), key='{"id": 7}', partition=1)
    answer = system.query_after(changed, "SELECT id, total, placed_at, rest FROM formats_orders", format="arrow")
    assert answer.to_arrow().to_pylist() == [
        {"id": 7, "total": Decimal("12.34"), "placed_at": AT.replace(tzinfo=None), "rest": '{"note":"kept"}'}
    ]
    assert system.dead_letters(readings) == []

    # It is back: both go on by themselves.
    registry.start()
    answer = system.query_after(
        last, "SELECT sensor, celsius, measured FROM formats_readings ORDER BY 1", format="arrow"
    )
    assert answer.to_arrow().to_pylist() == [
        {"sensor": sensor, "celsius": Decimal("20.500"), "measured": AT} for sensor in (1, 2)
    ]
    kept = f"FINAL WHERE _deleted = 0 AND _topic LIKE '{system.settings.application}.%' ORDER BY 1"
    for sql, rows in {
        f"SELECT sensor, celsius FROM formats_readings {kept}": [(1, Decimal("20.500")), (2, Decimal("20.500"))],
        f"SELECT id, total, rest FROM formats_orders {kept}": [(7, Decimal("12.34"), '{"note":"kept"}')],
    }.items():
        wait_for(lambda q=sql, r=rows: delivered(system, q) == r, f"ClickHouse holds {rows}")  # type: ignore[misc]
    for worker, partition in (("store-0", "0"), ("sink-0", f"{readings}[0]")):
        assert failure(system, worker, partition) is None
    assert [headers["pintail.reason"] for headers, _, _ in system.dead_letters(readings)] == ["not_avro"]
    assert [headers["pintail.reason"] for headers, _, _ in system.dead_letters(orders)] == ["unsupported_operation"]
