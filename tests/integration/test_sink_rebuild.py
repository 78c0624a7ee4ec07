"""`pintail sink rebuild`: rows that are wrong in ClickHouse are delivered anew from the log, on real servers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import pytest
from aiokafka import AIOKafkaConsumer
from clickhouse_connect.driver.client import Client
from confluent_kafka import Producer
from typer.testing import CliRunner

from schemas.catalog import Catalog
from schemas.parser import parse_table
from schemas.table import TableDefinition
from streams.adapters.clickhouse_sink import ClickHouseSink
from streams.adapters.kafka_intents import GroupRecords
from streams.adapters.kafka_positions import GroupPositions
from streams.adapters.memory_intents import IntentLog
from streams.cli.main import app
from streams.config import Settings, load_settings
from streams.errors import RebuildRefusedError
from streams.positions import OffsetRange, TopicPartition
from streams.processes.delivery import Delivery
from streams.processes.microbatches import FlushLimits
from streams.retry import Backoff, retrying
from tests.conftest import NewTopicMaker
from tests.sink_log import MemoryDeadLetters, PartitionLog, submit_all
from tests.store_samples import DECODER
from tests.unit.tables_helpers import write_table

RECORDS = (60, 20)
FROM_OFFSET = 25


class Deployment:
    """A table with two partitions, its log in Kafka, and its copy in ClickHouse."""

    def __init__(self, settings: Settings, table: TableDefinition) -> None:
        self.settings = settings
        self.table = table
        self.logs = {number: PartitionLog(TopicPartition(table.topic, number)) for number in range(len(RECORDS))}
        producer = Producer({"bootstrap.servers": settings.kafka})
        for number, records in enumerate(RECORDS):
            for record in range(records):
                key, value = b"%d" % (record % 7), b'{"id":%d,"value":%d}' % (record % 7, record)
                self.logs[number].append(value, key=key)
                producer.produce(table.topic, value, key, number)
        assert producer.flush(30) == 0

    async def deliver(self) -> None:
        """As a sink worker that starts, and stops once it has delivered everything."""
        records, positions = GroupRecords(self.settings), GroupPositions(self.settings)
        sink = ClickHouseSink(self.settings.clickhouse)
        await asyncio.to_thread(sink.ensure_tables, Catalog((self.table,)))
        for log in self.logs.values():
            intents = IntentLog()
            # A new broker needs a while to find the group's coordinator.
            record = await retrying(partial(records.read, log.topic_partition), what="reading", backoff=Backoff())
            if record is not None:
                intents.newest[log.topic_partition] = record
            delivery = Delivery(
                sink=sink,
                intents=intents.join(),
                decoder=DECODER,
                dead_letters=MemoryDeadLetters(),
                limits=FlushLimits(rows_max=10, bytes_max=1 << 20, age_seconds_max=0.01),
            )
            owner = delivery.open(log.topic_partition, self.table)
            async with asyncio.timeout(60):
                await submit_all(owner, log, await owner.start(), Random(1))
                await owner.wait_until_delivered(log.next_offset)
            await owner.stop()
            delivery.close()
            # What an idle partition records.
            await positions.set({log.topic_partition: log.next_offset})
        sink.close()


@pytest.fixture(params=["", ", PRIMARY KEY (id)"], ids=["append", "keyed"])
def deployment(
    request: pytest.FixtureRequest,
    kafka: str,
    clickhouse_url: str,
    new_topic: NewTopicMaker,
    unique_name: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Deployment:
    topic, name = new_topic(partitions=len(RECORDS)), unique_name("rebuilt")
    columns = f"id BIGINT NOT NULL, value BIGINT{request.param}"
    definition = f"CREATE TABLE {name} ({columns}) WITH (topic='{topic}', partitions={len(RECORDS)})"
    folder = write_table(tmp_path / "tables", name, definition)
    for variable, value in {
        "KAFKA": kafka,
        "CLICKHOUSE": clickhouse_url,
        "APPLICATION": name,
        "TABLES_DIR": str(folder.parent),
    }.items():
        monkeypatch.setenv(f"PINTAIL_{variable}", value)
    return Deployment(load_settings(), parse_table(folder).table)


def test_rows_that_were_damaged_come_back_from_the_log_and_others_stay(
    deployment: Deployment, clickhouse: Client
) -> None:
    asyncio.run(deployment.deliver())
    name, final = deployment.table.name, " FINAL" if deployment.table.is_keyed else ""
    rows = f"SELECT _partition, _offset, id, value FROM {name}{final} ORDER BY ALL"
    before = clickhouse.query(rows).result_rows
    clickhouse.command(f"ALTER TABLE {name} UPDATE value = -1 WHERE _offset >= 40 SETTINGS mutations_sync = 1")
    clickhouse.command(f"ALTER TABLE {name} DELETE WHERE _offset BETWEEN 30 AND 35 SETTINGS mutations_sync = 1")
    assert clickhouse.query(rows).result_rows != before
    command = ["sink", "rebuild", "--table", name, "--from-offset", str(FROM_OFFSET)]
    assert isinstance(CliRunner().invoke(app, command).exception, RebuildRefusedError), "it asks for --yes"
    done = CliRunner().invoke(app, [*command, "--yes"], catch_exceptions=False)
    assert done.exit_code == 0
    records = GroupRecords(deployment.settings)
    recorded = [asyncio.run(records.read(log.topic_partition)) for log in deployment.logs.values()]
    # The second partition had not come so far.
    assert recorded == [OffsetRange(FROM_OFFSET, FROM_OFFSET), OffsetRange(RECORDS[1], RECORDS[1])]
    asyncio.run(deployment.deliver())
    assert clickhouse.query(rows).result_rows == before
    (kept,) = [word for word in done.stdout.split() if word.strip(";").startswith(f"{name}_before_")]
    assert clickhouse.query(f"SELECT countIf(value = -1) > 0 FROM {kept.strip(';')}").result_rows == [(1,)]
    again = CliRunner().invoke(app, ["sink", "rebuild", "--table", name, "--from-offset", "60", "--yes"])
    assert isinstance(again.exception, RebuildRefusedError)
    assert "nothing" in again.exception.message


async def test_a_rebuild_is_refused_while_a_sink_worker_runs(deployment: Deployment) -> None:
    settings = deployment.settings
    member = AIOKafkaConsumer(deployment.table.topic, bootstrap_servers=settings.kafka, group_id=settings.sink_group)
    await member.start()
    try:
        positions = GroupPositions(settings)
        with pytest.raises(RebuildRefusedError, match="sink workers run") as refused:
            await positions.check_stopped()
        assert "stop every sink worker" in refused.value.hint
        with pytest.raises(RebuildRefusedError, match="sink workers run"):
            await positions.set({TopicPartition(deployment.table.topic, 0): 0})
    finally:
        await member.stop()
