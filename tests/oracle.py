"""An independent oracle: what two tables must hold, computed record by record straight from their topics.

It shares no code with the decoder, the store or the sink. Tables: `accounts` (keyed) and `clicks` (append), and a
generator of their write events with updates, deletes and poison.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from confluent_kafka import Consumer, Message, TopicPartition

TABLES = {
    "accounts": """
        CREATE TABLE accounts (
            id VARCHAR, balance BIGINT NOT NULL, note VARCHAR, PRIMARY KEY (id)
        ) WITH (topic = 'accounts', partitions = 4)
    """,
    "clicks": """
        CREATE TABLE clicks (
            user_id INTEGER NOT NULL, page VARCHAR, seconds DOUBLE
        ) WITH (topic = 'clicks', partitions = 4)
    """,
}
INTEGER_MAX = 2**31 - 1
BIGINT_MAX = 2**63 - 1


def write_tables(folder: Path) -> Path:
    """The table files, below `folder`."""
    for name, sql in TABLES.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "001_create.sql").write_text(sql)
    return folder


def write_events(random: Random) -> Iterator[tuple[str, bytes | None, bytes | None]]:
    """(topic, key, value) for ever."""
    while True:
        dice = random.random()
        key = f"account-{random.randrange(500)}".encode()
        if dice < 0.02:
            yield random.choice(poison(random))
        elif dice < 0.10:
            yield "accounts", key, None
        elif dice < 0.55:
            account = {"id": key.decode(), "balance": random.randrange(-(10**15), 10**15), "note": random.choice(NOTES)}
            yield "accounts", key, json.dumps(account).encode()
        else:
            click = {
                "user_id": random.randrange(10**6),
                "page": f"/p/{random.randrange(99)}",
                "seconds": random.random(),
            }
            yield "clicks", None, json.dumps(click).encode()


NOTES = ("plain", None, "ünïcode \u2603", 'quotes " and \\', "", "x" * 300)


def poison(random: Random) -> list[tuple[str, bytes | None, bytes | None]]:
    """Records that must be parked."""
    return [
        ("accounts", b"a", b"{not json"),
        ("accounts", b"a", b'{"id": "a", "balance": "many"}'),
        ("accounts", b"a", b'{"id": "a", "balance": 1.5}'),
        ("accounts", b"a", b'{"id": "a", "balance": %d}' % (BIGINT_MAX + 1)),
        ("accounts", b"a", b'{"id": "a"}'),
        ("accounts", b"a", b'{"balance": 1}'),
        ("accounts", None, b'{"id": "a", "balance": 1}'),
        ("clicks", None, b"\xff\xfe\xfd"),
        ("clicks", None, b'{"user_id": %d}' % (INTEGER_MAX + 1)),
        ("clicks", None, b"[" * random.randrange(1000, 10_000)),
        ("clicks", None, None),
        ("clicks", None, b"[1]"),
    ]


@dataclass
class Expected:
    """What the log says."""

    #: id -> (balance, note, partition, offset)
    accounts: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    #: (partition, offset) -> (user_id, page, seconds)
    clicks: dict[tuple[int, int], tuple[Any, ...]] = field(default_factory=dict)
    #: (topic, partition, offset)
    parked: set[tuple[str, int, int]] = field(default_factory=set)
    #: (topic, partition) -> the position after the last record
    ends: dict[tuple[str, int], int] = field(default_factory=dict)
    records: int = 0


def expected_from_log(bootstrap: str) -> Expected:
    """Reads both topics to their ends."""
    expected = Expected()
    for message in records_of(bootstrap, list(TABLES)):
        topic, partition, offset = message.topic(), message.partition(), message.offset()
        expected.records += 1
        expected.ends[topic, partition] = offset + 1
        applied = (_account if topic == "accounts" else _click)(expected, message)
        if not applied:
            expected.parked.add((topic, partition, offset))
    return expected


def records_of(bootstrap: str, topics: list[str]) -> Iterator[Message]:
    """Every record of these topics, up to the ends as they are at the start."""
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "oracle", "enable.auto.commit": False})
    try:
        missing: dict[tuple[str, int], int] = {}
        for topic in topics:
            for partition in consumer.list_topics(topic, timeout=30).topics[topic].partitions:
                _, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=30)
                if high:
                    missing[topic, partition] = high
        consumer.assign([TopicPartition(topic, partition, 0) for topic, partition in missing])
        while missing:
            message = consumer.poll(30)
            assert message is not None, f"the log of {sorted(missing)} does not go on"
            assert message.error() is None, message.error()
            yield message
            where = message.topic(), message.partition()
            if where in missing and message.offset() + 1 >= missing[where]:
                del missing[where]
    finally:
        consumer.close()


def _account(expected: Expected, message: Message) -> bool:
    key, value = message.key(), message.value()
    if key is None:
        return False
    if value is None:
        expected.accounts.pop(key.decode(), None)
        return True
    fields = _json_object(value)
    if fields is None or not isinstance(fields.get("id"), str) or not _integer(fields.get("balance"), BIGINT_MAX):
        return False
    row = (fields["balance"], fields.get("note"), message.partition(), message.offset())
    expected.accounts[fields["id"]] = row
    return True


def _click(expected: Expected, message: Message) -> bool:
    fields = _json_object(message.value())
    if fields is None or not _integer(fields.get("user_id"), INTEGER_MAX):
        return False
    row = (fields["user_id"], fields.get("page"), fields.get("seconds"))
    expected.clicks[message.partition(), message.offset()] = row
    return True


def _json_object(value: bytes | None) -> dict[str, Any] | None:
    if value is None or value.startswith(b"["):
        return None
    try:
        fields = json.loads(value.decode("utf-8"))
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None


def _integer(value: object, largest: int) -> bool:
    return type(value) is int and -largest - 1 <= value <= largest
