"""The ClickHouse rung of the recovery ladder, on the real engine: exact rows, the right bound, and when it is taken."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

from schemas.catalog import Catalog
from schemas.table import ArrayType, Column, ScalarKind, ScalarType, StructField, StructType, TableDefinition
from streams.adapters.clickhouse_history import ClickHouseHistory
from streams.adapters.clickhouse_rows import delivery_table
from streams.adapters.clickhouse_sink import ClickHouseSink
from streams.adapters.duckdb_store import DuckDBStore, PartitionStore
from streams.adapters.memory_intents import IntentLog, MemoryIntents
from streams.adapters.memory_snapshots import MemorySnapshotRepository
from streams.errors import InexactRowsError, SinkUnavailableError
from streams.ports import DeliveredPage, Watermarks
from streams.positions import OffsetRange, TopicPartition
from streams.processes import rebuilding
from streams.processes.progress import RecoveryProgress
from streams.processes.rebuilding import Rebuilding
from streams.processes.recovery import Recovery, Rung
from tests.snapshot_stores import CODEC
from tests.store_samples import DECODER, batch, scalar

Named = Callable[[str], str]
P = 1
Record = tuple[bytes | None, object]


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebuilding, "FIRST_PAGE_ROWS", 3)
    monkeypatch.setattr(rebuilding, "PAGE_ROWS_MAX", 7)


class Site:
    """One partition of some tables: its log, a live store that applied all of it, and what the sink delivered."""

    def __init__(self, folder: Path, sink: ClickHouseSink, *tables: TableDefinition) -> None:
        self.folder = folder
        self.sink = sink
        self.catalog = Catalog(tables)
        self.log: dict[str, list[Record]] = {table.topic: [] for table in tables}
        self.intents = IntentLog()
        self.live = DuckDBStore(folder / "live", self.catalog, threads=1)
        self.rebuilt = DuckDBStore(folder / "rebuilt", self.catalog, threads=1)
        sink.ensure_tables(self.catalog)

    def publish(self, table: TableDefinition, records: Sequence[Record]) -> None:
        """To the log and the live store."""
        start = len(self.log[table.topic])
        self.log[table.topic] += records
        self.replay(self.live.open_partition(P), table, start)

    def deliver(self, table: TableDefinition, lo: int, hi: int, *, is_recorded: bool = True) -> None:
        decoded = DECODER.decode(table, self._batch(table, lo, hi))
        source = TopicPartition(table.topic, P)
        if is_recorded:
            self.record(table, lo, hi)
        if decoded.rows.num_rows or decoded.deletes.num_rows:
            self.sink.insert(table, source, OffsetRange(lo, hi), delivery_table([decoded]))

    def record(self, table: TableDefinition, lo: int, hi: int) -> None:
        self.intents.newest[TopicPartition(table.topic, P)] = OffsetRange(lo, hi)

    def replay(self, store: PartitionStore, table: TableDefinition, start: int) -> None:
        store.apply([DECODER.decode(table, self._batch(table, start, len(self.log[table.topic])))])

    def rebuilding(self) -> Rebuilding:
        intents = MemoryIntents(self.intents, 0)
        return Rebuilding(self.catalog, ClickHouseHistory(self.sink), intents)

    def marks(self, low: int | None = None) -> dict[TopicPartition, Watermarks]:
        """Of a log that begins at `low`; of one that retention has emptied if that is None."""
        ends = {TopicPartition(topic, P): len(records) for topic, records in self.log.items()}
        return {source: Watermarks(end if low is None else low, end) for source, end in ends.items()}

    async def recover(self, *, low: int | None = None, **options: Any) -> tuple[PartitionStore, Rung, RecoveryProgress]:
        recovery = Recovery(self.rebuilt, None, None, rebuilding=self.rebuilding(), **options)
        progress = RecoveryProgress(P)
        recovered = await recovery.recover(P, self.marks(low), progress)
        return recovered.store, recovered.rung, progress

    def caught_up(self, store: PartitionStore) -> PartitionStore:
        for table in self.catalog.tables:
            self.replay(store, table, store.next_offsets()[table.topic])
        return store

    def close(self) -> None:
        self.live.close()
        self.rebuilt.close()

    def _batch(self, table: TableDefinition, lo: int, hi: int) -> Any:
        records = self.log[table.topic][lo:hi]
        return batch(table, [value for _, value in records], first=lo, keys=[key for key, _ in records], partition=P)


@pytest.fixture
def site(tmp_path: Path, sink: ClickHouseSink) -> Iterator[Callable[..., Site]]:
    sites: list[Site] = []

    def make(*tables: TableDefinition) -> Site:
        sites.append(Site(tmp_path / str(len(sites)), sink, *tables))
        return sites[-1]

    yield make
    for each in sites:
        each.close()


def moves(name: str) -> TableDefinition:
    columns = (Column("id", scalar("BIGINT"), nullable=False), Column("note", scalar("VARCHAR")))
    return TableDefinition(name, topic=f"{name}-events", columns=columns)


def seats(name: str) -> TableDefinition:
    columns = (
        Column("flight", scalar("UUID"), nullable=False),
        Column("seat", scalar("VARCHAR"), nullable=False),
        Column("passenger", scalar("VARCHAR")),
    )
    return TableDefinition(name, topic=f"{name}-events", columns=columns, primary_key=("flight", "seat"))


def move(number: int) -> Record:
    return None, b"poison" if number % 11 == 7 else {
        "id": number,
        "note": f"it's \\ {number}\n" if number % 3 else None,
    }


def seat(number: int, random: Random) -> Record:
    """One of 24 seats: taken, or now and then given back."""
    key = {"flight": f"00000000-0000-4000-8000-{number % 4:012x}", "seat": f"{number % 6}'\"\\A"}
    value = None if random.random() < 0.25 else {**key, "passenger": f"p{number}"}
    return json.dumps(key).encode(), value


def two_tables(unique_name: Named) -> tuple[TableDefinition, TableDefinition]:
    return moves(unique_name("moves")), seats(unique_name("seats"))


EXACT_KINDS = tuple(
    Column(f"c_{kind.value.lower()}", ScalarType(kind, 38, 6) if kind is ScalarKind.DECIMAL else ScalarType(kind))
    for kind in ScalarKind
)
NESTED = (
    Column("l_uuid", ArrayType(scalar("UUID")), nullable=False),
    Column("l_time", ArrayType(scalar("TIMESTAMP")), nullable=False),
    Column("l_money", ArrayType(scalar("DECIMAL(9,2)")), nullable=False),
    Column(
        "place",
        StructType(
            (
                StructField("UUID", scalar("UUID")),
                StructField("at", scalar("TIMESTAMPTZ")),
                StructField("json", scalar("JSON")),
                StructField("n", scalar("UBIGINT")),
            )
        ),
        nullable=False,
    ),
)
U = "61f0c404-5cb3-11e7-907b-a6006ad3dba0"
LOWEST = {
    "c_tinyint": -128,
    "c_smallint": -32768,
    "c_integer": -(2**31),
    "c_bigint": -(2**63),
    "c_utinyint": 0,
    "c_usmallint": 0,
    "c_uinteger": 0,
    "c_ubigint": 0,
    "c_real": -1.5e-45,
    "c_double": 5e-324,
    "c_boolean": False,
    "c_varchar": "",
    "c_decimal": "-99999999999999999999999999999999.999999",
    "c_uuid": "00000000-0000-0000-0000-000000000000",
    "c_date": "0001-01-01",
    "c_timestamp": "0001-01-01 00:00:00.000001",
    "c_timestamptz": "1969-12-31 23:59:59.999999+00:00",
    "c_json": "null",
    "l_uuid": [],
    "l_time": [],
    "l_money": [],
    "place": {},
}
HIGHEST = {
    "c_tinyint": 127,
    "c_smallint": 32767,
    "c_integer": 2**31 - 1,
    "c_bigint": 2**63 - 1,
    "c_utinyint": 255,
    "c_usmallint": 65535,
    "c_uinteger": 2**32 - 1,
    "c_ubigint": 2**64 - 1,
    "c_real": 3.4028234e38,
    "c_double": 0.1,
    "c_boolean": True,
    "c_varchar": "ä\x00\t'\\\n€😀",
    "c_decimal": "12345678901234567890123456789012.123456",
    "c_uuid": U,
    "c_date": "9999-12-31",
    "c_timestamp": "9999-12-31 23:59:59.999999",
    "c_timestamptz": "2026-02-28 12:00:00.123456+05:30",
    "c_json": {"b": [1, None, 1.10], "a": "ü"},
    "l_uuid": [U, None],
    "l_time": ["1900-01-01 00:00:00.5", None],
    "l_money": ["0.01", None, "-1234567.89"],
    "place": {"UUID": U, "at": "2026-01-01T00:00:00.000001Z", "json": {"x": 1}, "n": 2**64 - 1},
}
NULLS = {"l_uuid": [None], "l_time": [None], "l_money": [None], "place": {"n": None}}


async def test_every_type_comes_back_exactly(site: Callable[..., Site], unique_name: Named) -> None:
    name = unique_name("exact")
    table = TableDefinition(name, topic=f"{name}-events", columns=EXACT_KINDS + NESTED)
    place = site(table)
    place.publish(table, [(None, LOWEST), (None, HIGHEST), (None, NULLS)])
    live = place.live.open_partition(P)
    assert live.next_offsets() == {table.topic: 3}
    place.deliver(table, 0, 3)
    place.record(table, 3, 3)
    store, rung, _ = await place.recover()
    assert rung is Rung.CLICKHOUSE
    rows = [
        stores.query_cursor(None).execute(f"SELECT * FROM {name} ORDER BY _offset").fetchall()
        for stores in (place.live, place.rebuilt)
        if not stores.publish_scopes([P])  # type: ignore[func-returns-value]
    ]
    assert len(rows[0]) == 3, "one was parked"
    assert rows[1] == rows[0]
    assert store.content_hash() == live.content_hash()


KEY_KINDS = [kind for kind in ScalarKind if kind not in (ScalarKind.JSON, ScalarKind.REAL, ScalarKind.BOOLEAN)]


@pytest.mark.parametrize("kind", KEY_KINDS)
async def test_pages_follow_keys_of_every_type(
    site: Callable[..., Site], unique_name: Named, small_pages: None, kind: ScalarKind
) -> None:
    del small_pages
    lists: dict[ScalarKind, list[Any]] = {
        ScalarKind.VARCHAR: ["", "'", "\\", "ä", "\x00", *map(str, range(20))],
        ScalarKind.UUID: [f"{n:08x}-5cb3-11e7-907b-{99 - n:012x}" for n in range(25)],
        ScalarKind.DATE: [f"{1890 + 20 * n}-02-03" for n in range(25)],
        ScalarKind.TIMESTAMP: [f"2026-01-01 00:00:00.{n:06d}" for n in range(25)],
        ScalarKind.TIMESTAMPTZ: [f"{1880 + n}-01-01 00:00:00.{n:06d}+00:00" for n in range(25)],
        ScalarKind.DOUBLE: [(n - 12) / 7 for n in range(25)],
        ScalarKind.DECIMAL: [f"{n - 12}.{n:03d}" for n in range(25)],
    }
    values = lists.get(kind, list(range(100, 125)))
    name = unique_name("keys")
    key = Column("k", ScalarType(kind, 20, 3) if kind is ScalarKind.DECIMAL else ScalarType(kind), nullable=False)
    table = TableDefinition(name, topic=f"{name}-events", columns=(key,), primary_key=("k",))
    place = site(table)
    place.publish(table, [(json.dumps({"k": value}).encode(), {"k": value}) for value in values])
    place.deliver(table, 0, len(values))
    store, _, progress = await place.recover()
    assert (progress.done, progress.total, progress.unit) == (len(values), len(values), "rows")
    assert place.caught_up(store).content_hash() == place.live.open_partition(P).content_hash()


@pytest.mark.invariant(8, place="recovery")
async def test_invariant_8_rows_and_replay_give_the_content_of_the_live_store(
    site: Callable[..., Site], unique_name: Named, small_pages: None
) -> None:
    """Every way an insert can be under way, several tables at once."""
    del small_pages
    random = Random(5)
    appended, keyed = two_tables(unique_name)
    place = site(appended, keyed)
    place.publish(appended, [move(number) for number in range(60)])
    place.publish(keyed, [seat(number, random) for number in range(200)])
    # [0, 30) delivered, [30, 44) recorded but not there.
    place.deliver(appended, 0, 30)
    place.record(appended, 30, 44)
    # [0, 120) delivered, [120, 170) recorded and there, although the next record has not been written.
    place.deliver(keyed, 0, 120)
    place.deliver(keyed, 120, 170)
    positions = await place.rebuilding().positions(P, _at_once)
    assert positions == {appended.topic: 30, keyed.topic: 170}
    store, rung, _ = await place.recover()
    assert (rung, store.next_offsets()) == (Rung.CLICKHOUSE, positions)
    assert place.caught_up(store).content_hash() == place.live.open_partition(P).content_hash()


@pytest.mark.invariant(8, place="recovery")
async def test_invariant_8_inserts_that_land_while_rows_are_read_do_not_matter(
    site: Callable[..., Site], unique_name: Named, small_pages: None
) -> None:
    del small_pages
    random = Random(6)
    appended, keyed = two_tables(unique_name)
    place = site(appended, keyed)
    place.publish(appended, [move(number) for number in range(40)])
    place.publish(keyed, [seat(number, random) for number in range(150)])
    place.deliver(appended, 0, 20)
    place.record(appended, 20, 40)
    place.deliver(keyed, 0, 90)
    place.record(keyed, 90, 150)

    class Overtaken(ClickHouseHistory):
        pages = 0

        def page(self, *arguments: Any, **options: Any) -> DeliveredPage:
            self.pages += 1
            if self.pages == 2:
                place.deliver(appended, 20, 40)
                place.deliver(keyed, 90, 150)
            return super().page(*arguments, **options)

    history = Overtaken(place.sink)
    built = Rebuilding(place.catalog, history, MemoryIntents(place.intents, 0))
    recovered = await Recovery(place.rebuilt, None, None, rebuilding=built).recover(P, place.marks())
    assert history.pages > 4
    assert recovered.store.next_offsets() == {appended.topic: 20, keyed.topic: 90}
    assert place.caught_up(recovered.store).content_hash() == place.live.open_partition(P).content_hash()


async def test_invariant_6_what_the_log_still_holds_is_replayed_so_that_its_poison_is_parked(
    site: Callable[..., Site], unique_name: Named
) -> None:
    """The sink was ahead of the store that was lost, and passed over record 18."""
    table = moves(unique_name("moves"))
    place = site(table)
    place.publish(table, [move(number) for number in range(20)])
    place.deliver(table, 0, 20)
    store, rung, _ = await place.recover(low=15)
    assert (rung, store.next_offsets()) == (Rung.CLICKHOUSE, {table.topic: 15})
    assert place.caught_up(store).content_hash() == place.live.open_partition(P).content_hash()


async def _at_once(action: Callable[[], Any]) -> Any:
    return await action()


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (Column("c", ArrayType(scalar("INTEGER"))), "array 'c'"),
        (Column("c", StructType((StructField("n", scalar("INTEGER")),))), "struct 'c'"),
        (Column("c", ArrayType(ArrayType(scalar("INTEGER"))), nullable=False), r"array 'c\[\]'"),
        (Column("c", StructType((StructField("a", ArrayType(scalar("DATE"))),)), nullable=False), "array 'c.a'"),
    ],
)
async def test_a_type_that_cannot_come_back_exactly_is_refused(
    site: Callable[..., Site], unique_name: Named, kind: Column, named: str
) -> None:
    table = moves(unique_name("inexact"))
    table = replace(table, columns=(*table.columns, kind))
    place = site(table)
    with pytest.raises(InexactRowsError, match=named) as refusal:
        await place.recover(low=1)
    assert "snapshot" in refusal.value.hint
    assert not place.rebuilt.path_of(P).exists()


async def test_a_table_that_was_emptied_is_refused(site: Callable[..., Site], unique_name: Named) -> None:
    table = moves(unique_name("emptied"))
    place = site(table)
    place.publish(table, [move(number) for number in range(5)])
    place.record(table, 5, 5)
    with pytest.raises(InexactRowsError, match="no row"):
        await place.recover()


async def test_the_whole_log_is_the_choice_where_it_reaches_back_or_clickhouse_knows_nothing(
    site: Callable[..., Site], unique_name: Named
) -> None:
    table = moves(unique_name("moves"))
    place = site(table)
    place.publish(table, [move(number) for number in range(5)])
    assert (await place.recover(low=3))[1] is Rung.WHOLE_LOG
    place.rebuilt.close_partition(P)
    place.deliver(table, 0, 5)
    assert (await place.recover(low=0))[1] is Rung.WHOLE_LOG
    place.rebuilt.close_partition(P)
    assert (await place.recover(low=3))[1] is Rung.CLICKHOUSE
    place.rebuilt.close_partition(P)
    assert (await place.recover(low=3))[1] is Rung.LOCAL_FILE


async def test_a_rebuilding_that_did_not_end_is_discarded(site: Callable[..., Site], unique_name: Named) -> None:
    """As after kill -9 between two pages: the file has rows and no position."""
    table = moves(unique_name("moves"))
    place = site(table)
    place.publish(table, [move(number) for number in range(5)])
    place.deliver(table, 0, 5)
    decoded = DECODER.decode(table, place._batch(table, 0, 2))
    place.rebuilt.open_partition(P).load(table, decoded.rows)
    place.rebuilt.close_partition(P)
    store, rung, _ = await place.recover()
    assert rung is Rung.CLICKHOUSE
    assert place.caught_up(store).content_hash() == place.live.open_partition(P).content_hash()


async def test_clickhouse_away_is_waited_for_and_never_a_reason_to_replay_a_log_with_a_gap(
    site: Callable[..., Site], unique_name: Named
) -> None:
    table = moves(unique_name("moves"))
    place = site(table)
    place.publish(table, [move(number) for number in range(5)])
    place.deliver(table, 0, 5)
    away = ClickHouseSink("http://127.0.0.1:9/default")
    built = Rebuilding(place.catalog, ClickHouseHistory(away), MemoryIntents(place.intents, 0))
    recovery = Recovery(place.rebuilt, MemorySnapshotRepository(), CODEC, rebuilding=built, server_deadline_seconds=0.3)
    with pytest.raises(SinkUnavailableError) as outage:
        await recovery.recover(P, place.marks(2))
    assert outage.value.retriable
    assert not place.rebuilt.path_of(P).exists()


async def test_a_page_that_fails_for_a_moment_is_asked_for_again_and_a_failure_for_good_leaves_nothing(
    site: Callable[..., Site], unique_name: Named, small_pages: None
) -> None:
    del small_pages
    table = moves(unique_name("moves"))
    place = site(table)
    place.publish(table, [move(number) for number in range(30)])
    place.deliver(table, 0, 30)

    class Faltering(ClickHouseHistory):
        def __init__(self) -> None:
            super().__init__(place.sink)
            self.faults, self.pages = [1, 4], 0

        def page(self, *arguments: Any, **options: Any) -> DeliveredPage:
            self.pages += 1
            if self.pages in self.faults:
                raise SinkUnavailableError("reset", hint="")
            return super().page(*arguments, **options)

    history = Faltering()
    built = Rebuilding(place.catalog, history, MemoryIntents(place.intents, 0))
    recover = partial(Recovery(place.rebuilt, None, None, rebuilding=built).recover, P, place.marks(2))
    store = (await recover()).store
    assert place.caught_up(store).content_hash() == place.live.open_partition(P).content_hash()
    place.rebuilt.close_partition(P)
    place.rebuilt.remove_partition(P)
    history.faults = list(range(100))
    hasty = Recovery(place.rebuilt, None, None, rebuilding=built, server_deadline_seconds=0.2)
    with pytest.raises(SinkUnavailableError):
        await hasty.recover(P, place.marks(2))
    assert not place.rebuilt.path_of(P).exists()
