"""What an audit amounts to, over a real store behind the real guard, with log and sink in memory."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from schemas.catalog import Catalog
from schemas.dead_letters import dead_letter_headers
from schemas.messages import QueryRequest
from schemas.row_text import shared_columns, sink_text_in_duckdb, store_text
from schemas.table import TableDefinition
from streams.adapters.duckdb_audit import AuditWorkspace, Copy
from streams.adapters.duckdb_guard import QueryGuard
from streams.adapters.duckdb_queries import DuckDBQueries, FetchLimits
from streams.adapters.duckdb_store import DuckDBStore
from streams.batches import RecordBatch
from streams.cli.main import main
from streams.ports import AuditedRange, HeldRow, Holdings, ParkReason, Watermarks
from streams.positions import OffsetRange, TopicPartition
from streams.processes.audit import AuditParts, PartitionAudit, Verdict, audit
from tests.store_samples import DECODER, batch, table

EVENTS = replace(table("events", number="INTEGER!"), partitions=1)
PLACES = replace(table("places", ("id",), id="INTEGER", name="VARCHAR"), partitions=1)
CATALOG = Catalog((EVENTS, PLACES))


class Log:
    """Partition 0 of each topic."""

    def __init__(self) -> None:
        self.batches: dict[str, RecordBatch] = {}
        self.lows: dict[str, int] = {}

    async def partitions(self, topic: str) -> list[TopicPartition]:
        return [TopicPartition(topic, 0)] if topic in self.batches else []

    async def is_compacted(self, topic: str) -> bool:
        del topic
        return False

    async def watermarks(self, topic_partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, Watermarks]:
        return {
            each: Watermarks(self.lows.get(each.topic, 0), self.batches[each.topic].next_offset)
            for each in topic_partitions
        }

    async def read(self, topic_partition: TopicPartition, offsets: OffsetRange) -> AsyncIterator[RecordBatch]:
        assert offsets.lo >= self.lows.get(topic_partition.topic, 0), "Kafka would refuse that"
        yield self.batches[topic_partition.topic].starting_at(offsets.lo).ending_at(offsets.hi)


@dataclass(frozen=True)
class Answer:
    rows: list[list[Any]]
    offsets: dict[str, dict[int, int]]


class Sink:
    """Holds what was delivered to it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.workspace = AuditWorkspace(folder)
        self.position = 0

    def deliver(self, definition: TableDefinition, *batches: RecordBatch) -> None:
        self.workspace.begin_table(definition)
        self.workspace.begin_partition(0)
        for each in batches:
            self.workspace.add(DECODER.decode(definition, each))
            self.position = max(self.position, each.next_offset)
        self.workspace.settle()

    def fault(self, definition: TableDefinition) -> str | None:
        del definition
        return None

    def holdings(self, definition: TableDefinition, asked: AuditedRange) -> Holdings:
        del definition
        return Holdings(self.position, self.workspace.buckets(Copy.SINK, asked, self.position))

    def rows(self, definition: TableDefinition, asked: AuditedRange) -> tuple[int, list[HeldRow]]:
        del definition
        return self.position, self.workspace.rows(Copy.SINK, asked, self.position)

    async def read(self, topic_partition: TopicPartition) -> OffsetRange:
        del topic_partition
        return OffsetRange(self.position, self.position)


@dataclass
class Site:
    """All copies of the tables."""

    folder: Path
    log: Log = field(default_factory=Log)

    def __post_init__(self) -> None:
        self.store = DuckDBStore(self.folder / "stores", CATALOG)
        self.store.open_partition(0)
        self.sink = Sink(self.folder / "sink")
        self.workspace = AuditWorkspace(self.folder)

    def write(self, definition: TableDefinition, *values: Any) -> RecordBatch:
        """Into the log and the store."""
        keys = [b"%d" % value["id"] for value in values] if definition.is_keyed else None
        written = self.log.batches[definition.topic] = batch(definition, values, keys=keys)
        self.apply(definition, written)
        return written

    def apply(self, definition: TableDefinition, records: RecordBatch) -> None:
        self.store.partitions()[0].apply([DECODER.decode(definition, records)])
        self.store.publish_scopes([0])

    async def ask(
        self, sql: str, *, key: str, deadline_ms: int, at_least: Mapping[str, Mapping[int, int]] | None = None
    ) -> Answer:
        del deadline_ms, at_least
        query = DuckDBQueries(self.store, CATALOG).prepare(
            QueryRequest(id="1", sql=sql, key=key),
            partition=0,
            scope=frozenset([0]),
            limits=FetchLimits(10_000, 1_000_000),
        )
        body = query.run()
        offsets = {topic: {int(number): at for number, at in each.items()} for topic, each in body.offsets.items()}
        return Answer(orjson.loads(b"[" + b",".join(body.rows_json) + b"]"), offsets)

    async def audited(self, definition: TableDefinition, *, with_sink: bool = False) -> PartitionAudit:
        parts = AuditParts(
            catalog=CATALOG,
            log=self.log,
            decoder=DECODER,
            workspace=self.workspace,
            ask=self.ask,
            query_partitions=1,
            sink=self.sink if with_sink else None,
            intents=self.sink if with_sink else None,
            deadline_seconds=5,
        )
        (result,) = [each async for each in audit(parts, [definition])]
        return result


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.store.close()
    for workspace in (site.sink.workspace, site.workspace):
        workspace.__exit__(None, None, None)


def found(result: PartitionAudit) -> list[tuple[str, str, OffsetRange]]:
    return [(each.where, each.kind, each.offsets) for each in result.differences]


def numbers(count: int) -> list[dict[str, int]]:
    return [{"number": number} for number in range(count)]


async def test_what_agrees_from_the_first_record_on_is_proven(site: Site) -> None:
    site.sink.deliver(EVENTS, site.write(EVENTS, *numbers(300)))
    result = await site.audited(EVENTS, with_sink=True)
    assert (result.verdict, result.rows, result.in_store, result.in_sink) == (Verdict.PROVEN, 300, 300, 300)
    assert result.notes == []


async def test_a_table_of_keys_whose_log_was_cut_is_proven_from_there_and_the_rest_is_said_to_be_open(
    site: Site,
) -> None:
    site.write(PLACES, *({"id": number % 20, "name": str(number)} for number in range(30)))
    site.log.lows[PLACES.topic] = 15
    result = await site.audited(PLACES)
    assert result.verdict is Verdict.PROVEN_FROM_START
    assert (result.offsets, result.in_store) == (OffsetRange(15, 30), 15)
    assert any("(5 rows in the store), nothing was compared" in note for note in result.notes)
    assert any("ledger's counts of [0, 30)" in note for note in result.notes)


async def test_below_a_cut_log_store_and_sink_differ_by_what_the_sink_refused_and_nothing_else(site: Site) -> None:
    written = site.write(EVENTS, *numbers(30))
    headers = dead_letter_headers(
        topic=EVENTS.topic, partition=0, offset=7, timestamp_ms=0, reason=ParkReason.REFUSED_BY_SINK, detail=""
    )
    letter = batch(EVENTS, [b""])
    letter.topic, letter.headers = EVENTS.dead_letter_topic, {0: tuple(headers)}
    site.log.batches[EVENTS.dead_letter_topic] = letter
    site.log.lows[EVENTS.topic] = 10
    site.sink.deliver(EVENTS, written.ending_at(7), written.starting_at(8))
    result = await site.audited(EVENTS, with_sink=True)
    assert (result.verdict, found(result)) == (Verdict.PROVEN_FROM_START, [])

    site.sink.deliver(EVENTS, written.ending_at(3), written.starting_at(3), written.starting_at(5).ending_at(6))
    result = await site.audited(EVENTS, with_sink=True)
    assert found(result) == [("sink", "doubled", OffsetRange(5, 6))]
    site.sink.deliver(EVENTS, written.ending_at(3), written.starting_at(6))
    result = await site.audited(EVENTS, with_sink=True)
    assert (result.verdict, found(result)) == (Verdict.NOT_PROVEN, [("sink", "missing", OffsetRange(3, 6))])
    other = batch(EVENTS, [{"number": -1}], first=4)
    site.sink.deliver(EVENTS, written.ending_at(4), other, written.starting_at(5))
    result = await site.audited(EVENTS, with_sink=True)
    assert found(result) == [("store and sink", "changed", OffsetRange(4, 5))]


async def test_a_copy_that_is_ahead_of_the_log_is_not_proven_also_when_the_log_is_empty(site: Site) -> None:
    site.sink.deliver(EVENTS, site.write(EVENTS, *numbers(5)))
    site.log.batches[EVENTS.topic] = batch(EVENTS, [])
    result = await site.audited(EVENTS, with_sink=True)
    assert result.verdict is Verdict.NOT_PROVEN
    assert found(result)[:2] == [(copy, "unexpected", OffsetRange(0, 5)) for copy in ("store", "sink")]


async def test_a_hole_in_the_ledger_is_found_although_every_row_is_there(site: Site) -> None:
    site.write(EVENTS, *numbers(5))
    with site.store._instance.cursor() as cursor:  # what no code of the store does
        cursor.execute("UPDATE partition_0.pintail.ledger SET first_offset = 2, rows = 3")
        cursor.execute(f"INSERT INTO partition_0.pintail.ledger VALUES ('{EVENTS.topic}', 0, 1, 1, 0, 0)")
    result = await site.audited(EVENTS)
    assert found(result) == [("ledger", "hole", OffsetRange(1, 2))]


async def test_a_partition_that_kafka_does_not_have_is_not_passed_over(site: Site) -> None:
    result = await site.audited(EVENTS)
    assert (result.verdict, result.open) == (Verdict.NOT_PROVEN, ["Kafka has no such partition"])


def test_the_texts_of_a_table_of_many_columns_are_no_query_that_is_refused() -> None:
    kinds = ("VARCHAR", "TIMESTAMPTZ", "DOUBLE", "DATE")
    wide = table("wide", **{f"column_{number}": kinds[number % 4] for number in range(150)})
    guard = QueryGuard(Catalog((wide,)))
    for text in (store_text(wide), sink_text_in_duckdb(shared_columns(wide))):
        assert guard.check(f"SELECT sum(md5_number_upper(t)) FROM (SELECT {text} AS t FROM wide)", []).tables


def test_the_option_sink_insists_on_clickhouse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PINTAIL_KAFKA", "localhost:1")
    monkeypatch.delenv("PINTAIL_CLICKHOUSE", raising=False)
    monkeypatch.setattr(sys, "argv", ["pintail", "audit", "--sink"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "PINTAIL_CLICKHOUSE" in capsys.readouterr().err
