"""Write events through a real broker into the stores: types, upserts, deletes, poison (invariants 1, 2, 6, 10)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import pytest
from confluent_kafka import Producer

from tests.conftest import Servers
from tests.system import Position, System, running_system
from tests.waiting import wait_for

TABLES = {
    "everything": """
        CREATE TABLE everything (
            id BIGINT, i8 TINYINT, u64 UBIGINT, ratio DOUBLE, price DECIMAL(18, 4), ok BOOLEAN, name VARCHAR, day DATE,
            at TIMESTAMP, seen TIMESTAMPTZ, ref UUID, extra JSON, tags VARCHAR[],
            place STRUCT(lat DOUBLE, names VARCHAR[]), PRIMARY KEY (id)
        ) WITH (topic = '{prefix}.everything', partitions = 2)
    """,
    "readings": """
        CREATE TABLE readings (sensor INTEGER NOT NULL, celsius DOUBLE)
        WITH (topic = '{prefix}.readings', partitions = 2)
    """,
}


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, servers: Servers) -> Iterator[System]:
    folder: Path = tmp_path_factory.mktemp("write-path")
    with running_system(folder, TABLES, **servers) as system:
        yield system


def topic(system: System, table: str) -> str:
    return f"{system.settings.application}.{table}"


def publish_row(system: System, number: int, **fields: object) -> Position:
    return system.publish(topic(system, "everything"), json.dumps({"id": number, **fields}), key=str(number))


def test_every_type_arrives_exactly(system: System) -> None:
    position = publish_row(
        system,
        1,
        i8=-128,
        u64=2**64 - 1,
        ratio=0.1,
        price="12345678901234.5678",
        ok=True,
        name="Zoë ☃",
        day="2013-01-31",
        at="2013-01-01T05:00:00.123456",
        seen="2013-01-01T05:00:00+02:00",
        ref="123e4567-e89b-12d3-a456-426614174000",
        extra={"a": [1, None]},
        tags=["x", None],
        place={"lat": 1.5, "names": ["A", "B"]},
        unknown="ignored",
    )
    table = system.query_after(position, "SELECT * FROM everything WHERE id = 1", format="arrow").to_arrow()
    (row,) = table.to_pylist()
    assert row["i8"] == -128
    assert row["u64"] == 2**64 - 1
    assert row["ratio"] == 0.1
    assert row["price"] == Decimal("12345678901234.5678")
    assert row["ok"] is True
    assert row["name"] == "Zoë ☃"
    assert row["day"] == date(2013, 1, 31)
    assert row["at"] == datetime(2013, 1, 1, 5, 0, 0, 123456)  # noqa: DTZ001  # a TIMESTAMP has no zone
    assert row["seen"].astimezone(UTC) == datetime(2013, 1, 1, 3, tzinfo=UTC)
    assert str(row["ref"]).replace("-", "") == "123e4567e89b12d3a456426614174000"
    assert json.loads(row["extra"]) == {"a": [1, None]}
    assert row["tags"] == ["x", None]
    assert row["place"] == {"lat": 1.5, "names": ["A", "B"]}
    assert (row["_partition"], row["_offset"]) == (position.partition, position.offset)


def test_the_last_record_of_a_key_wins_and_a_tombstone_deletes(system: System) -> None:
    for name in ("first", "second", "third"):
        position = publish_row(system, 7, name=name)
    sql = "SELECT name, _offset FROM everything WHERE id = 7"
    assert system.query_after(position, sql).rows == [("third", position.offset)]
    gone = system.publish(topic(system, "everything"), None, key="7")
    assert system.query_after(gone, sql).rows == []
    back = publish_row(system, 7, name="back")
    assert system.query_after(back, sql).rows == [("back", back.offset)]


def test_an_append_table_keeps_every_record(system: System) -> None:
    for _ in range(3):
        position = system.publish(topic(system, "readings"), '{"sensor": 9, "celsius": 20.5}', partition=1)
    answer = system.query_after(position, "SELECT count(*), count(DISTINCT _offset) FROM readings WHERE sensor = 9")
    assert answer.rows == [(3, 3)]


@pytest.mark.parametrize("codec", ["none", "gzip", "snappy", "lz4", "zstd"])
def test_records_of_every_compression_codec_arrive(system: System, codec: str) -> None:
    numbers = range(500, 1_000)
    producer = Producer({"bootstrap.servers": system.settings.kafka, "compression.type": codec, "linger.ms": 100})
    name = f"{codec} " + "x" * 100
    for number in numbers:
        row = {"id": number, "name": name, "i8": number % 100}
        producer.produce(topic(system, "everything"), json.dumps(row), key=str(number), partition=0)
    assert producer.flush(30) == 0
    last = system.publish(topic(system, "everything"), json.dumps({"id": 1}), key="1", partition=0)
    sql = "SELECT count(*), sum(i8), count(DISTINCT name), min(name) FROM everything WHERE id BETWEEN 500 AND 999"
    total = sum(number % 100 for number in numbers)
    assert system.query_after(last, sql).rows == [(len(numbers), total, 1, name)]


POISON: dict[str, tuple[str | None, bytes, str]] = {
    "not JSON": ("1", b"{oops", "not_json"),
    "JSON but no object": ("1", b"[1, 2]", "not_an_object"),
    "invalid UTF-8": ("1", b'{"id": 1, "name": "\xff\xfe"}', "invalid_utf8"),
    "wrong type": ("1", b'{"id": 1, "ok": "perhaps"}', "wrong_type"),
    "fraction in an integer": ("1", b'{"id": 1, "i8": 1.9}', "wrong_type"),
    "out of range": ("1", b'{"id": 1, "i8": 128}', "out_of_range"),
    "missing key column": ("1", b'{"name": "x"}', "missing_key"),
    "no Kafka key": (None, b'{"id": 1}', "missing_key"),
    "absurd nesting": ("1", b'{"id": 1, "extra": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "too_deep"),
    "10 MB": ("1", b'{"id": 1, "name": "' + b"x" * 10_000_000 + b'"}', "too_large"),
    "tombstone key": ("not-a-number", b"", "bad_key"),
}


@pytest.mark.invariant(6, 10, place="input")
def test_each_poison_record_is_parked_with_its_provenance_and_holds_nobody_up(system: System) -> None:
    where = topic(system, "everything")
    expected: dict[tuple[int, int], str] = {}
    for number, (key, value, reason) in enumerate(POISON.values()):
        position = system.publish(where, value or None, key=key, partition=0)
        expected[position.partition, position.offset] = reason
        good = system.publish(where, json.dumps({"id": 1000 + number}), key=str(1000 + number), partition=0)
    answer = system.query_after(good, "SELECT count(*) FROM everything WHERE id >= 1000")
    assert answer.rows == [(len(POISON),)]

    letters = wait_for(lambda: list(system.dead_letters(where)), "dead letters")
    parked = {
        (int(headers["pintail.partition"]), int(headers["pintail.offset"])): headers["pintail.reason"]
        for headers, _, _ in letters
        if headers["pintail.topic"] == where
    }
    assert parked == expected
    by_reason = {headers["pintail.reason"]: (headers, value) for headers, _, value in letters}
    assert by_reason["not_json"][1] == b"{oops"
    assert len(by_reason["too_large"][1] or b"") in (len(POISON["10 MB"][1]), 64 * 1024)
    assert "ok" in by_reason["wrong_type"][0]["pintail.detail"] or "i8" in by_reason["wrong_type"][0]["pintail.detail"]


@pytest.mark.invariant(6, 10, place="input")
def test_a_poison_storm_is_parked_while_the_rest_goes_on(system: System) -> None:
    where = topic(system, "readings")
    for number in range(300):
        bad = number % 3 == 0
        position = system.publish(where, "junk" if bad else json.dumps({"sensor": 5000 + number}), partition=0)
    answer = system.query_after(position, "SELECT count(*) FROM readings WHERE sensor >= 5000")
    assert answer.rows == [(200,)]
    assert len(system.dead_letters(where)) == 100
