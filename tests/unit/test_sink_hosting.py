"""The deliveries of a sink worker: what breaks is started anew and says why; nothing is thrown at the agent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pyarrow as pa
import pytest
from aiokafka.errors import KafkaTimeoutError

from agents.sink_app import intent_of, status_of
from schemas.catalog import Catalog
from schemas.table import TableDefinition
from streams.adapters.duckdb_decoder import DuckDBDecoder
from streams.adapters.memory_intents import IntentLog
from streams.batches import RecordBatch
from streams.ports import DecodedBatch, Watermarks
from streams.positions import OffsetRange, TopicPartition
from streams.processes import log_reading
from streams.processes.delivery import Delivery, DeliveryState
from streams.processes.microbatches import FlushLimits
from streams.processes.sink_hosting import HostedDelivery, SinkHost
from streams.retry import Backoff
from tests.sink_log import MemoryDeadLetters, PartitionLog, append_table
from tests.watched_log import SECONDS_MAX, WatchedLog, until

TABLE = append_table("t")
TP = TopicPartition(TABLE.topic, 0)


@dataclass
class MemorySink:
    """Offsets, each range once."""

    offsets: list[int] = field(default_factory=list)

    def last_offset(self, table: TableDefinition, topic_partition: TopicPartition) -> int | None:
        del table, topic_partition
        return max(self.offsets, default=None)

    def insert(
        self, table: TableDefinition, topic_partition: TopicPartition, offsets: OffsetRange, rows: pa.Table
    ) -> None:
        del table, topic_partition, offsets
        self.offsets += rows.column("_offset").to_pylist()


class BreakingDecoder(DuckDBDecoder):
    """Fails like a program with a mistake in it, as often as it is told to."""

    faults = 0

    def decode(self, table: TableDefinition, batch: RecordBatch) -> DecodedBatch:
        if self.faults:
            self.faults -= 1
            raise KeyError("a mistake in the program")
        return super().decode(table, batch)


class SinkWorker:
    """A host. The test is Kafka, and ClickHouse is in memory."""

    def __init__(self) -> None:
        self.records = PartitionLog(TP)
        for number in range(10):
            self.records.append(b'{"id": %d, "value": 1}' % number)
        self.log = WatchedLog({TP: Watermarks(0, 10)})
        self.sink, self.decoder = MemorySink(), BreakingDecoder()
        self.delivery = Delivery(
            sink=self.sink,
            intents=IntentLog().join(),
            decoder=self.decoder,
            dead_letters=MemoryDeadLetters(),
            limits=FlushLimits(rows_max=100, bytes_max=1 << 20, age_seconds_max=0.001),
        )
        self.host = SinkHost(self.delivery, Catalog((TABLE,)), self.log)

    @property
    def hosted(self) -> HostedDelivery:
        return self.host.hosted()[TP]

    async def assign(self) -> None:
        await self.host.on_assigned([TP], 1)

    async def submit(self, first: int, end: int) -> None:
        await self.host.submit(self.records.batch(first, end))


@pytest.fixture
async def worker(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SinkWorker]:
    monkeypatch.setattr(Backoff, "next_delay_seconds", lambda _: 0.01)
    monkeypatch.setattr(log_reading, "REREAD_SECONDS_MIN", 0.01)
    worker = SinkWorker()
    yield worker
    await worker.host.revoke(list(worker.host.hosted()))
    worker.delivery.close()


async def test_a_delivery_starts_although_kafka_is_away_at_first(worker: SinkWorker) -> None:
    worker.log.faults = [KafkaTimeoutError("ListOffsets"), TimeoutError("seek")]
    await worker.assign()
    await until(lambda: worker.log.active == {TP})
    assert worker.hosted.is_running
    await worker.submit(0, 10)
    await until(lambda: worker.sink.offsets == list(range(10)))


async def test_a_delivery_that_cannot_start_is_failed_and_says_why_and_can_be_let_go_of(
    worker: SinkWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backoff, "next_delay_seconds", lambda _: 3600.0)
    worker.log.faults = [KafkaTimeoutError("ListOffsets")]
    await worker.assign()
    await until(lambda: worker.hosted.failure is not None)
    assert worker.hosted.state is DeliveryState.FAILED
    report = status_of(worker.host)
    assert not report["ready"]
    assert report["partitions"][str(TP)]["state"] == "failed"
    assert "ListOffsets" in report["partitions"][str(TP)]["failure"]
    delivery = worker.hosted.delivery
    await asyncio.wait_for(worker.host.revoke([TP]), SECONDS_MAX)
    assert delivery.state is DeliveryState.STOPPED


@pytest.mark.invariant(10, place="input")
async def test_invariant_10_a_mistake_in_the_program_is_started_anew_and_never_thrown_at_the_agent(
    worker: SinkWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause, pauses = asyncio.Event(), []
    sleep = asyncio.sleep

    async def sleep_until_allowed(seconds: float) -> None:
        if seconds == 0.01:
            pauses.append(seconds)
            await pause.wait()
        else:
            await sleep(seconds)

    await worker.assign()
    await until(lambda: worker.log.active == {TP})
    worker.decoder.faults = 1
    monkeypatch.setattr(asyncio, "sleep", sleep_until_allowed)
    await worker.submit(0, 4)
    await until(lambda: bool(pauses))
    assert worker.hosted.state is DeliveryState.FAILED
    assert worker.hosted.failure == "KeyError: 'a mistake in the program'"
    await worker.submit(4, 6)
    assert worker.delivery.budget.bytes_used == 0
    pause.set()
    await until(lambda: worker.log.reads == [(TP, 0), (TP, 0)])
    await worker.submit(0, 6)
    await until(lambda: worker.sink.offsets == list(range(6)))
    assert worker.hosted.is_running


@pytest.mark.invariant(6, place="input")
async def test_invariant_6_batches_that_were_lost_on_the_way_are_read_again(worker: SinkWorker) -> None:
    await worker.assign()
    await until(lambda: worker.log.active == {TP})
    await worker.submit(0, 3)
    await worker.submit(5, 10)
    await until(lambda: worker.log.reads == [(TP, 0), (TP, 3)])
    await worker.submit(3, 10)
    await until(lambda: worker.sink.offsets == list(range(10)))


async def test_an_offset_that_the_log_lost_ends_the_delivery_for_good(worker: SinkWorker) -> None:
    await worker.assign()
    await until(lambda: worker.log.active == {TP})
    worker.host.on_out_of_range(TP)
    await until(lambda: worker.hosted.failure is not None)
    assert worker.hosted.state is DeliveryState.FAILED
    assert worker.log.active == set()
    await worker.submit(0, 3)
    assert worker.sink.offsets == []


@pytest.mark.parametrize(
    ("metadata", "intent"),
    [
        ("5:9", (5, 9)),
        ("5:5", (5, 5)),
        ("", (5, 5)),
        ("a:b", (5, 5)),
        ("4:9", (5, 5)),
        ("5:3", (5, 5)),
        ("5:", (5, 5)),
    ],
)
def test_a_position_that_somebody_else_committed_says_where_to_go_on(metadata: str, intent: tuple[int, int]) -> None:
    assert intent_of(5, metadata) == OffsetRange(*intent)
