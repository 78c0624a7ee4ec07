"""The partition store: what is applied, what is left out, and what survives (invariants 1, 2 and 8)."""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from schemas.catalog import Catalog
from schemas.table import Column, Migration, TableDefinition
from streams.adapters import duckdb_partition
from streams.adapters.duckdb_file import write_block_list
from streams.adapters.duckdb_partition import LedgerEntry, used_blocks
from streams.adapters.duckdb_store import DuckDBStore, PartitionStore
from streams.errors import LogGapError, StaleEpochError, StoreCorruptError, StoreError, StoreLockedError
from streams.limits import SNAPSHOT_BLOCK_BYTES
from streams.ports import DecodedBatch
from tests.store_samples import EVENTS, EVERYTHING, FLIGHTS, SEATS, TIMESTAMP_MS, decoded, scalar

CATALOG = Catalog((EVENTS, EVERYTHING, FLIGHTS, SEATS))
DEADLINE_SECONDS = 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DuckDBStore]:
    opened = DuckDBStore(tmp_path / "stores", CATALOG, memory_limit="256MB")
    yield opened
    opened.close()


def rows(store: DuckDBStore, sql: str, partition: int = 0) -> list[tuple[Any, ...]]:
    """What a query sees once the partition is served."""
    store.publish_scopes(store.partitions())
    cursor = store.query_cursor(partition)
    try:
        return cursor.execute(sql).fetchall()
    finally:
        cursor.close()


def flights(first: int, *values: Any, keys: Sequence[bytes | None] | None = None) -> DecodedBatch:
    return decoded(FLIGHTS, values, first=first, keys=keys)


# -- upserts and deletes ---------------------------------------------------------------------------------------------


def test_the_last_record_of_a_key_wins_inside_a_batch_and_across_batches(store: DuckDBStore) -> None:
    partition = store.open_partition(0)
    partition.apply([flights(0, {"id": 1, "carrier": "AA"}, {"id": 2, "carrier": "BB"}, {"id": 1, "carrier": "CC"})])
    assert rows(store, "SELECT id, carrier, _offset FROM flights ORDER BY id") == [(1, "CC", 2), (2, "BB", 1)]
    partition.apply([flights(3, {"id": 2, "carrier": "DD"}), flights(4, {"id": 2, "carrier": "EE"})])
    assert rows(store, "SELECT id, carrier, _offset FROM flights ORDER BY id") == [(1, "CC", 2), (2, "EE", 4)]


@pytest.mark.parametrize("split", [0, 1, 2, 3], ids="{}".format)
def test_deletes_and_upserts_of_one_key_take_effect_in_order(store: DuckDBStore, split: int) -> None:
    records = [(b"1", {"id": 1, "carrier": "AA"}), (b"1", None), (b"1", {"id": 1, "carrier": "BB"}), (b"2", None)]
    batches = [
        flights(first, *(value for _, value in part), keys=[key for key, _ in part])
        for first, part in ((0, records[:split]), (split, records[split:]))
    ]
    partition = store.open_partition(0)
    partition.apply(batches)
    assert rows(store, "SELECT id, carrier FROM flights") == [(1, "BB")]
    partition.apply([flights(4, None, keys=[b"1"])])
    assert rows(store, "FROM flights") == []
    assert partition.next_offsets() == {FLIGHTS.topic: 5}


def test_keys_of_several_columns(store: DuckDBStore) -> None:
    partition = store.open_partition(0)
    seats = [{"flight": flight, "seat": seat, "passenger": "x"} for flight in (1, 2) for seat in ("A", "B")]
    partition.apply([decoded(SEATS, seats)])
    changed = [{"flight": 1, "seat": "B", "passenger": "y"}, None]
    partition.apply([decoded(SEATS, changed, first=4, keys=[b"k", b'{"flight": 2, "seat": "A"}'])])
    left = rows(store, "SELECT flight, seat, passenger FROM seats ORDER BY ALL")
    assert left == [(1, "A", "x"), (1, "B", "y"), (2, "B", "x")]


def test_transactions_of_any_size_leave_what_a_dictionary_would(store: DuckDBStore) -> None:
    partition, random, expected, offset = store.open_partition(0), Random(3), dict[int, tuple[str, int]](), 0
    for size in (3, 1, 1, 40, 700, 2, 1500, 600, 1, 30, 0, 5):
        ids = [random.randrange(900) for _ in range(size)]
        is_delete = [random.random() < 0.2 for _ in ids] if offset % 2 else [False] * size
        values = [None if gone else {"id": i, "carrier": str(i % 7)} for i, gone in zip(ids, is_delete, strict=True)]
        partition.apply([flights(offset, *values, keys=[b"%d" % i for i in ids])])
        for i, gone in zip(ids, is_delete, strict=True):
            expected.pop(i, None)
            if not gone:
                expected[i] = (str(i % 7), offset)
            offset += 1
        found = rows(store, "SELECT id, carrier, _offset FROM flights ORDER BY id")
        assert found == [(i, *expected[i]) for i in sorted(expected)]


def test_append_tables_keep_every_record(store: DuckDBStore) -> None:
    partition = store.open_partition(0)
    event = {"what": "x", "tag": "123E4567-e89b-12d3-a456-426614174000", "extra": {"a": [1, 2.50]}, "at": 5}
    partition.apply([decoded(EVENTS, [event, event]), decoded(EVENTS, [event], first=2)])
    found = rows(
        store, "SELECT tag::VARCHAR, extra ->> '$.a[1]', epoch_ms(e.at), count(*) FROM events AS e GROUP BY ALL"
    )
    assert found == [("123e4567-e89b-12d3-a456-426614174000", "2.5", 5, 3)]


def test_every_column_type_survives_the_store(store: DuckDBStore) -> None:
    record = {
        **dict.fromkeys(("tinyint", "smallint", "integer", "bigint"), -7),
        **dict.fromkeys(("utinyint", "usmallint", "uinteger"), 7),
        "ubigint": 2**64 - 1,
        "real": 0.5,
        "double": 0.1,
        "boolean": True,
        "varchar": "é",
        "date": "2024-02-29",
        "timestamp": "2024-02-29T12:00:00+02:00",
        "timestamptz": "2024-02-29T12:00:00+02:00",
        "uuid": "123e4567-e89b-12d3-a456-426614174000",
        "money": 12.34,
        "numbers": [1, None],
        "place": {"name": "x", "height": 1.5},
    }
    partition = store.open_partition(0)
    partition.apply([decoded(EVERYTHING, [record, {}])])
    full, empty = rows(store, "FROM everything ORDER BY _offset")
    names = EVERYTHING.column_names
    found = {name: str(value) for name, value in zip(names, full, strict=False)}
    expected = {name: str(value) for name, value in record.items()} | {
        "timestamp": "2024-02-29 10:00:00",
        "timestamptz": "2024-02-29 10:00:00+00:00",
        "money": "12.34",
    }
    assert found == expected
    assert set(empty[: len(names)]) == {None}


# -- the ledger ------------------------------------------------------------------------------------------------------


@pytest.mark.invariant(7, place="input")
def test_the_ledger_counts_what_became_of_every_record_however_long_it_grows(store: DuckDBStore) -> None:
    partition = store.open_partition(0)
    partition.apply([decoded(EVENTS, [{"what": "x"}], first=40)])
    for first in range(0, 300, 3):
        # The first one of each three is read again and again; the one in the middle is poison.
        again = max(0, first - 3)
        values = [{"id": 1}] * (first - again) + [{"id": 1, "carrier": "AA"}, b"poison", None]
        partition.apply([flights(again, *values, keys=[b"1"] * len(values))])
    expected = {
        FLIGHTS.topic: [LedgerEntry(first_offset=0, next_offset=300, rows=100, deletes=100, parked=100)],
        EVENTS.topic: [LedgerEntry(first_offset=40, next_offset=41, rows=1)],
    }
    assert partition.ledger() == expected
    store.close_partition(0)
    partition = store.open_partition(0)
    assert partition.ledger() == expected
    assert partition.next_offsets() == {FLIGHTS.topic: 300, EVENTS.topic: 41}
    store.publish_scopes([0])
    assert len(rows(store, "FROM partition_0.pintail.ledger")) < 70


@pytest.mark.invariant(7, place="checkpoint")
def test_folding_the_ledger_hides_neither_a_hole_nor_an_overlap(store: DuckDBStore) -> None:
    partition = store.open_partition(0)
    partition.apply([decoded(EVENTS, [{"what": "x"}] * 10)])
    store.close_partition(0)
    with duckdb.connect(store.path_of(0)) as connection:  # what no code of the store does
        connection.execute(
            f"INSERT INTO pintail.ledger VALUES ('{EVENTS.topic}', 8, 12, 4, 0, 0), ('{EVENTS.topic}', 15, 20, 5, 0, 0)"
        )
    partition = store.open_partition(0)
    for first in range(20, 220):
        partition.apply([decoded(EVENTS, [{"what": "x"}], first=first)])
    assert partition.ledger()[EVENTS.topic] == [
        LedgerEntry(0, 10, rows=10),
        LedgerEntry(8, 12, rows=4),
        LedgerEntry(15, 220, rows=205),
    ]
    store.publish_scopes([0])
    assert len(rows(store, "FROM partition_0.pintail.ledger")) < 70


# -- offsets ---------------------------------------------------------------------------------------------------------


@pytest.mark.invariant(2, place="input")
def test_records_below_next_offset_are_never_applied_again(store: DuckDBStore) -> None:
    partition = store.open_partition(0)
    first, second = decoded(EVENTS, [{"what": "a"}, {"what": "b"}]), decoded(EVENTS, [{"what": "c"}], first=2)
    partition.apply([first, second])
    before = partition.content_hash()
    for again in ([first], [second], [first, second], [decoded(EVENTS, [{"what": w} for w in "abc"])]):
        partition.apply(again)
        assert partition.content_hash() == before
    partition.apply([decoded(EVENTS, [{"what": w} for w in "bcd"], first=1)])
    assert rows(store, "SELECT what, _offset FROM events ORDER BY 2") == [("a", 0), ("b", 1), ("c", 2), ("d", 3)]
    assert partition.next_offsets() == {EVENTS.topic: 4}


def test_a_gap_in_the_log_is_refused_and_changes_nothing(store: DuckDBStore) -> None:
    partition = store.open_partition(0)
    partition.apply([decoded(EVENTS, [{"what": "a"}], first=100)])
    before = partition.content_hash()
    with pytest.raises(LogGapError, match="needs offset 102, the log continues at 103"):
        partition.apply([decoded(EVENTS, [{"what": "b"}], first=101), decoded(EVENTS, [{"what": "c"}], first=103)])
    assert partition.content_hash() == before
    assert partition.next_offsets() == {EVENTS.topic: 101}


def test_empty_and_wholly_parked_batches_move_the_position(store: DuckDBStore) -> None:
    partition = store.open_partition(0)
    empty = decoded(EVENTS, [])
    moved = replace(empty, source=replace(empty.source, next_offset=9))
    partition.apply([moved])
    parked = decoded(EVENTS, [b"nope", b"{}"], first=9)
    assert len(parked.parked) == 2
    partition.apply([parked])
    assert partition.next_offsets() == {EVENTS.topic: 11}


@pytest.mark.invariant(1, place="checkpoint")
@pytest.mark.parametrize("order", [1, -1], ids=["applied-before-it", "applied-after-it"])
def test_rows_and_offsets_roll_back_together(store: DuckDBStore, order: int) -> None:
    partition = store.open_partition(0)
    partition.apply([flights(0, {"id": 1, "carrier": "AA"})])
    before = partition.content_hash()
    broken = decoded(EVENTS, [{"what": "x"}])
    without_a_required_value = broken.rows.set_column(0, "what", [[None]])
    with pytest.raises(StoreError, match="NOT NULL"):
        partition.apply(
            [flights(1, {"id": 1, "carrier": "BB"}), replace(broken, rows=without_a_required_value)][::order]
        )
    assert partition.content_hash() == before
    assert partition.next_offsets() == {FLIGHTS.topic: 1}
    partition.apply([flights(1, {"id": 2, "carrier": "CC"})])
    assert rows(store, "SELECT carrier FROM flights ORDER BY id") == [("AA",), ("CC",)]


def test_positions_and_epoch_survive_reopening(store: DuckDBStore) -> None:
    partition = store.open_partition(2)
    assert (partition.epoch(), partition.next_offsets()) == (0, {})
    partition.apply([decoded(FLIGHTS, [{"id": 1}], first=7, partition=2)])
    partition.set_epoch(41)
    before = partition.content_hash()
    store.close_partition(2)
    store.close_partition(2)
    again = store.open_partition(2)
    assert (again.epoch(), again.next_offsets(), again.content_hash()) == (41, {FLIGHTS.topic: 8}, before)
    assert rows(store, "FROM _positions", 2) == [(2, FLIGHTS.topic, 8)]


# -- content hash, retention -----------------------------------------------------------------------------------------


def test_the_content_hash_ignores_the_order_of_rows_and_sees_every_value(tmp_path: Path) -> None:
    records = [{"id": number, "carrier": "AA"} for number in range(50)]

    def hash_after(name: str, *batches: DecodedBatch) -> str:
        store = DuckDBStore(tmp_path / name, CATALOG)
        partition = store.open_partition(0)
        for batch in batches:
            partition.apply([batch])
        found = partition.content_hash()
        store.close()
        return found

    whole = hash_after("a", flights(0, *records))
    assert whole == hash_after("b", *(flights(i, record) for i, record in enumerate(records)))
    records[7]["carrier"] = "BB"
    assert whole != hash_after("c", flights(0, *records))
    assert whole != hash_after("d", flights(1, *records))


def test_expired_rows_are_deleted_where_a_table_has_retention(tmp_path: Path) -> None:
    brief = replace(EVENTS, retention_seconds=60)
    store = DuckDBStore(tmp_path, Catalog((brief, FLIGHTS)))
    partition = store.open_partition(0)
    partition.apply([decoded(brief, [{"what": "a"}, {"what": "b"}]), flights(0, {"id": 1})])
    assert partition.delete_expired(TIMESTAMP_MS + 60_000) == 0
    assert partition.delete_expired(TIMESTAMP_MS + 60_001) == 1
    assert rows(store, "SELECT what FROM events") == [("b",)]
    assert len(rows(store, "FROM flights")) == 1
    store.close()


# -- what queries see --------------------------------------------------------------------------------------------------


def test_a_query_sees_the_served_partitions_and_nothing_else(store: DuckDBStore) -> None:
    for number in range(3):
        store.open_partition(number).apply([decoded(FLIGHTS, [{"id": number}], partition=number)])
    store.publish_scopes([0, 2])
    everything, second = store.query_cursor(None), store.query_cursor(2)
    assert everything.execute("SELECT id FROM flights ORDER BY id").fetchall() == [(0,), (2,)]
    assert second.execute("SELECT id, _partition FROM flights").fetchall() == [(2, 2)]
    assert everything.execute("FROM _positions ORDER BY 1").fetchall() == [(0, FLIGHTS.topic, 1), (2, FLIGHTS.topic, 1)]
    with pytest.raises(duckdb.Error):
        second.execute("FROM offsets")
    with pytest.raises(duckdb.Error):
        second.execute("SELECT * FROM read_text('/etc/hostname')")
    with pytest.raises(StoreError, match="partition 1 is not served"):
        store.query_cursor(1)
    store.publish_scopes([])
    assert store.query_cursor(None).execute("SELECT count(*), sum(id) FROM flights").fetchall() == [(0, None)]


# -- one owner ---------------------------------------------------------------------------------------------------------


@pytest.mark.invariant(5, place="rebalance")
def test_a_partition_has_one_owner(store: DuckDBStore, tmp_path: Path) -> None:
    store.open_partition(0)
    other = DuckDBStore(tmp_path / "stores", CATALOG)
    with pytest.raises(StoreLockedError):
        other.open_partition(0)
    with pytest.raises(StoreLockedError):
        other.remove_partition(0)
    store.close_partition(0)
    other.open_partition(0)
    other.close()


@pytest.mark.invariant(1, 5, place="rebalance")
@pytest.mark.invariant(5, place="checkpoint")
def test_closing_waits_for_the_transaction_in_flight_and_fences_later_ones(store: DuckDBStore) -> None:
    partition = store.open_partition(0)
    refused = threading.Event()

    def keep_writing() -> None:
        try:
            for offset in range(100_000):
                partition.apply([decoded(EVENTS, [{"what": "x"}], first=offset)])
                applied.set()
        except StaleEpochError:
            refused.set()

    applied = threading.Event()
    writer = threading.Thread(target=keep_writing)
    writer.start()
    assert applied.wait(DEADLINE_SECONDS)
    store.close_partition(0)
    writer.join(DEADLINE_SECONDS)
    assert refused.is_set()
    reached = partition.next_offsets()
    again = store.open_partition(0)
    assert again.next_offsets() == reached
    assert rows(store, "SELECT count(*), max(_offset) + 1 FROM events") == [(reached[EVENTS.topic],) * 2]


def test_a_partition_that_takes_long_to_close_holds_up_no_other_and_no_query(store: DuckDBStore) -> None:
    """A copy of its file goes on, as while a snapshot waits for its repository."""
    partition = store.open_partition(0)
    store.open_partition(1).apply([decoded(FLIGHTS, [{"id": 1}], partition=1)])
    store.publish_scopes([0, 1])
    closing = threading.Thread(target=store.close_partition, args=[0])
    others = threading.Event()

    def use_the_others() -> None:
        store.query_cursor(1).close()
        store.open_partition(2)
        store.close_partition(2)
        store.publish_scopes([0, 1])
        others.set()

    with partition.frozen():
        closing.start()
        deadline = time.monotonic() + DEADLINE_SECONDS
        while 0 in visible(store):
            assert time.monotonic() < deadline, "the partition is not taken from the views"
        using = threading.Thread(target=use_the_others)
        using.start()
        assert others.wait(DEADLINE_SECONDS)
        assert visible(store) == [1], "a partition that is being closed is not made visible again"
        assert closing.is_alive()
    closing.join(DEADLINE_SECONDS)
    using.join(DEADLINE_SECONDS)
    assert sorted(store.partitions()) == [1]


def visible(store: DuckDBStore) -> list[int]:
    """The partitions that a query over all of them reads."""
    cursor = store.query_cursor(None)
    try:
        described = cursor.execute("SELECT sql FROM duckdb_views() WHERE view_name = '_positions'").fetchall()
    finally:
        cursor.close()
    return sorted({int(number) for (sql,) in described for number in re.findall(r"partition_(\d+)", sql)})


def test_partitions_come_and_go_side_by_side(store: DuckDBStore) -> None:
    faults: list[BaseException] = []

    def come_and_go(number: int) -> None:
        try:
            for turn in range(12):
                partition = store.open_partition(number)
                partition.apply([decoded(FLIGHTS, [{"id": turn}], partition=number, first=turn)])
                store.publish_scopes(range(4))
                cursor = store.query_cursor(number)
                assert cursor.execute("SELECT count(*) FROM flights").fetchall() == [(turn + 1,)]
                cursor.close()
                store.close_partition(number)
        except BaseException as error:
            faults.append(error)
            raise

    threads = [threading.Thread(target=come_and_go, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_SECONDS * 3)
    assert faults == []
    assert store.partitions() == {}


# -- files -------------------------------------------------------------------------------------------------------------


def filled(store: DuckDBStore, count: int = 30_000) -> PartitionStore:
    partition = store.open_partition(0)
    partition.apply([flights(0, *({"id": number, "carrier": f"c{number}"} for number in range(count)))])
    return partition


@pytest.mark.invariant(1, 8, place="checkpoint")
def test_a_frozen_file_is_a_consistent_copy_while_writes_go_on(store: DuckDBStore, tmp_path: Path) -> None:
    partition = filled(store)
    expected = partition.content_hash()
    copy = tmp_path / "copy" / "0.duckdb"
    copy.parent.mkdir()
    with partition.frozen() as file, copy.open("wb") as target:
        offset = file.next_offsets[FLIGHTS.topic]
        for position in range(0, file.size_bytes, SNAPSHOT_BLOCK_BYTES):
            partition.apply([flights(offset, {"id": offset % 7, "carrier": "new"})])
            offset += 1
            target.write(os.pread(file.fd, min(SNAPSHOT_BLOCK_BYTES, file.size_bytes - position), position))
    assert partition.content_hash() != expected
    restored = DuckDBStore(copy.parent, CATALOG)
    assert restored.open_partition(0).content_hash() == expected
    restored.close()


def test_a_checkpoint_waits_until_the_file_is_no_longer_frozen(store: DuckDBStore) -> None:
    partition = filled(store, 10)
    done = threading.Event()

    def fold() -> None:
        partition.checkpoint()
        done.set()

    checkpoint = threading.Thread(target=fold)
    with partition.frozen():
        partition.apply([flights(10, {"id": 99})])
        checkpoint.start()
        assert not done.wait(0.2)
        assert partition.wal_bytes() > 0
    assert done.wait(DEADLINE_SECONDS)
    checkpoint.join()
    assert partition.wal_bytes() == 0


def flip_bit(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("place", ["main header", "database header", "block", "end cut off"])
def test_damage_to_the_file_is_found_at_open(store: DuckDBStore, place: str) -> None:
    filled(store).checkpoint()
    store.close_partition(0)
    path = store.path_of(0)
    if place == "end cut off":
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - SNAPSHOT_BLOCK_BYTES)
    else:
        flip_bit(path, {"main header": 100, "database header": 4096 + 16, "block": 12288 + 1000}[place])
    with pytest.raises(StoreCorruptError) as caught:
        store.open_partition(0)
    assert "recover it" in caught.value.hint
    store.remove_partition(0)
    assert store.open_partition(0).next_offsets() == {}


@pytest.mark.parametrize("state", ["of an older checkpoint", "torn", "lost"])
def test_a_list_of_blocks_that_does_not_belong_to_the_file_says_nothing(store: DuckDBStore, state: str) -> None:
    """As after a crash between a checkpoint and its list, or a power loss."""
    partition = filled(store)
    partition.checkpoint()
    listed = partition.path.with_name("0.duckdb.blocks")
    older = listed.read_bytes()
    partition.set_epoch(7)
    partition.checkpoint()
    expected = partition.content_hash()
    store.close_partition(0)
    match state:
        case "of an older checkpoint":
            listed.write_bytes(older)
        case "torn":
            listed.write_bytes(listed.read_bytes()[:-9])
        case _:
            listed.unlink()
    assert store.open_partition(0).content_hash() == expected


def large(first: int) -> DecodedBatch:
    """More rows than DuckDB keeps for the log: it writes them into free blocks before they are committed."""
    one = decoded(EVENTS, [{"what": "x"}], first=first)
    count = 150_000
    columns = {name: pa.repeat(one.rows[name][0], count) for name in one.rows.column_names}
    columns["_offset"] = pa.array(range(first, first + count))
    columns["what"] = pa.array(f"{first} {number} {number * 7919 % 1000}" for number in range(count))
    source = replace(one.source, next_offset=first + count)
    return replace(one, source=source, rows=pa.table(columns).cast(one.rows.schema))


def listed_blocks(partition: PartitionStore) -> list[int]:
    """The ids in the list beside the partition's file."""
    content = partition.path.with_name("0.duckdb.blocks").read_bytes()
    return [int(block) for block in np.frombuffer(content[12:-16], np.uint64)[::2]]


def test_the_list_names_the_blocks_that_a_checkpoint_uses_and_no_other(store: DuckDBStore) -> None:
    partition = store.open_partition(0)
    random = Random(1)
    for first in range(0, 6_000, 1_000):
        values = [{"id": random.randrange(900), "carrier": random.randbytes(40).hex()} for _ in range(1_000)]
        partition.apply([flights(first, *values)])
        partition.checkpoint()
        assert listed_blocks(partition) == sorted(used_blocks(partition._connection, partition.database))
    assert any(set(range(max(listed_blocks(partition)))) - set(listed_blocks(partition))), "none was free: proves less"


def test_a_list_is_right_while_the_writer_commits_meanwhile_also_if_that_is_lost_in_a_crash(
    store: DuckDBStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the writer puts into free blocks while the list is made must not be in it: after a power loss, something
    else is put there before the next checkpoint."""
    partition = filled(store)
    partition.apply([large(0)])
    in_use = list[int]()

    def commit_first(fd: int, path: Path) -> None:
        in_use.extend(sorted(used_blocks(partition._connection, partition.database)))
        partition.apply([large(150_000)])
        write_block_list(fd, path)

    with monkeypatch.context() as patched:
        patched.setattr(duckdb_partition, "write_block_list", commit_first)
        partition.checkpoint()
    assert listed_blocks(partition) == in_use
    filled_since = used_blocks(partition._connection, partition.database) - set(in_use)
    assert filled_since, "the writer filled no block: the test proves nothing"
    store.close_partition(0)
    partition.path.with_name("0.duckdb.wal").unlink()  # a power loss: nothing of it had reached the disk
    partition = store.open_partition(0)
    assert partition.next_offsets()[EVENTS.topic] == 150_000
    partition.apply([large(150_000), large(300_000)])
    assert filled_since & used_blocks(partition._connection, partition.database)
    expected = partition.content_hash()
    store.close_partition(0)
    assert store.open_partition(0).content_hash() == expected


def test_a_flipped_bit_in_the_log_is_found_at_open(store: DuckDBStore) -> None:
    filled(store)
    store.close_partition(0)
    flip_bit(store.path_of(0).with_name("0.duckdb.wal"), 20_000)
    with pytest.raises(StoreCorruptError):
        store.open_partition(0)


@pytest.mark.invariant(1, place="recovery")
def test_a_log_with_a_tail_of_zeros_loses_nothing(store: DuckDBStore) -> None:
    expected = filled(store).content_hash()
    store.close_partition(0)
    with store.path_of(0).with_name("0.duckdb.wal").open("ab") as log:
        log.write(bytes(100_000))
    assert store.open_partition(0).content_hash() == expected


def test_a_log_without_its_file_is_not_applied(store: DuckDBStore) -> None:
    filled(store)
    store.close_partition(0)
    store.path_of(0).unlink()
    assert store.open_partition(0).next_offsets() == {}


def test_removing_a_partition_removes_its_logs(store: DuckDBStore, tmp_path: Path) -> None:
    filled(store)
    store.close_partition(0)
    store.remove_partition(0)
    assert [path.name for path in (tmp_path / "stores").iterdir() if "duckdb" in path.name] == []


# -- migrations --------------------------------------------------------------------------------------------------------


def migrated(definition: TableDefinition, *added: Column) -> TableDefinition:
    first = Migration(1, "001_create.sql", definition.columns)
    return replace(
        definition,
        columns=(*definition.columns, *added),
        migrations=(first, *(Migration(2 + i, f"{2 + i:03}.sql", (column,)) for i, column in enumerate(added))),
    )


def test_opening_brings_tables_forward_and_an_older_worker_still_writes(tmp_path: Path) -> None:
    gate, seats_left = Column("gate", scalar("VARCHAR")), Column("seats_left", scalar("INTEGER"))
    old, new = migrated(FLIGHTS), migrated(FLIGHTS, gate, seats_left)

    def write(definition: TableDefinition, first: int, record: dict[str, Any]) -> None:
        store = DuckDBStore(tmp_path, Catalog((definition,)))
        store.open_partition(0).apply([decoded(definition, [record], first=first)])
        store.close()

    write(old, 0, {"id": 1, "carrier": "AA"})
    write(new, 1, {"id": 2, "gate": "B7", "seats_left": 3})
    write(old, 2, {"id": 3, "carrier": "CC"})
    store = DuckDBStore(tmp_path, Catalog((new,)))
    partition = store.open_partition(0)
    found = rows(store, "SELECT id, carrier, gate, seats_left, _offset FROM flights ORDER BY id")
    assert found == [(1, "AA", None, None, 0), (2, None, "B7", 3, 1), (3, "CC", None, None, 2)]
    with partition.frozen() as file:
        assert file.schema_versions == {"flights": 3}
    store.close()


def test_a_copied_file_can_be_opened_under_another_directory(store: DuckDBStore, tmp_path: Path) -> None:
    expected = filled(store, 100).content_hash()
    store.close_partition(0)
    shutil.copytree(tmp_path / "stores", tmp_path / "moved")
    moved = DuckDBStore(tmp_path / "moved", CATALOG)
    assert moved.open_partition(0).content_hash() == expected
    moved.close()
