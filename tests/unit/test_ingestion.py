"""The data path of one partition: the order of its effects, re-reads, gaps, and Kafka being away for dead letters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from aiokafka.errors import KafkaTimeoutError

from schemas.catalog import Catalog
from schemas.table import TableDefinition
from streams.adapters.duckdb_store import DuckDBStore
from streams.batches import RecordBatch
from streams.errors import LogGapError, SchemaRegistryError, SchemaRegistryRejectedError, SchemaRegistryUnavailableError
from streams.limits import PARKED_TOGETHER_MAX
from streams.ports import DeadLetter, DecodedBatch
from streams.processes.ingestion import PartitionIngestion, ingestion_threads
from streams.retry import Backoff
from tests.store_samples import DECODER, batch, table
from tests.waiting import wait_for

EVENTS = table("events", number="INTEGER!")


class Watched:
    """An ingestion over a real store. Stands in for Kafka's dead-letter topic and for a decoder that may have to wait
    for the schema registry, and hears what is announced."""

    def __init__(self, store: DuckDBStore) -> None:
        self.database = store
        self.store = store.open_partition(0)
        self.letters: list[DeadLetter] = []
        #: The store's positions each time letters were parked.
        self.positions_when_parked: list[dict[str, int]] = []
        self.failures_to_come: list[Exception] = []
        self.schema_failures_to_come: list[SchemaRegistryError] = []
        self.announced: dict[str, int] = {}
        self.moved = asyncio.Condition()
        self.ingestion = PartitionIngestion(
            self.store,
            tables={EVENTS.topic: EVENTS},
            decoder=self,
            dead_letters=self,
            announce=self.announce,
            threads=ingestion_threads(),
        )
        self.task = asyncio.create_task(self.ingestion.run())

    def decode(self, definition: TableDefinition, records: RecordBatch) -> DecodedBatch:
        if self.schema_failures_to_come:
            raise self.schema_failures_to_come.pop(0)
        return DECODER.decode(definition, records)

    async def park(self, letters: Sequence[DeadLetter]) -> None:
        if self.failures_to_come:
            raise self.failures_to_come.pop(0)
        self.positions_when_parked.append(self.store.next_offsets())
        self.letters += letters

    async def announce(self, positions: Mapping[str, int]) -> None:
        async with self.moved:
            self.announced |= positions
            self.moved.notify_all()

    async def is_applied(self, position: int) -> None:
        async with asyncio.timeout(30), self.moved:
            await self.moved.wait_for(lambda: self.announced.get(EVENTS.topic, 0) >= position)

    def numbers(self) -> list[int]:
        self.database.publish_scopes([0])
        cursor = self.database.query_cursor(0)
        try:
            return [row[0] for row in cursor.execute("SELECT number FROM events ORDER BY _offset").fetchall()]
        finally:
            cursor.close()


@pytest.fixture
async def watched(tmp_path: Path) -> AsyncIterator[Watched]:
    store = DuckDBStore(tmp_path, Catalog((EVENTS,)))
    watched = Watched(store)
    yield watched
    watched.task.cancel()
    with suppress(asyncio.CancelledError, LogGapError):
        await watched.task
    store.close()


async def test_what_is_queued_is_applied_in_order_and_announced(watched: Watched) -> None:
    for first in (0, 2, 4):
        watched.ingestion.submit(batch(EVENTS, [{"number": first}, {"number": first + 1}], first=first))
    await watched.is_applied(6)
    assert watched.numbers() == [0, 1, 2, 3, 4, 5]
    assert watched.store.next_offsets() == {EVENTS.topic: 6}


@pytest.mark.invariant(6, 10, place="checkpoint")
async def test_invariant_6_poison_is_parked_before_its_offset_is_passed(watched: Watched) -> None:
    watched.ingestion.submit(batch(EVENTS, [{"number": 1}, b"junk", {"number": 3}]))
    await watched.is_applied(3)
    assert watched.numbers() == [1, 3]
    ((letter,), (before,)) = (watched.letters, watched.positions_when_parked)
    assert (letter.offset, letter.value, letter.source.topic) == (1, b"junk", EVENTS.topic)
    assert before == {}, "parked before the transaction"


@pytest.mark.invariant(2, place="input")
async def test_invariant_2_a_re_read_is_neither_applied_nor_parked_again(watched: Watched) -> None:
    first = batch(EVENTS, [{"number": 1}, b"junk"])
    watched.ingestion.submit(first)
    await watched.is_applied(2)
    watched.ingestion.submit(first)
    watched.ingestion.submit(batch(EVENTS, [b"junk", {"number": 3}], first=1))
    await watched.is_applied(3)
    assert watched.numbers() == [1, 3]
    assert [letter.offset for letter in watched.letters] == [1]


@pytest.mark.invariant(6, place="outage")
async def test_nothing_is_applied_past_poison_that_cannot_be_parked_yet(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backoff, "next_delay_seconds", lambda _: 0.0)
    watched.failures_to_come = [KafkaTimeoutError(), KafkaTimeoutError()]
    watched.ingestion.submit(batch(EVENTS, [b"junk", {"number": 2}]))
    await watched.is_applied(2)
    assert watched.failures_to_come == []
    assert watched.numbers() == [2]
    assert [letter.offset for letter in watched.letters] == [0]


async def test_what_is_applied_is_folded_into_the_file_once_nothing_comes(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.processes.ingestion.IDLE_WAL_BYTES_MAX", 0)
    monkeypatch.setattr("streams.processes.ingestion.IDLE_SECONDS", 0.01)
    for first in (0, 2):
        watched.ingestion.submit(batch(EVENTS, [{"number": first}, {"number": first + 1}], first=first))
        await watched.is_applied(first + 2)
        await asyncio.to_thread(wait_for, lambda: watched.store.wal_bytes() == 0, "the log is folded")
    assert watched.numbers() == [0, 1, 2, 3]


async def test_a_trickle_is_decoded_together_and_in_order(watched: Watched) -> None:
    """What one fetch or many brought makes no difference."""
    for first in range(0, 200, 2):
        watched.ingestion.submit(batch(EVENTS, [{"number": first}, {"number": first + 1}], first=first))
    await watched.is_applied(200)
    assert watched.numbers() == list(range(200))


async def test_a_storm_of_poison_is_parked_a_few_letters_at_a_time(watched: Watched) -> None:
    storm = 2 * PARKED_TOGETHER_MAX + 1
    watched.ingestion.submit(batch(EVENTS, [b"junk"] * storm + [{"number": 1}]))
    await watched.is_applied(storm + 1)
    assert len(watched.positions_when_parked) == 3
    assert [letter.offset for letter in watched.letters] == list(range(storm))
    assert watched.numbers() == [1]


@pytest.mark.invariant(6, place="outage")
async def test_a_partition_waits_for_the_schema_registry_and_goes_on_by_itself(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    obstacles: list[object] = []

    def delay(_: Backoff) -> float:
        obstacles.append(watched.ingestion.obstacle)
        return 0.0

    monkeypatch.setattr(Backoff, "next_delay_seconds", delay)
    away, refused = SchemaRegistryUnavailableError("away"), SchemaRegistryRejectedError("wrong password")
    watched.schema_failures_to_come = [away, refused]
    watched.ingestion.submit(batch(EVENTS, [b"junk", {"number": 2}]))
    await watched.is_applied(2)
    assert obstacles == [away, refused]
    assert watched.ingestion.obstacle is None
    assert watched.numbers() == [2]
    assert [letter.offset for letter in watched.letters] == [0]


async def test_breaking_off_ends_a_wait_for_the_schema_registry(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = asyncio.Event()

    def delay(_: Backoff) -> float:
        waiting.set()
        return 3600.0

    monkeypatch.setattr(Backoff, "next_delay_seconds", delay)
    watched.schema_failures_to_come = [SchemaRegistryUnavailableError("away")]
    watched.ingestion.submit(batch(EVENTS, [{"number": 1}]))
    await asyncio.wait_for(waiting.wait(), timeout=30)
    watched.ingestion.break_off(LogGapError("the topic is gone"))
    with pytest.raises(LogGapError, match="the topic is gone"):
        await asyncio.wait_for(watched.task, timeout=30)
    assert watched.numbers() == []


async def test_a_gap_in_the_log_ends_the_run_and_applies_nothing(watched: Watched) -> None:
    watched.ingestion.submit(batch(EVENTS, [{"number": 1}]))
    await watched.is_applied(1)
    watched.ingestion.submit(batch(EVENTS, [{"number": 9}], first=5))
    with pytest.raises(LogGapError):
        await asyncio.wait_for(watched.task, timeout=30)
    assert watched.numbers() == [1]
    assert watched.store.next_offsets() == {EVENTS.topic: 1}


async def test_breaking_off_ends_the_run_with_the_fault(watched: Watched) -> None:
    watched.ingestion.break_off(LogGapError("the topic is gone"))
    with pytest.raises(LogGapError, match="the topic is gone"):
        await asyncio.wait_for(watched.task, timeout=30)
